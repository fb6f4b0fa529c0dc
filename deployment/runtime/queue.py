"""One queue in front of the model: images of all requests wait in it one by one, whichever threads ask.

It is fair: requests take turns, so that one image never waits for all 64 of another request. Where the model computes
batches, images of one shape go through it together, from whichever requests they come.
"""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..protocol import out_of_memory

logger = logging.getLogger(__name__)

# A batch (N, height, width, channels), and whether it is all there is to do, to the N outputs.
Compute = Callable[[np.ndarray, bool], np.ndarray]


class Waiting:
    """An image on its way through the model: `output` is what came of it, or the error that ended it."""

    def __init__(self, image: np.ndarray):
        self.image = image
        self.output: np.ndarray | Exception | None = None


class ImageQueue:
    """The model as a function from images to one output or error for each, for any number of threads.

    The thread of a request computes in its own turn, so that a lone image is never handed to another thread; it also
    computes what comes before its own. A request of several images gets the help of more threads.

    Args:
        compute: the model.
        at_once: batches that it computes side by side.
        batch: images in a batch, at most.
        pixels: in a batch, at most; an image of more goes alone. None: there is no limit.
        free_memory: called after memory ran out.
    """

    def __init__(
        self,
        compute: Compute,
        at_once: int = 1,
        batch: int = 1,
        pixels: int | None = None,
        free_memory: Callable[[], object] = lambda: None,
    ):
        self.compute, self.at_once, self.free_memory = compute, at_once, free_memory
        self.batch, self.pixels = batch, pixels
        self.requests: deque[deque[Waiting]] = deque()  # each with the images that nobody computes yet
        self.computing = 0  # batches
        self.changed = threading.Condition()
        self.helpers = ThreadPoolExecutor(at_once)

    def __call__(self, images: Sequence[np.ndarray]) -> list[np.ndarray | Exception]:
        """The output of the model for each of `images`, or the error that it ended with."""
        waiting = [Waiting(image) for image in images]
        with self.changed:
            if waiting:
                self.requests.append(deque(waiting))
        for _ in range(min(len(waiting), self.at_once) - 1):
            with contextlib.suppress(RuntimeError):  # no memory for one more thread: this one computes all
                self.helpers.submit(self.work, waiting)
        self.work(waiting)
        return [item.output for item in waiting if item.output is not None]  # as all have by now

    def work(self, own: list[Waiting]) -> None:
        """Compute whatever has its turn until all of `own` are done."""
        while batch := self.take(own):
            items, alone = batch
            try:
                self.run(items, alone)
            finally:
                with self.changed:
                    self.computing -= 1
                    self.changed.notify_all()

    def take(self, own: list[Waiting]) -> tuple[list[Waiting], bool] | None:
        """The next batch, once there is a place for it, and whether nothing else is to do; None: `own` are done."""
        with self.changed:
            while True:
                if all(item.output is not None for item in own):
                    return None
                if self.requests and self.computing < self.at_once:
                    break
                self.changed.wait()
            items = [self.next_image()]
            shape = items[0].image.shape
            most = self.batch if self.pixels is None else min(self.batch, self.pixels // (shape[0] * shape[1]))
            while len(items) < most and self.requests and self.requests[0][0].image.shape == shape:
                items.append(self.next_image())
            alone = not self.requests and self.computing == 0 and len(own) == 1
            self.computing += 1
            return items, alone

    def next_image(self) -> Waiting:
        """The first image of the request whose turn it is, which then waits for the others' turns."""
        request = self.requests.popleft()
        image = request.popleft()
        if request:
            self.requests.append(request)
        return image

    def run(self, items: list[Waiting], alone: bool = False) -> None:
        """One pass. Where it fails the batch is halved, until the image that cannot be answered is alone."""
        try:
            outputs = self.compute(np.stack([item.image for item in items]), alone)
            for item, output in zip(items, outputs, strict=True):
                item.output = output
            return
        except Exception as error:
            failure = error
        if out_of_memory(failure):
            failure.__traceback__ = None  # it keeps what the pass had made
            self.free_memory()
        if len(items) == 1:
            items[0].output = failure
            return
        logger.warning("halving a batch of %d images: %s", len(items), type(failure).__name__)
        for half in items[: len(items) // 2], items[len(items) // 2 :]:
            self.run(half)
