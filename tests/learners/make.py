"""A small learner as another Python pickles it: `python tests/learners/make.py` writes pythonX.Y.pkl.gz and mask.png.

The label function and the metric exist in this script alone. Of its weights only the signs are kept, a size per
tensor, so that the file is small. mask.png is what `learn.predict` gives for photo.png.
"""

import gzip
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from fastai.vision.all import Normalize, Resize, SegmentationDataLoaders, resnet18, set_seed, unet_learner
from PIL import Image

HERE = Path(__file__).parent
PHOTO = HERE / "photo.png"


def label(photo: Path) -> Path:
    return photo.with_name("mask.png")


def share_of_road(predictions, targets):
    return (predictions.argmax(1) == 1).float().mean()


if __name__ == "__main__":
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for i in range(2):
            (folder / f"{i}.png").write_bytes(PHOTO.read_bytes())
        Image.fromarray(np.random.default_rng(0).integers(0, 3, (60, 80), np.uint8)).save(folder / "mask.png")
        dls = SegmentationDataLoaders.from_label_func(
            folder,
            [folder / "0.png", folder / "1.png"],
            label,
            codes=["sky", "road", "tree"],
            item_tfms=Resize((48, 64)),
            batch_tfms=Normalize.from_stats([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]),
            bs=1,
            valid_pct=0.5,
            num_workers=0,
        )
        learn = unet_learner(dls, resnet18, pretrained=False, n_out=3, cut=5, metrics=share_of_road, path=folder)
        with torch.no_grad():
            for p in learn.model.parameters():
                if p.ndim > 1:
                    p.copy_(p.sign() * p.abs().mean())
            x = learn.dls.test_dl([PHOTO]).one_batch()[0]
            logits = learn.model.eval()(x).as_subclass(torch.Tensor)
            learn.model.layers[-2][0].bias -= logits.mean((0, 2, 3))  # no class wins everywhere
        with learn.no_bar(), learn.no_logging():
            mask = learn.predict(PHOTO)[0].numpy().astype(np.uint8)
        assert len(np.unique(mask)) == 3
        learn.export("learner.pkl")
        file = HERE / f"python{sys.version_info.major}.{sys.version_info.minor}.pkl.gz"
        file.write_bytes(gzip.compress((folder / "learner.pkl").read_bytes(), mtime=0))
        Image.fromarray(mask).save(HERE / "mask.png")
        print(file.name, file.stat().st_size, "bytes, classes:", np.bincount(mask.ravel()))
