"""How good masks are: beside those of the original model, and beside labels where there are some."""

import re
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ..photos import Preprocessor
from .dataset import label_of
from .learner import ExportError


def read_label(photo: Path, preprocessor: Preprocessor) -> Tensor:
    """The label of `photo` where the model's pixels are: uint8 (1, H, W).

    Raises:
        ExportError: it is missing, or names a class that the model does not have.
    """
    path, n_classes = label_of(photo), len(preprocessor.config.classes)
    if not path.is_file():
        raise ExportError(f"no label {path} for {photo.name}: give every photo its label, or none")
    with Image.open(path) as image:
        label = preprocessor.label(image)[None]
    if label.max() >= n_classes:
        raise ExportError(f"{path} has class {label.max()}, but the model knows {n_classes} classes")
    return label


def compare_masks(
    original: list[Tensor], converted: list[Tensor], labels: list[Tensor] | None, classes: list[str]
) -> dict:
    """The masks of the converted model beside the original's: agreement, and with `labels` the accuracy of both.

    Accuracies are shares of 1 over all pixels that are not void; `drop` is in points of percent, the larger of the two.
    """
    equal = sum((a == b).sum().item() for a, b in zip(original, converted, strict=True))
    report = {"photos": len(original), "mask_agreement": round(equal / sum(m.numel() for m in original), 6)}
    if labels is not None:
        before, after = mask_scores(original, labels, classes), mask_scores(converted, labels, classes)
        for name in before:
            report[name] = {"original": round(before[name], 5), "converted": round(after[name], 5)}
        report["drop"] = round(100 * max(before[name] - after[name] for name in before), 3)
    return report


def mask_scores(masks: list[Tensor], labels: list[Tensor], classes: list[str]) -> dict[str, float]:
    """Pixel accuracy and mean IoU (over the classes that occur) of `masks`; void, found by its name, does not count."""
    n = len(classes)
    pairs = np.zeros((n, n), np.int64)  # rows: label, columns: mask
    for mask, label in zip(masks, labels, strict=True):
        pairs += np.bincount(label.numpy().ravel() * np.int64(n) + mask.numpy().ravel(), minlength=n * n).reshape(n, n)
    void = [i for i, name in enumerate(classes) if re.fullmatch("void", name, re.I)]
    pairs[void] = 0
    hits, occurs = pairs.diagonal(), pairs.sum(axis=1) > 0
    iou = hits[occurs] / (pairs.sum(axis=0) + pairs.sum(axis=1) - hits)[occurs]
    return {"pixel_accuracy": float(hits.sum() / pairs.sum()), "mean_iou": float(iou.mean())}


def report_text(report: dict) -> str:
    """What `compare_masks` found, in words."""
    lines = [f"{report['mask_agreement']:.3%} of the pixels of {report['photos']} photos as before the conversion"]
    for name in ("pixel_accuracy", "mean_iou"):
        if name in report:
            lines.append(f"{name}: {report[name]['original']:.4f} before, {report[name]['converted']:.4f} after")
    return "\n".join(lines)
