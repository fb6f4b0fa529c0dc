"""Half precision for a GPU: what it costs in accuracy, measured before it is chosen."""

import copy
import dataclasses
from pathlib import Path

import torch

from .. import gpu_runtime
from ..config import Config
from ..photos import Preprocessor
from ..runtime import Model
from .accuracy import compare, read_labels, report_text
from .dataset import split_photos
from .learner import ExportError


def half_precision(
    config: Config, folder: Path | str, precision: str, calibrate: Path | str | None = None, max_drop: float = 0.5
) -> Config:
    """`config` with `precision`; fp16 and bf16 are measured on the validation photos of `calibrate`, where it is given.

    Without a GPU here, its arithmetic is emulated: what each layer gives is rounded as the GPU stores it.

    Raises:
        ExportError: with labels, more than `max_drop` points of accuracy, or of mean IoU, are lost.
    """
    config = dataclasses.replace(config, precision=precision)
    if precision not in ("fp16", "bf16") or not calibrate:
        return config
    preprocessor, valid = Preprocessor(config), split_photos(calibrate)[1]
    if not valid:
        raise ExportError(f"{calibrate} holds no photos to measure {precision} on")
    labels = read_labels(valid, calibrate, preprocessor)
    model = Model(config, folder, exact=False)
    half, dtype = copy.deepcopy(model), gpu_runtime.TYPES[precision]
    if torch.cuda.is_available():
        model, half = model.cuda(), half.to("cuda", dtype, memory_format=torch.channels_last)
    else:
        print(f"no GPU here: {precision} is emulated on the CPU")
        round_as(dtype, half)
        dtype = torch.float32
    original, converted = [], []
    for path in valid:
        x = preprocessor(path.read_bytes())[None]
        original.append(gpu_runtime.compute(model, x, torch.float32).cpu())
        converted.append(gpu_runtime.compute(half, x, dtype).cpu())
    report = compare(config, original, converted, labels)
    print(report_text(report))
    if report.get("drop", 0) > max_drop:
        raise ExportError(f"{precision} loses {report['drop']:.2f} points, more than --max-drop {max_drop:g}")
    return dataclasses.replace(config, accuracy=report)


def round_as(dtype: torch.dtype, model: torch.nn.Module) -> None:
    """Make `model`, in float32, round its weights, its input and what each of its layers gives to what `dtype` holds.

    Tensor cores sum up in float32 too, so this is where half precision loses digits.
    """

    def rounded(x):
        return x.to(dtype).float() if torch.is_tensor(x) and x.is_floating_point() else x

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(rounded(parameter))
    for layer in model.modules():
        layer.register_forward_pre_hook(lambda layer, inputs: tuple(map(rounded, inputs)))
        layer.register_forward_hook(lambda layer, inputs, output: rounded(output))
