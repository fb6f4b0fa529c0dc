"""Read off a learner which task it has, how its logits become an answer, and the names of its classes."""

import torch

from ..runtime.pytorch import ACTIVATIONS, decode
from .learner import ExportError, name_of, require


def describe_task(learner, output: torch.Size) -> dict:
    """`task`, `activation`, `threshold` and `classes` of a learner whose network gives logits of the shape `output`.

    Raises:
        ExportError: its task cannot be served, or `learn.predict` makes no answer with its loss.
    """
    kinds, transforms = target(learner.dls)
    if len(output) == 4:
        refuse_images(kinds)
        decoding = describe_decoding(learner.loss_func, "segmentation", (2, output[1], 24, 17))
        return {"task": "segmentation", **decoding, "classes": class_names(learner.dls, output[1])}
    task, n_out = named_task(kinds, transforms), output[1] if len(output) == 2 else 1
    if task == "segmentation" or len(output) > 2:
        raise ExportError(
            f"the network gives values of shape {tuple(output[1:])} for an image, which is not what {task} needs"
        )
    classes = []
    if task in ("classification", "multi-label"):
        classes = [str(name) for transform in transforms for name in getattr(transform, "vocab", None) or []]
        if len(classes) != n_out or len(set(classes)) < len(classes):
            raise ExportError(f"the network gives {n_out} values, but the learner has the names {classes}")
    if task == "points" and n_out % 2:
        raise ExportError(f"the network gives {n_out} values, which cannot be points of x and y")
    return {"task": task, **describe_decoding(learner.loss_func, task, (64, n_out)), "classes": classes}


def target(dls) -> tuple[list[type], list]:
    """What the label of an image goes through in `dls`: the classes that it takes, and the transforms.

    Raises:
        ExportError: there is more than one label for an image.
    """
    tls = dls.valid_ds.tls
    for tl in tls:
        if any(kind.__name__ in ("TensorBBox", "LabeledBBox") for kind in flat(tl.types)):
            raise ExportError("boxes around objects (BBoxBlock) are not supported")
    if len(tls) != 2:
        raise ExportError(f"learners with {len(tls) - 1} labels for an image are not supported, only with one")
    for transform in tls[1].tfms.fs:
        require(transform, "the labels")
        if not known_decoding(transform):
            raise ExportError(
                f"the labels' transform {name_of(transform)} decodes answers in a way of its own, which serving does "
                "not know: train on labels that are transformed already"
            )
    return flat(tls[1].types), list(tls[1].tfms.fs)


def known_decoding(transform) -> bool:
    """Whether `transform`, of the labels, decodes nothing, or as fastai's own classes do."""
    from fastai.data.transforms import (
        Categorize,
        EncodedMultiCategorize,
        MultiCategorize,
        OneHotEncode,
        RegressionSetup,
    )

    own = (Categorize, MultiCategorize, EncodedMultiCategorize, OneHotEncode, RegressionSetup)
    return type(transform) in own or getattr(transform, "decodes", None) is None


def flat(types) -> list[type]:
    """`types`, some of which may be in lists."""
    return [kind for one in types for kind in (one if isinstance(one, list | tuple) else [one])]


def named_task(kinds: list[type], transforms: list) -> str:
    """The task of a learner whose labels go through `transforms` and are of `kinds` on the way.

    Raises:
        ExportError: it cannot be served.
    """
    from fastai.data.transforms import Categorize, EncodedMultiCategorize, MultiCategorize, RegressionSetup
    from fastai.vision.core import PILMask, TensorPoint

    for task, kind in (
        ("multi-label", (MultiCategorize, EncodedMultiCategorize)),
        ("classification", Categorize),
        ("regression", RegressionSetup),
    ):
        if any(isinstance(transform, kind) for transform in transforms):
            return task
    if any(issubclass(kind, TensorPoint) for kind in kinds):
        return "points"
    if any(issubclass(kind, PILMask) for kind in kinds):
        return "segmentation"
    refuse_images(kinds)
    names = ", ".join(name_of(kind) for kind in kinds)
    raise ExportError(f"labels of {names} are not supported: only masks, categories, numbers and points are")


def refuse_images(kinds: list[type]) -> None:
    """Raises ExportError when the labels are images themselves."""
    from fastai.vision.core import PILBase, PILMask

    if any(issubclass(kind, PILBase) and not issubclass(kind, PILMask) for kind in kinds):
        raise ExportError("learners from image to image are not supported: their labels are images")


def describe_decoding(loss_func, task: str, shape: tuple[int, ...]) -> dict:
    """`activation` and `threshold`, with which serving makes of logits what `learn.predict` makes of them.

    Args:
        shape: of the logits to try.

    Raises:
        ExportError: `learn.predict` makes something else of them with `loss_func`.
    """
    require(loss_func, "the loss function")
    if task == "segmentation" and shape[1] > 256:
        raise ExportError(f"{shape[1]} classes do not fit into a mask of one byte per pixel")
    logits = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    activated = getattr(loss_func, "activation", lambda x: x)(logits)
    decoded = getattr(loss_func, "decodes", lambda x: x)(activated).as_subclass(torch.Tensor)
    activation = next((name for name, f in ACTIVATIONS.items() if torch.equal(activated, f(logits))), "unknown")
    thresh = getattr(loss_func, "thresh", 0.5)
    thresholds = {"segmentation": (None, thresh), "multi-label": (thresh,)}
    if activation != "unknown":
        for threshold in thresholds.get(task, (None,)):
            ours = decision(decode(logits, activation, threshold, task == "segmentation"), task, threshold)
            same_kind = decoded.is_floating_point() == ours.is_floating_point()
            if (
                same_kind
                and decoded.numel() == ours.numel()
                and torch.equal(decoded.reshape(ours.shape).to(ours), ours)
            ):
                return {"activation": activation, "threshold": threshold}
    name = repr(loss_func) if hasattr(loss_func, "func") else name_of(loss_func)  # fastai's say what they flatten
    if task == "segmentation":
        advice = "set learn.loss_func = CrossEntropyLossFlat(axis=1) before learn.export() if it predicts classes"
        raise ExportError(f"with the loss {name}, learn.predict gives no class for each pixel: {advice}")
    advice = {"classification": "CrossEntropyLossFlat", "multi-label": "BCEWithLogitsLossFlat"}.get(task, "MSELossFlat")
    raise ExportError(
        f"with the loss {name}, learn.predict gives no answer for {task}: set learn.loss_func = {advice}() before "
        "learn.export()"
    )


def decision(values: torch.Tensor, task: str, threshold: float | None) -> torch.Tensor:
    """What `learn.predict` decides on the values of an answer: one class, a yes for each, or the values themselves."""
    if task == "classification":
        return values.argmax(dim=1)
    if task == "multi-label":
        assert threshold is not None  # see describe_decoding
        return values > threshold
    return values


def class_names(dls, n_classes: int) -> list[str]:
    """A name for each value that a mask can have: the learner's codes, or the number where it has none."""
    codes = next((list(t.codes) for t in dls.valid.after_item.fs if getattr(t, "codes", None) is not None), [])
    values = max(n_classes, 2)  # one output channel is thresholded into two
    return [str(code) for code in codes[:values]] + [str(i) for i in range(len(codes), values)]
