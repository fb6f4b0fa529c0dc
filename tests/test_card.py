"""MODEL_CARD.md, as the Hugging Face Hub reads it."""

import dataclasses
import gzip
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from deployment.config import read_config
from deployment.export import ExportError, export_learner, load_learner
from deployment.export.card import last_validation, write_card

LEARNERS = Path(__file__).parent / "learners"


def card_in(folder: Path) -> tuple[dict, str]:
    """The facts and the text of the card in `folder`."""
    card = ModelCard((folder / "MODEL_CARD.md").read_text(encoding="utf-8"))
    return card.data.to_dict(), card.text


def test_card_says_what_the_export_knows(learner, exported):
    facts, text = card_in(exported)
    config = read_config(exported)
    assert facts == {
        "library_name": "pytorch",
        "pipeline_tag": "image-segmentation",
        "tags": ["fastai", "torchserve", "segmentation", "resnet18"],
    }
    for fact in (
        "# A fastai model for segmentation",
        "as 96 × 64 pixels (width × height), of 3 channels",
        ", ".join(config.classes),
        f"- data: {len(learner.dls.train_ds)} images to train on, {len(learner.dls.valid_ds)} to validate on",
        "- loss: fastai.losses.CrossEntropyLossFlat",
        "Not measured.",
        "fp32 on eager; the network is `DynamicUnetDIY` on resnet18",
        "- proven on 9 images",
        f"- torch {config.exported_with['torch']}",
    ):
        assert fact in text, text
    assert "license" not in facts, "nobody told"


def test_card_of_a_learner_from_a_file_does_not_guess_its_data(tmp_path):
    (tmp_path / "learner.pkl").write_bytes(gzip.decompress((LEARNERS / "python3.11.pkl.gz").read_bytes()))
    learner = load_learner(tmp_path / "learner.pkl")
    write_card(learner, dataclasses.replace(a_config(), classes=["a", "b"]), tmp_path, ["proven"])
    _, text = card_in(tmp_path)
    assert "- data: a learner's file does not say which; add it here" in text and "\na, b\n" in text


def a_config(**changes):
    from deployment.config import Config

    return dataclasses.replace(Config("resnet18", 2, [64, 96]), **changes)


@pytest.mark.parametrize(
    ("changes", "tag", "sentence"),
    [
        ({"task": "classification"}, "image-classification", "It gives one class of an image"),
        ({"task": "multi-label", "threshold": 0.3}, "image-classification", "probability is above 0.3"),
        ({"task": "points", "n_classes": 4}, "keypoint-detection", "It gives points in an image, 2 of them"),
        ({"task": "regression", "n_classes": 1}, None, "It gives numbers for an image, 1 of them"),
    ],
)
def test_every_task_has_its_card(changes, tag, sentence, learner, tmp_path):
    write_card(learner, a_config(**changes), tmp_path, ["proven"])
    facts, text = card_in(tmp_path)
    assert facts.get("pipeline_tag") == tag and sentence in text


def test_what_a_precision_cost_is_in_the_card(learner, tmp_path):
    report = {"photos": 10, "agreement": 0.99, "mean_iou": {"original": 0.81, "converted": 0.8}, "drop": 1.0}
    write_card(learner, a_config(runtime="openvino", precision="int8", accuracy=report), tmp_path, ["proven"])
    facts, text = card_in(tmp_path)
    assert facts["library_name"] == "openvino"
    assert "- mean_iou: 0.8100 before, 0.8000 after" in text and "- 1.00 points lost by int8 on openvino" in text


def test_what_the_learner_noted_in_training():
    class Recorder:
        metric_names = ["epoch", "train_loss", "valid_loss", "dice", "time"]
        values = [[0.9, 0.8, 0.4], [0.5, 0.6, 0.7]]

    noted = last_validation(SimpleNamespace(cbs=[Recorder()]))
    assert noted == (2, {"train_loss": 0.5, "valid_loss": 0.6, "dice": 0.7})
    assert last_validation(SimpleNamespace(cbs=[])) is None


def test_no_card_without_a_model(learner, tmp_path):
    with pytest.raises(ExportError):
        export_learner(learner, tmp_path / "store", decode="fast")
    assert not (tmp_path / "store").exists()
