"""Read off a learner what happens to an image at validation time: how it is opened, its item and batch transforms.

A transform is known by its class, or refused by its name; nothing is judged by what it does to one picture.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from PIL import Image

from .learner import ExportError, name_of, require

OPEN_IMAGE = """\
import io
from PIL import Image

def open_image(data: bytes):  # the bytes of a file; what the learner's own steps make of them, before its Resize
    return Image.open(io.BytesIO(data)).convert("RGB")  # or an array (height, width, channels)
"""


@dataclass
class ImagePipeline:
    """What a learner does to an image between the file and the network."""

    skip: int = 0  # steps at the beginning that look up a file by what is not one; `learn.predict(FILE)` goes without
    resize: dict | None = None  # as in Config, and so the others
    affine: list[dict] = field(default_factory=list)
    divisor: float = 1.0
    mean: list[float] | None = None
    std: list[float] | None = None
    size: list[int] | None = None  # (height, width) that the network sees; None: the image's own
    own: list[Callable] = field(
        default_factory=list
    )  # what comes after, from the reader's first own batch transform on


def read_pipeline(dls, sample: Path, opens_itself: bool) -> ImagePipeline:
    """The pipeline of `dls`.

    Args:
        sample: an image file, to see what looks up a file and what opens it.
        opens_itself: the reader gives the opening, and all item transforms up to the last unknown one, as a function.

    Raises:
        ExportError: a step is not known; the message names it.
    """
    pipeline = ImagePipeline()
    check_data(dls)
    pipeline.skip = read_opening(dls, sample, opens_itself)
    scaled = read_item_transforms(dls, pipeline, opens_itself)
    read_batch_transforms(dls, pipeline, scaled)
    return pipeline


def check_data(dls) -> None:
    """Raises ExportError unless `dls` holds one image for each item, in fastai's own data sets."""
    from fastai.data.core import Datasets

    if not isinstance(dls.valid_ds, Datasets):
        what = "tabular data are" if "tabular" in type(dls.valid_ds).__module__ else f"{name_of(dls.valid_ds)} is"
        raise ExportError(f"{what} not supported: only data of a DataBlock or of DataLoaders made with one are")
    if dls.n_inp != 1:
        raise ExportError(f"learners with {dls.n_inp} inputs are not supported, only with a single image as input")


def read_opening(dls, sample: Path, opens_itself: bool) -> int:
    """How many steps `learn.predict(FILE)` must leave out, since they look up what is not a file.

    Raises:
        ExportError: an image is opened in a way that is not fastai's own.
    """
    from fastai.vision.core import PILBase

    chain = dls.valid_ds.tls[0]
    for step in chain.tfms.fs:
        require(step, "the opening of images")
        require(function_of(step), "the opening of images")
    kinds = [kind for one in chain.types for kind in (one if isinstance(one, list | tuple) else [one])]
    for kind in kinds:
        require(kind, "the opening of images")
    if any("text" in kind.__module__ for kind in kinds):
        raise ExportError("the learner's input is text, which is not supported")
    try:
        first = chain.infer_idx(sample)
    except AssertionError:
        raise ExportError("learn.predict takes no file: the learner's items are none, and nothing opens one") from None
    skip = 0
    for i, step in enumerate(chain.tfms.fs[first:], first):
        function = function_of(step)
        if is_fastai_opener(function) or is_noop(function):
            continue
        if opens_itself:
            break
        if i + 1 < len(chain.tfms.fs) and looks_up(function, sample):
            skip = i + 1
        else:
            raise own_opening(f"the learner opens images with {name_of(function)}, which is not fastai's own opening")
    if not opens_itself and not any(isinstance(kind, type) and issubclass(kind, PILBase) for kind in kinds):
        raise own_opening(f"the learner's input is not an image that fastai opens but {name_of(kinds[-1])}")
    return skip


def own_opening(reason: str) -> ExportError:
    """The refusal of a learner that opens images itself: it says what would help."""
    return ExportError(f"{reason}: give it as open_image(data) with --open FILE.py", hint=OPEN_IMAGE)


def function_of(step):
    """The function of a fastai transform that wraps one; else the transform itself."""
    from fasttransform import Transform

    if type(step) is not Transform or "encodes" not in vars(step):
        return step
    methods = [method.implementation for method in step.encodes.methods]
    return methods[0] if len(methods) == 1 else step


def is_fastai_opener(function) -> bool:
    """Whether `function` is `PILImage.create` or `PILImageBW.create`."""
    from fastai.vision.core import PILImage, PILImageBW

    owner = getattr(function, "__self__", None)  # by name: a learner's file may hold the function's code
    return owner in (PILImage, PILImageBW) and name_of(function) == "fastai.vision.core.PILBase.create"


def is_noop(function) -> bool:
    """Whether `function` is fastcore's that changes nothing."""
    from fastcore.basics import noop

    return function is noop or getattr(function, "__name__", "") == "noop"


def looks_up(function, sample: Path) -> bool:
    """Whether `function`, the first of several steps, finds a file by something else: then it knows no `sample`.

    What makes an image of that, or fails as decoders do, opens it.
    """
    if not callable(function) or isinstance(function, type):
        return False
    try:
        found = function(sample)
    except (KeyError, IndexError, TypeError, AttributeError):  # of a table that is asked for a file's name
        return True
    except Exception:  # of a decoder: any
        return False
    return isinstance(found, str | Path)


def read_item_transforms(dls, pipeline: ImagePipeline, opens_itself: bool) -> bool:
    """Set `resize`, `size` and `divisor` of `pipeline`; return whether images are scaled already.

    Raises:
        ExportError: an item transform is not known.
    """
    from fastai.data.transforms import IntToFloatTensor, ToTensor
    from fastai.vision.augment import CropPad, RandomCrop, RandomResizedCrop, RatioResize, Resize
    from fastai.vision.core import PointScaler

    steps, scaled = {}, False
    for transform in [*dls.valid.after_item.fs, *dls.valid.before_batch.fs]:
        kind = type(transform)
        require(transform, "a transform of the images")
        if getattr(transform, "split_idx", None) == 0 or kind in (ToTensor, PointScaler) or is_noop(transform):
            continue
        if kind is IntToFloatTensor and not scaled:
            scaled, pipeline.divisor = True, float(transform.div)
        elif kind is Resize and not steps:
            pipeline.size = [transform.size[1], transform.size[0]]
            method, pad_mode = transform.method, transform.pad_mode
            steps = {"size": pipeline.size, "method": method, "pad_mode": pad_mode, "resample": filter_name(transform)}
        elif kind is RandomResizedCrop and not steps:
            pipeline.size = [transform.size[1], transform.size[0]]
            extra = math.ceil(max(pipeline.size) * transform.val_xtra / 8) * 8
            larger = [side + extra for side in pipeline.size]
            steps = {"size": larger, "method": "squish", "resample": filter_name(transform), "crop": pipeline.size}
        elif kind in (CropPad, RandomCrop) and "crop" not in steps:
            pipeline.size = [transform.size[1], transform.size[0]]
            steps |= {"crop": pipeline.size, "crop_pad_mode": getattr(transform, "pad_mode", "zeros")}
        elif kind is RatioResize:
            raise ExportError("RatioResize is not supported: fastai cuts its images at random, at validation too")
        elif not acts_on_images(transform):
            continue
        elif opens_itself:  # the reader's function does this, and all before
            steps, pipeline.size, scaled, pipeline.divisor = {}, None, False, 1.0
        else:
            name = name_of(function_of(transform))
            raise own_opening(f"the item transform {name} is not one that serving knows")
    pipeline.resize = steps or None
    return scaled


def filter_name(transform) -> str:
    """The name of the filter that `transform` resizes with, as in Config."""
    return Image.Resampling(transform.mode).name.lower()


def acts_on_images(transform) -> bool:
    """Whether fastai's dispatch finds a method of `transform` for an image, or for all that an item consists of."""
    from fastai.torch_core import TensorImage
    from fastai.vision.core import PILImage
    from fasttransform import Transform

    if not isinstance(transform, Transform) or type(transform).__call__ is not Transform.__call__:
        return True
    image = PILImage.create(np.zeros((4, 4, 3), np.uint8))
    return any(method_for(transform, x) is not None for x in (image, TensorImage(torch.zeros(1, 3, 4, 4))))


def method_for(transform, x) -> Callable | None:
    """What `transform` does to something of the type of `x`, as a plain function; None: nothing.

    fastai's own dispatch fails on the tensors with which torch.export captures a program.
    """
    from plum import NotFoundLookupError

    encodes = getattr(transform, "encodes", None)
    if encodes is None:
        return None
    function, before = encodes, ()
    if isinstance(encodes, MethodType):
        function, before = encodes._f, (transform,)  # pyrefly: ignore[missing-attribute]  # plum's
    try:
        method = function.resolve_method((*before, x))[0]
    except NotFoundLookupError:
        return None
    return lambda x: method(*before, x)


def read_batch_transforms(dls, pipeline: ImagePipeline, scaled: bool) -> None:
    """Set `affine`, `divisor`, `mean`, `std`, `size` and `own` of `pipeline`.

    Raises:
        ExportError: a transform is random, or comes where it cannot be taken over.
    """
    from fastai.data.transforms import IntToFloatTensor, Normalize
    from fastai.torch_core import TensorImage
    from fastai.vision.augment import AffineCoordTfm, RandomResizedCropGPU, RandTransform

    for transform in dls.valid.after_batch.fs:
        kind = type(transform)
        require(transform, "a transform of the images")
        # These note in `split_idx` what they saw last, and act on every split.
        affine = isinstance(transform, AffineCoordTfm) and kind.__module__ == AffineCoordTfm.__module__
        if not affine and (getattr(transform, "split_idx", None) == 0 or is_noop(transform)):
            continue
        if affine or kind is RandomResizedCropGPU:
            if not scaled or pipeline.mean is not None or pipeline.own:
                raise ExportError(f"the batch transform {name_of(transform)} must come before Normalize and your own")
            read_affine(transform, pipeline)
        elif isinstance(transform, RandTransform):
            raise ExportError(f"the batch transform {name_of(transform)} is random, at validation time too")
        elif kind is IntToFloatTensor and not scaled and not pipeline.own:
            scaled, pipeline.divisor = True, float(transform.div)
        elif kind is Normalize and pipeline.mean is None and not pipeline.own and per_channel(transform):
            pipeline.mean, pipeline.std = transform.mean.flatten().tolist(), transform.std.flatten().tolist()
        elif (method := method_for(transform, TensorImage(torch.zeros(1, 3, 4, 4)))) is not None:
            require_deterministic(transform, method)
            pipeline.own.append(method)
            scaled = True


def read_affine(transform, pipeline: ImagePipeline) -> None:
    """Append to `pipeline` what an augmentation that resamples images does at validation time."""
    from fastai.vision.augment import RandomResizedCropGPU

    kind = type(transform)
    if kind is RandomResizedCropGPU:
        if any(earlier["size"] for earlier in pipeline.affine):
            raise ExportError("RandomResizedCropGPU comes after a transform with a size: not supported")
        options: dict[str, Any] = {"pad_mode": "reflection", "align_corners": True}
        options |= {"ratio": [*map(float, transform.ratio)], "scale": float(transform.valid_scale)}
    else:
        options = {"pad_mode": transform.pad_mode, "align_corners": bool(transform.align_corners)}
    size = transform.size
    if size is not None:
        size = pipeline.size = [size, size] if isinstance(size, int) else list(size)
    pipeline.affine.append({"size": size, "mode": transform.mode} | options)


def per_channel(normalize) -> bool:
    """Whether `normalize` has one mean and one deviation for each channel."""
    return normalize.mean.ndim == 4 and normalize.mean.numel() == normalize.mean.shape[1]


def require_deterministic(transform, method: Callable) -> None:
    """Raises ExportError where `method`, of `transform`, draws random numbers, or gives two answers to one question."""
    x = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    try:
        before = random_states()
        first, second = method(x.clone()), method(x.clone())
        after = random_states()
    except Exception:  # it takes other images than these: the proof will tell what it does
        return
    if before != after or not torch.equal(first, second):
        raise ExportError(f"the batch transform {name_of(transform)} is random, at validation time too")


def random_states() -> tuple:
    """How far the generators of Python, NumPy and torch are: equal, unless something was drawn in between."""
    state = np.random.get_state(legacy=False)["state"]
    return random.getstate(), state["key"].tolist(), state["pos"], torch.get_rng_state().tolist()
