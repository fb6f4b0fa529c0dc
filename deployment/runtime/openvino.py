"""OpenVINO on a CPU: images side by side, and a lone one with all threads. It needs no torch."""

import logging
import os
import queue
from pathlib import Path

import numpy as np
import openvino

from .queue import ImageQueue

logger = logging.getLogger(__name__)


def load_openvino(
    model: Path | str | object, threads: int, precision: str = "fp32", usual_size: tuple[int, int] = (32, 32)
) -> ImageQueue:
    """`model`, a path or in memory, as a function from images to outputs; see `runtime.load`.

    Images that come together are computed side by side, one on each of the `threads`: threads that work on one image
    wait for each other, which costs throughput. An image that comes while no other is computed is ready sooner with all
    `threads`, and, where several processes share the cores, with those of one more.

    Args:
        precision: one of `runtime.PRECISIONS["openvino"]`; bf16 is fp32 on a processor without it, and the log says so.
        usual_size: (height, width) of an image that the model takes, where it takes several sizes.
    """
    if precision == "bf16" and not has_bf16():
        logger.warning("this processor has no bf16: serving in fp32")
    together = compile_model(model, threads, streams=threads, precision=precision)
    requests = queue.SimpleQueue()  # those that no image is in
    at_once = 2 * threads  # the next images already wait in OpenVINO, so that no thread waits for Python
    for _ in range(at_once):
        requests.put(together.create_infer_request())
    most = min(max(threads, 2), available_cores())
    lone = compile_model(model, most, precision=precision).create_infer_request() if most > 1 else None

    def compute(batch: np.ndarray, alone: bool) -> np.ndarray:
        if alone and lone is not None:
            return infer(lone, batch)
        request = requests.get()
        try:
            return infer(request, batch)
        finally:
            requests.put(request)

    sides = list(together.inputs[0].partial_shape)[1:3]
    size = [side.get_length() if side.is_static else usual for side, usual in zip(sides, usual_size, strict=True)]
    channels = together.inputs[0].partial_shape[3].get_length()
    warm_up = np.zeros((1, *size, channels), together.inputs[0].element_type.to_dtype())
    for alone in (True, False):
        compute(warm_up, alone)
    logger.info("OpenVINO in %s on %d threads", precision, threads)
    return ImageQueue(compute, at_once)


def infer(request, batch: np.ndarray) -> np.ndarray:
    """The output of one infer request, which only one thread at a time may use, for one image."""
    return request.infer(batch, share_inputs=True)[0]


def compile_model(model: Path | str | object, threads: int, streams: int = 1, precision: str = "fp32"):
    """`model`, a path or in memory, for `threads` threads that `streams` images at once share."""
    settings = {
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads,
        # The default is bf16 where the processor has it: other masks.
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" and has_bf16() else "f32",
        "ENABLE_CPU_PINNING": False,  # several processes would all be pinned to the same cores
    }
    return openvino.Core().compile_model(model, "CPU", settings)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_bf16() -> bool:
    """Whether this processor computes in bf16 (AVX512-BF16 or AMX)."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
