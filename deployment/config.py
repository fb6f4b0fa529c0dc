"""What serving must know of a learner: the section `handler` of `model-config.yaml`, as one frozen dataclass."""

from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

TASKS = ("segmentation", "classification", "multi-label", "regression", "points")


@dataclass(frozen=True)
class Config:
    """A served model. `deployment.export` reads it off the learner and writes it; nobody has to type it."""

    # the network: the arguments of DynamicUnetDIY, or of the program fastunet.pt2 its outputs and its size
    arch: str | None  # name of a torchvision model, whose body is the encoder; None: the network is a program
    n_classes: int  # channels of the logits
    img_size: tuple[int, int]  # (height, width) of what the network was built for
    options: dict = field(default_factory=dict)  # all other arguments that differ from their defaults
    sides: list | None = None  # least and greatest height and width of images of their own size; None: no limits

    # from a file to pixels: see photos.Preprocessor
    channels: int = 3  # of an image as it is opened: 3 for RGB, 1 for gray
    dtype: str = "uint8"  # of its pixels
    opener: bool = False  # the learner's own opening, in open_image.py
    decode: str = "exact"  # fast: large JPEGs at a fraction of their size, which is not bit for bit as the learner does
    resize: dict | None = None  # the item transforms; None: images keep their own size

    # from pixels to what the network takes, as part of the served model: see runtime.pytorch.ServedModel
    affine: list[dict] = field(default_factory=list)  # the batch transforms that resample an image
    divisor: float = 255.0  # of the pixels; 1: they are taken as they are
    mean: list[float] | None = None  # Normalize, one value per channel; None: the learner does not normalize
    std: list[float] | None = None

    # from logits to an answer: see runtime.pytorch.decode and answers.make_answer
    task: str = "segmentation"  # or one of the other TASKS
    activation: str | None = "softmax"  # of the loss function
    threshold: float | None = None  # None: the class of the highest value; a number: each class whose value is above it
    classes: list[str] = field(default_factory=list)  # a name for each value of a mask, or for each probability

    # serving
    runtime: str = "eager"  # what computes: see runtime.PRECISIONS
    precision: str = "fp32"
    max_pixels: int | None = None  # of the images of one request; None: 50 million, or 4 million at their own size
    accuracy: dict | None = None  # what the export measured when it converted the model
    exported_with: dict = field(default_factory=dict)  # versions of python, torch and fastai

    def takes_size(self, size: tuple[int, int]) -> bool:
        """Whether the network takes an image of `size` (width, height): see `sides`."""
        limits = zip(size[::-1], self.sides or [], strict=False)
        return all((low or 0) <= side and (high is None or side <= high) for side, (low, high) in limits)

    @property
    def pixels_size(self) -> tuple[int, int] | None:
        """(height, width) of an image as the item transforms leave it; None: images keep their own size."""
        return (self.resize or {}).get("crop") or (self.resize or {}).get("size")

    @property
    def model_file(self) -> str:
        """The file that holds the network: the weights of a `DynamicUnetDIY`, or a program of `torch.export`."""
        return "fastunet.pth" if self.arch else "fastunet.pt2"

    @property
    def keeps_image_size(self) -> bool:
        """Whether the network sees every image at the image's own size."""
        return not self.resize and not any(options["size"] for options in self.affine)


def read_config(folder: Path | str) -> Config:
    """The configuration in `folder`/model-config.yaml.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, has no section `handler`, or a setting there is missing or unknown.
    """
    path = Path(folder, "model-config.yaml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
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
