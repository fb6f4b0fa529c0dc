"""TorchServe handler of a fastai learner: images in, answers out, in four steps.

`initialize` loads the model, `preprocess` reads a request and the pixels of its images just as the learner did,
`inference` gives each image the output of the model, `postprocess` makes the answer. Each request of a batch, and each
image of a request, succeeds or fails alone, whichever step fails.
"""

import importlib.util
import logging
import os
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

if not __package__:  # TorchServe imports this file by itself: the folder around it becomes the package that it is here
    package = types.ModuleType("served")
    package.__path__ = [str(Path(__file__).resolve().parent)]
    sys.modules["served"], sys.modules["served.handler"] = package, sys.modules[__name__]
    __package__, __spec__ = "served", importlib.util.spec_from_file_location("served.handler", __file__)

from . import answers, protocol, runtime
from .config import read_config
from .photos import PixelBudget, Preprocessor, size_of, to_array, viewable

logger = logging.getLogger(__name__)

REQUESTS_AT_ONCE = 2  # of the largest kind, whose pixels one process decodes at one time; others wait


@dataclass
class Item:
    """One image on its way: what the steps made of it so far, or the error that ended it."""

    data: bytes = b""  # the file
    header: Image.Image | None = None  # the file opened, not decoded yet
    size: tuple[int, int] = (0, 0)  # width and height as sent
    counted: int = 0  # pixels that it counts for
    pixels: np.ndarray | None = None  # (height, width, channels), as the model takes it
    shown: Image.Image | None = None  # what an overlay is drawn on
    output: np.ndarray | None = None  # of the model: see runtime.load
    answer: dict | None = None
    error: protocol.Rejected | None = None


@dataclass
class Job:
    """One request and its images."""

    request: protocol.Request
    items: list[Item]


class Handler:
    """One instance per worker."""

    def initialize(self, context) -> None:
        """Load the model in the archive, on the GPU that TorchServe gives this worker, and warm it up."""
        properties = context.system_properties
        self.load(properties["model_dir"], properties.get("gpu_id"))

    def load(self, folder: Path | str, gpu: int | None = None, threads: int | None = None) -> None:
        """Load the model in `folder`, which holds what the export wrote; `gpu` and `threads` as in `runtime.load`."""
        self.config = read_config(folder)
        self.preprocessor = Preprocessor(self.config, folder)
        self.budget = PixelBudget(REQUESTS_AT_ONCE * self.preprocessor.max_pixels)
        self.threads = started_threads(threads or int(os.environ.get("OMP_NUM_THREADS") or runtime.cores()))
        self.model = runtime.load(self.config, folder, gpu, threads)

    def preprocess(self, fields: dict, accept: str = "") -> Job:
        """The request in `fields`, the body or the fields of a form, and its images as pixels."""
        job = self.read(fields, accept)
        self.decode([job])
        return job

    def read(self, fields: dict, accept: str) -> Job:
        """The request, and of its images the headers: their pixels together have a limit."""
        try:
            request = protocol.read_request(fields, accept)
        except Exception as error:
            return Job(protocol.Request([]), [Item(error=protocol.rejection(error))])
        job = Job(request, [Item() for _ in request.instances])
        total = 0
        for item, instance in zip(job.items, request.instances, strict=True):
            try:
                self.identify(item, instance)
                total += item.counted
                if total > self.preprocessor.max_pixels:
                    total -= item.counted
                    raise protocol.too_large(f"photos of one request: over {self.preprocessor.max_pixels} pixels")
            except Exception as error:
                item.error = protocol.rejection(error)
        return job

    def identify(self, item: Item, instance) -> None:
        """Set the file and the size of `item`. An opener of the reader's own reads no headers: it opens the image."""
        item.data = protocol.read_instance(instance)
        if not self.config.opener:
            item.header = self.preprocessor.identify(item.data)
            item.size = item.header.size
            item.counted = self.preprocessor.counted_pixels(item.size)

    def decode(self, jobs: list[Job]) -> None:
        """The pixels of images. Several are decoded at a time: Pillow lets other threads run."""
        todo = [(item, job.request) for job in jobs for item in job.items if not item.error]
        if len(todo) == 1:
            self.decode_item(*todo[0])
        else:
            list(self.threads.map(lambda pair: self.decode_item(*pair), todo))

    def decode_item(self, item: Item, request: protocol.Request) -> None:
        try:
            with self.budget.hold(item.counted):
                drawn_on = request.format == "overlay" and request.size == "original"
                if item.header:
                    image = self.preprocessor.decode(item.header, whole=drawn_on)
                else:
                    image = self.preprocessor.open(item.data)
                    item.size = size_of(image)
                resized = self.preprocessor.resize(image)
                item.pixels = to_array(resized)
                if request.format == "overlay":
                    item.shown = viewable(image if drawn_on else resized)
        except Exception as error:
            item.error = protocol.rejection(error)
        item.data, item.header = b"", None

    def inference(self, items: list[Item]) -> None:
        """Set the output of each image, or its error. Which go through the model together is up to the runtime."""
        outputs = self.model([item.pixels for item in items])
        for item, output in zip(items, outputs, strict=True):
            if isinstance(output, Exception):
                item.error = self.inference_error(output, item.pixels)
            else:
                item.output = output

    def inference_error(self, failure: Exception, pixels: np.ndarray) -> protocol.Rejected:
        """Whose fault it is that an image got no output: its own if the model takes others, but none of its size."""
        its_own = self.config.keeps_image_size and not protocol.out_of_memory(failure)
        usual = np.zeros((*self.config.img_size, self.config.channels), pixels.dtype)
        if its_own and self.takes(usual) and not self.takes(np.zeros_like(pixels)):
            return protocol.bad_request("the model takes no photo of this size")
        return protocol.rejection(failure)

    def takes(self, pixels: np.ndarray) -> bool:
        """Whether the model has an output for `pixels`, as far as memory lets it tell."""
        (output,) = self.model([pixels])
        return not isinstance(output, Exception) or protocol.out_of_memory(output)

    def postprocess(self, job: Job) -> protocol.Response:
        """The answer to one request: JSON, PNG or JPEG, with its status."""
        for item in job.items:
            try:
                if not item.error:
                    item.answer = self.make_answer(item, job.request)
            except Exception as error:
                item.error = protocol.rejection(error)
        try:
            return protocol.respond(job.request, [item.error or item.answer for item in job.items])
        except Exception as error:
            job.items = [Item(error=protocol.rejection(error))]
            return protocol.respond(protocol.Request([]), [job.items[0].error])

    def make_answer(self, item: Item, request: protocol.Request) -> dict:
        return answers.make_answer(item.output, self.preprocessor, request, item.size, item.shown)

    def handle(self, requests: list[dict], context) -> list[bytes]:
        """A dynamic batch of requests in, as many answers out; the time of each step goes into the metrics."""
        began = time.perf_counter()
        jobs = [self.read(fields, header(context, i, "accept")) for i, fields in enumerate(requests)]
        self.decode(jobs)
        decoded = time.perf_counter()
        items = [item for job in jobs for item in job.items if not item.error]
        self.inference(items)
        computed = time.perf_counter()
        responses = [self.postprocess(job) for job in jobs]
        observe(context, "preprocess_seconds", decoded - began)
        observe(context, "inference_seconds", computed - decoded)
        observe(context, "postprocess_seconds", time.perf_counter() - computed)
        observe(context, "batch_requests", len(requests))
        observe(context, "batch_photos", len(items))
        for i, (job, response) in enumerate(zip(jobs, responses, strict=True)):
            context.set_response_status(response.status.value, response.status.phrase, i)
            context.set_response_content_type(i, response.content_type)
            log_errors(context, i, response, [item.error for item in job.items if item.error])
        return [response.body for response in responses]


def started_threads(n: int) -> ThreadPoolExecutor:
    """A pool whose `n` threads have started: one that starts where memory is short would fail a whole batch."""
    threads, all_there = ThreadPoolExecutor(n), threading.Barrier(n)
    list(threads.map(lambda _: all_there.wait(), range(n)))
    return threads


def header(context, i: int, name: str) -> str:
    """The header `name` of request `i`, or "". Clients write header names in any case."""
    headers = {key.lower(): value for key, value in context.get_all_request_header(i).items()}
    value = headers.get(name)
    return value if isinstance(value, str) else ""


def observe(context, name: str, value: float) -> None:
    """Add `value` to the histogram `name` on TorchServe's metrics address."""
    from ts.metrics.metric_type_enum import MetricTypes  # there when TorchServe runs this

    context.metrics.add_metric(name, round(value, 6), "count", dimensions=[], metric_type=MetricTypes.HISTOGRAM)


def log_errors(context, i: int, response: protocol.Response, errors: list[protocol.Rejected]) -> None:
    """One line in the log for request `i`, with the stack of a fault of our own; a count per error in the metrics."""
    from ts.metrics.dimension import Dimension

    if errors:
        fault = next((error.__cause__ for error in errors if error.__cause__), None)
        logger.warning(
            "request %s answered with %d: %s",
            context.get_request_id(i),
            response.status,
            protocol.reasons(errors),
            exc_info=fault,
        )
    for error in errors:
        context.metrics.add_counter("rejected_inputs", 1, dimensions=[Dimension("Reason", error.type)])


_handler = Handler()


def handle(requests: list[dict] | None, context) -> list[bytes] | None:
    """TorchServe's entry point. It calls once with None to have the model loaded, then with each dynamic batch."""
    return _handler.initialize(context) if requests is None else _handler.handle(requests, context)
