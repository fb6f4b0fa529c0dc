"""Every kind of learner: the served answer is that of `learn.predict`. `python tests/test_tasks.py` writes the table."""

import base64
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_photo, encoded
from PIL import Image

from deployment.archive import make_archive
from deployment.export import ExportError, export_learner
from deployment.handler import Handler
from deployment.serve import torchserve

ROOT = Path(__file__).parents[1]
KINDS = ["bus", "car", "tram"]
SIZES = [(120, 90), (90, 120), (64, 64), (151, 77), (50, 41)]

# task, body, item_tfms, batch_tfms, arguments of vision_learner, what is called on the learner: code of fastai, which is
# also what the table shows. The first of each task run by default.
CLASS, MULTI, NUMBER, POINTS, MASK = "classification", "multi-label", "regression", "points", "segmentation"
NORMALIZE = "Normalize.from_stats(*imagenet_stats)"
ROWS = [
    (CLASS, "resnet18", "Resize(64)", NORMALIZE, "", ""),
    (CLASS, "xresnet18", "Resize((48, 64), 'squish')", "", "", ""),
    (CLASS, "timm convnext_atto", "RandomResizedCrop(64, min_scale=0.5)", NORMALIZE, "", ""),
    (MULTI, "resnet18", "Resize(64, 'pad', 'zeros')", NORMALIZE, "loss_func=BCEWithLogitsLossFlat(thresh=0.4)", ""),
    (NUMBER, "timm resnet10t", "Resize(64)", "", "n_out=1, y_range=(0, 5)", ""),
    (POINTS, "resnet18", "Resize((48, 64), 'crop')", "", "y_range=(-1, 1)", ""),
    (MASK, "xresnet18", "Resize((64, 96), 'squish')", NORMALIZE, "", ""),
    # the others with `-m tasks`
    (CLASS, "resnet34", "Resize(64, 'squish')", "aug_transforms(size=48)", "", ""),
    (CLASS, "resnet18", "Resize(64)", "aug_transforms()", "loss_func=LabelSmoothingCrossEntropyFlat()", ""),
    (CLASS, "resnet18", "Resize(64)", "", "cbs=MixUp()", ""),
    (CLASS, "resnet18", "Resize(64)", NORMALIZE, "", ".to_fp16()"),
    (CLASS, "resnet18", "Resize(64)", NORMALIZE, "loss_func=FocalLossFlat(), concat_pool=False", ""),
    (CLASS, "resnet18", "Resize(64)", NORMALIZE, "img_cls=PILImageBW, n_in=1", ""),
    (CLASS, "resnet18", "", "", "", ""),
    (CLASS, "densenet121", "Resize(64)", f"[*aug_transforms(size=64), {NORMALIZE}]", "", ""),
    (CLASS, "vgg11_bn", "Resize(64)", "", "lin_ftrs=[64], ps=0.2", ""),
    (CLASS, "squeezenet1_1", "Resize(64, 'pad', 'border')", "", "", ""),
    (CLASS, "mobilenet_v3_small", "CropPad(64)", "", "", ""),
    (CLASS, "efficientnet_b0", "[Resize(72), RandomCrop(64)]", NORMALIZE, "", ""),
    (CLASS, "regnet_y_400mf", "RandomResizedCrop(64)", "", "", ""),
    (CLASS, "convnext_tiny", "Resize(64, 'squish')", "", "", ""),
    (CLASS, "swin_t", "Resize(64)", "", "", ""),
    (CLASS, "xresnet34_deep", "RandomResizedCrop(64)", NORMALIZE, "", ""),
    (CLASS, "xse_resnext18", "Resize(64)", "", "loss_func=LabelSmoothingCrossEntropy()", ""),
    (CLASS, "timm resnet26d", "Resize(64)", NORMALIZE, "cbs=CutMix()", ""),
    (CLASS, "timm vit_tiny_patch16_224", "Resize(224)", NORMALIZE, "", ""),
    (CLASS, "timm efficientnet_lite0", "Resize(64)", "", "", ".to_fp16()"),
    (CLASS, "timm mobilenetv3_small_050", "", "", "", ""),
    (CLASS, "own", "Resize(32)", "", "", ""),
    (MULTI, "xresnet18", "Resize(64)", "", "", ""),
    (MULTI, "resnet34", "RandomResizedCrop(64)", NORMALIZE, "loss_func=BCEWithLogitsLossFlat(thresh=0.55)", ""),
    (MULTI, "timm convnext_femto", "Resize(64, 'squish')", NORMALIZE, "", ".to_fp16()"),
    (MULTI, "timm regnety_002", "Resize(64)", "aug_transforms(size=(48, 64))", "", ""),
    (MULTI, "own", "Resize(32)", NORMALIZE, "", ""),
    (NUMBER, "resnet18", "Resize(64)", NORMALIZE, "n_out=3", ""),
    (NUMBER, "resnet18", "Resize(64, 'squish')", "", "n_out=1, loss_func=L1LossFlat()", ""),
    (NUMBER, "xresnet18", "RandomResizedCrop(64)", "", "n_out=2, y_range=(-1, 1)", ""),
    (NUMBER, "timm mobilenetv3_small_050", "Resize(64)", NORMALIZE, "n_out=1", ".to_fp16()"),
    (NUMBER, "own", "Resize(32)", "aug_transforms()", "n_out=2", ""),
    (POINTS, "resnet34", "Resize(64)", f"[*aug_transforms(size=(48, 56)), {NORMALIZE}]", "", ""),
    (POINTS, "xresnet18", "Resize((48, 64), 'pad', 'zeros')", "", "", ""),
    (POINTS, "timm resnet10t", "Resize((56, 64), 'squish')", NORMALIZE, "y_range=(-1, 1)", ""),
    (POINTS, "resnet18", "[Resize(80, 'pad'), CropPad((64, 72))]", "", "", ""),
    (POINTS, "resnet18", "RandomResizedCrop(64)", "", "", ""),
    (POINTS, "own", "", "", "", ""),
    (MASK, "xresnet34", "Resize((61, 83), 'squish')", "", "self_attention=True, blur=True", ""),
    (MASK, "xresnet18", "Resize(64)", "aug_transforms(size=(48, 64))", "norm_type=NormType.Spectral", ""),
    (MASK, "xresnet18", "", "", "norm_type=NormType.Weight", ""),
    (MASK, "own", "Resize((40, 56), 'squish')", NORMALIZE, "", ""),
]
BY_DEFAULT = 7


class Own(torch.nn.Sequential):
    """A network of nobody else's: (N, channels, H, W) to (N, n_out), or for masks to (N, n_out, H, W)."""

    def __init__(self, n_out: int, masks: bool, channels: int = 3):
        nn = torch.nn
        head = [nn.Conv2d(8, n_out, 1)] if masks else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_out)]
        super().__init__(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), *head)


def label_of(task: str, n_out: int):
    """The labels of a learner: a function of the photo's path, all of whose values occur in four photos."""
    return {
        CLASS: lambda path: KINDS[int(path.stem) % 3],
        MULTI: lambda path: [kind for i, kind in enumerate(KINDS) if (int(path.stem) + 4) >> i & 1],
        NUMBER: lambda path: [float(path.stem)] * n_out if n_out > 1 else float(path.stem),
        POINTS: lambda path: torch.tensor([[10.0 + int(path.stem), 20.0], [60.0, 50.0]]),
        MASK: lambda path: path.parent / "masks" / path.name,
    }[task]


def make(folder: Path, row: tuple):
    """The learner of `row`, with random weights, on four photos that are drawn into `folder`."""
    import timm  # noqa: F401 - vision_learner finds its bodies
    from fastai.vision import all as fastai

    names = vars(fastai)
    task, body, item, batch, options, call = row
    options = eval(f"dict({options})", names)
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    for i in range(4):
        draw_photo(i, (120, 90)).save(folder / f"{i}.png")
        mask = np.random.default_rng(i).integers(0, 3, (90, 120), np.uint8)
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    fastai.set_seed(0)
    blocks = {
        CLASS: fastai.CategoryBlock,
        MULTI: fastai.MultiCategoryBlock,
        NUMBER: lambda: fastai.RegressionBlock(options.get("n_out", 1)),
        POINTS: fastai.PointBlock,
        MASK: lambda: fastai.MaskBlock(KINDS),
    }
    target = blocks[task] if task == POINTS else blocks[task]()
    data = fastai.DataBlock(
        (fastai.ImageBlock(options.pop("img_cls", fastai.PILImage)), target),
        get_items=lambda folder: sorted(folder.glob("?.png")),
        get_y=label_of(task, options.get("n_out", 1)),
        splitter=fastai.IndexSplitter([3]),
        item_tfms=eval(item, names) if item else None,
        batch_tfms=eval(batch, names) if batch else None,
    )
    dls = data.dataloaders(folder, bs=2, num_workers=0)
    options = {"n_out": {NUMBER: 1, POINTS: 4}.get(task, 3)} | options
    if body == "own":
        network = Own(options.pop("n_out"), task == MASK)
        options = {"loss_func": fastai.CrossEntropyLossFlat(axis=1)} | options if task == MASK else options
        learner = fastai.Learner(dls, network, **options)
    elif task == MASK:
        learner = fastai.unet_learner(dls, names[body], pretrained=False, **options)
    else:
        arch = body.removeprefix("timm ") if body.startswith("timm ") else getattr(fastai.models, body, names.get(body))
        arch = arch or getattr(__import__("torchvision").models, body)
        learner = fastai.vision_learner(dls, arch, pretrained=False, **options)
    learner = eval(f"learner{call}", {"learner": learner})
    with torch.no_grad():  # every norm does something, and the answers to two photos differ
        for p in learner.model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    return learner


def photos_of(store: Path) -> list[Image.Image]:
    """Photos that the model in `store` takes: of many sizes, or of its own where torch.export left it no other."""
    return [draw_photo(10 + i, size) for i, size in enumerate(SIZES)]


def served(store: Path, photos: list[bytes], **parameters) -> list[dict]:
    """The answers to `photos` in one request, by the handler and the exported files alone."""
    handler = Handler()
    handler.load(store)
    instances = [{"b64": base64.b64encode(photo).decode()} for photo in photos]
    job = handler.preprocess({"body": json.dumps({"instances": instances, "parameters": parameters}).encode()})
    handler.inference([photo for photo in job.photos if not photo.error])
    return json.loads(handler.postprocess(job).body)["predictions"]


def same_answer(learner, task: str, photo: Image.Image, answer: dict) -> bool:
    """Whether `answer` says of `photo` what `learner` says of it."""
    from fastai.vision.all import PILImage, TensorPoint

    opened = learner.dls.valid_ds.tls[0].tfms.fs[0](np.array(photo))
    with learner.no_bar(), learner.no_logging():
        decoded, decision, values = learner.predict(opened)
    values = values.as_subclass(torch.Tensor).numpy()
    if task == MASK:
        mask = np.frombuffer(base64.b64decode(answer["base64_prediction"]), np.uint8).reshape(answer["shape"])
        return np.array_equal(mask, decision.as_subclass(torch.Tensor).numpy())
    if task == NUMBER:
        return np.array_equal(np.array(answer["values"], np.float32), values.reshape(-1))
    if task == POINTS:  # where the answer's points go when fastai treats them, and the photo, as a label
        item = (PILImage(opened), TensorPoint(torch.tensor(answer["points"]), img_size=photo.size))
        there = learner.dls.valid.after_item(item)[1].as_subclass(torch.Tensor).reshape(-1)
        return np.allclose(there.numpy(), values.reshape(-1), rtol=0, atol=2e-4)
    names = list(learner.dls.vocab)
    same = {name: np.float32(p) for name, p in answer["probabilities"].items()} == dict(zip(names, values, strict=True))
    ordered = list(answer["probabilities"].values()) == sorted(answer["probabilities"].values(), reverse=True)
    return same and ordered and (answer["label"] == decoded if task == CLASS else answer["labels"] == list(decoded))


def equal_answers(row: tuple, folder: Path) -> bool:
    """Whether the learner of `row`, exported into `folder`, and the handler say the same of all photos."""
    learner = make(folder / "photos", row)
    store = export_learner(learner, folder / "store")
    photos = photos_of(store)
    answers = served(store, [encoded(photo) for photo in photos])
    equal = [same_answer(learner, row[0], photo, answer) for photo, answer in zip(photos, answers, strict=True)]
    return all(equal) and len({json.dumps(answer) for answer in answers}) > 1


@pytest.mark.parametrize("row", ROWS[:BY_DEFAULT], ids=lambda row: f"{row[0]}-{row[1]}")
def test_answer_is_that_of_learn_predict(row, tmp_path):
    assert equal_answers(row, tmp_path)


@pytest.mark.tasks
@pytest.mark.parametrize("row", ROWS[BY_DEFAULT:], ids=lambda row: "-".join(filter(None, row)))
def test_answer_is_that_of_learn_predict_for_every_row(row, tmp_path):
    assert equal_answers(row, tmp_path)
