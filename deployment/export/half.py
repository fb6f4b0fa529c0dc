"""Half precision for a GPU: what it costs in accuracy, measured before it is chosen."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..config import Config
from ..photos import Preprocessor
from ..runtime import cuda
from ..runtime.pytorch import ServedModel
from .accuracy import compare, read_labels, report_text
from .dataset import split_photos
from .learner import ExportError


def half_precision(
    config: Config, folder: Path | str, precision: str, calibrate: Path | str | None = None, max_drop: float = 0.5
) -> Config:
    """`config` with `precision`; fp16 and bf16 are measured on the validation photos of `calibrate`, where it is given.

    Without a GPU here, its arithmetic is emulated: what each operation gives is rounded as the GPU stores it.

    Raises:
        ExportError: with labels, more than `max_drop` points of accuracy, or of mean IoU, are lost.
    """
    config = dataclasses.replace(config, precision=precision)
    if precision not in ("fp16", "bf16") or not calibrate:
        return config
    preprocessor, valid = Preprocessor(config, folder), split_photos(calibrate)[1]
    if not valid:
        raise ExportError(f"{calibrate} holds no images to measure {precision} on")
    labels = read_labels(valid, calibrate, preprocessor)
    model, dtype = ServedModel(config, folder, exact=False), cuda.TYPES[precision]
    half = cuda.in_half(model, dtype)
    if torch.cuda.is_available():
        model, half = model.cuda(), half.cuda()
    else:
        print(f"no GPU here: {precision} is emulated on the CPU")
        half.network.float()
    original, converted = [], []
    for path in valid:
        pixels = torch.from_numpy(np.stack([preprocessor(path.read_bytes())]))
        original.append(cuda.compute(model, pixels, torch.float32).cpu())
        if torch.cuda.is_available():
            converted.append(cuda.compute(half, pixels, dtype).cpu())
        else:
            converted.append(emulate(half, pixels, dtype))
    report = compare(config, original, converted, labels)
    print(report_text(report))
    if report.get("drop", 0) > max_drop:
        raise ExportError(f"{precision} loses {report['drop']:.2f} points, more than --max-drop {max_drop:g}")
    return dataclasses.replace(config, accuracy=report)


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
