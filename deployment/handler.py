"""TorchServe handler of a fastai learner: images in, answers out, in four steps.

`initialize` loads the model, `preprocess` reads a request and the pixels of its images just as the learner did,
`inference` gives each image the output of the model, `postprocess` makes the answer. Each request of a batch, and each
image of a request, succeeds or fails alone, whichever step fails.
"""

import contextlib
import importlib.util
import itertools
import logging
import os
import sys
import time
import types
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if not __package__:  # TorchServe imports this file by itself: the folder around it becomes the package that it is here
    package = types.ModuleType("served")
    package.__path__ = [str(Path(__file__).resolve().parent)]
    sys.modules["served"], sys.modules["served.handler"] = package, sys.modules[__name__]
    __package__, __spec__ = "served", importlib.util.spec_from_file_location("served.handler", __file__)

from . import answers, protocol, runtime
from .config import read_config
from .memory import budget_for_images, give_free_memory_back, give_large_blocks_back, groups_that_fit
from .photos import ANSWER_BYTES, CLIPPED, Preprocessor, clips, size_of, to_array, viewable

if TYPE_CHECKING:
    from ts.context import Context  # TorchServe's

logger = logging.getLogger(__name__)

TRIM_EVERY = 100  # batches, after which free memory goes back to the system
MOST_FAILURES = 5  # requests in a row that the model fails, after which it is asked for a blank image


@dataclass
class Item:
    """One image on its way: what the steps made of it so far, or the error that ended it."""

    data: bytes = b""  # the file
    size: tuple[int, int] = (0, 0)  # width and height as sent
    counted: int = 0  # pixels that it counts for
    memory: int = 0  # bytes that it takes at most, until it is resized
    pixels: np.ndarray | None = None  # (height, width, channels), as the model takes it
    shown: Image.Image | None = None  # what an overlay is drawn on
    warning: str = ""  # what its own answer does not tell
    output: np.ndarray | None = None  # of the model: see runtime.load
    answer: dict | None = None
    error: protocol.Rejected | None = None


@dataclass
class Job:
    """One request and its images."""

    request: protocol.Request
    items: list[Item]
    kept: int = 0  # bytes that its images take together until its answer is drawn, at their own size
    respond: Callable[..., protocol.Response] = protocol.respond  # another protocol has a function of its own for it

    @property
    def largest(self) -> int:
        """The bytes that one of its images takes at most, beside what is kept."""
        return max(item.memory for item in self.items)


class Handler:
    """One instance per worker. It is `broken` where the model fails on every image, as on a GPU with a fault."""

    broken = False
    failures = 0  # requests in a row, by faults of our own

    def initialize(self, context: "Context") -> None:
        """Load the model in the archive, on the GPU that TorchServe gives this worker, and warm it up."""
        properties = context.system_properties
        workers = int(os.environ.get("TS_DEFAULT_WORKERS_PER_MODEL") or 1)
        self.load(properties["model_dir"], properties.get("gpu_id"), share=0.75 / workers)  # Java has the rest

    def load(self, folder: Path | str, gpu: int | None = None, threads: int | None = None, share: float = 1.0) -> None:
        """Load the model in `folder`, which holds what the export wrote; `gpu` and `threads` as in `runtime.load`.

        Of the memory there is, this process may use the `share`.
        """
        give_large_blocks_back()
        self.config = read_config(folder)
        self.preprocessor = Preprocessor(self.config, folder)
        self.threads = runtime.started_threads(threads or runtime.threads_wanted())
        self.model = runtime.load(self.config, folder, gpu, threads)
        self.budget = budget_for_images(share)
        self.batches = itertools.count(1)

    def preprocess(self, fields: dict, accept: str = "") -> Job:
        """The request in `fields`, the body or the fields of a form, and its images as pixels."""
        job = self.read(fields, accept)
        self.decode([job])
        return job

    def read(self, fields: dict, accept: str, form_length: int = 0) -> Job:
        """The request, and of its images the headers: their pixels together have a limit.

        `form_length` has a form as it was sent, in bytes, where the server may have dropped fields of it.
        """
        try:
            protocol.check_complete(fields, form_length)
            with self.budget.hold(protocol.memory_to_read(fields)):
                request = protocol.read_request(fields, accept)
        except Exception as error:
            return Job(protocol.Request([]), [Item(error=protocol.rejection(error))])
        job, pixels_left = Job(request, []), self.preprocessor.max_pixels
        for instance in request.instances:
            try:
                item = self.identify(instance)
                if item.counted > pixels_left:
                    raise protocol.too_large(f"photos of one request: over {self.preprocessor.max_pixels} pixels")
                pixels_left -= item.counted
            except Exception as error:
                item = Item(error=protocol.rejection(error))
            job.items.append(item)
        request.instances.clear()  # the files are in the items
        if request.size == "original":  # an answer as large as the image: its memory is held from here to there
            for item in job.items:
                job.kept += max(item.memory, item.counted * ANSWER_BYTES)
                item.memory = 0
        return job

    def identify(self, instance: object) -> Item:
        """The image in `instance`, of which the header is read; an `open_image` of the reader's own reads it later."""
        item = Item(protocol.read_instance(instance))
        if not self.config.opener:
            header = self.preprocessor.identify(item.data)  # not kept: what is beside its pixels is not counted
            item.size = header.size
            item.counted = self.preprocessor.counted_pixels(item.size)
            item.memory = self.preprocessor.memory(header)
        return item

    def decode(self, jobs: list[Job]) -> None:
        """The pixels of images. Several are decoded at a time: Pillow lets other threads run."""
        todo = deque((item, job) for job in jobs for item in job.items if not item.error)

        def work() -> None:
            with contextlib.suppress(IndexError):  # nothing is left to do
                while True:
                    self.decode_item(*todo.popleft())

        # This thread decodes in any case, so that no request waits until the threads are through with another's images.
        helpers = [self.threads.submit(work) for _ in range(len(todo) - 1)]
        work()
        for helper in helpers:
            if not helper.cancel():
                helper.result()

    def decode_item(self, item: Item, job: Job) -> None:
        """Set the pixels of `item`, once there is memory for them, or its error."""
        is_overlay = job.request.format == "overlay"
        drawn_on = is_overlay and job.request.size == "original"
        try:
            with self.budget.hold(item.memory):
                if self.config.opener:
                    image = self.preprocessor.open(item.data)
                    item.size = size_of(image)
                else:
                    header = self.preprocessor.identify(item.data)
                    image = self.preprocessor.decode(header, whole=drawn_on)
                    item.warning = CLIPPED if clips(header) else ""
                resized = self.preprocessor.resize(image)
                item.pixels = to_array(resized)
                if is_overlay:
                    item.shown = viewable(image if drawn_on else resized)
        except Exception as error:
            item.error = protocol.rejection(error)
        item.data = b""

    def inference(self, items: list[Item]) -> None:
        """Set the output of each image, or its error. Which go through the model together is up to the runtime."""
        images = [item.pixels for item in items if item.pixels is not None]  # as all have by now
        outputs = self.model(images)
        for item, image, output in zip(items, images, outputs, strict=True):
            if isinstance(output, Exception):
                item.error = self.inference_error(output, image)
            else:
                item.output = output
        faults = [output for output in outputs if isinstance(output, Exception) and not protocol.out_of_memory(output)]
        self.watch_model(len(faults), len(outputs))

    def watch_model(self, faults: int, images: int) -> None:
        """Count requests that the model failed. A client's image may be what it fails on: a blank one decides."""
        if faults < images:
            self.failures, self.broken = 0, False
        elif images:
            self.failures += 1
            if self.failures >= MOST_FAILURES:
                self.failures, blank = 0, np.zeros((*self.config.img_size, self.config.channels), self.config.dtype)
                self.broken = not self.takes(blank)

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
            response = job.respond(job.request, [item.error or item.answer for item in job.items])
            if warnings := {item.warning for item in job.items if item.warning}:
                response.headers["Warning"] = f'199 - "{", ".join(warnings)}"'
            return response
        except Exception as error:
            return self.refuse(job, protocol.rejection(error))

    def refuse(self, job: Job, error: protocol.Rejected) -> protocol.Response:
        """`error` as the answer to a whole request, whatever it asked for."""
        job.request, job.items = protocol.Request([]), [Item(error=error)]
        return job.respond(job.request, [error])

    def make_answer(self, item: Item, request: protocol.Request) -> dict:
        assert item.output is not None  # or there is an error
        return answers.make_answer(item.output, self.preprocessor, request, item.size, item.shown)

    def answer(self, jobs: list[Job], began: float) -> tuple[list[protocol.Response], list[float], int]:
        """The answers to `jobs`, the seconds that each step took since `began`, and how many images were computed.

        What does not fit into the memory together is answered one group after the other.
        """
        responses, seconds, images = [], [0.0, 0.0, 0.0], 0
        for group in groups_that_fit(jobs, self.budget.limit):
            try:
                with self.budget.hold(sum(job.kept for job in group)):
                    made, taken, computed = self.take_steps(group, began)
            except protocol.Rejected as error:  # there was no room
                made, taken, computed = [self.refuse(job, error) for job in group], [0.0, 0.0, 0.0], 0
            responses += made
            seconds = [total + more for total, more in zip(seconds, taken, strict=True)]
            images += computed
            began = time.perf_counter()
        if next(self.batches) % TRIM_EVERY == 0:
            give_free_memory_back()
        return responses, seconds, images

    def take_steps(self, jobs: list[Job], began: float) -> tuple[list[protocol.Response], list[float], int]:
        """As `answer`, of `jobs` for which there is memory."""
        times = [began]
        self.decode(jobs)
        times.append(time.perf_counter())
        items = [item for job in jobs for item in job.items if not item.error]
        self.inference(items)
        times.append(time.perf_counter())
        responses = [self.postprocess(job) for job in jobs]
        times.append(time.perf_counter())
        return responses, [after - before for before, after in itertools.pairwise(times)], len(items)

    def handle(self, requests: list[dict], context: "Context") -> list[bytes]:
        """A dynamic batch of requests in, as many answers out; the time of each step goes into the metrics."""
        if self.broken:
            logger.critical("the model fails on every image: this worker ends, and TorchServe starts another")
            sys.exit(1)
        began = time.perf_counter()
        jobs = [
            self.read(fields, header(context, i, "accept"), form_length(context, i))
            for i, fields in enumerate(requests)
        ]
        responses, seconds, photos = self.answer(jobs, began)
        for step, value in zip(("preprocess", "inference", "postprocess"), seconds, strict=True):
            observe(context, f"{step}_seconds", value)
        observe(context, "batch_requests", len(requests))
        observe(context, "batch_photos", photos)
        for i, (job, response) in enumerate(zip(jobs, responses, strict=True)):
            context.set_response_status(response.status.value, response.status.phrase, i)
            context.set_response_content_type(i, response.content_type)
            for name, value in response.headers.items():
                context.set_response_header(i, name, value)
            log_errors(context, i, response, [item.error for item in job.items if item.error])
        return [response.body for response in responses]


def header(context: "Context", i: int, name: str) -> str:
    """The header `name` of request `i`, or "". Clients write header names in any case."""
    headers = {key.lower(): value for key, value in context.get_all_request_header(i).items()}
    value = headers.get(name)
    return value if isinstance(value, str) else ""


def form_length(context: "Context", i: int) -> int:
    """The bytes of request `i`, if it is a form and says so; else 0."""
    length = header(context, i, "content-length")
    is_form = header(context, i, "content-type").lower().startswith("multipart/")
    return int(length) if is_form and length.isdigit() else 0


def observe(context: "Context", name: str, value: float) -> None:
    """Add `value` to the histogram `name` on TorchServe's metrics address."""
    from ts.metrics.metric_type_enum import MetricTypes  # there when TorchServe runs this

    context.metrics.add_metric(name, round(value, 6), "count", dimensions=[], metric_type=MetricTypes.HISTOGRAM)


def log_errors(context: "Context", i: int, response: protocol.Response, errors: list[protocol.Rejected]) -> None:
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


def handle(requests: list[dict] | None, context: "Context") -> list[bytes] | None:
    """TorchServe's entry point. It calls once with None to have the model loaded, then with each dynamic batch."""
    return _handler.initialize(context) if requests is None else _handler.handle(requests, context)
