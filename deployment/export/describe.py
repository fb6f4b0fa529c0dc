"""Read off a learner all that serving must know: the network, what happens to an image, the decoding, the names."""

import contextlib
import dataclasses
import inspect
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image

from ..config import Config
from ..model import DynamicUnetDIY, create_body
from ..photos import to_array
from .learner import ExportError, name_of, require
from .predict import one_line, predict_file
from .tasks import describe_task, target
from .transforms import ImagePipeline

DTYPES = ("uint8", "uint16", "float32")  # of the pixels that a reader's own opener may return


def describe_learner(
    learner, model: torch.nn.Module, image: Path, pipeline: ImagePipeline, open_image: Callable | None = None
) -> Config:
    """All that serving must know of `learner`, whose network is `model`.

    Args:
        image: a file as the learner gets them: its size, channels and type are the model's.
        pipeline: what happens to an image.
        open_image: the reader's own opening.

    Raises:
        ExportError: the learner holds something that cannot be reproduced; the message names it.
    """
    import fastai

    for callback in learner.cbs:
        require(callback, "a callback of the learner")
    target(learner.dls)
    steps = predict_file(learner, model, image, pipeline.skip, decode=False)
    pixels = own_pixels(open_image, image) if open_image else to_array(steps.opened)
    logits = steps.logits
    if len(logits) != 1 or logits.ndim not in (1, 2, 4):
        raise ExportError(f"the network gives {tuple(logits.shape)} for one image, which serving cannot answer with")
    size, n_in = list(pipeline.size or steps.x.shape[-2:]), steps.x.shape[1]
    network: dict[str, Any] = {"n_classes": logits.shape[1] if logits.ndim > 1 else 1, "img_size": size, "arch": None}
    network["options"] = {} if n_in == 3 else {"n_in": n_in}
    if is_unet(model) and not pipeline.own:
        with contextlib.suppress(ExportError, AttributeError, LookupError, StopIteration):  # else it is a program
            network = describe_unet(model, getattr(getattr(learner, "arch", None), "__name__", None), size)
    return Config(
        **network,
        channels=pixels.shape[2],
        dtype=str(pixels.dtype),
        opener=open_image is not None,
        resize=pipeline.resize,
        affine=pipeline.affine,
        divisor=pipeline.divisor,
        mean=pipeline.mean,
        std=pipeline.std,
        **describe_task(learner, logits.shape),
        exported_with={
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "fastai": fastai.__version__,
        },
    )


def own_pixels(open_image: Callable, path: Path) -> np.ndarray:
    """The file at `path` as the reader's `open_image` returns it: (height, width, channels).

    Raises:
        ExportError: it fails, or returns something else than an image.
    """
    try:
        image = open_image(path.read_bytes())
    except Exception as error:  # of the reader's function: any
        raise ExportError(f"{path.name}: open_image fails ({one_line(error)})") from error
    pixels = to_array(image) if isinstance(image, np.ndarray | Image.Image) else None
    if pixels is None or pixels.ndim != 3 or str(pixels.dtype) not in DTYPES:
        what = f"{pixels.dtype} of shape {pixels.shape}" if pixels is not None else name_of(image)
        raise ExportError(f"{path.name}: open_image returned {what} and not an image of {', '.join(DTYPES)}")
    return pixels


def as_program(config: Config, channels: int) -> Config:
    """`config` for a program of `torch.export` in place of a `DynamicUnetDIY`; it takes `channels`."""
    return dataclasses.replace(config, arch=None, options={} if channels == 3 else {"n_in": channels})


def is_unet(model: torch.nn.Module) -> bool:
    """Whether `model` is what fastai's `unet_learner` makes."""
    from fastai.vision.models.unet import DynamicUnet

    return isinstance(model, DynamicUnet)


def describe_unet(model, hint: str | None, img_size: list[int]) -> dict:
    """`arch`, `n_classes`, `img_size` and `options` of the `DynamicUnetDIY` that equals fastai's `model`.

    Args:
        hint: the architecture's name, where the learner knows it.
        img_size: (height, width) of the learner's images.
    """
    encoder, _, _, middle, *rest = model.layers
    kinds = {type(layer).__name__: layer for layer in rest}
    blocks = [layer for layer in rest if type(layer).__name__ == "UnetBlock"]
    first = middle[0]
    last = next(layer for layer in reversed(rest) if type(layer).__name__ == "ConvLayer")
    n_in = next(p.shape[1] for p in encoder.parameters() if p.ndim == 4)
    arch, cut = find_arch(encoder, n_in, hint)
    norms = {"BatchNorm2d": "Batch", "InstanceNorm2d": "Instance"}
    norm = next((norms[type(layer).__name__] for layer in first if type(layer).__name__ in norms), None)
    if hasattr(first[0], "weight_g"):
        norm = "Weight"
    elif hasattr(first[0], "weight_orig"):
        norm = "Spectral"
    blur = [len(block.shuf) > 2 for block in blocks]
    sigmoid = kinds.get("SigmoidRange")
    options: dict[str, Any] = {
        "n_in": n_in,
        "cut": cut,
        "blur": any(blur),
        "blur_final": blur[-1] if any(blur) else True,
        "self_attention": any(type(block.conv2[-1]).__name__ == "SelfAttention" for block in blocks),
        "y_range": [float(sigmoid.low), float(sigmoid.high)] if sigmoid else None,
        "last_cross": "MergeLayer" in kinds,
        "act_cls": describe_activation(next(layer for layer in first if not list(layer.parameters()))),
        "norm_type": norm,
    }
    defaults = DynamicUnetDIY.__init__.__kwdefaults__ or {}
    network = {
        "arch": arch,
        "n_classes": next(last.parameters()).shape[0],
        "img_size": img_size,
        "options": {name: value for name, value in options.items() if value != defaults[name]},
    }
    try:
        with torch.device("meta"):
            copy = DynamicUnetDIY(network["arch"], network["n_classes"], network["img_size"], **network["options"])
    except ValueError as e:
        raise ExportError(f"the network cannot be rebuilt for images of {network['img_size']}: {e}") from e
    theirs, ours = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (model, copy))
    for name in [*theirs, *ours]:
        if theirs.get(name) != ours.get(name):
            found = f"shape {theirs.get(name)} instead of {ours.get(name)}"
            raise ExportError(f"the network is no plain DynamicUnet on {arch}: its weight {name} has {found}")
    return network


def find_arch(encoder, n_in: int, hint: str | None) -> tuple[str, int | list | None]:
    """The torchvision model, and the cut where it is not fastai's own, whose body has the weights of `encoder`."""
    models = torchvision.models
    sources = {type(module).__module__ for module in encoder.modules()}
    if sources & {"fastai.vision.models.xresnet"} or any(source.startswith("timm.") for source in sources):
        raise ExportError("the encoder is not one of torchvision's")
    names = models.list_models(module=models)
    families = sources & {models.get_model_builder(name).__module__ for name in names}
    families = families or {models.vgg.__name__, models.alexnet.__module__}  # these use torch's own layers alone
    names = [name for name in names if models.get_model_builder(name).__module__ in families]
    shapes = {k: v.shape for k, v in encoder.state_dict().items()}
    for name in sorted(names, key=lambda name: name != hint):  # the learner's own name first
        for cut in (None, len(encoder), ["features", len(encoder)]):
            try:
                with torch.device("meta"):
                    body = create_body(name, n_in, cut)
            except (ValueError, AttributeError):
                continue
            if len(body) == len(encoder) and {k: v.shape for k, v in body.state_dict().items()} == shapes:
                return name, cut
    raise ExportError(f"no torchvision model has the layers of this encoder ({hint or 'architecture unknown'})")


def describe_activation(layer) -> str | list:
    """The activation `layer` as `DynamicUnetDIY` takes it: its name in torch.nn, and its arguments if not default."""
    name = type(layer).__name__
    if type(layer) is not getattr(torch.nn, name, None):
        raise ExportError(f"the activation {type(layer).__module__}.{name} is not one of torch.nn")
    parameters = inspect.signature(type(layer).__init__).parameters
    values = {k: getattr(layer, k) for k, p in parameters.items() if k != "inplace" and hasattr(layer, k)}
    options = {k: v for k, v in values.items() if v != parameters[k].default}
    return [name, options] if options else name
