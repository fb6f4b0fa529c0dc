"""What computes: the model in a folder, by PyTorch on a CPU or a GPU, or by OpenVINO on a CPU.

Each of them is imported only where it is used: an OpenVINO model is served without torch.
"""

import contextlib
import functools
import importlib
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..config import Config
from .queue import ImageQueue

# By runtime, the default first. Those of eager are for a GPU: a CPU computes in fp32.
PRECISIONS = {"eager": ("fp32", "fp16", "bf16"), "openvino": ("fp32", "bf16", "int8")}


class RuntimeUnavailable(RuntimeError):
    """A runtime cannot be used: its package is missing, or it cannot do what is asked; the message says which."""


def load(config: Config, folder: Path | str, gpu: int | None = None, threads: int | None = None) -> ImageQueue:
    """The model in `folder` as a function from images to outputs, warm: it has run already. Any thread may call it.

    An image is an array (height, width, channels) of `config.dtype`; see `photos.Preprocessor`. Its output is a mask,
    uint8 (height, width), or float32 (n): probabilities, values, or x and y of each point in turn, from -1 to 1.

    Args:
        gpu: the index of the GPU that PyTorch computes on; None: the first; without one, and for -1, it is the CPU.
        threads: that compute; None: what OMP_NUM_THREADS says, else as PyTorch or OpenVINO have it by themselves.

    Raises:
        RuntimeUnavailable: there is no such runtime or precision, or its package is missing.
        FileNotFoundError: `folder` lacks the model's file.
        ValueError: as in `threads_wanted`.
    """
    check_runtime(config.runtime, config.precision)
    if config.runtime == "openvino":
        import_optional("openvino")
        from .openvino import load_openvino

        threads = threads or threads_wanted()
        return load_openvino(Path(folder, "fastunet.xml"), threads, config.precision, config.img_size)
    import_optional("torch")
    from .pytorch import load_pytorch

    return load_pytorch(config, folder, gpu, threads)


def check_runtime(runtime: str, precision: str) -> None:
    """Raises RuntimeUnavailable where there is no such runtime, or it has no such precision."""
    if precision not in PRECISIONS.get(runtime, ()):
        choices = ", ".join(f"{name} ({'/'.join(p)})" for name, p in PRECISIONS.items())
        raise RuntimeUnavailable(f"no runtime {runtime!r} with precision {precision!r}: there are {choices}")


def import_optional(package: str):
    """The module `package`, which only some runtimes need.

    Raises:
        RuntimeUnavailable: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise RuntimeUnavailable(f"this runtime needs `{package}`: pip install {package} ({error})") from None


def cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The cores this process may really use: its CPU affinity, or less where a cgroup, v2 or v1, grants less."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            quota, period = map(int, " ".join((cgroup / name).read_text() for name in names).split())
            if quota > 0:  # -1 is none in version 1
                available = min(available, math.ceil(quota / period))
    return available


def threads_wanted() -> int:
    """How many threads OMP_NUM_THREADS asks for, else one for each core.

    Of a list, one number for each level of parallel regions that are nested, it is the first.

    Raises:
        ValueError: that is no number, or less than 1.
    """
    given = os.environ.get("OMP_NUM_THREADS")
    if not given:
        return cores()
    first = given.split(",")[0].strip()
    if not first.isdecimal() or int(first) < 1:
        raise ValueError(f"OMP_NUM_THREADS={given}: give a whole number, 1 or more")
    return int(first)


def started_threads(n: int) -> ThreadPoolExecutor:
    """A pool whose `n` threads have started: one that starts where memory is short would fail a whole batch."""
    threads, all_there = ThreadPoolExecutor(n), threading.Barrier(n)
    list(threads.map(lambda _: all_there.wait(), range(n)))
    return threads


@functools.cache
def gpus() -> int:
    """The number of GPUs that PyTorch can use. It is asked only where there is a driver: importing it takes seconds."""
    if not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg", "/proc/driver/nvidia/version"))):
        return 0
    import torch

    return torch.cuda.device_count()
