"""Half precision for a GPU: what it costs in accuracy, measured before it is chosen."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..config import Config
from ..photos import Preprocessor
from ..runtime import cuda
from ..runtime.pytorch import ServedModel
from .accuracy import compare, read_labels, read_pixels, report_text
from .dataset import split_photos
from .learner import ExportError

MIN_AGREEMENT = 0.98  # the share of the answers that must stay, where no labels say what half precision costs


def half_precision(
    config: Config, folder: Path | str, precision: str, calibrate: Path | str | None = None, max_drop: float = 0.5
) -> Config:
    """`config` with `precision`; fp16 and bf16 are measured on the validation photos of `calibrate`.

    Without a GPU here, its arithmetic is emulated: what each operation gives is rounded as the GPU stores it.

    Raises:
        ExportError: there are no photos to measure on; the network does not run in `precision`; with labels, more than
            `max_drop` points of accuracy, or of mean IoU, are lost; without labels, more than 2 % of the answers.
    """
    config = dataclasses.replace(config, precision=precision)
    if precision == "fp32":
        return config
    if not calibrate:
        raise ExportError(f"{precision} must be measured: name a folder of your photos with --calibrate")
    preprocessor, (train, valid) = Preprocessor(config, folder), split_photos(calibrate)
    if not valid and train:
        why = f"has {len(train)} photos, but none to measure {precision} on: give five, or name some in valid.txt"
        raise ExportError(f"{calibrate} {why}")
    if not valid:
        raise ExportError(f"{calibrate} holds no photos (png, jpg, bmp, webp, tiff, gif)")
    labels = read_labels(valid, calibrate, preprocessor)
    dtype, device = cuda.TYPES[precision], torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    emulated = device.type == "cpu" or precision == "bf16" and not cuda.has_bf16(device)
    if emulated:
        print(f"no GPU here that computes in {precision}: it is emulated on the CPU")
        device = torch.device("cpu")
    model = cuda.placed(ServedModel(config, folder, exact=False, device=device), device)
    half = cuda.placed(ServedModel(config, folder, exact=False, device=device), device, precision)
    original, converted = [], []
    with all_of_float32():
        for path in valid:
            pixels = torch.from_numpy(np.stack([read_pixels(path, preprocessor)]))
            if path == valid[0]:
                check_it_runs(half, pixels, precision)
                half.network.to(torch.float32 if emulated else dtype)
            original.append(cuda.compute(model, pixels, torch.float32).cpu())
            converted.append(emulate(half, pixels, dtype) if emulated else cuda.compute(half, pixels, dtype).cpu())
    report = compare(config, original, converted, labels)
    print(report_text(report))
    if not report.get("drop", 0) <= max_drop:  # so NaN does not pass either
        raise ExportError(f"{precision} loses {report['drop']:.2f} points, more than --max-drop {max_drop:g}")
    if "drop" not in report and not report["agreement"] >= MIN_AGREEMENT:
        raise ExportError(f"only {report['agreement']:.2%} of the answers are in {precision} as in fp32")
    return dataclasses.replace(config, accuracy=report)


@contextlib.contextmanager
def all_of_float32() -> Iterator[None]:
    """Within the block a GPU computes as `cuda.use_all_of_float32` says, and after it as the program had it."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cuda.use_all_of_float32()
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before  # pyrefly: ignore[missing-attribute]  # torch has it by __getattr__


def check_it_runs(half: ServedModel, pixels: torch.Tensor, precision: str) -> None:
    """Raises ExportError where the network of `half`, which is in `precision`, takes nothing but float32."""
    try:
        cuda.compute(half, pixels, cuda.TYPES[precision])
    except RuntimeError as error:
        raise ExportError(f"the network does not run in {precision}: {' '.join(str(error).split())[:200]}") from error


@torch.inference_mode()
def emulate(model: ServedModel, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a GPU with the network in `dtype` makes of `pixels`: `model`, in float32, rounds as it would."""
    x = model.batch_transforms(pixels).to(dtype).float()
    with Rounding(dtype):
        return model.decode(model.network(x))


class Rounding(TorchDispatchMode):
    """Within it, what each operation of torch gives in float32 is rounded to what `dtype` holds.

    Tensor cores sum up in float32 too, so this is where half precision loses digits.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        if not operation.is_view:  # of something that is rounded already
            for tensor in tree_leaves(output):
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                    tensor.copy_(tensor.to(self.dtype))
        return output
