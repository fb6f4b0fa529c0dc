"""OpenVINO on a CPU: images side by side, and a lone one with all threads. It needs no torch."""

import locale
import logging
import os
import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openvino

from .queue import ImageQueue

logger = logging.getLogger(__name__)


def load_openvino(
    model: Path | str | openvino.Model, threads: int, precision: str = "fp32", usual_size: tuple[int, int] = (32, 32)
) -> ImageQueue:
    """`model`, a path or in memory, as a function from images to outputs; see `runtime.load`.

    Images that come together are computed side by side, one on each of the `threads`: threads that work on one image
    wait for each other, which costs throughput. An image that comes while no other is computed is ready sooner with all
    `threads`, and, where several processes share the cores, with those of one more. That takes the model compiled a
    second time, which happens in the background: until then such an image is computed by one thread.

    Args:
        precision: one of `runtime.PRECISIONS["openvino"]`; bf16 is fp32 on a processor without it, and the log says so.
        usual_size: (height, width) of an image that the model takes, where it takes several sizes.
    """
    if precision == "bf16" and not has_bf16():
        logger.warning("this processor has no bf16: serving in fp32")
    if isinstance(model, str | Path):
        model = openvino.Core().read_model(model)
    together = compile_model(model, threads, streams=threads, precision=precision, keep=True)
    requests = queue.SimpleQueue()  # those that no image is in
    at_once = 2 * threads  # the next images already wait in OpenVINO, so that no thread waits for Python
    for _ in range(at_once):
        requests.put(together.create_infer_request())
    warm_up = blank_image(together, usual_size)
    infer(together.create_infer_request(), warm_up)
    most = min(max(threads, 2), available_cores())
    lone = in_background(lambda: lone_request(model, most, precision, warm_up)) if most > 1 else None

    def compute(batch: np.ndarray, alone: bool) -> np.ndarray:
        if alone and lone is not None and lone.done() and not lone.exception():
            return infer(lone.result(), batch)
        request = requests.get()
        try:
            return infer(request, batch)
        finally:
            requests.put(request)

    logger.info("OpenVINO in %s on %d threads", precision, threads)
    return ImageQueue(compute, at_once)


def blank_image(compiled: openvino.CompiledModel, usual_size: tuple[int, int]) -> np.ndarray:
    """A batch of one image that `compiled` takes: of `usual_size` (height, width) where it takes several."""
    (given,) = compiled.inputs
    _, *sides, channels = given.partial_shape
    size = [side.get_length() if side.is_static else usual for side, usual in zip(sides, usual_size, strict=True)]
    return np.zeros((1, *size, channels.get_length()), given.element_type.to_dtype())


def lone_request(
    model: Path | str | openvino.Model, threads: int, precision: str, warm_up: np.ndarray
) -> openvino.InferRequest:
    """An infer request that computes an image with all `threads`, and has done so once."""
    try:
        request = compile_model(model, threads, precision=precision).create_infer_request()
        infer(request, warm_up)
        return request
    except Exception as error:  # memory that ran out, above all
        logger.warning("a lone image is computed by one thread: %s", error)
        raise


def in_background(function: Callable) -> Future:
    """What `function` will return; Python waits for it before it exits."""
    thread = ThreadPoolExecutor(1)
    result = thread.submit(function)
    thread.shutdown(wait=False)
    return result


def infer(request: openvino.InferRequest, batch: np.ndarray) -> np.ndarray:
    """The output of one infer request, which only one thread at a time may use, for one image."""
    return request.infer(batch, share_inputs=True)[0]


def compile_model(
    model: Path | str | openvino.Model, threads: int, streams: int = 1, precision: str = "fp32", keep: bool = False
):
    """`model`, a path or in memory, for `threads` threads that `streams` images at once share.

    With `keep`, what is compiled is kept in the folder OPENVINO_CACHE_DIR, where that is set, and found there at the
    next start: by the model's content, the settings, and the name of the processor.
    """
    settings = {
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads,
        # The default is bf16 where the processor has it: other masks.
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" and has_bf16() else "f32",
        "ENABLE_CPU_PINNING": False,  # several processes would all be pinned to the same cores
    }
    folder = os.environ.get("OPENVINO_CACHE_DIR")
    if not keep or not folder:
        return openvino.Core().compile_model(model, "CPU", settings)
    settings["CACHE_DIR"] = folder
    before = locale.setlocale(locale.LC_ALL)
    try:
        return openvino.Core().compile_model(model, "CPU", settings)
    finally:
        locale.setlocale(locale.LC_ALL, before)  # with a cache, OpenVINO leaves this process in the locale C


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_bf16() -> bool:
    """Whether this processor computes in bf16 (AVX512-BF16 or AMX)."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
