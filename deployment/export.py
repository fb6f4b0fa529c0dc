"""Export a fastai U-Net learner for serving: `python -m deployment.export LEARNER.pkl --out model_store`.

Everything that serving must know is read off the learner: the network's architecture and options, what happens to a
photo at validation time, how logits become a mask, the class names. Then the pure-PyTorch copy is proven equal, on
photos, through the complete pipeline of either side; only then are weights and configuration written.
"""

import argparse
import inspect
import math
import os
import pickle
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torchvision
import yaml
from PIL import Image

from deployment import runtime as runtimes
from deployment.handler import load_model, open_image, resize, to_tensor
from deployment.model import ACTIVATIONS, DynamicUnetDIY, create_body, decode

CONFIG_HEAD = """\
# TorchServe's configuration of this model, for `torch-model-archiver --config-file`.
# How many workers run is not said here: deployment/serve.py decides it by the machine's cores.
batchSize: 4         # requests handed to a worker together, at most; on a GPU 32, which go through the model as one
maxBatchDelay: 1     # ms that the first of them waits for others (0 would mean 100); those that come while the workers
                     # compute gather anyway, and are handed over with one message in place of several
responseTimeout: 120 # s until a worker that does not answer is restarted

# What deployment/handler.py must know of the learner, read off it by deployment/export.py.
"""


class ExportError(Exception):
    """The learner cannot be exported; the message says why, in one line."""


def export_learner(
    learner,
    out_dir: Path | str,
    *,
    check: Path | str | None = None,
    tolerance: float = 0.0,
    runtime: str = "eager",
    precision: str = "fp32",
    calibrate: Path | str | None = None,
    max_drop: float = 0.5,
) -> Path:
    """Write `fastunet.pth` and `model-config.yaml` of `learner` into `out_dir`, once they are proven; return `out_dir`.

    For the runtime `openvino` the converted model, `fastunet.xml` and `fastunet.bin`, is written too.

    Args:
        learner: a `fastai.learner.Learner` around a U-Net, as `unet_learner` makes it.
        out_dir: folder to write into; files already there are replaced whole, or left as they are.
        check: folder of photos to prove the copy on; default: generated photos of several sizes and modes.
        tolerance: greatest difference of a logit that is accepted, on a GPU only; on a CPU there is none.
        runtime, precision: what serves the model, see `deployment.runtime.PRECISIONS`.
        calibrate, max_drop: as in `deployment.runtime.convert`.

    Raises:
        ExportError: the learner holds something that cannot be reproduced, the copy's output differs, the runtime
            cannot be had, or the converted model is not good enough.
    """
    config = describe(learner)
    with tempfile.TemporaryDirectory() as folder:
        photos = find_photos(check) if check else sample_photos(folder, config["img_size"])
        out_dir = Path(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        weights, text = out_dir / "fastunet.pth", out_dir / "model-config.yaml"
        with written_whole(weights, text) as (new_weights, new_text):
            state = {name: value.detach().cpu().contiguous() for name, value in unet(learner).state_dict().items()}
            torch.save(state, new_weights)
            new_text.write_text(as_yaml(config))
            prove(learner, yaml.safe_load(new_text.read_text())["handler"], new_weights, photos, tolerance)
            if runtime != "eager":
                try:
                    runtimes.check(runtime, precision)
                    chosen = config | {"runtime": runtime, "precision": precision}
                    if runtime == "openvino":
                        chosen = runtimes.convert(config, new_weights, out_dir, precision, calibrate, max_drop)
                except (runtimes.RuntimeUnavailable, runtimes.ConversionError) as error:
                    raise ExportError(str(error)) from error
                new_text.write_text(as_yaml(chosen))
    return out_dir


def as_yaml(config: dict) -> str:
    """The text of `model-config.yaml` with `config` as its section `handler`."""
    return CONFIG_HEAD + yaml.safe_dump({"handler": config}, sort_keys=False, default_flow_style=None, width=100)


@contextmanager
def written_whole(*paths: Path) -> Iterator[list[Path]]:
    """Temporary names for `paths`: when the block ends well, the files take their places; else they are removed."""
    parts = [path.with_name(f"{path.name}.{os.getpid()}.part") for path in paths]
    try:
        yield parts
        for part, path in zip(parts, paths, strict=True):
            os.replace(part, path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


# --- loading ---


class MissingType(type):
    """Gives a stand-in the attributes, such as class methods, that a pickle asks it for."""

    def __getattr__(cls, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return stand_in(f"{cls.symbol}.{name}")


class Missing(metaclass=MissingType):
    """Stands for a class or function that a learner's pickle names and that cannot be imported here."""

    symbol = ""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def stand_in(symbol: str) -> type:
    """A new `Missing` for `symbol`."""
    return type(symbol.rpartition(".")[2], (Missing,), {"symbol": symbol})


def load(path: Path | str, *, trust: bool = False, device: str = "cpu"):
    """The learner that `learn.export()` wrote to `path`, also where the functions of its trainer are missing.

    Labelling functions, metrics and the like play no part in serving: where one cannot be imported, an inert stand-in
    takes its place. `describe` refuses a learner in which a stand-in would matter.

    Raises:
        ExportError: the file is missing, belongs to another user and is not trusted, or holds no learner.
    """
    import fastai
    from fastai.learner import Learner, load_learner

    path = Path(path)
    if not path.is_file():
        raise ExportError(f"no such file: {path}")
    if not trust and hasattr(os, "geteuid") and path.stat().st_uid != os.geteuid():
        raise ExportError(f"loading a learner runs the code in it, and {path} is another user's: add --trust if you do")
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # it holds more than tensors, as it should
        pass
    else:
        raise ExportError(f"{path} holds weights only, as learn.save() writes them: give the file of learn.export()")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fastai's warning that a pickle runs code; `main` has said so
            learner = load_learner(path, cpu=device == "cpu", pickle_module=lenient_pickle())
        if not isinstance(learner, Learner):
            raise TypeError(f"it holds a {type(learner).__name__}")
    except Exception as e:  # a broken pickle can raise anything
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        versions = f"Python {sys.version_info.major}.{sys.version_info.minor}, fastai {fastai.__version__}"
        raise ExportError(
            f"{path} is no learner that can be loaded: it is something else, cut short, or from versions far from "
            f"{versions} ({reason})"
        ) from e
    return learner


def lenient_pickle() -> types.SimpleNamespace:
    """A stand-in for the module `pickle` that unpickles what cannot be imported as `Missing`."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            try:
                if not module == __name__ == "__main__":  # the trainer's __main__ was another program
                    return super().find_class(module, name)
            except (ImportError, AttributeError):
                if module.startswith("fastcore."):  # of a learner older than fastai 2.8: load_learner says what to do
                    raise
            return stand_in(f"{module}.{name}")

    def load(file, **options):
        return Unpickler(file, **options).load()

    return types.SimpleNamespace(__name__="pickle", Unpickler=Unpickler, load=load)


def require(thing, what: str) -> None:
    """Raises ExportError when `thing`, which serving needs, is a stand-in for something that cannot be imported."""
    kind = thing if isinstance(thing, type) else type(thing)
    if issubclass(kind, Missing):
        module = kind.symbol.rpartition(".")[0]
        how = "call deployment.export.export_learner(learn, 'model_store') in the program that trained it"
        if module != "__main__":
            how = f"make the module {module} importable (PYTHONPATH), or {how}"
        raise ExportError(f"{what} needs {kind.symbol}, which cannot be imported here: {how}")


# --- reading the learner ---


def describe(learner) -> dict:
    """All that serving must know of `learner`: the section `handler` of `model-config.yaml`, as plain values.

    Raises:
        ExportError: the learner holds something that cannot be reproduced; the message names it.
    """
    for callback in learner.cbs:
        require(callback, "a callback of the learner")
    model = unet(learner)
    photos = describe_photos(learner.dls)
    network = describe_network(model, getattr(getattr(learner, "arch", None), "__name__", None), photos.pop("img_size"))
    n_in = network["options"].get("n_in", 3)
    if {"RGB": 3, "L": 1}[photos.pop("mode")] != n_in:
        raise ExportError(f"the network takes {n_in} channels, but photos are opened with another number")
    return {
        **network,
        **photos,
        "decode": describe_decode(learner.loss_func, network["n_classes"]),
        "codes": class_names(learner.dls, network["n_classes"]),
        "runtime": "eager",
        "precision": "fp32",
    }


def unet(learner) -> torch.nn.Module:
    """The learner's fastai `DynamicUnet`.

    Raises:
        ExportError: its model is something else.
    """
    from fastai.vision.models.unet import DynamicUnet

    model = getattr(learner.model, "module", learner.model)  # out of DataParallel
    require(model, "the model")
    parts = [model]
    for part in parts:
        for name, child in part._modules.items():
            if child is not None:
                require(child, f"the model's part {name}")
                parts.append(child)
    if not isinstance(model, DynamicUnet):
        raise ExportError(f"the learner's model is a {type(model).__name__}, not the DynamicUnet of unet_learner")
    return model


def describe_network(model, hint: str | None, img_size: list[int] | None) -> dict:
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
    for library, what in (("fastai", "fastai's own xresnet layers"), ("timm", "timm models")):
        if any(source.split(".")[0] == library for source in sources):
            raise ExportError(f"an encoder of {what} is not supported: serving has torchvision's layers only")
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
    from fastai.vision.augment import AffineCoordTfm, CropPad, RandomCrop, RandomResizedCrop, RatioResize, Resize
    from fastai.vision.core import PILImage, PILImageBW, TensorImage, TensorImageBW, ToTensor

    if not isinstance(dls.valid_ds, Datasets) or dls.n_inp != 1:
        raise ExportError("the learner's data are not photos and masks of a DataBlock or SegmentationDataLoaders")
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
        elif kind is not ToTensor and not idle(transform, probe):
            raise ExportError(f"the item transform {name_of(transform)} changes photos and is not supported here")

    x = ToTensor()(probe)[None].float() / 255
    batch = {"mean": None, "std": None, "affine": []}
    scaled = False
    for transform in dls.valid.after_batch.fs:
        kind = type(transform)
        require(transform, "a transform of the photos")
        if kind is IntToFloatTensor and transform.div == 255 and not scaled:
            scaled = True
        elif isinstance(transform, AffineCoordTfm) and kind.__module__ == AffineCoordTfm.__module__:
            given = transform.size
            if given is not None:
                size = [given, given] if isinstance(given, int) else list(given)
            options = {"size": size if given is not None else None, "mode": transform.mode}
            options |= {"pad_mode": transform.pad_mode, "align_corners": bool(transform.align_corners)}
            in_order = scaled and batch["mean"] is None
            if not in_order:
                raise ExportError(f"the batch transform {name_of(transform)} comes after Normalize: not supported")
            batch["affine"].append(options)
        elif kind is Normalize and batch["mean"] is None and scaled:
            if transform.mean.ndim != 4 or transform.mean.numel() != transform.mean.shape[1]:
                raise ExportError("Normalize has other statistics than one mean and one deviation per channel")
            batch |= {"mean": transform.mean.flatten().tolist(), "std": transform.std.flatten().tolist()}
        elif not idle(transform, x.as_subclass(TensorImage if opener is PILImage else TensorImageBW)):
            raise ExportError(f"the batch transform {name_of(transform)} changes photos and is not supported here")
    if not scaled:
        raise ExportError("the learner's photos are not scaled to 0..1 by IntToFloatTensor(div=255)")
    return {"mode": opener._open_args["mode"], "img_size": size, "resize": steps or None, **batch}


def photo_class(dls) -> type:
    """The class as which `dls` opens a photo.

    Raises:
        ExportError: it opens none.
    """
    from fastai.vision.core import PILBase

    kinds = [k for kind in dls.valid_ds.tls[0].types for k in (kind if isinstance(kind, list | tuple) else [kind])]
    for kind in reversed(kinds):
        require(kind, "the opening of photos")
        if issubclass(kind, PILBase):
            return kind
    raise ExportError("the learner's input is no photo")


def idle(transform, probe) -> bool:
    """Whether a fastai transform leaves photos alone at validation time: it is for training, or masks, only."""
    if getattr(transform, "split_idx", None) == 0:
        return True
    before = np.array(probe)
    after = transform(probe, split_idx=1)
    return type(after) is type(probe) and np.array_equal(before, np.array(after))


def name_of(thing) -> str:
    """The class of `thing`, or its own name for a function, with the module that it is from."""
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def describe_decode(loss_func, n_classes: int) -> dict:
    """The options of `deployment.model.decode` that make of logits the mask that `learn.predict` makes of them.

    Raises:
        ExportError: `learn.predict` gives no mask of one class per pixel with `loss_func`.
    """
    require(loss_func, "the loss function")
    if n_classes > 256:
        raise ExportError(f"{n_classes} classes do not fit into a mask of one byte per pixel")
    logits = 3 * torch.randn(2, n_classes, 24, 17, generator=torch.Generator().manual_seed(0))
    activated = getattr(loss_func, "activation", lambda x: x)(logits)
    mask = getattr(loss_func, "decodes", lambda x: x)(activated).as_subclass(torch.Tensor)
    activation = next((name for name, f in ACTIVATIONS.items() if torch.equal(activated, f(logits))), "unknown")
    if activation != "unknown" and not mask.is_floating_point():
        for threshold in (None, getattr(loss_func, "thresh", 0.5)):
            ours = decode(logits, activation, threshold)
            if mask.numel() == ours.numel() and torch.equal(mask.reshape(ours.shape).to(ours), ours):
                return {"activation": activation, "threshold": threshold}
    name = repr(loss_func) if hasattr(loss_func, "func") else name_of(loss_func)  # fastai's say what they flatten
    advice = "set learn.loss_func = CrossEntropyLossFlat(axis=1) before learn.export() if it predicts classes"
    raise ExportError(f"with the loss {name}, learn.predict gives no class for each pixel: {advice}")


def class_names(dls, n_classes: int) -> list[str]:
    """A name for each value that a mask can have: the learner's codes, or the number where it has none."""
    codes = next((list(t.codes) for t in dls.valid.after_item.fs if getattr(t, "codes", None) is not None), [])
    values = max(n_classes, 2)  # one output channel is thresholded into two
    return [str(code) for code in codes[:values]] + [str(i) for i in range(len(codes), values)]


# --- proof ---


def find_photos(folder: Path | str) -> list[Path]:
    """The image files in `folder` and below it.

    Raises:
        ExportError: there are none.
    """
    known = Image.registered_extensions()
    photos = sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.suffix.lower() in known)
    if not photos:
        raise ExportError(f"no photos to check in {folder}")
    return photos


def sample_photos(folder: Path | str, img_size: list[int]) -> list[Path]:
    """Write generated photos into `folder`: larger, smaller, wider and taller than `img_size`, in the usual modes."""
    h, w = img_size
    rng = np.random.default_rng(0)
    photos = []
    for width, height, mode, name in (
        (w, h, "RGB", "same.png"),
        (w * 3 // 2, h * 7 // 4, "RGB", "tall.jpg"),
        (w * 2 + 1, h + 3, "RGBA", "wide.png"),
        (w * 2 // 3 + 1, h * 3 // 4, "L", "small.png"),
        (w + 5, h + 1, "P", "palette.png"),
    ):
        blobs = Image.fromarray(rng.integers(0, 256, (6, 8, 4), np.uint8)).resize((width, height), Image.BICUBIC)
        photo = np.array(blobs) + rng.normal(0, 20, (height, width, 4))
        photo = Image.fromarray(photo.clip(0, 255).astype(np.uint8))
        photos.append(Path(folder, name))
        (photo if mode == "RGBA" else photo.convert("RGB").convert(mode)).save(photos[-1])
    return photos


def prove(learner, config: dict, weights: Path | str, photos: list[Path], tolerance: float = 0.0) -> None:
    """Predict `photos` with `learner` and with its copy, each through its own pipeline, one photo at a time.

    Raises:
        ExportError: a value differs anywhere (a logit on a GPU: by more than `tolerance`); the message says where the
            difference begins.
    """
    model, opener = unet(learner), photo_class(learner.dls)
    device = next(model.parameters()).device
    if tolerance and device.type == "cpu":
        raise ExportError("a tolerance is for GPUs: on a CPU the copy is exact")
    copy = load_model(config, weights).to(device)
    for path in photos:
        try:
            photo = opener.create(path)
        except Exception as e:  # decoders raise all kinds of errors on broken files
            raise ExportError(f"{path} cannot be opened: {e}") from e
        data = learner.dls.test_dl([photo], bs=1, num_workers=0)
        x, logits, mask = predict(learner, model, data)

        opened = open_image(path.read_bytes(), config["options"].get("n_in", 3))
        resized = resize(opened, **config["resize"]) if config["resize"] else opened
        our_x = to_tensor(resized, config["mean"], config["std"], config["affine"])[None].to(device)
        if not torch.equal(x, our_x):
            item = np.array(data.after_item((photo,))[0])
            stage = "after the batch transforms"
            if not np.array_equal(np.array(photo), np.array(opened)):
                stage = "as opened"
            elif not np.array_equal(item, np.array(resized).reshape(*resized.size[::-1], -1).transpose(2, 0, 1)):
                stage = "after the item transforms"
            raise ExportError(f"{path.name}: the photo {stage} differs from the learner's")

        with torch.inference_mode():
            our_logits = copy(our_x)
        if logits.dtype != our_logits.dtype:
            raise ExportError(f"the learner computes in {logits.dtype}: call learn.to_fp32() first")
        apart = (logits - our_logits).abs().max().item() if logits.shape == our_logits.shape else math.inf
        if not (torch.equal(logits, our_logits) or apart <= tolerance):
            begin = first_difference(model, copy, x)
            raise ExportError(f"{path.name}: the logits differ by {apart:.3g}, first in {begin}")
        our_mask = decode(our_logits, **config["decode"])
        if not torch.equal(mask.reshape(our_mask.shape).to(our_mask), our_mask):
            raise ExportError(f"{path.name}: the masks differ in {int((mask != our_mask).sum())} pixels")


def predict(learner, model, data) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The model's input, its logits and the decoded mask as `learn.predict` makes them of the one photo in `data`."""
    seen = []
    hook = model.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    try:
        # Without the recorder, whose metrics may be stand-ins: a prediction needs none of them.
        with learner.no_bar(), learner.no_logging(), learner.removed_cbs(learner.recorder):
            mask = learner.get_preds(dl=data, with_decoded=True)[-1]
    finally:
        hook.remove()
    return tuple(value.detach().as_subclass(torch.Tensor) for value in (*seen[-1], mask))


def first_difference(original, copy, x: torch.Tensor) -> str:
    """The name of the first layer whose output for `x` is not the same in `original` and `copy`."""
    outputs = []
    for model in (original, copy):
        seen = {}

        def keep(module, _, output, name, seen):
            if isinstance(output, torch.Tensor):
                seen[name] = output.detach().clone().as_subclass(torch.Tensor)

        hooks = []
        for name, module in model.named_modules():
            if name:
                hook = lambda m, i, o, name=name, seen=seen: keep(m, i, o, name, seen)  # noqa: E731
                hooks.append(module.register_forward_hook(hook))
        with torch.inference_mode():
            model(x.clone())
        for hook in hooks:
            hook.remove()
        outputs.append(seen)
    theirs, ours = outputs
    for name, value in theirs.items():
        if name in ours and not torch.equal(value, ours[name]):
            return f"layer {name} ({type(original.get_submodule(name)).__name__})"
    return "no layer alone"


def main() -> None:
    """The command line; ends with status 2 and one line on stderr where the learner cannot be exported."""
    parser = argparse.ArgumentParser(prog="python -m deployment.export", description=__doc__.splitlines()[0])
    parser.add_argument("learner", help="the file that learn.export() wrote")
    parser.add_argument("--out", default="model_store", help="folder to write into (default: %(default)s)")
    parser.add_argument("--check", metavar="DIR", help="photos to prove the copy on (default: generated ones)")
    parser.add_argument("--trust", action="store_true", help="load a file that is another user's")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="to prove on (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=0.0, help="greatest difference of logits, on cuda only")
    parser.add_argument("--runtime", default="eager", choices=tuple(runtimes.PRECISIONS), help="default: %(default)s")
    parser.add_argument("--precision", default="fp32", help="fp32; openvino: int8; compile on a GPU: fp16, bf16")
    parser.add_argument("--calibrate", metavar="DIR", help="photos for int8, with CamVid's labels/ to measure accuracy")
    parser.add_argument(
        "--max-drop", type=float, default=0.5, help="points of accuracy that int8 may lose: %(default)s"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # fastai's own, about torch.jit
    print("Loading a learner runs the code that is pickled in it: load only files you trust.", file=sys.stderr)
    try:
        learner = load(args.learner, trust=args.trust, device=args.device)
        options = {
            name: value for name, value in vars(args).items() if name not in ("learner", "out", "trust", "device")
        }
        out = export_learner(learner, args.out, **options)
    except (ExportError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {out / 'fastunet.pth'} and {out / 'model-config.yaml'}")


if __name__ == "__main__":
    main()
