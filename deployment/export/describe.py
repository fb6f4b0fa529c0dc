"""Read off a learner all that serving must know: the network, what happens to a photo, the decoding, the names."""

import contextlib
import inspect
import math
import platform

import numpy as np
import torch
import torchvision
from PIL import Image

from ..config import Config
from ..model import DynamicUnetDIY, create_body
from .learner import ExportError, name_of, network, photo_class, require
from .tasks import describe_task


def describe_learner(learner) -> Config:
    """All that serving must know of `learner`.

    Raises:
        ExportError: the learner holds something that cannot be reproduced; the message names it.
    """
    import fastai

    for callback in learner.cbs:
        require(callback, "a callback of the learner")
    model = network(learner)
    photos = describe_photos(learner.dls)
    n_in, size = {"RGB": 3, "L": 1}[photos.pop("mode")], photos.pop("img_size")
    shape, size = output_shape(model, n_in, [size] if size else [[96, 128], [224, 224]])
    described = {"n_classes": shape[1] if len(shape) > 1 else 1, "img_size": size, "arch": None}
    described["options"] = {} if n_in == 3 else {"n_in": n_in}
    if is_unet(model):
        with contextlib.suppress(ExportError, AttributeError, LookupError, StopIteration):  # else it is a program
            described = describe_unet(model, getattr(getattr(learner, "arch", None), "__name__", None), size)
    return Config(
        **described,
        **photos,
        **describe_task(learner, shape),
        exported_with={
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "fastai": fastai.__version__,
        },
    )


def output_shape(model, n_in: int, sizes: list[list[int]]) -> tuple[torch.Size, list[int]]:
    """The shape of what `model` gives for two photos of the first of `sizes` (height, width) that it takes, and that.

    Raises:
        ExportError: it takes none, or gives something else than a tensor.
    """
    weight = next(model.parameters())
    for size in sizes:
        try:
            with torch.no_grad():
                output = model.eval()(torch.zeros(2, n_in, *size, device=weight.device, dtype=weight.dtype))
        except Exception as error:  # of the network: any
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            continue
        if isinstance(output, torch.Tensor) and len(output) == 2 and output.ndim in (1, 2, 4):
            return output.shape, size
        what = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ExportError(f"the network gives {what} for two photos, of which no answer can be made")
    h, w = sizes[0]
    raise ExportError(f"the network takes no photo of {n_in} channels and {h} × {w} pixels: {reason}")


def is_unet(model) -> bool:
    from fastai.vision.models.unet import DynamicUnet

    return isinstance(model, DynamicUnet)


def describe_unet(model, hint: str | None, img_size: list[int] | None) -> dict:
    """`arch`, `n_classes`, `img_size` and `options` of the `DynamicUnetDIY` that equals fastai's `model`.

    Args:
        hint: the architecture's name, where the learner knows it.
        img_size: (height, width) the learner's photos have; None where they keep their own.
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
    options = {
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
    defaults = DynamicUnetDIY.__init__.__kwdefaults__
    network = {
        "arch": arch,
        "n_classes": next(last.parameters()).shape[0],
        "img_size": list(img_size or DynamicUnetDIY.__init__.__defaults__[2]),
        "options": {name: value for name, value in options.items() if value != defaults[name]},
    }
    try:
        with torch.device("meta"):
            copy = DynamicUnetDIY(network["arch"], network["n_classes"], network["img_size"], **network["options"])
    except ValueError as e:
        raise ExportError(f"the network cannot be rebuilt for photos of {network['img_size']}: {e}") from e
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
        raise ExportError("the encoder is none of torchvision")
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


def describe_photos(dls) -> dict:
    """What `dls` does to a photo at validation time: `mode`, `img_size`, `resize`, `mean`, `std`, `affine`.

    Raises:
        ExportError: a transform changes photos in a way that serving cannot repeat; the message names it.
    """
    from fastai.data.core import Datasets
    from fastai.data.transforms import IntToFloatTensor, Normalize
    from fastai.vision.augment import (
        AffineCoordTfm,
        CropPad,
        RandomCrop,
        RandomResizedCrop,
        RandomResizedCropGPU,
        RatioResize,
        Resize,
    )
    from fastai.vision.core import PILImage, PILImageBW, TensorImage, TensorImageBW, ToTensor

    if not isinstance(dls.valid_ds, Datasets):
        what = "tabular data are" if "tabular" in type(dls.valid_ds).__module__ else f"{name_of(dls.valid_ds)} is"
        raise ExportError(f"{what} not supported: only data of a DataBlock or of DataLoaders made with one are")
    if dls.n_inp != 1:
        raise ExportError(f"learners with {dls.n_inp} inputs are not supported: one photo there must be")
    opener = photo_class(dls)
    if opener not in (PILImage, PILImageBW):
        raise ExportError(f"photos opened as {name_of(opener)} are not supported: only PILImage and PILImageBW are")

    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8)
    probe = opener.create(Image.fromarray(noise).convert(opener._open_args["mode"]))
    steps, size = {}, None
    for transform in [*dls.valid.after_item.fs, *dls.valid.before_batch.fs]:
        kind = type(transform)
        require(transform, "a transform of the photos")
        if kind is Resize and not steps:
            size = [transform.size[1], transform.size[0]]
            method, pad_mode, mode = transform.method, transform.pad_mode, Image.Resampling(transform.mode)
            steps = {"size": size, "method": method, "pad_mode": pad_mode, "resample": mode.name.lower()}
        elif kind is RandomResizedCrop and not steps:
            size = [transform.size[1], transform.size[0]]
            extra = math.ceil(max(size) * transform.val_xtra / 8) * 8
            mode = Image.Resampling(transform.mode).name.lower()
            steps = {"size": [s + extra for s in size], "method": "squish", "resample": mode, "crop": size}
        elif kind in (CropPad, RandomCrop) and "crop" not in steps:
            size = [transform.size[1], transform.size[0]]
            steps |= {"crop": size, "crop_pad_mode": getattr(transform, "pad_mode", "zeros")}
        elif kind is RatioResize:
            raise ExportError("RatioResize is not supported: fastai cuts its photos at random, at validation too")
        elif kind is not ToTensor and not changes_nothing(transform, probe):
            raise ExportError(f"the item transform {name_of(transform)} changes photos and is not supported here")

    x = ToTensor()(probe)[None].float() / 255
    batch = {"mean": None, "std": None, "affine": []}
    scaled = False
    for transform in dls.valid.after_batch.fs:
        kind = type(transform)
        require(transform, "a transform of the photos")
        if kind is IntToFloatTensor and transform.div == 255 and not scaled:
            scaled = True
        elif kind is RandomResizedCropGPU or (
            isinstance(transform, AffineCoordTfm) and kind.__module__ == AffineCoordTfm.__module__
        ):
            if not scaled or batch["mean"] is not None:
                raise ExportError(f"the batch transform {name_of(transform)} comes after Normalize: not supported")
            if kind is RandomResizedCropGPU:
                if any(earlier["size"] for earlier in batch["affine"]):
                    raise ExportError("RandomResizedCropGPU comes after a transform with a size: not supported")
                options = {"pad_mode": "reflection", "align_corners": True, "ratio": [*map(float, transform.ratio)]}
                options["scale"] = float(transform.valid_scale)
            else:
                options = {"pad_mode": transform.pad_mode, "align_corners": bool(transform.align_corners)}
            given = transform.size
            if given is not None:
                size = given = [given, given] if isinstance(given, int) else list(given)
            batch["affine"].append({"size": given, "mode": transform.mode} | options)
        elif kind is Normalize and batch["mean"] is None and scaled:
            if transform.mean.ndim != 4 or transform.mean.numel() != transform.mean.shape[1]:
                raise ExportError("Normalize has other statistics than one mean and one deviation per channel")
            batch |= {"mean": transform.mean.flatten().tolist(), "std": transform.std.flatten().tolist()}
        elif not changes_nothing(transform, x.as_subclass(TensorImage if opener is PILImage else TensorImageBW)):
            raise ExportError(f"the batch transform {name_of(transform)} changes photos and is not supported here")
    if not scaled:
        raise ExportError("the learner's photos are not scaled to 0..1 by IntToFloatTensor(div=255)")
    return {"mode": opener._open_args["mode"], "img_size": size, "resize": steps or None, **batch}


def changes_nothing(transform, probe) -> bool:
    """Whether a fastai transform leaves photos alone at validation time: it is for training, or masks, only."""
    if getattr(transform, "split_idx", None) == 0:
        return True
    before = np.array(probe)
    after = transform(probe, split_idx=1)
    return type(after) is type(probe) and np.array_equal(before, np.array(after))
