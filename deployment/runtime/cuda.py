"""The model on a GPU: batches of a few sizes, CUDA graphs, half precision where it is chosen. No compiler.

A small network keeps a GPU waiting for Python, which starts hundreds of kernels for each batch. A CUDA graph starts
them all at once, but is made for one size of batch: so batches are padded to the next of `SIZES`.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ..photos import Preprocessor
from .pytorch import ServedModel, warm_up_size
from .queue import ImageQueue

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 32)  # of the batches that are computed
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Batches on the CPU of up to as many images as it is made for, to their outputs on the CPU.
Forward = Callable[[Tensor], Tensor]


def load(model: ServedModel, device: torch.device) -> tuple[ImageQueue, str]:
    """`model` behind a queue that gathers batches, on `device`; and the precision in which it computes.

    That is the configuration's; where it is bf16 and the GPU has none, it is fp32, and the log says so.

    Where the learner resizes its images before the batch, all have one shape: batches are padded then, and on a GPU
    become CUDA graphs. Images of any size go through the model as they are, as many at a time as one request may have
    pixels.

    Raises:
        torch.OutOfMemoryError: the GPU's memory is too small for the model.
    """
    # cuDNN and cuBLAS keep what they have found out, and memory, for each thread that asks: so one thread asks.
    thread = ThreadPoolExecutor(1)
    forward, batch, precision = thread.submit(prepared, model, device).result()
    pixels = Preprocessor(dataclasses.replace(model.config, opener=False)).max_pixels

    def answer(images: np.ndarray, alone: bool) -> np.ndarray:
        try:
            return thread.submit(forward, torch.from_numpy(images)).result().numpy()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if is_lost(device):
                end_soon()
            raise

    return ImageQueue(answer, batch=batch, pixels=pixels, free_memory=torch.cuda.empty_cache), precision


def prepared(model: ServedModel, device: torch.device) -> tuple[Forward, int, str]:
    """`model` as a function of batches, how many images they may hold, and the precision in which it computes."""
    precision = model.config.precision
    if precision == "bf16" and not has_bf16(device):
        logger.warning("%s has no bf16: serving in fp32", torch.cuda.get_device_name(device))
        precision = "fp32"
    use_all_of_float32()
    fixed, dtype = model.config.pixels_size is not None, TYPES[precision]
    torch.backends.cudnn.benchmark = fixed  # the fastest algorithm for each size of batch
    model = placed(model, device, precision)
    if not fixed:
        return lambda batch: compute(model, batch, dtype).cpu(), SIZES[-1], precision
    passes = prepared_batches(model, device, dtype)
    return lambda batch: passes[padded_size(len(batch), passes)](batch), max(passes), precision


def has_bf16(device: torch.device) -> bool:
    """Whether `device` computes in bf16; GPUs before Ampere, such as the T4, only imitate it."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def use_all_of_float32() -> None:
    """Switch TF32 off, which convolutions take by default: what is called float32 rounds to 10 bits then."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def placed(model: ServedModel, device: torch.device, precision: str = "fp32") -> ServedModel:
    """`model` on `device`, its network in `precision` and laid out for a GPU; what comes before it stays in float32."""
    model = model.to(device)
    # CUDA multiplies with the reciprocal of a number: 126 of 256 values round otherwise. A tensor it divides by.
    model.batch_transforms.divisor = torch.tensor(model.batch_transforms.divisor, device=device)
    model.network.to(dtype=TYPES[precision])
    if model.config.arch:
        model.network.to(memory_format=torch.channels_last)
    return model


@torch.inference_mode()
def compute(model: ServedModel, pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """What `model`, whose network is in `dtype`, makes of `pixels` on its own device; numbers come as float32."""
    device = next(model.network.parameters()).device
    x = model.batch_transforms(pixels.to(device))
    # A program sees memory as it did when it was captured: its views hold for no other layout.
    x = x.to(dtype, memory_format=torch.channels_last if model.config.arch else torch.contiguous_format)
    # It may make tensors of its own, in float32: autocast lets them meet weights in half precision.
    half = dtype != torch.float32
    with torch.autocast(device.type, dtype, cache_enabled=False) if half else contextlib.nullcontext():
        logits = model.network(x)
    y = model.decode(logits)
    return y.float() if y.is_floating_point() else y


def prepared_batches(model: ServedModel, device: torch.device, dtype: torch.dtype) -> dict[int, Forward]:
    """A function for batches of up to each of `SIZES` that fits into memory.

    Raises:
        torch.OutOfMemoryError: none fits.
    """
    shape, passes, capture = warm_up_size(model.config), {}, None
    if device.type == "cuda":
        capture = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    for size in reversed(SIZES):  # what the largest graph needs is enough for all
        try:
            pixels = torch.zeros(size, *shape, device=device, dtype=model.pixels_dtype)
            graph = graphed(model, pixels, dtype, *capture) if capture else None
            passes[size] = graph or padded(model, pixels, dtype)
            capture = capture if graph else None  # what cannot be captured once is not tried again
        except torch.OutOfMemoryError:
            logger.warning("batches of %d images do not fit into the GPU's memory", size)
            torch.cuda.empty_cache()
    if not passes:
        raise torch.OutOfMemoryError("the model does not fit into the GPU's memory")
    return passes


def padded_size(n: int, sizes: Iterable[int]) -> int:
    """The smallest of `sizes` that holds `n` images."""
    return min(size for size in sizes if size >= n)


def padded(model: ServedModel, pixels: Tensor, dtype: torch.dtype) -> Forward:
    """`model` on batches of up to len(pixels), padded to that size; it has run once."""

    def forward(batch: Tensor) -> Tensor:
        pixels[: len(batch)] = batch.to(pixels.device)
        return compute(model, pixels, dtype)[: len(batch)].cpu()

    forward(pixels)
    return forward


@torch.inference_mode()
def graphed(
    model: ServedModel, pixels: Tensor, dtype: torch.dtype, stream: torch.cuda.Stream, pool: tuple[int, int]
) -> Forward | None:
    """As `padded`, by a CUDA graph; None where the network cannot be captured as one, and the log says why.

    The graphs share the memory of `pool`, and what cuBLAS has for the `stream` on which they are captured: only one of
    them may run at a time.

    Raises:
        torch.OutOfMemoryError: the batch does not fit.
    """
    device, graph = pixels.device, torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        # A capture that fails leaves its stream the current one; this `with` leads back in any case.
        with torch.cuda.device(device), torch.cuda.stream(stream):
            for _ in range(3):  # what is done only once must not be captured
                compute(model, pixels, dtype)
            with no_waiting():  # a rehearsal: most of what no graph can hold fails here, where it does no harm
                compute(model, pixels, dtype)
            # pyrefly: ignore[bad-argument-type] - torch gives the pool's type a name of its own
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                y = compute(model, pixels, dtype)
    except RuntimeError as error:
        close_pool(device, pool)
        cause = error.__context__ or error  # the end of a capture fails for whatever failed within it
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        reason = str(cause).partition("\n")[0]
        logger.warning("no CUDA graphs for batches of up to %d images: %s", len(pixels), reason)
        return None
    torch.cuda.current_stream(device).wait_stream(stream)

    @torch.inference_mode()
    def forward(batch: Tensor) -> Tensor:
        with torch.cuda.device(device):
            pixels[: len(batch)] = batch.to(device)
            graph.replay()
            return y[: len(batch)].cpu()

    return forward


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Within it, whatever waits for a GPU raises RuntimeError, in every thread."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def close_pool(device: torch.device, pool: tuple[int, int]) -> None:
    """End the capture into `pool` that failed, as far as the allocator knows of it.

    Before PyTorch 2.13 it believes for ever that the capture goes on, and gives no memory back (pull request 180395).
    """
    with contextlib.suppress(RuntimeError):  # as it should be: it knows of none
        torch._C._cuda_endAllocateToPool(device.index, pool)


def is_lost(device: torch.device) -> bool:
    """Whether `device` has failed for good: after an illegal access every call fails until the process ends."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


@functools.cache
def end_soon() -> None:
    """End this process in a second, with status 1. What waits for an answer still gets it: an error.

    Only a new process can use the GPU again. TorchServe starts a worker anew that ends, Kubernetes and the clouds a
    container; a health check finds nobody until then.
    """
    logger.critical("the GPU has failed for good: this process ends, to be started anew")
    threading.Timer(1, os._exit, (1,)).start()
