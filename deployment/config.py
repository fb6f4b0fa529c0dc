"""What serving must know of a learner: the section `handler` of `model-config.yaml`, as one frozen dataclass."""

from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

TASKS = ("segmentation", "classification", "multi-label", "regression", "points")


@dataclass(frozen=True)
class Config:
    """A served model. `deployment.export` reads it off the learner and writes it; nobody has to type it."""

    # the network: the arguments of DynamicUnetDIY, or of the program fastunet.pt2 its channels and its size
    arch: str | None  # name of a torchvision model, whose body is the encoder; None: the network is a program
    n_classes: int  # channels of the logits
    img_size: tuple[int, int]  # (height, width) that the network was built for
    options: dict = field(default_factory=dict)  # all other arguments that differ from their defaults

    # from a photo to a tensor: see photos.Preprocessor
    resize: dict | None = None  # the item transforms; None: photos keep their own size
    affine: list[dict] = field(default_factory=list)  # the batch transforms that sample a photo anew
    mean: list[float] | None = None  # Normalize, one value per channel; None: the learner does not normalize
    std: list[float] | None = None

    # from logits to an answer: see runtime.decode and answers.make_answer
    task: str = "segmentation"  # or one of the other TASKS
    activation: str | None = "softmax"  # of the loss function
    threshold: float | None = None  # None: the class of the highest value; a number: each class whose value is above it
    classes: list[str] = field(default_factory=list)  # a name for each value of a mask, or for each probability

    # serving
    runtime: str = "eager"  # what computes: see runtime.PRECISIONS
    precision: str = "fp32"
    max_pixels: int | None = None  # of the photos of one request; None: 50 million, or 4 million at their own size
    accuracy: dict | None = None  # what the export measured when it converted the model
    exported_with: dict = field(default_factory=dict)  # versions of python, torch and fastai

    @property
    def n_in(self) -> int:
        """Channels of a photo: 3 for RGB, 1 for gray."""
        return self.options.get("n_in", 3)

    @property
    def model_file(self) -> str:
        """The file that holds the network: the weights of a `DynamicUnetDIY`, or a program of `torch.export`."""
        return "fastunet.pth" if self.arch else "fastunet.pt2"

    @property
    def keeps_photo_size(self) -> bool:
        """Whether the network sees every photo at the photo's own size."""
        return not self.resize and not any(options["size"] for options in self.affine)


def read_config(folder: Path | str) -> Config:
    """The configuration in `folder`/model-config.yaml.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML, has no section `handler`, or a setting there is missing or unknown.
    """
    path = Path(folder, "model-config.yaml")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    section = content.get("handler") if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"{path} has no section `handler`: write it with `python -m deployment.export`")
    if unknown := section.keys() - {f.name for f in fields(Config)}:
        raise ValueError(f"{path}: unknown setting {', '.join(sorted(map(str, unknown)))} in the section `handler`")
    if missing := {"arch", "n_classes", "img_size"} - section.keys():
        raise ValueError(f"{path}: {', '.join(sorted(missing))} is missing in the section `handler`")
    if section.get("task", TASKS[0]) not in TASKS:
        raise ValueError(f"{path}: the task must be one of: {', '.join(TASKS)}")
    return Config(**section)
