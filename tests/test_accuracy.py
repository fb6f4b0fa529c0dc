"""How good answers are: agreement, accuracy, IoU and errors, by hand-made ones."""

import dataclasses
import math

import pytest
import torch
from conftest import SMALL
from PIL import Image

from deployment.export import ExportError
from deployment.export.accuracy import class_scores, compare, compare_masks, mask_scores, read_label, read_labels
from deployment.export.convert import first_good
from deployment.photos import Preprocessor


def test_scores_leave_out_void_by_its_name():
    label = torch.tensor([[[0, 0, 1, 1], [1, 1, 3, 3]]], dtype=torch.uint8)
    mask = torch.tensor([[[0, 1, 1, 1], [1, 2, 0, 3]]], dtype=torch.uint8)
    scores = mask_scores([mask], [label], SMALL.classes)
    assert scores["pixel_accuracy"] == pytest.approx(4 / 6)
    assert scores["mean_iou"] == pytest.approx((1 / 2 + 3 / 5) / 2)
    assert mask_scores([mask], [label], ["a", "b", "c", "d"])["pixel_accuracy"] == pytest.approx(5 / 8)


def test_scores_of_each_class_that_occurs():
    label = torch.tensor([[0, 0, 1, 1], [1, 1, 3, 3]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 2, 0, 3]])
    scores = class_scores([mask], [label], ["road", "car", "bus", "Void"])
    assert list(scores) == ["road", "car"], "nothing is a bus, and void is no class"
    assert scores["road"] == pytest.approx({"share": 2 / 6, "recall": 1 / 2, "iou": 1 / 2})
    assert scores["car"] == pytest.approx({"share": 4 / 6, "recall": 3 / 4, "iou": 3 / 5})


def test_without_labels_agreement_alone_is_reported():
    a, b = torch.zeros(1, 4, 4, dtype=torch.uint8), torch.zeros(1, 4, 4, dtype=torch.uint8)
    b[0, 0, 0] = 1
    assert compare_masks([a, a], [a, b], None, SMALL.classes) == {"photos": 2, "agreement": 31 / 32}


def test_the_drop_is_the_larger_of_both():
    label = torch.tensor([[[0, 0, 0, 0, 0, 0, 0, 0, 0, 1]]], dtype=torch.uint8)
    converted = torch.zeros_like(label)
    report = compare_masks([label], [converted], [label], ["a", "b"])
    assert report["pixel_accuracy"] == {"original": 1, "converted": 0.9}
    assert report["mean_iou"] == {"original": 1, "converted": 0.45}
    assert (report["agreement"], report["drop"]) == (0.9, 55)


@pytest.mark.parametrize(
    ("labels", "drop"),
    [
        ([20.0], 5),  # a single one has no range: relative to its size
        ([20.0, 20.0], 5),
        ([0.0], 100),
        ([10.0, 20.0], 10),
    ],
)
def test_errors_are_relative_to_the_range_of_the_labels_if_they_have_one(labels, drop):
    config = dataclasses.replace(SMALL, task="regression", n_classes=1, classes=[])
    truth = [torch.tensor([[label]]) for label in labels]
    report = compare(config, truth, [label + 1 for label in truth], truth)
    assert report["mean_error"] == {"original": 0, "converted": 1} and report["drop"] == drop


@pytest.mark.parametrize(("value", "message"), [(7, "class 7, but the model knows 4 classes"), (None, "no label")])
def test_a_label_that_cannot_be_used_is_named(value, message, tmp_path):
    (tmp_path / "labels").mkdir()
    if value is not None:
        Image.new("L", (64, 64), value).save(tmp_path / "labels" / "a_P.png")
    with pytest.raises(ExportError, match=message) as error:
        read_label(tmp_path / "images" / "a.png", Preprocessor(SMALL))
    assert "a_P.png" in str(error.value)


@pytest.mark.parametrize("task", ["classification", "multi-label", "regression", "points"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_answers_that_are_no_numbers_are_refused(task, value):
    config = dataclasses.replace(SMALL, task=task, n_classes=2, classes=["a", "b"], threshold=0.5)
    good = [torch.tensor([[0.9, 0.1]]) for _ in range(50)]
    bad = [*good[1:], torch.tensor([[0.9, value]])]
    for labels in (None, good):
        with pytest.raises(ExportError, match="for 1 of 50 photos the converted model answers with NaN or infinity"):
            compare(config, good, bad, labels)
        with pytest.raises(ExportError, match="for 1 of 50 photos the original model answers with NaN or infinity"):
            compare(config, bad, good, labels)


def test_labels_that_are_void_everywhere_measure_nothing():
    mask, void = torch.zeros(1, 4, 4, dtype=torch.uint8), torch.full((1, 4, 4), 3, dtype=torch.uint8)
    with pytest.raises(ExportError, match="void everywhere"):
        compare_masks([mask], [mask], [void], SMALL.classes)


def test_a_limit_that_is_no_number_lets_nothing_pass():
    with pytest.raises(ExportError, match="more than --max-drop nan"):
        first_good([object()], lambda _: {"photos": 1, "agreement": 1.0, "drop": 0.0}, "bf16", math.nan)


def test_labels_as_excel_writes_them_are_read(tmp_path):
    photos = [tmp_path / "0.png", tmp_path / "1.png"]
    (tmp_path / "labels.csv").write_text("0.png,Tree\n1.png,Sky\n", encoding="utf-8-sig")
    config = dataclasses.replace(SMALL, task="classification")
    labels = read_labels(photos, tmp_path, Preprocessor(config))
    assert [label.argmax().item() for label in labels] == [2, 0]
