"""How good answers are: beside those of the original model, and beside labels where there are some.

A photo's label is, for a mask, CamVid's (see `dataset`). For the other tasks it is a line of `labels.csv` beside the
photos: the photo's name, then its class; its classes, with `;` between them; its numbers; or x and y of its points in
pixels. The class may also be the name of the photo's folder.
"""

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import Config
from ..photos import Preprocessor
from ..protocol import Rejected
from ..runtime.pytorch import resample_affine
from ..runtime.queue import ImageQueue
from .dataset import label_of
from .learner import ExportError
from .tasks import decision


def read_labels(photos: list[Path], folder: Path | str, preprocessor: Preprocessor) -> list[Tensor] | None:
    """The label of each of `photos`, which lie in `folder`, in the form of the model's output; None: there are none.

    Raises:
        ExportError: some are missing, or cannot be read.
    """
    config = preprocessor.config
    if not photos:
        return None
    if config.task == "segmentation":
        return [read_label(path, preprocessor) for path in photos] if label_of(photos[0]).exists() else None
    listing = Path(folder, "labels.csv")
    if listing.is_file():
        with listing.open(newline="", encoding="utf-8-sig") as file:
            lines = {line[0]: line[1:] for line in csv.reader(file) if line}
        given = [lines.get(path.name) or lines.get(path.relative_to(folder).as_posix()) for path in photos]
    elif config.task == "classification" and all(path.parent.name in config.classes for path in photos):
        given = [[path.parent.name] for path in photos]
    else:
        return None
    labels = []
    for path, values in zip(photos, given, strict=True):
        if not values:
            raise ExportError(f"{path.name} has no label in {listing}: give every photo one, or delete that file")
        try:
            labels.append(as_output(values, path, preprocessor))
        except ValueError as error:
            raise ExportError(f"{path.name} has a label in {listing} that cannot be used: {error}") from None
    return labels


def as_output(values: list[str], photo: Path, preprocessor: Preprocessor) -> Tensor:
    """What a model without fault would give for `photo`, whose label is `values`: float32 (1, n)."""
    config = preprocessor.config
    if config.task in ("classification", "multi-label"):
        names = [name for name in values[0].split(";") if name] if config.task == "multi-label" else values[:1]
        if unknown := set(names) - set(config.classes):
            raise ValueError(f"the model does not know {', '.join(sorted(unknown))}")
        return torch.tensor([[float(name in names) for name in config.classes]])
    numbers = np.array([float(value) for value in values])
    if odd := [value for value, number in zip(values, numbers, strict=True) if not np.isfinite(number)]:
        raise ValueError(f"{odd[0]} is no number to compare with")
    if len(numbers) != config.n_classes:
        raise ValueError(f"{len(numbers)} numbers instead of {config.n_classes}")
    if config.task == "points":
        with Image.open(photo) as image:
            corners = preprocessor.points_to_image(np.array([[-1, -1], [1, 1]]), image.size)
        numbers = (2 * (numbers.reshape(-1, 2) - corners[0]) / (corners[1] - corners[0]) - 1).ravel()
    return torch.from_numpy(numbers).float()[None]


def compare(config: Config, original: list[Tensor], converted: list[Tensor], labels: list[Tensor] | None) -> dict:
    """The answers of the converted model beside the original's: `agreement`, and with `labels` the accuracy of both.

    Agreement is the share of the pixels or labels that are the same, of values and points how close they are, from 0 to
    1; `drop` is what accuracy loses, in points of percent, of errors relative to the range of the labels.

    Raises:
        ExportError: an answer is NaN or infinite, or all labels are void.
    """
    for answers, whose in ((original, "original"), (converted, "converted")):
        if lost := sum(not answer.isfinite().all() for answer in answers):
            raise ExportError(f"for {lost} of {len(answers)} photos the {whose} model answers with NaN or infinity")
    if config.task == "segmentation":
        return compare_masks(original, converted, labels, config.classes)
    ours, theirs = (decision(torch.cat(outputs), config.task, config.threshold) for outputs in (original, converted))
    if ours.is_floating_point():
        agreement = 1 - ((ours - theirs).abs().mean() / ours.abs().max().clamp(min=1e-6)).item()
    else:
        agreement = (ours == theirs).float().mean().item()
    report: dict[str, Any] = {"photos": len(original), "agreement": round(agreement, 6)}
    if labels is not None:
        truth = torch.cat(labels)
        name, before, after = (*score(ours, truth, config), score(theirs, truth, config)[1])
        report[name] = {"original": round(before, 5), "converted": round(after, 5)}
        lost = before - after if name != "mean_error" else (after - before) / scale_of(truth)
        report["drop"] = round(100 * lost, 3)
    return report


def scale_of(truth: Tensor) -> float:
    """The range of the numbers in `truth`; their size where all are equal, as with a single label, and 1 for zeros."""
    return (truth.max() - truth.min()).item() or truth.abs().max().item() or 1.0


def score(decided: Tensor, truth: Tensor, config: Config) -> tuple[str, float]:
    """The measure of the task, by name: share of right classes, F-score of all labels together, or mean error."""
    if config.task == "classification":
        return "top_1", (decided == truth.argmax(dim=1)).float().mean().item()
    if config.task == "multi-label":
        hits = (decided & (truth > 0)).sum().item()
        return "f_score", 2 * hits / max(1, decided.sum().item() + int(truth.sum()))
    return "mean_error", (decided - truth).abs().mean().item()


def read_pixels(photo: Path, preprocessor: Preprocessor) -> np.ndarray:
    """The pixels of `photo` as the model sees them: see `Preprocessor`.

    Raises:
        ExportError: it cannot be read; the message names it.
    """
    try:
        return preprocessor(photo.read_bytes())
    except Rejected as error:
        raise ExportError(f"{photo.name}: {error.message}: take it out of {photo.parent}") from error
    except TypeError as error:  # of the reader's own opener
        raise ExportError(f"{photo.name}: {error}") from error


def read_label(photo: Path, preprocessor: Preprocessor) -> Tensor:
    """The label of `photo` where the model's pixels are: uint8 (1, H, W).

    Raises:
        ExportError: it is missing, or names a class that the model does not have.
    """
    path, n_classes = label_of(photo), len(preprocessor.config.classes)
    if not path.is_file():
        raise ExportError(f"no label {path} for {photo.name}: give every photo its label, or none")
    with Image.open(path) as image:
        label = as_model_sees(image, preprocessor)[None]
    if label.max() >= n_classes:
        raise ExportError(f"{path} has class {label.max()}, but the model knows {n_classes} classes")
    return label


def as_model_sees(label: Image.Image, preprocessor: Preprocessor) -> Tensor:
    """`label` (mode L, pixel value = class) where the model's pixels are: uint8 (height, width)."""
    x = torch.from_numpy(np.array(preprocessor.resize(label, resample="nearest"), np.uint8))[None, None]
    for options in preprocessor.config.affine:
        x = resample_affine(x.float(), **options | {"mode": "nearest"}).to(torch.uint8)
    return x[0, 0]


def outputs(model: ImageQueue, images: list[np.ndarray]) -> list[Tensor]:
    """What `model` makes of `images`, each as a batch of one.

    Raises:
        ExportError: it fails on one of them.
    """
    made = []
    for image in images:
        (output,) = model([image])
        if isinstance(output, Exception):
            raise ExportError(f"the model fails on an image of {image.shape}: {output}") from output
        made.append(torch.from_numpy(output)[None])
    return made


def compare_masks(
    original: list[Tensor], converted: list[Tensor], labels: list[Tensor] | None, classes: list[str]
) -> dict:
    """The masks of the converted model beside the original's: agreement, and with `labels` the accuracy of both.

    Accuracies are shares of 1 over all pixels that are not void; `drop` is in points of percent, the larger of the two.

    Raises:
        ExportError: all labels are void.
    """
    equal = sum((a == b).sum().item() for a, b in zip(original, converted, strict=True))
    agreement = equal / sum(m.numel() for m in original)
    report: dict[str, Any] = {"photos": len(original), "agreement": round(agreement, 6)}
    if labels is not None:
        before, after = mask_scores(original, labels, classes), mask_scores(converted, labels, classes)
        for name in before:
            report[name] = {"original": round(before[name], 5), "converted": round(after[name], 5)}
        report["drop"] = round(100 * max(before[name] - after[name] for name in before), 3)
    return report


def mask_scores(masks: Iterable[Tensor], labels: Iterable[Tensor], classes: list[str]) -> dict[str, float]:
    """Pixel accuracy and mean IoU (over the classes that occur) of `masks`; void, found by its name, does not count.

    Raises:
        ExportError: all labels are void.
    """
    labeled, predicted, hits = count_pixels(masks, labels, classes)
    if not labeled.any():
        raise ExportError("the labels of the photos to measure on are void everywhere: choose others in valid.txt")
    iou = hits[labeled > 0] / (labeled + predicted - hits)[labeled > 0]
    return {"pixel_accuracy": float(hits.sum() / labeled.sum()), "mean_iou": float(iou.mean())}


def class_scores(masks: Iterable[Tensor], labels: Iterable[Tensor], classes: list[str]) -> dict[str, dict[str, float]]:
    """How well `masks` find each class that occurs in `labels`, both integer tensors (H, W) or (1, H, W).

    Returns:
        By the name of the class: its `share` of the pixels, the `recall`, which is the share of its pixels that
        `masks` have right, and `iou`, intersection over union. The pixels that are void in `labels` do not count.
    """
    labeled, predicted, hits = count_pixels(masks, labels, classes)
    return {
        classes[i]: {
            "share": float(labeled[i] / labeled.sum()),
            "recall": float(hits[i] / labeled[i]),
            "iou": float(hits[i] / (labeled[i] + predicted[i] - hits[i])),
        }
        for i in np.flatnonzero(labeled)
    }


def count_pixels(
    masks: Iterable[Tensor], labels: Iterable[Tensor], classes: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each class, the pixels that are of it in `labels`, in `masks` and in both, where `labels` are not void."""
    n = len(classes)
    pairs = np.zeros((n, n), np.int64)  # rows: label, columns: mask
    for mask, label in zip(masks, labels, strict=True):
        pairs += np.bincount(label.numpy().ravel() * np.int64(n) + mask.numpy().ravel(), minlength=n * n).reshape(n, n)
    void = [i for i, name in enumerate(classes) if re.fullmatch("void", name, re.I)]
    pairs[void] = 0
    return pairs.sum(axis=1), pairs.sum(axis=0), pairs.diagonal()


def report_text(report: dict) -> str:
    """What `compare` found, in words."""
    lines = [f"{report['agreement']:.3%} agreement with the model before the conversion, on {report['photos']} photos"]
    for name in ("pixel_accuracy", "mean_iou", "top_1", "f_score", "mean_error"):
        if name in report:
            lines.append(f"{name}: {report[name]['original']:.4f} before, {report[name]['converted']:.4f} after")
    return "\n".join(lines)
