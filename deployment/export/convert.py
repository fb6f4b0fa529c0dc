"""Convert a network for OpenVINO, in bf16 or with NNCF in int8 if asked, and measure it beside the original.

Each optional package is imported only where it is used.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from ..config import Config
from ..photos import Preprocessor
from ..runtime import check_runtime, cores, import_optional
from ..runtime.pytorch import ServedModel, eager, warm_up_size
from .accuracy import compare, outputs, read_labels, read_pixels, report_text
from .dataset import split_photos
from .learner import ExportError
from .program import capture_served, input_shape

# The share of pixels that must keep their class: in fp32, and in less than that where no labels say what it costs.
MIN_AGREEMENT = {"fp32": 0.9999, "bf16": 0.98, "int8": 0.98, "--decode fast": 0.98}
CALIBRATION_IMAGES = 300  # at most


def convert(
    config: Config,
    folder: Path | str,
    precision: str = "fp32",
    calibrate: Path | str | None = None,
    max_drop: float = 0.5,
    decode: str = "exact",
) -> Config:
    """Write the model of `config` and `folder` for OpenVINO: fastunet.xml and fastunet.bin beside it.

    `calibrate` is a folder of photos, with labels as `accuracy` says: int8 is calibrated on those to train on, and
    measured on the others. With labels it may lose `max_drop` points of accuracy (of masks also of mean IoU), without
    them 98 % of the answers must stay; else the last layers stay float too, then, with labels, NNCF controls the
    accuracy. With `decode` fast, large JPEGs are decoded smaller (see `photos.Preprocessor.decode`),
    which is measured on the same photos, against the same limits.

    Returns:
        `config` with the new runtime and precision, and with what was measured as `accuracy`.

    Raises:
        ExportError: the converted model is not as good as that whatever is tried, or `calibrate` cannot be used.
        RuntimeUnavailable: OpenVINO or NNCF is not installed, or has no such precision.
    """
    check_runtime("openvino", precision)
    if precision == "int8" and not calibrate:
        raise ExportError("int8 must be calibrated: name a folder of some hundred photos with --calibrate")
    ov = import_optional("openvino")
    from ..runtime.openvino import has_bf16, load_openvino

    if decode == "fast":
        check_fast_decoding(config, calibrate)
    preprocessor = Preprocessor(config, folder)
    train, valid, labels = [], [], None
    if calibrate:
        train, valid = calibration_images(calibrate)
        labels = read_labels(valid, calibrate, preprocessor)
    noise = (255 * np.random.default_rng(0).random((4, *warm_up_size(config)))).astype(config.dtype)
    inputs = [read_pixels(path, preprocessor) for path in valid] or list(noise)
    original = outputs(eager(config, folder), inputs)

    if precision == "bf16" and not has_bf16():
        print("this processor has no bf16: measured in fp32, as it would be served here")
    tries = [to_openvino(config, folder)]
    if precision == "int8":
        samples = [read_pixels(path, preprocessor)[None] for path in train]
        tries = quantized(tries[0], samples, inputs, labels, original, config, max_drop)

    def measure(candidate, inputs: list[np.ndarray]) -> dict:
        return compare(config, original, outputs(load_openvino(candidate, cores(), precision), inputs), labels)

    candidate, report = first_good(tries, lambda model: measure(model, inputs), precision, max_drop)
    if decode == "fast":
        inputs = fast_inputs(config, folder, valid, inputs)
        candidate, report = first_good([candidate], lambda model: measure(model, inputs), "--decode fast", max_drop)

    part = Path(folder, "fastunet.part.xml")
    ov.save_model(candidate, part, compress_to_fp16=False)
    os.replace(part.with_suffix(".bin"), Path(folder, "fastunet.bin"))
    os.replace(part, Path(folder, "fastunet.xml"))
    return dataclasses.replace(config, runtime="openvino", precision=precision, decode=decode, accuracy=report)


def first_good(tries: Iterable, measure: Callable, what: str, max_drop: float) -> tuple:
    """The first of `tries` that is as good as `what`, a key of MIN_AGREEMENT, must be, and what `measure` says of it.

    Raises:
        ExportError: none is; the message has what is lost by the best.
    """
    best: tuple = ()
    least = float("inf")
    for candidate in tries:
        report = measure(candidate)
        lost = excess(report, what, max_drop)
        if not best or lost < least:
            best, least = (candidate, report), lost
        if least <= 0:
            break
    report = best[1]
    print(f"{what}: {report_text(report)}")
    if least <= 0:
        return best
    if "drop" in report and what != "fp32":
        raise ExportError(f"{what} loses {report['drop']:.2f} points, more than --max-drop {max_drop:g}")
    raise ExportError(f"{what}: only {report['agreement']:.4%} of the answers are as PyTorch has them")


def excess(report: dict, what: str, max_drop: float) -> float:
    """How much worse than `what` may be `report` is, in points; at most 0 for a good one."""
    if "drop" in report and what != "fp32":
        return report["drop"] - max_drop
    return 100 * (MIN_AGREEMENT[what] - report["agreement"])


def check_fast_decoding(config: Config, calibrate: Path | str | None) -> None:
    """Raises ExportError where JPEGs cannot be decoded at a fraction of their size, or that could not be measured."""
    if config.opener or not (config.resize or {}).get("size"):
        raise ExportError("--decode fast is for learners that open images as fastai does, and resize them with Resize")
    if not calibrate:
        raise ExportError(
            "--decode fast must be measured: name a folder of photos as you will send them, --calibrate DIR"
        )


def fast_inputs(config: Config, folder: Path | str, photos: list[Path], exact: list[np.ndarray]) -> list[np.ndarray]:
    """The pixels of `photos`, decoded fast, where `exact` are those as the learner has them.

    Raises:
        ExportError: they are the same, since no photo is a JPEG that is large enough.
    """
    preprocessor = Preprocessor(dataclasses.replace(config, decode="fast"), folder)
    inputs = [read_pixels(path, preprocessor) for path in photos]
    if all(map(np.array_equal, inputs, exact)):
        assert config.resize  # see check_fast_decoding
        h, w = config.resize["size"]
        raise ExportError(
            f"--decode fast changes nothing: no photo to measure with is a JPEG of {4 * w} × {4 * h} or more"
        )
    return inputs


def calibration_images(folder: Path | str) -> tuple[list[Path], list[Path]]:
    """The photos in `folder` to calibrate with, evenly chosen, and those to measure with: the validation photos.

    Raises:
        ExportError: there is no photo, or all or none of them are validation photos.
    """
    train, valid = split_photos(folder)
    if not train and not valid:
        raise ExportError(f"{folder} holds no photos (png, jpg, bmp, webp, tiff, gif)")
    if not train or not valid:
        raise ExportError(f"the photos of {folder} must be split into some to calibrate with and some to measure with")
    step = max(1, len(train) / CALIBRATION_IMAGES)
    return [train[int(i * step)] for i in range(min(len(train), CALIBRATION_IMAGES))], valid


def to_openvino(config: Config, folder: Path | str):
    """The served model of `config` as an OpenVINO model of one image, whose sides are free where images keep theirs.

    A fixed shape is faster than a free one, and on a CPU a batch is no faster than its images one by one.
    """
    ov = import_optional("openvino")
    served = ServedModel(config, folder, exact=False, in_graph=True)
    program = capture_served(served, config)
    model = ov.convert_model(program)  # which leaves every axis free
    model.reshape([1, *input_shape(program)[1:]])
    return model


def quantized(
    base: object,
    samples: list[np.ndarray],
    inputs: list[np.ndarray],
    labels: list[torch.Tensor] | None,
    original: list[torch.Tensor],
    config: Config,
    max_drop: float,
) -> Iterator:
    """int8 versions of `base`, each more careful and slower than the one before; made only when asked for.

    What comes before the first convolution and that itself stay in float in all of them: they see the image, cost next
    to nothing, and in int8 move more pixels to another class than all other layers together.
    """
    os.environ.setdefault("NNCF_CI", "1")  # no usage statistics
    nncf = import_optional("nncf")
    nncf.set_log_level(logging.WARNING)  # its progress bars stay
    data = nncf.Dataset(samples)
    settings = {"preset": nncf.QuantizationPreset.MIXED, "subset_size": len(samples)}
    begin, end = up_to_first_convolution(base), convolutions(base)[-3:]
    first = nncf.IgnoredScope(names=begin, validate=False)
    ends = nncf.IgnoredScope(names=[*begin, *end], validate=False)
    yield nncf.quantize(base, data, ignored_scope=first, **settings)
    yield nncf.quantize(base, data, ignored_scope=ends, **settings)
    if labels is None:
        return

    def change(compiled, _) -> tuple[float, None]:
        converted = [torch.from_numpy(compiled(image[None])[0]) for image in inputs]
        return -compare(config, original, converted, labels)["drop"], None

    control = {"max_drop": max_drop, "ignored_scope": first, **settings}
    yield nncf.quantize_with_accuracy_control(
        base, data, nncf.Dataset([image[None] for image in inputs]), change, **control
    )


def up_to_first_convolution(base) -> list[str]:
    """The names of all operations until the first convolution or matrix product, with that."""
    names = []
    for op in base.get_ordered_ops():
        names.append(op.get_friendly_name())
        if op.get_type_name() in ("Convolution", "GroupConvolution", "MatMul"):
            break
    return names


def convolutions(base) -> list[str]:
    """The names of the convolutions, in the order in which a photo meets them."""
    return [op.get_friendly_name() for op in base.get_ordered_ops() if op.get_type_name() == "Convolution"]
