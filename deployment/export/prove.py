"""Prove that a network and its configuration answer as the learner does: both on the same photos, bit for bit."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..config import Config
from ..photos import Preprocessor
from ..runtime import decode, load_network
from .learner import ExportError, network, photo_class
from .tasks import decision

BATCH = 4  # photos, at most, that are also compared as one batch


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


def size_of(photo: Path) -> list[int]:
    """(height, width) of `photo`."""
    with Image.open(photo) as image:
        return [image.height, image.width]


def prove(learner, config: Config, folder: Path | str, photos: list[Path], tolerance: float = 0.0) -> None:
    """Predict `photos` with `learner` and with its copy, each through its own pipeline, one photo at a time.

    Raises:
        ExportError: a value differs anywhere (a logit on a GPU: by more than `tolerance`); the message says where the
            difference begins.
    """
    model, opener = network(learner), photo_class(learner.dls)
    device = next(model.parameters()).device
    if tolerance and device.type == "cpu":
        raise ExportError("a tolerance is for GPUs: on a CPU the copy is exact")
    copy, preprocessor = load_network(config, folder).to(device), Preprocessor(config)
    masks, batches = config.task == "segmentation", {}
    for path in photos:
        try:
            photo = opener.create(path)
        except Exception as e:  # decoders raise all kinds of errors on broken files
            raise ExportError(f"{path} cannot be opened: {e}") from e
        data = learner.dls.test_dl([photo], bs=1, num_workers=0)
        x, logits, values, decided = predict(learner, model, data)

        opened = preprocessor.open(path.read_bytes())
        resized = preprocessor.resize(opened)
        our_x = preprocessor.to_tensor(resized)[None].to(device)
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
            begin = f", first in {first_difference(model, copy, x)}" if config.arch else ""
            raise ExportError(f"{path.name}: the logits differ by {apart:.3g}{begin}")
        ours = decode(our_logits, config.activation, config.threshold, masks)
        if not masks and not (torch.equal(values.reshape(ours.shape), ours) or apart <= tolerance > 0):
            raise ExportError(f"{path.name}: the {'values' if config.activation is None else 'probabilities'} differ")
        our_decision = decision(ours, config.task, config.threshold)
        different = int((decided.reshape(our_decision.shape).to(our_decision) != our_decision).sum())
        if different and not (apart <= tolerance > 0):
            what = f"the masks differ in {different} pixels" if masks else "the decoded answers differ"
            raise ExportError(f"{path.name}: {what}")
        batches.setdefault(x.shape, []).append(x)
    for batch in batches.values():
        x = torch.cat(batch[:BATCH] * (BATCH if len(batch) == 1 else 1))
        with torch.inference_mode():
            apart = (model.eval()(x).as_subclass(torch.Tensor) - copy(x)).abs().max().item()
        if not apart <= tolerance:
            raise ExportError(f"the logits of {len(x)} photos in one batch differ by {apart:.3g}")


def predict(learner, model, data) -> tuple[torch.Tensor, ...]:
    """What `learn.predict` makes of the one photo in `data`: the model's input, logits, after activation, decoded."""
    seen = []
    hook = model.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    try:
        # Without the recorder, whose metrics may be stand-ins, and the callbacks that follow it: fastai marks them.
        of_training = [callback for callback in learner.cbs if getattr(callback, "remove_on_fetch", False)]
        with learner.no_bar(), learner.no_logging(), learner.removed_cbs(of_training):
            values, _, decided = learner.get_preds(dl=data, with_decoded=True)
    finally:
        hook.remove()
    return tuple(value.detach().as_subclass(torch.Tensor) for value in (*seen[-1], values, decided))


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
