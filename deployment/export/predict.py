"""What `learn.predict(FILE)` does, step by step."""

from __future__ import annotations  # an earlier fastai's environment runs this too, see rescue.py

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .learner import ExportError, name_of


@dataclass
class Steps:
    """What a learner made of one file."""

    opened: Any  # a Pillow image, or whatever else the learner opens images as
    item: Any  # after the item transforms: (channels, height, width)
    x: torch.Tensor  # after the batch transforms: (1, channels, height, width)
    seen: torch.Tensor  # by the network: the same, unless a callback changes it
    logits: torch.Tensor
    values: torch.Tensor  # after the loss function's activation: (1, …)
    decided: torch.Tensor  # after its `decodes`: (1, …)
    decoded: Any  # what `learn.predict` returns first: after the decoding of the labels' transforms


def predict_file(
    learner, model: torch.nn.Module, path: Path, skip: int = 0, decode: bool = True, go_on: torch.Tensor | None = None
) -> Steps:
    """What `learner`, whose network is `model`, predicts for the file at `path`.

    Args:
        skip: steps of the opening that are left out, see `transforms.ImagePipeline`.
        decode: also what the loss function and the labels' transforms make of the logits.
        go_on: what to go on with after the item transforms, in place of what they made.

    Raises:
        ExportError: the file cannot be opened, the network does not take the image, or what it gives is not a tensor.
    """
    from fastai.torch_core import noop, tuplify

    data = learner.dls.test_dl([path], bs=1, num_workers=0, rm_type_tfms=skip or None)
    try:
        opened = data.dataset[0][0]
    except Exception as error:  # decoders raise all kinds of errors on broken files
        raise ExportError(f"{path.name}: the learner cannot open it ({one_line(error)})") from error
    try:
        x = data.one_batch()[0]  # which tells the transforms that this is no training
        item = data.after_item(data.dataset[0])[0]
        if go_on is not None:
            data.after_item = lambda _: (go_on.as_subclass(type(item)),)
            x = data.one_batch()[0]
    except Exception as error:  # of a transform: any
        raise ExportError(f"{path.name}: the learner's transforms fail ({one_line(error)})") from error
    seen = []
    hook = model.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    # Without the recorder, whose metrics may be stand-ins, and the callbacks that follow it: fastai marks them.
    of_training = [callback for callback in learner.cbs if getattr(callback, "remove_on_fetch", False)]
    try:
        with learner.no_bar(), learner.no_logging(), learner.removed_cbs(of_training):
            act = None if decode else noop
            # To reorder, fastai copies `data`, with its own item transforms again.
            results = learner.get_preds(dl=data, with_input=True, with_decoded=decode, act=act, reorder=go_on is None)
            inputs, values, decided = results[0], results[1], results[3 if decode else 1]
            decoded = learner.dls.decode_batch((inputs, *tuplify(decided)))[0][1:] if decode else [None]
    except Exception as error:  # of the network, a callback, the loss function or the labels' transforms: any
        if seen and not isinstance(seen[-1][1], torch.Tensor):
            given = name_of(seen[-1][1])
            raise ExportError(
                f"the network gives {given} and not a tensor, which serving cannot answer with"
            ) from error
        size = " × ".join(map(str, x.shape[-2:]))
        raise ExportError(
            f"{path.name}: the learner fails on an image of {size} pixels, {one_line(error)}; give images as it gets "
            "them with --check DIR"
        ) from error
    finally:
        hook.remove()
    x, shown, logits, values, decided = map(plain_tensor, (x, *seen[-1], values, decided))
    return Steps(opened, item, x, shown, logits, values, decided, decoded[0] if len(decoded) == 1 else decoded)


def plain_tensor(value: torch.Tensor) -> torch.Tensor:
    """`value` without fastai's class."""
    return value.detach().as_subclass(torch.Tensor)


def one_line(error: Exception) -> str:
    """The class of `error` and its message, 200 characters at most."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def changing_callback(learner, model: torch.nn.Module, path: Path, skip: int) -> str:
    """The name of the callback without which the network sees the batch as it is; or that there are several."""
    for callback in list(learner.cbs):
        with learner.removed_cbs([callback]):
            steps = predict_file(learner, model, path, skip)
        if torch.equal(steps.x, steps.seen):
            return f"the callback {name_of(callback)}"
    return "a callback"
