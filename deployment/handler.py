"""TorchServe handler of a fastai learner: photos in, answers out, in four steps.

`initialize` loads the model, `preprocess` reads a request and makes tensors of its photos just as the learner did,
`inference` gives each photo what the model makes of it, `postprocess` makes the answer. Each request of a batch, and
each photo of a request, succeeds or fails alone, whichever step fails.
"""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

if __package__:
    from . import answers, protocol, runtime
    from .config import read_config
    from .photos import Preprocessor
    from .reports import log_errors, observe
else:  # in the archive, where the files lie side by side
    import answers
    import protocol
    import runtime
    from config import read_config
    from photos import Preprocessor
    from reports import log_errors, observe

logger = logging.getLogger(__name__)


@dataclass
class Photo:
    """One photo on its way: what the steps made of it so far, or the error that ended it."""

    size: tuple[int, int] = (0, 0)  # width and height as sent
    pixels: int = 0  # that it counts for
    image: Image.Image | None = None  # to be decoded, then what an overlay is drawn on
    x: torch.Tensor | None = None  # float32 (channels, height, width), as the model takes it
    output: np.ndarray | None = None  # what the model made of it: see runtime.decode
    answer: dict | None = None
    error: protocol.Rejected | None = None


@dataclass
class Job:
    """One request and its photos."""

    request: protocol.Request
    photos: list[Photo]


class Handler:
    """One instance per worker."""

    def initialize(self, context) -> None:
        """Load the model in the archive, on the GPU that TorchServe gives this worker, and warm it up."""
        properties = context.system_properties
        self.load(properties["model_dir"], runtime.choose_device(properties.get("gpu_id")))

    def load(self, folder: Path | str, device: torch.device | None = None) -> None:
        """Load the model in `folder`, which holds what the export wrote."""
        self.config = read_config(folder)
        self.preprocessor = Preprocessor(self.config)
        self.threads = ThreadPoolExecutor(torch.get_num_threads())
        self.model = runtime.load(self.config, folder, device)

    def preprocess(self, fields: dict, accept: str = "") -> Job:
        """The request in `fields`, the body or the fields of a form, and its photos as tensors."""
        job = self.read(fields, accept)
        self.decode([job])
        return job

    def read(self, fields: dict, accept: str) -> Job:
        """The request, and of its photos the headers: their pixels together have a limit."""
        try:
            request = protocol.read_request(fields, accept)
        except Exception as error:
            return Job(protocol.Request([]), [Photo(error=protocol.rejection(error))])
        job = Job(request, [Photo() for _ in request.instances])
        for photo, instance in zip(job.photos, request.instances, strict=True):
            try:
                photo.image = self.preprocessor.identify(protocol.read_instance(instance))
                pixels = self.preprocessor.counted_pixels(photo.image.size)
                if pixels + sum(other.pixels for other in job.photos) > self.preprocessor.max_pixels:
                    raise protocol.too_large(f"photos of one request: over {self.preprocessor.max_pixels} pixels")
                photo.size, photo.pixels = photo.image.size, pixels
            except Exception as error:
                photo.error = protocol.rejection(error)
        return job

    def decode(self, jobs: list[Job]) -> None:
        """Make tensors of photos. Several are decoded at a time: Pillow and torch let other threads run."""
        photos = [(photo, job.request) for job in jobs for photo in job.photos if not photo.error]
        list((self.threads.map if len(photos) > 1 else map)(lambda item: self.decode_photo(*item), photos))

    def decode_photo(self, photo: Photo, request: protocol.Request) -> None:
        try:
            image = self.preprocessor.decode(photo.image)
            resized = self.preprocessor.resize(image)
            photo.x = self.preprocessor.to_tensor(resized)
            photo.image = image if request.size == "original" else resized
        except Exception as error:
            photo.error = protocol.rejection(error)
        if request.format != "overlay":
            photo.image = None

    def inference(self, photos: list[Photo]) -> None:
        """Set the output of each photo, or its error. Photos of one shape go through the model together."""
        groups = {}
        for photo in photos:
            groups.setdefault(photo.x.shape, []).append(photo)
        for group in groups.values():
            self.forward(group)

    def forward(self, photos: list[Photo]) -> None:
        """One forward pass. Where it fails the batch is halved, until the photo that cannot be answered is alone."""
        try:
            outputs = self.model(torch.stack([photo.x for photo in photos])).numpy()
            for photo, output in zip(photos, outputs, strict=True):
                photo.output = output
            return
        except Exception as error:
            failure = error
        if protocol.out_of_memory(failure):
            runtime.free_memory(failure)
        if len(photos) > 1:
            logger.warning("halving a batch of %d photos: %s", len(photos), type(failure).__name__)
            for half in photos[: len(photos) // 2], photos[len(photos) // 2 :]:
                self.forward(half)
        else:
            photos[0].error = self.inference_error(failure, photos[0].x.shape)

    def inference_error(self, failure: Exception, shape: torch.Size) -> protocol.Rejected:
        """Whose fault it is that a photo of `shape` got no output: its own if the model takes others, but not this."""
        its_own = self.config.keeps_photo_size and not protocol.out_of_memory(failure)
        if its_own and self.takes((self.config.n_in, *self.config.img_size)) and not self.takes(shape):
            return protocol.bad_request("the model takes no photo of this size")
        return protocol.rejection(failure)

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether the model computes an output for a photo of `shape`, as far as memory lets it tell."""
        try:
            self.model(torch.zeros(1, *shape))
        except Exception as error:
            return protocol.out_of_memory(error)
        return True

    def postprocess(self, job: Job) -> protocol.Response:
        """The answer to one request: JSON, PNG or JPEG, with its status."""
        for photo in job.photos:
            try:
                if not photo.error:
                    photo.answer = answers.make_answer(
                        photo.output, self.preprocessor, job.request, photo.size, photo.image
                    )
            except Exception as error:
                photo.error = protocol.rejection(error)
        try:
            return protocol.respond(job.request, [photo.error or photo.answer for photo in job.photos])
        except Exception as error:
            job.photos = [Photo(error=protocol.rejection(error))]
            return protocol.respond(protocol.Request([]), [job.photos[0].error])

    def handle(self, requests: list[dict], context) -> list[bytes]:
        """A dynamic batch of requests in, as many answers out; the time of each step goes into the metrics."""
        times = [time.perf_counter()]
        jobs = [self.read(fields, header(context, i, "accept")) for i, fields in enumerate(requests)]
        self.decode(jobs)
        times.append(time.perf_counter())
        photos = [photo for job in jobs for photo in job.photos if not photo.error]
        self.inference(photos)
        times.append(time.perf_counter())
        responses = [self.postprocess(job) for job in jobs]
        times.append(time.perf_counter())
        for i, (job, response) in enumerate(zip(jobs, responses, strict=True)):
            context.set_response_status(response.status.value, response.status.phrase, i)
            context.set_response_content_type(i, response.content_type)
            log_errors(context, i, response, [photo.error for photo in job.photos if photo.error])
        for i, step in enumerate(("preprocess", "inference", "postprocess")):
            observe(context, f"{step}_seconds", times[i + 1] - times[i])
        observe(context, "batch_requests", len(requests))
        observe(context, "batch_photos", len(photos))
        return [response.body for response in responses]


def header(context, i: int, name: str) -> str:
    """The header `name` of request `i`, or "". Clients write header names in any case."""
    headers = {key.lower(): value for key, value in context.get_all_request_header(i).items()}
    return headers[name] if isinstance(headers.get(name), str) else ""


_handler = Handler()


def handle(requests: list[dict] | None, context) -> list[bytes] | None:
    """TorchServe's entry point. It calls once with None to have the model loaded, then with each dynamic batch."""
    return _handler.initialize(context) if requests is None else _handler.handle(requests, context)
