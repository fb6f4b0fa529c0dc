"""Small learners as an earlier fastai pickles them: `PYTHON tests/learners/earlier.py FOLDER KIND…`, without KIND all.

PYTHON is one with a fastai of 2.0 to 2.7. It writes FOLDER/KIND.pkl and FOLDER/KIND.npy, what `learn.predict` gives for
photo.png: a mask, or probabilities. The functions, the metric and the callback exist in this script alone.

`tiny` and `tiny_dilled` have weights that do not depend on a version: tests/learners/fastaiX.Y.pkl.gz and
fastaiX.Y-dilled.pkl.gz are such learners, compressed, and tiny.npy what all of them give.
"""

import sys
import tempfile
from pathlib import Path

import dill
import numpy as np
import torch
from fastai.vision import all as fv
from PIL import Image
from torch import nn

PHOTO = Path(__file__).with_name("photo.png")
KINDS = ["tiny", "tiny_dilled", "unet", "classifier", "multilabel", "dilled"]
CODES = ["sky", "road", "tree"]


def mask_of(photo):
    return photo.with_name("mask.png")


def is_even(photo):
    return "even" if int(photo.stem) % 2 == 0 else "odd"


def tags_of(photo):
    return [tag for i, tag in enumerate(["car", "sign", "tree"]) if int(photo.stem) & 1 << i]


def share_of_road(predictions, targets):
    return (predictions.argmax(1) == 1).float().mean()


class Counts(fv.Callback):
    """A callback of training alone."""

    batches = 0

    def after_batch(self):
        self.batches += 1


def make_photos(folder):
    rng = np.random.RandomState(0)
    (folder / "photos").mkdir()
    files = [folder / "photos" / f"{i}.png" for i in range(8)]
    for file in files:
        Image.fromarray(rng.randint(0, 256, (6, 8, 3)).astype(np.uint8)).resize((80, 60), Image.BICUBIC).save(file)
    Image.fromarray(rng.randint(0, 3, (60, 80)).astype(np.uint8)).save(folder / "photos" / "mask.png")
    return files


def make_masks(kind, folder, files):
    """A learner whose answer is a mask."""
    normalize = fv.Normalize.from_stats([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
    options = {"codes": CODES, "item_tfms": fv.Resize((48, 64)), "batch_tfms": normalize, "bs": 4, "num_workers": 0}
    cbs, label = [], mask_of
    if kind == "tiny_dilled":
        cbs, label = [Counts()], lambda photo: mask_of(photo)
    dls = fv.SegmentationDataLoaders.from_label_func(folder, files, label, **options)
    if kind == "unet":
        return fv.unet_learner(dls, fv.resnet18, pretrained=False, metrics=share_of_road, path=folder)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))
    rng = np.random.RandomState(0)
    for p in network.parameters():
        p.data = torch.tensor(rng.uniform(-1, 1, tuple(p.shape)), dtype=torch.float32)
    loss = fv.CrossEntropyLossFlat(axis=1)
    return fv.Learner(dls, network, loss_func=loss, metrics=share_of_road, cbs=cbs, path=folder)


def make_classes(kind, folder):
    """A learner whose answer is a class, or several."""
    category, label, loss, cbs = fv.CategoryBlock, is_even, fv.CrossEntropyLossFlat(), []
    item = fv.RandomResizedCrop(64, min_scale=0.5)
    if kind == "multilabel":
        category, label, loss = fv.MultiCategoryBlock, tags_of, fv.BCEWithLogitsLossFlat(thresh=0.3)
        item = fv.Resize(64, method="squish")
    elif kind == "dilled":
        label, cbs, item = lambda photo: is_even(photo), [Counts()], fv.Resize(64, method="pad", pad_mode="zeros")
    batch = [*fv.aug_transforms(size=48), fv.Normalize.from_stats(*fv.imagenet_stats)]
    block = fv.DataBlock(
        (fv.ImageBlock, category),
        get_items=lambda folder: sorted(folder.glob("?.png")),
        get_y=label,
        splitter=fv.RandomSplitter(seed=1),
        item_tfms=item,
        batch_tfms=batch,
    )
    dls = block.dataloaders(folder / "photos", bs=4, num_workers=0)
    make = getattr(fv, "vision_learner", None) or fv.cnn_learner  # its name until 2.5
    return make(dls, fv.resnet18, pretrained=False, loss_func=loss, cbs=cbs, path=folder)


def make(kind, out):
    """Write `out`/KIND.pkl and `out`/KIND.npy."""
    fv.set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files = make_photos(folder)
        of_masks = kind in ("tiny", "tiny_dilled", "unet")
        learn = make_masks(kind, folder, files) if of_masks else make_classes(kind, folder)
        with learn.no_bar(), learn.no_logging():
            if not kind.startswith("tiny"):
                learn.fit(1, 1e-3)
            decoded, _, probabilities = learn.predict(PHOTO)
        learn.export("learner.pkl", **({"pickle_module": dill} if kind.endswith("dilled") else {}))
        (out / f"{kind}.pkl").write_bytes((folder / "learner.pkl").read_bytes())
        np.save(out / f"{kind}.npy", np.array(decoded).astype(np.uint8) if of_masks else probabilities.numpy())


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(exist_ok=True)
    for kind in sys.argv[2:] or KINDS:
        make(kind, out)
