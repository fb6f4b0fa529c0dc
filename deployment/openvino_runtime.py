"""OpenVINO on a CPU, for any number of threads that ask at once. The package is imported only where it is used."""

import logging
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def load_openvino(model, threads: int, precision: str = "fp32") -> Callable[[Tensor], Tensor]:
    """The model as a thread-safe function from float32 (N, channels, H, W) to its output for each of the N photos.

    Photos that come together are computed side by side, one on each of the `threads`: threads that work on one photo
    wait for each other, which costs throughput. A photo that comes while no other is computed is ready sooner with all
    `threads`, and, where several processes share the cores, with those of one more. Who computes is counted here.

    Args:
        model: what `convert` made, a path or a model in memory.
        precision: one of `runtime.PRECISIONS["openvino"]`; bf16 is fp32 on a processor without it, and the log says so.
    """
    if precision == "bf16" and not has_bf16():
        logger.warning("this processor has no bf16: serving in fp32")
    together = compile_model(model, threads, streams=threads, precision=precision)
    requests = queue.SimpleQueue()  # those that no photo is in
    at_once = 2 * threads  # the next photos already wait in OpenVINO, so that no thread waits for Python
    for _ in range(at_once):
        requests.put(together.create_infer_request())
    most = min(max(threads, 2), available_cores())
    alone = compile_model(model, most, precision=precision).create_infer_request() if most > 1 else None
    pool = ThreadPoolExecutor(at_once)
    lock, photos = threading.Lock(), 0

    def compute(x: Tensor) -> Tensor:
        request = requests.get()
        try:
            return infer(request, x)
        finally:
            requests.put(request)

    def predict(batch: Tensor) -> Tensor:
        nonlocal photos
        with lock:
            lone = alone is not None and photos == 0 and len(batch) == 1
            photos += len(batch)
        try:
            if lone:
                return infer(alone, batch)
            if len(batch) == 1:
                return compute(batch)
            return torch.cat([*pool.map(compute, batch.split(1))])
        finally:
            with lock:
                photos -= len(batch)

    return predict


def infer(request, x: Tensor) -> Tensor:
    """The output of one infer request, which only one thread at a time may use, for one photo."""
    return torch.from_numpy(request.infer(x.numpy(), share_inputs=True)[0])


def compile_model(model: Path | str | object, threads: int, streams: int = 1, precision: str = "fp32"):
    """`model`, a path or in memory, for `threads` threads that `streams` photos at once share."""
    import openvino

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
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
