"""Prove that what is served answers as the learner does: both on the same files, from file to answer, bit for bit."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .. import answers
from ..config import Config
from ..handler import Handler
from ..photos import Preprocessor, to_array
from ..protocol import Rejected, Request, as_json
from ..runtime.pytorch import ServedModel
from .learner import ExportError
from .predict import Steps, changing_callback, predict_file
from .transforms import ImagePipeline

BATCH = 4  # images, at most, that are also compared as one batch
LARGE = (3000, 4000)  # (height, width) of a phone's photo


class NetworkDiffers(ExportError):
    """The copy of the network gives other logits than the learner's."""


def find_images(folder: Path | str, any_file: bool = False) -> list[Path]:
    """The image files in `folder` and below it; with `any_file`, which a reader's own opener takes, all files.

    Raises:
        ExportError: there are none.
    """
    known = Image.registered_extensions()
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith("."))
    images = [path for path in files if any_file or path.suffix.lower() in known]
    if not images:
        raise ExportError(f"no images to check in {folder}")
    return images


def sample_images(folder: Path | str, size: list[int], large: bool) -> list[Path]:
    """Write generated images into `folder`: of `size` (height, width) in the usual modes, and of other sizes.

    One is dark, one is to be turned by its EXIF orientation, one has 16 bits. With `large` one has 12 megapixels.
    """
    h, w = size
    rng = np.random.default_rng(0)
    orientation = Image.Exif()
    orientation[0x0112] = 6
    turned: dict[str, Any] = {"exif": orientation}
    images = []
    for width, height, mode, name, options in (
        (w, h, "RGB", "same.png", {}),
        (w, h, "RGB", "turned.jpg", turned),
        (w, h, "dark", "dark.png", {}),
        (w, h, "I;16", "16-bit.png", {}),
        (w * 3 // 2, h * 7 // 4, "RGB", "tall.jpg", {}),
        (w * 2 + 1, h + 3, "RGBA", "wide.png", {}),
        (w * 2 // 3 + 1, h * 3 // 4, "L", "small.png", {}),
        (w + 5, h + 1, "P", "palette.png", {}),
        *([(LARGE[1], LARGE[0], "smooth", "large.jpg", {})] if large else []),
    ):
        blobs = Image.fromarray(rng.integers(0, 256, (6, 8, 4), np.uint8))
        image = blobs.resize((width, height), Image.Resampling.BICUBIC)
        if mode != "smooth":
            pixels = np.array(image) + rng.normal(0, 20, (height, width, 4))
            pixels = pixels.clip(0, 255) * (0.1 if mode == "dark" else 1)
            image = Image.fromarray(pixels.astype(np.uint8))
        if mode == "I;16":
            image = Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257)
        elif mode != "RGBA":
            image = image.convert("RGB").convert(mode if mode in ("L", "P") else "RGB")
        images.append(Path(folder, name))
        image.save(images[-1], **options)
    return images


def prove(
    learner, model: torch.nn.Module, config: Config, folder: Path | str, images: list[Path], pipeline: ImagePipeline
) -> str:
    """Predict `images` with `learner`, whose network is `model`, and with what is served from `folder`.

    The answers are compared, of each file alone; then the logits of several images in one batch. Returns what was
    proven, in one line, which is also printed.

    Raises:
        ExportError: a value differs anywhere; the message names the image and the step where the difference begins.
    """
    handler, served = Handler(), ServedModel(config, folder)
    handler.load(folder, gpu=-1)
    batches = {}
    with tqdm(images, bar_format="{desc}", leave=False, disable=None) as shown:  # on a terminal alone
        for i, path in enumerate(shown, 1):
            shown.set_description_str(f"proving image {i} of {len(images)}: {path.name}")
            theirs = predict_file(learner, model, path, pipeline.skip)
            if not torch.equal(theirs.x, theirs.seen):
                who = changing_callback(learner, model, path, pipeline.skip)
                raise ExportError(
                    f"{path.name}: {who} changes the batch after the transforms, which serving cannot repeat"
                )
            x = compare_pixels(path, theirs, handler.preprocessor, served, bool(pipeline.own))
            compare_logits(path, theirs, x, served, model)
            compare_answers(path, theirs, handler)
            batches.setdefault(x.shape, []).append((theirs.x, x))
    for pairs in batches.values():
        compare_batch(pairs[:BATCH] * (BATCH if len(pairs) == 1 else 1), model, served)
    sizes = f" of {len(batches)} sizes" if len(batches) > 1 else ""
    names = ", ".join(path.name for path in images[:3]) + (", …" if len(images) > 3 else "")
    text = f"proven on {len(images)} images{sizes} ({names}): from file to answer as learn.predict, bit for bit"
    print(text)
    return text


def compare_pixels(
    path: Path, theirs: Steps, preprocessor: Preprocessor, served: ServedModel, own_inside: bool
) -> torch.Tensor:
    """What the served network gets, (1, channels, height, width).

    Args:
        own_inside: the network begins with the reader's own batch transforms.

    Raises:
        ExportError: the image is not opened, resized or transformed as the learner does it.
    """
    try:
        opened = preprocessor.open(path.read_bytes())
        pixels = to_array(preprocessor.resize(opened))
    except Rejected as error:
        raise ExportError(f"{path.name}: the server refuses it ({error.message}): leave it out of --check") from error
    except TypeError as error:
        raise ExportError(f"{path.name}: {error}") from error
    if not preprocessor.config.opener and not same_pixels(theirs.opened, opened):
        raise ExportError(f"{path.name}: the image as opened differs from the learner's")
    item = as_pixels(theirs.item)
    if item is not None and item.dtype == pixels.dtype and not np.array_equal(item, pixels):
        begin = first_pixel(item, pixels)
        raise ExportError(f"{path.name}: the image after the item transforms differs from the learner's: {begin}")
    with torch.inference_mode():
        x = served.batch_transforms(torch.from_numpy(np.stack([pixels])))
    if not own_inside and not torch.equal(theirs.x, x):
        raise ExportError(f"{path.name}: the image after the batch transforms differs from the learner's")
    return x


def same_pixels(theirs: object, ours: Image.Image | np.ndarray) -> bool:
    """Whether an image that the learner opened is ours. What is no Pillow image is compared as an item later."""
    return not isinstance(theirs, Image.Image) or np.array_equal(to_array(theirs), to_array(ours))


def as_pixels(item: object) -> np.ndarray | None:
    """`item`, a tensor (channels, height, width), as (height, width, channels); None for something else."""
    if not isinstance(item, torch.Tensor) or item.ndim != 3:
        return None
    return item.detach().as_subclass(torch.Tensor).permute(1, 2, 0).numpy()


def first_pixel(theirs: np.ndarray, ours: np.ndarray) -> str:
    """What differs first between two images: their shapes, or a pixel."""
    if theirs.shape != ours.shape:
        return f"{theirs.shape} against {ours.shape}"
    y, x, _ = np.argwhere(theirs != ours)[0]
    return f"{theirs[y, x].tolist()} against {ours[y, x].tolist()} in row {y}, column {x}"


def compare_logits(path: Path, theirs: Steps, x: torch.Tensor, served: ServedModel, model: torch.nn.Module) -> None:
    """Raises NetworkDiffers where the networks differ, ExportError where the learner's own logits cannot be served."""
    if theirs.logits.isnan().any():
        raise ExportError(f"{path.name}: the learner's own logits are NaN, so there is no answer to serve")
    with torch.inference_mode():
        ours = served.network(x)
    if theirs.logits.dtype != ours.dtype:
        raise ExportError(f"the learner computes in {theirs.logits.dtype}: call learn.to_fp32() first")
    if torch.equal(theirs.logits, ours):
        return
    apart = (theirs.logits - ours).abs().max().item() if theirs.logits.shape == ours.shape else math.inf
    raise NetworkDiffers(
        f"{path.name}: the logits differ by {apart:.3g}, first in {first_difference(model, served.network, theirs.x)}"
    )


def compare_answers(path: Path, theirs: Steps, handler: Handler) -> None:
    """Raises ExportError where the handler's answer to the file is not the learner's."""
    job = handler.preprocess({"body": path.read_bytes()})
    handler.inference([item for item in job.items if not item.error])
    response = handler.postprocess(job)
    ours, expected = json.loads(response.body), learner_answer(theirs, handler, job.items[0].size)
    if ours == expected:
        return
    if response.status != 200:
        raise ExportError(f"{path.name}: the server answers with an error, {ours['message']}")
    different = next(key for key in expected if ours.get(key) != expected[key])
    if different == "base64_prediction":
        mask = np.asarray(theirs.decoded).astype(np.uint8)
        wrong = int(np.sum(job.items[0].output != mask))
        raise ExportError(f"{path.name}: the masks differ in {wrong} pixels")
    raise ExportError(
        f"{path.name}: `{different}` of the answer differs: learn.predict says {short(expected[different])}, "
        f"the server {short(ours.get(different))}"
    )


def short(value: object) -> str:
    """`value` as JSON of 60 characters at most."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def learner_answer(theirs: Steps, handler: Handler, size: tuple[int, int]) -> dict:
    """The JSON answer for an image of `size` (width, height), of what `learn.predict` returned for its file."""
    config, values = handler.config, theirs.values[0].float().numpy().reshape(-1)
    if config.task == "segmentation":
        mask = np.asarray(theirs.decoded).astype(np.uint8)
        answer = answers.segmentation_answer(mask.reshape(mask.shape[-2:]), config.classes, "json", None)
    elif config.task == "classification":
        ranked = answers.ranked(values, config.classes, None)
        answer = {"label": str(theirs.decoded), "probabilities": ranked}
    elif config.task == "multi-label":
        labels = [str(label) for label in theirs.decoded]
        answer = {"labels": labels, "probabilities": answers.ranked(values, config.classes, None)}
    elif config.task == "points":
        answer = answers.make_answer(theirs.decided.reshape(-1).numpy(), handler.preprocessor, Request([]), size)
    else:
        decoded = np.asarray(theirs.decoded, np.float32).reshape(-1)
        answer = {"values": [answers.number(value) for value in decoded]}
    return json.loads(json.dumps(as_json(answer)))


def compare_batch(pairs: list[tuple[torch.Tensor, torch.Tensor]], model: torch.nn.Module, served: ServedModel) -> None:
    """Raises NetworkDiffers where the networks give other logits for several images in one batch.

    `pairs` have what the learner's network gets of an image, and what the served one does.
    """
    theirs, ours = (torch.cat(images) for images in zip(*pairs, strict=True))
    with torch.inference_mode():
        apart = (model(theirs).as_subclass(torch.Tensor) - served.network(ours)).abs().max().item()
    if apart != 0:
        raise NetworkDiffers(f"the logits of {len(theirs)} images in one batch differ by {apart:.3g}")


def first_difference(original: torch.nn.Module, copy: torch.nn.Module, x: torch.Tensor) -> str:
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
