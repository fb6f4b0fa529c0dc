"""PyTorch: the served model as one module, from an image's pixels to the values of an answer, on a CPU or a GPU."""

import logging
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config
from ..geometry import middle_of_ratio, sampled_cells, shrink_factor
from ..model import DynamicUnetDIY
from ..protocol import bad_image
from . import RuntimeUnavailable
from .program import load_program
from .queue import ImageQueue

logger = logging.getLogger(__name__)

ACTIVATIONS = {"softmax": lambda x: x.softmax(dim=1), "sigmoid": torch.sigmoid, None: lambda x: x}


def load_pytorch(config: Config, folder: Path | str, gpu: int | None = None, threads: int | None = None) -> ImageQueue:
    """The model in `folder`, in front of it a queue of images; see `runtime.load`.

    On a CPU a batch takes as long as its images one by one, and rounds a few logits differently: a mask could then
    depend on who else asks at the moment. So there images go through one by one, whichever threads ask: how many
    compute decides how torch rounds, and is always the same.
    """
    if threads:
        torch.set_num_threads(threads)
    exported = config.exported_with.get("torch", torch.__version__)
    if exported.split(".")[:2] != torch.__version__.split(".")[:2]:
        logger.warning(
            "exported with torch %s, served with %s: answers may round differently", exported, torch.__version__
        )
    device, precision = choose_device(gpu), config.precision
    if device.type == "cuda":
        from . import cuda

        model = ServedModel(config, folder, exact=precision == "fp32", device=device)
        images, precision = cuda.load(model, device)
    else:
        images, precision = eager(config, folder), "fp32"
    (output,) = images([np.zeros(warm_up_size(config), config.dtype)])
    if isinstance(output, Exception):
        raise output
    logger.info("%s with PyTorch in %s on %s", config.arch or config.model_file, precision, device)
    return images


def eager(config: Config, folder: Path | str) -> ImageQueue:
    """The model as PyTorch runs it on a CPU."""
    model = ServedModel(config, folder)

    def compute(batch: np.ndarray, alone: bool = True) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(batch)).numpy()

    return ImageQueue(compute)


def warm_up_size(config: Config) -> tuple[int, int, int]:
    """(height, width, channels) of an image that the model takes."""
    return (*(config.pixels_size or config.img_size), config.channels)


def choose_device(gpu: int | None = None) -> torch.device:
    """The GPU of that index (None: the first), else the CPU; -1 is the CPU.

    The log says so where one of several GPUs is used because nobody chose, and where an NVIDIA driver is there and
    PyTorch finds no GPU.

    Raises:
        RuntimeUnavailable: there is no usable GPU, and the environment variable REQUIRE_GPU is 1.
    """
    if gpu == -1:
        return torch.device("cpu")
    if torch.cuda.is_available():
        if gpu is None and (n := torch.cuda.device_count()) > 1:
            logger.warning(
                "one of %d GPUs is used: TorchServe has a worker for each; else start a server for each, with another "
                "CUDA_VISIBLE_DEVICES and port",
                n,
            )
        return torch.device(f"cuda:{gpu or 0}")
    if os.environ.get("REQUIRE_GPU") == "1":
        raise RuntimeUnavailable(f"REQUIRE_GPU=1, but PyTorch {torch.__version__} finds no GPU it can use")
    given = os.environ.get("NVIDIA_VISIBLE_DEVICES", "")  # of a container
    if Path("/proc/driver/nvidia/version").exists() or given not in ("", "void", "none"):
        logger.warning(
            "this machine has an NVIDIA driver, but PyTorch %s finds no GPU it can use (a CPU build, or a driver that "
            "is too old): serving on the CPU",
            torch.__version__,
        )
    return torch.device("cpu")


def load_network(config: Config, folder: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """The network of `config`, in evaluation mode: float32 (N, channels, H, W) to the learner's logits.

    It is a `DynamicUnetDIY` with the weights in `folder`/fastunet.pth, or the program in `folder`/fastunet.pt2, which
    begins with the learner's own batch transforms where it has some.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the program is damaged, or may run code.
    """
    path = Path(folder, config.model_file)
    if not config.arch:
        return load_program(path, device)
    weights = torch.load(path, map_location=device, weights_only=True)
    with torch.device("meta"):  # no memory, no random initialization: every tensor comes from the file
        network = DynamicUnetDIY(config.arch, config.n_classes, config.img_size, **config.options)
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval()


class ServedModel(nn.Module):
    """What is served: pixels (N, H, W, channels) to what `decode` returns; batch transforms, network and decoding.

    Args:
        exact: compute what `learn.predict` computes, bit for bit on a CPU. Otherwise an activation that leaves the
            order of the classes of a mask as it is may be left out, which is faster.
        in_graph: resample with operations that other runtimes have, for images of any size: see `resample_in_graph`.
    """

    def __init__(
        self,
        config: Config,
        folder: Path | str,
        exact: bool = True,
        in_graph: bool = False,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.config = config
        self.network = load_network(config, folder, device)
        self.batch_transforms = BatchTransforms(config, in_graph)
        self.pixels_dtype = getattr(torch, config.dtype)
        self.masks, self.threshold = config.task == "segmentation", config.threshold
        leave_out = self.masks and config.threshold is None and not exact
        self.activation = None if leave_out else config.activation

    def forward(self, pixels: Tensor) -> Tensor:
        return self.decode(self.network(self.batch_transforms(pixels)))

    def decode(self, logits: Tensor) -> Tensor:
        return decode(logits, self.activation, self.threshold, self.masks)


class BatchTransforms(nn.Module):
    """The batch transforms of the configuration, as fastai does them at validation time.

    Pixels (N, H, W, channels) of any dtype to floats (N, channels, H, W).
    """

    mean: Tensor
    std: Tensor
    divisor: float | Tensor

    def __init__(self, config: Config, in_graph: bool = False):
        super().__init__()
        self.affine, self.resample = config.affine, resample_in_graph if in_graph else resample_affine
        self.divisor, self.normalizes = config.divisor, config.mean is not None
        for name, values in (("mean", config.mean), ("std", config.std)):
            if self.normalizes:
                self.register_buffer(name, torch.tensor(values)[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        # A copy, since one channel is contiguous as it is, with strides that have convolutions round differently.
        x = pixels.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format).to(torch.float32) / self.divisor
        for options in self.affine:
            x = self.resample(x, **options)
        if self.normalizes:
            x = (x - self.mean) / self.std
        return x


def resample_affine(
    x: Tensor,
    size: tuple[int, int] | None = None,
    mode: str = "bilinear",
    pad_mode: str = "reflection",
    align_corners: bool = True,
    ratio: tuple[float, float] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """`x` (N, channels, height, width) as fastai's affine augmentations leave it at validation time.

    They do not turn or zoom it then, but still sample it anew, at `size` (height, width) where that is given: see
    `AffineCoordTfm`, `affine_coord` and `_grid_sample` in fastai.vision.augment, whose arithmetic this is. With `ratio`
    and `scale` the middle is cut out first, as `RandomResizedCropGPU` does it.

    Raises:
        Rejected: 400 for an image of which nothing is left.
    """
    if ratio:
        h, w = middle_of_ratio(x.shape[-2:], ratio, scale)
        if not h or not w:
            raise bad_image("the photo is too narrow for the model")
        top, left = (x.shape[-2] - h) // 2, (x.shape[-1] - w) // 2
        x = x[..., top : top + h, left : left + w]
    theta = torch.eye(2, 3, dtype=x.dtype, device=x.device).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, [*x.shape[:2], *(size or x.shape[-2:])], align_corners=align_corners)
    if mode == "bilinear":
        sides = max(grid.shape[1:3])
        if align_corners and sides > 1:  # the grid reaches from -1 to 1
            zoom = 1.0
        elif grid.device.type != "cpu" and sides > 1:  # the same but for its last bit, without waiting for the GPU
            zoom = sides / (sides - 1)
        else:
            zoom = 1 / (grid.max() - grid.min()).item() * 2
        shrink = shrink_factor(x.shape[-2:], grid.shape[1:3])
        if shrink > 1 and shrink > zoom:
            x = F.interpolate(x, scale_factor=1 / shrink, mode="area", recompute_scale_factor=True)
    return F.grid_sample(x, grid, mode=mode, padding_mode=pad_mode, align_corners=align_corners)


def resample_in_graph(
    x: Tensor,
    size: tuple[int, int] | None = None,
    mode: str = "bilinear",
    pad_mode: str = "reflection",
    align_corners: bool = True,
    ratio: tuple[float, float] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """As `resample_affine`, to within rounding, in operations that a graph for images of any size can hold.

    Along each axis every sample lies between two cells: pixels, or where the image is much larger than `size` means
    over areas, which are differences of a cumulative sum. How many areas there are may hang on the last bit of float64:
    in a graph for images of any size it is computed by the runtime, and OpenVINO, which has float32, may be off by one.
    """
    if size is None and not ratio:
        return x  # each sample is a pixel
    shape, out = x.shape[-2:], size or x.shape[-2:]
    h, w = height, width = [scalar(side) for side in shape]
    top = left = scalar(0)
    if ratio:
        too_tall, too_wide = width / height < ratio[0], width / height > ratio[1]
        h = torch.floor(torch.where(too_tall, torch.floor(width / ratio[0]), height) * scale)
        w = torch.floor(torch.where(too_wide, torch.floor(height * ratio[1]), width) * scale)
        top, left = torch.floor((height - h) / 2), torch.floor((width - w) / 2)
    if all(isinstance(side, int) for side in shape):
        part = middle_of_ratio(shape, ratio, scale) if ratio else shape
        rows, columns = map(scalar, sampled_cells(part, out, mode, align_corners))
    else:
        # Of corners that are not aligned the grid falls short of -1 and 1: see `zoom` there.
        zoom = 1.0 if align_corners else max(out) / max(max(out) - 1, 1)
        shrink = torch.minimum(h / out[1], w / 2) / 2
        shrink = torch.where(shrink > zoom, shrink, 1.0) if mode == "bilinear" else scalar(1)
        rows, columns = torch.floor(h * (1 / shrink)), torch.floor(w * (1 / shrink))
    x = sample_axis(x, 2, h, top, rows, out[0], mode, align_corners)
    return sample_axis(x, 3, w, left, columns, out[1], mode, align_corners)


def scalar(number: int | torch.SymInt) -> Tensor:
    """`number` as a float64 tensor of no dimensions, which a graph can hold."""
    return torch.scalar_tensor(number, dtype=torch.float64)


def sample_axis(
    x: Tensor, axis: int, n: Tensor, start: Tensor, cells: Tensor, out: int, mode: str, align_corners: bool
) -> Tensor:
    """`out` samples along `axis` (2 or 3) of the `n` pixels from `start` on, of which `cells` are made before."""
    samples = torch.arange(out, dtype=torch.float64)
    if not align_corners:
        position = torch.minimum(torch.clamp((samples + 0.5) * cells / out - 0.5, min=0.0), cells - 1)
    elif out > 1:
        position = samples * (cells - 1) / (out - 1)
    else:
        position = samples + (cells - 1) / 2
    if mode == "nearest":
        return x.index_select(axis, (torch.round(position) + start).long())
    low = torch.floor(position)
    high = torch.minimum(low + 1, cells - 1)
    sums = F.pad(x.cumsum(axis), (0, 0, 1, 0) if axis == 2 else (1, 0))
    shape = [1, 1, 1, 1]
    shape[axis] = out

    def mean(cell: Tensor) -> Tensor:
        first = (torch.floor(cell * n / cells) + start).long()
        last = (torch.ceil((cell + 1) * n / cells) + start).long()
        total = sums.index_select(axis, last) - sums.index_select(axis, first)
        return total / (last - first).to(x.dtype).view(shape)

    weight = (position - low).to(x.dtype).view(shape)
    return mean(low) * (1 - weight) + mean(high) * weight


def decode(
    logits: Tensor, activation: str | None = "softmax", threshold: float | None = None, masks: bool = True
) -> Tensor:
    """What `learn.predict` makes of `logits`: its loss function's `activation`, and for masks also its `decodes`.

    In masks the activation matters where rounding makes equal what was not: ties go to the first class.

    Args:
        logits: float (N, n_classes, H, W) for masks, else (N, n_classes) or (N,).
        activation: one of `ACTIVATIONS`.
        threshold: of masks: None for the class of the highest value; a number, with one output channel, for class 1
            above it.

    Returns:
        Masks as uint8 (N, H, W); else float32 (N, n_classes): probabilities, values, or x and y of each point in turn,
        from -1 to 1.
    """
    values = ACTIVATIONS[activation](logits)
    if not masks:
        return values.flatten(1) if values.ndim > 1 else values[:, None]
    return (values.argmax(dim=1) if threshold is None else values[:, 0] > threshold).to(torch.uint8)
