"""The model on a GPU: half precision, memory laid out for it, batches of a few sizes, CUDA graphs. No compiler.

A small network keeps a GPU waiting for Python, which starts hundreds of kernels for each batch. A CUDA graph starts
them all at once, but is made for one size of batch: so batches are padded to the next of `SIZES`.
"""

import copy
import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .pytorch import ServedModel, warm_up_size
from .queue import ImageQueue

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 32)  # of the batches that are computed
AGREEMENT = 0.99  # share of the warm-up image that half precision must answer as float32 does
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What is tried, in this order; float32 is what is left. fp16 rounds less than bf16, and overflows earlier.
ATTEMPTS = {"auto": ("fp16", "bf16"), "fp16": ("fp16",), "bf16": ("bf16",), "fp32": ()}


def load(model: ServedModel, device: torch.device, precision: str = "auto") -> tuple[ImageQueue, str]:
    """`model`, in float32, behind a queue that gathers batches, on `device`; and its precision.

    Where the learner resizes its images before the batch, all have one shape: batches are padded then, and on a GPU
    become CUDA graphs.

    Args:
        precision: one of `ATTEMPTS`: with auto, fp16 or bf16, whichever answers as float32 does.
    """
    shape, fixed = warm_up_size(model.config), model.config.pixels_size is not None
    torch.backends.cudnn.allow_tf32 = False  # else what is called float32 rounds to 10 bits
    torch.backends.cudnn.benchmark = fixed  # the fastest algorithm for each size of batch
    model = model.to(device)
    image = warm_up_image(shape)
    expected = compute(model, image, torch.float32).cpu()
    for name in ATTEMPTS[precision]:
        if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            continue
        half = in_half(model, TYPES[name])
        try:
            share = agreement(expected, compute(half, image, TYPES[name]).cpu())
        except RuntimeError as error:  # a program of torch.export may insist on float32
            logger.warning("the network does not run in %s: %s", name, error)
            continue
        if share >= AGREEMENT:
            return queued(half, shape, device, TYPES[name], fixed), name
        logger.warning("%s agrees with fp32 on %.2f %% of the warm-up image only: not used", name, 100 * share)
    model.network.to(memory_format=torch.channels_last)
    return queued(model, shape, device, torch.float32, fixed), "fp32"


def in_half(model: ServedModel, dtype: torch.dtype) -> ServedModel:
    """A copy of `model` whose network computes in `dtype`; what comes before it stays in float32."""
    half = copy.deepcopy(model)
    half.network.to(dtype=dtype, memory_format=torch.channels_last)
    return half


def warm_up_image(shape: tuple[int, int, int]) -> Tensor:
    """Something like an image, uint8 (1, height, width, channels): areas, edges, and some noise."""
    height, width, channels = shape
    random = np.random.default_rng(0)
    areas = random.integers(0, 256, (max(height // 16, 2), max(width // 16, 2), channels))
    rows, columns = np.arange(height) * len(areas) // height, np.arange(width) * areas.shape[1] // width
    image = areas[rows][:, columns] + random.normal(0, 10, (height, width, channels))
    return torch.from_numpy(image.clip(0, 255).astype(np.uint8))[None]


def agreement(expected: Tensor, answer: Tensor) -> float:
    """The share of `answer` that is as in `expected`: equal classes, or numbers that differ by less than 1 %."""
    if not expected.is_floating_point():
        return (expected == answer).float().mean().item()
    return torch.isclose(answer.float(), expected, rtol=0.01, atol=0.01).float().mean().item()


@torch.inference_mode()
def compute(model: ServedModel, pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """What `model`, whose network is in `dtype`, makes of `pixels` on its own device; numbers come as float32."""
    device = next(model.network.parameters()).device
    x = model.batch_transforms(pixels.to(device)).to(dtype, memory_format=torch.channels_last)
    y = model.decode(model.network(x))
    return y.float() if y.is_floating_point() else y


def queued(
    model: ServedModel, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, fixed: bool
) -> ImageQueue:
    """`model` behind a queue of images, of which it takes as many at a time as the largest batch holds."""
    if fixed:
        passes = prepared_batches(model, shape, device, dtype)
        largest = max(passes)
    else:
        passes, largest = None, SIZES[-1]

    def forward(batch: np.ndarray, alone: bool = True) -> np.ndarray:
        pixels = torch.from_numpy(batch)
        if passes is None:
            return compute(model, pixels, dtype).cpu().numpy()
        return passes[padded_size(len(pixels), passes)](pixels).numpy()

    return ImageQueue(forward, batch=largest, free_memory=torch.cuda.empty_cache)


def prepared_batches(
    model: ServedModel, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> dict[int, Callable[[Tensor], Tensor]]:
    """A function for batches of up to each of `SIZES` that fits into memory.

    Raises:
        torch.OutOfMemoryError: none fits.
    """
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    passes = {}
    for size in reversed(SIZES):  # what the largest graph needs is enough for all
        try:
            pixels = torch.zeros(size, *shape, device=device, dtype=model.pixels_dtype)
            passes[size] = prepare(model, pixels, dtype, pool)
        except torch.OutOfMemoryError:
            logger.warning("batches of %d images do not fit into the GPU's memory", size)
            torch.cuda.empty_cache()
    if not passes:
        raise torch.OutOfMemoryError("the model does not fit into the GPU's memory")
    return passes


def padded_size(n: int, sizes) -> int:
    """The smallest of `sizes` that holds `n` images."""
    return min(size for size in sizes if size >= n)


def prepare(model: ServedModel, pixels: Tensor, dtype: torch.dtype, pool=None) -> Callable[[Tensor], Tensor]:
    """`model` on batches of up to len(pixels), padded to that size: as a CUDA graph, where there can be one."""
    if pixels.is_cuda:
        try:
            return graphed(model, pixels, dtype, pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the network does something that cannot be captured
            logger.warning("no CUDA graph for batches of %d images: %s", len(pixels), error)

    def forward(batch: Tensor) -> Tensor:
        pixels[: len(batch)] = batch.to(pixels.device)
        return compute(model, pixels, dtype)[: len(batch)].cpu()

    forward(pixels)
    return forward


@torch.inference_mode()
def graphed(model: ServedModel, pixels: Tensor, dtype: torch.dtype, pool) -> Callable[[Tensor], Tensor]:
    """As `prepare`; the graphs share the memory of `pool`, so only one of them may run at a time."""
    with torch.cuda.device(pixels.device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # what is done only once must not be captured
                compute(model, pixels, dtype)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            y = compute(model, pixels, dtype)

    @torch.inference_mode()
    def forward(batch: Tensor) -> Tensor:
        pixels[: len(batch)] = batch.to(pixels.device)
        with torch.cuda.device(pixels.device):
            graph.replay()
        return y[: len(batch)].cpu()

    return forward
