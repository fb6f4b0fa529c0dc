"""The model on a GPU: half precision, memory laid out for it, batches of a few sizes, CUDA graphs. No compiler.

A small network keeps a GPU waiting for Python, which starts hundreds of kernels for each batch. A CUDA graph starts
them all at once, but is made for one size of batch: so batches are padded to the next of `SIZES`.
"""

import copy
import logging
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 32)  # of the batches that are computed; more photos go through in several
AGREEMENT = 0.99  # share of the warm-up photo that half precision must answer as float32 does
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What is tried, in this order; float32 is what is left. fp16 rounds less than bf16, and overflows earlier.
ATTEMPTS = {"auto": ("fp16", "bf16"), "fp16": ("fp16",), "bf16": ("bf16",), "fp32": ()}


def load(
    model: nn.Module,
    shape: tuple[int, int, int],
    device: torch.device,
    precision: str = "auto",
    fixed: bool = True,
) -> tuple[Callable[[Tensor], Tensor], str]:
    """`model`, a module in float32 from photos to answers, as a function of batches on `device`, and its precision.

    Args:
        shape: (channels, height, width) of a photo.
        precision: one of `ATTEMPTS`: with auto, fp16 or bf16, whichever answers as float32 does.
        fixed: all photos have that shape, so that batches are padded, and on a GPU become CUDA graphs.
    """
    torch.backends.cudnn.allow_tf32 = False  # else what is called float32 rounds to 10 bits
    torch.backends.cudnn.benchmark = fixed  # the fastest algorithm for each size of batch
    model = model.to(device)
    photo = warm_up_photo(shape)
    expected = compute(model, photo, torch.float32).cpu()
    for name in ATTEMPTS[precision]:
        if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            continue
        half = copy.deepcopy(model).to(dtype=TYPES[name], memory_format=torch.channels_last)
        try:
            share = agreement(expected, compute(half, photo, TYPES[name]).cpu())
        except RuntimeError as error:  # a program of torch.export may insist on float32
            logger.warning("the network does not run in %s: %s", name, error)
            continue
        if share >= AGREEMENT:
            return in_batches(half, shape, device, TYPES[name], fixed), name
        logger.warning("%s agrees with fp32 on %.2f %% of the warm-up photo only: not used", name, 100 * share)
    model = model.to(memory_format=torch.channels_last)
    return in_batches(model, shape, device, torch.float32, fixed), "fp32"


def warm_up_photo(shape: tuple[int, int, int]) -> Tensor:
    """Something like a normalized photo, float32 (1, channels, height, width): areas, edges, and some noise."""
    channels, height, width = shape
    random = torch.Generator().manual_seed(0)
    areas = torch.randn(1, channels, max(height // 16, 2), max(width // 16, 2), generator=random)
    photo = F.interpolate(areas, (height, width), mode="bilinear")
    photo[..., width // 3 : width // 2] *= -1
    return photo + 0.1 * torch.randn(1, *shape, generator=random)


def agreement(expected: Tensor, answer: Tensor) -> float:
    """The share of `answer` that is as in `expected`: equal classes, or numbers that differ by less than 1 %."""
    if not expected.is_floating_point():
        return (expected == answer).float().mean().item()
    return torch.isclose(answer.float(), expected, rtol=0.01, atol=0.01).float().mean().item()


@torch.inference_mode()
def compute(model: nn.Module, batch: Tensor, dtype: torch.dtype) -> Tensor:
    """What `model`, in `dtype`, makes of `batch` on its own device; numbers come as float32."""
    device = next(model.parameters()).device
    y = model(batch.to(device).to(dtype, memory_format=torch.channels_last))
    return y.float() if y.is_floating_point() else y


def in_batches(
    model: nn.Module, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, fixed: bool
) -> Callable[[Tensor], Tensor]:
    """`model` as a function from a batch of any size, float32 on the CPU, to its answers there."""
    if not fixed:
        return lambda batch: torch.cat([compute(model, part, dtype).cpu() for part in batch.split(SIZES[-1])])
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    prepared = {}
    for size in reversed(SIZES):  # what the largest graph needs is enough for all
        try:
            prepared[size] = prepare(model, torch.zeros(size, *shape, device=device, dtype=dtype), pool)
        except torch.OutOfMemoryError:
            logger.warning("batches of %d photos do not fit into the GPU's memory", size)
            torch.cuda.empty_cache()
    if not prepared:
        raise torch.OutOfMemoryError("the model does not fit into the GPU's memory")
    lock = threading.Lock()  # the graphs share their memory

    def predict(batch: Tensor) -> Tensor:
        answers = []
        for part in batch.split(max(prepared)):
            with lock:
                answers.append(prepared[padded_size(len(part), prepared)](part))
        return torch.cat(answers)

    return predict


def padded_size(n: int, sizes) -> int:
    """The smallest of `sizes` that holds `n` photos."""
    return min(size for size in sizes if size >= n)


def prepare(model: nn.Module, x: Tensor, pool=None) -> Callable[[Tensor], Tensor]:
    """`model` on batches of up to len(x) photos, padded to the size of `x`: as a CUDA graph, where there can be one."""
    if x.is_cuda:
        try:
            return graphed(model, x, pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the network does something that cannot be captured
            logger.warning("no CUDA graph for batches of %d photos: %s", len(x), error)

    def forward(batch: Tensor) -> Tensor:
        x[: len(batch)] = batch.to(x.device)
        return compute(model, x, x.dtype)[: len(batch)].cpu()

    forward(x)
    return forward


@torch.inference_mode()
def graphed(model: nn.Module, x: Tensor, pool) -> Callable[[Tensor], Tensor]:
    """As `prepare`; the graphs share the memory of `pool`, so only one of them may run at a time."""
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.cuda.device(x.device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # what is done only once must not be captured
                compute(model, x, x.dtype)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            y = compute(model, x, x.dtype)

    @torch.inference_mode()
    def forward(batch: Tensor) -> Tensor:
        x[: len(batch)] = batch.to(x.device)
        with torch.cuda.device(x.device):
            graph.replay()
        return y[: len(batch)].cpu()

    return forward
