"""Convert a network for OpenVINO, in int8 with NNCF if asked, and measure it beside the original.

Each optional package is imported only where it is used.
"""

import dataclasses
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from ..config import Config
from ..photos import Preprocessor
from ..runtime import Model, check_runtime, eager, import_optional, openvino_model
from .accuracy import compare_masks, read_label, report_text
from .dataset import label_of, split_photos
from .learner import ExportError
from .program import capture_widest

MIN_AGREEMENT = 0.9999  # share of pixels on which a float32 runtime must give the class that PyTorch gives
CALIBRATION_PHOTOS = 300  # at most


def convert(
    config: Config,
    folder: Path | str,
    precision: str = "fp32",
    calibrate: Path | str | None = None,
    max_drop: float = 0.5,
) -> Config:
    """Write the model of `config` and `folder`/fastunet.pth for OpenVINO: fastunet.xml and fastunet.bin beside it.

    `calibrate` is a folder of photos, or one in CamVid's layout. int8 is calibrated on the training photos; with
    labels, accuracy is measured on the others, and int8 that loses more than `max_drop` points of pixel accuracy or of
    mean IoU is tried again more carefully: without the last layers, then with NNCF's accuracy control. Without labels
    only the agreement of the masks is measured.

    Returns:
        `config` with the new runtime and precision, and with what was measured as `accuracy`.

    Raises:
        ExportError: accuracy falls by more than `max_drop` points whatever is tried, float32 masks differ from
            PyTorch's, or `calibrate` cannot be used.
        RuntimeUnavailable: OpenVINO or NNCF is not installed, or has no such precision.
    """
    check_runtime("openvino", precision)
    if precision == "int8" and not calibrate:
        raise ExportError("int8 must be calibrated: name a folder of some hundred photos with --calibrate")
    ov = import_optional("openvino")
    preprocessor = Preprocessor(config)
    train, valid = calibration_photos(calibrate) if calibrate else ([], [])
    noise = torch.rand(4, 1, config.n_in, *config.img_size, generator=torch.Generator().manual_seed(0))
    inputs = [preprocessor(path.read_bytes())[None] for path in valid] or list(noise)
    labels = [read_label(path, preprocessor) for path in valid] if valid and label_of(valid[0]).exists() else None
    original = [*map(eager(config, folder, torch.device("cpu")), inputs)]

    best = None
    base = to_openvino(config, folder)
    tries = [base]
    if precision == "int8":
        samples = [preprocessor(path.read_bytes())[None].numpy() for path in train]
        tries = quantized(base, samples, inputs, labels, original, config, max_drop)
    for candidate in tries:
        report = compare_masks(original, [*map(openvino_model(candidate), inputs)], labels, config.classes)
        if best is None or report.get("drop", 0) < best[1].get("drop", 0):
            best = candidate, report
        if report.get("drop", 0) <= max_drop:
            break
    candidate, report = best
    print(report_text(report))
    if report.get("drop", 0) > max_drop:
        raise ExportError(f"{precision} loses {report['drop']:.2f} points, more than --max-drop {max_drop:g}")
    if precision == "fp32" and report["mask_agreement"] < MIN_AGREEMENT:
        raise ExportError(f"only {report['mask_agreement']:.4%} of the pixels are as PyTorch has them")

    part = Path(folder, "fastunet.part.xml")
    ov.save_model(candidate, part, compress_to_fp16=False)
    os.replace(part.with_suffix(".bin"), Path(folder, "fastunet.bin"))
    os.replace(part, Path(folder, "fastunet.xml"))
    return dataclasses.replace(config, runtime="openvino", precision=precision, accuracy=report)


def calibration_photos(folder: Path | str) -> tuple[list[Path], list[Path]]:
    """The photos in `folder` to calibrate with, evenly chosen, and those to measure with: the validation photos.

    Raises:
        ExportError: there is no photo, or all or none of them are validation photos.
    """
    train, valid = split_photos(folder)
    if not train and not valid:
        raise ExportError(f"{folder} holds no photos (png, jpg, bmp, webp, tiff, gif)")
    if not train or not valid:
        raise ExportError(f"the photos of {folder} must be split into some to calibrate with and some to measure with")
    step = max(1, len(train) / CALIBRATION_PHOTOS)
    return [train[int(i * step)] for i in range(min(len(train), CALIBRATION_PHOTOS))], valid


def to_openvino(config: Config, folder: Path | str):
    """The model of `config` as an OpenVINO model of one photo, whose sides are free where photos keep their size.

    A fixed shape is faster than a free one, and on a CPU a batch is no faster than its photos one by one.
    """
    ov = import_optional("openvino")
    h, w = config.img_size
    shape = [1, config.n_in, h, w]
    if config.keeps_photo_size:  # tracing keeps what it saw: with odd sides every step up resizes, as some photos need
        shape, h, w = [1, config.n_in, -1, -1], h | 1, w | 1
    if not config.arch:
        model = ov.convert_model(capture_widest(Model(config, folder, exact=False), config))
        model.reshape([1, *model.inputs[0].partial_shape[1:]])
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of just that
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)  # OpenVINO's way in
        example = torch.rand(1, config.n_in, h, w)
        return ov.convert_model(Model(config, folder, exact=False), example_input=example, input=shape)


def quantized(base, samples: list, inputs, labels, original, config: Config, max_drop: float) -> Iterator:
    """int8 versions of `base`, each more careful and slower than the one before; made only when asked for."""
    os.environ.setdefault("NNCF_CI", "1")  # no usage statistics
    nncf = import_optional("nncf")
    data = nncf.Dataset(samples)
    settings = {"preset": nncf.QuantizationPreset.MIXED, "subset_size": len(samples)}
    yield nncf.quantize(base, data, **settings)
    if labels is None:
        return
    yield nncf.quantize(base, data, ignored_scope=nncf.IgnoredScope(names=last_layers(base)), **settings)

    def change(compiled, _) -> tuple[float, None]:
        masks = [torch.from_numpy(compiled(x.numpy())[0]) for x in inputs]
        return -compare_masks(original, masks, labels, config.classes)["drop"], None

    yield nncf.quantize_with_accuracy_control(base, data, nncf.Dataset(inputs), change, max_drop=max_drop, **settings)


def last_layers(base, count: int = 3) -> list[str]:
    """The names of the last `count` convolutions: the head and the block before it."""
    convolutions = [op for op in base.get_ordered_ops() if op.get_type_name() == "Convolution"]
    return [op.get_friendly_name() for op in convolutions[-count:]]
