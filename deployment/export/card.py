"""Write MODEL_CARD.md, in the form that the Hugging Face Hub reads: facts in YAML, then what a person asks first."""

from pathlib import Path

import yaml

from ..config import Config
from .accuracy import report_text
from .learner import name_of

PIPELINES = {  # the Hub's name of a task; it has none for regression
    "segmentation": "image-segmentation",
    "classification": "image-classification",
    "multi-label": "image-classification",
    "points": "keypoint-detection",
}
GIVES = {
    "segmentation": "a class for each pixel",
    "classification": "one class of an image, and the probability of each",
    "multi-label": "each class whose probability is above {threshold}, and all probabilities",
    "regression": "numbers for an image, {n} of them",
    "points": "points in an image, {n} of them",
}


def write_card(learner, config: Config, folder: Path | str, proof: list[str]) -> None:
    """Write `folder`/MODEL_CARD.md of the model of `config` that `learner` became; `proof` says what was proven.

    Where a line would have to be guessed, such as the license or what the learner was trained on, the card says that
    nobody told.
    """
    front: dict[str, object] = {"library_name": "openvino" if config.runtime == "openvino" else "pytorch"}
    if config.task in PIPELINES:
        front["pipeline_tag"] = PIPELINES[config.task]
    front["tags"] = ["fastai", "torchserve", config.task, *([config.arch] if config.arch else [])]
    network = f"`DynamicUnetDIY` on {config.arch}" if config.arch else "a program of `torch.export`"
    sections = {
        f"A fastai model for {config.task}": what_it_does(config),
        "Classes": ", ".join(config.classes) or "none: it gives numbers",
        "Training": "\n".join(f"- {line}" for line in training(learner)),
        "Accuracy": accuracy(learner, config),
        "Precision and runtime": f"{config.precision} on {config.runtime}; the network is {network}.",
        "Proof": "\n".join(f"- {line}" for line in proof),
        "Versions": "\n".join(f"- {name} {version}" for name, version in config.exported_with.items()),
    }
    text = f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n"
    for level, (title, body) in enumerate(sections.items()):
        text += f"\n{'##' if level else '#'} {title}\n\n{body}\n"
    Path(folder, "MODEL_CARD.md").write_text(text, encoding="utf-8")


def what_it_does(config: Config) -> str:
    """Task and sizes, in sentences."""
    n = config.n_classes // 2 if config.task == "points" else config.n_classes
    gives = GIVES[config.task].format(threshold=config.threshold, n=n)
    h, w = config.img_size
    size = "at its own size" if config.keeps_image_size else f"as {w} × {h} pixels (width × height)"
    return f"It gives {gives}. The network sees an image {size}, of {config.options.get('n_in', 3)} channels."


def training(learner) -> list[str]:
    """What `learner` knows of its training."""
    lines = [f"loss: {name_of(learner.loss_func)}"]
    try:
        sizes = len(learner.dls.train_ds), len(learner.dls.valid_ds)
    except Exception:  # of data sets that are none any more: any
        sizes = (0, 0)
    if any(sizes):
        lines.append(f"data: {sizes[0]} images to train on, {sizes[1]} to validate on")
    else:
        lines.append("data: a learner's file does not say which; add it here")
    return lines


def accuracy(learner, config: Config) -> str:
    """What the export measured on labelled photos, and what the learner noted when it was trained."""
    lines = []
    if config.accuracy:
        lines += [f"- {line}" for line in report_text(config.accuracy).splitlines()]
        if "drop" in config.accuracy:
            lines.append(f"- {config.accuracy['drop']:.2f} points lost by {config.precision} on {config.runtime}")
    if noted := last_validation(learner):
        epochs, values = noted
        words = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        lines.append(f"- in training, after {epochs} epochs: {words}")
    return "\n".join(lines) or "Not measured."


def last_validation(learner) -> tuple[int, dict[str, float]] | None:
    """How many epochs the recorder of `learner` has of its last training, and the values of the last one by name."""
    recorder = next((callback for callback in learner.cbs if type(callback).__name__ == "Recorder"), None)
    names = [name for name in getattr(recorder, "metric_names", None) or [] if name not in ("epoch", "time")]
    rows = getattr(recorder, "values", None) or []
    if not rows or len(rows[-1]) != len(names):
        return None
    return len(rows), {name: float(value) for name, value in zip(names, rows[-1], strict=True) if value is not None}
