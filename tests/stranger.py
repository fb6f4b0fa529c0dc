"""Somebody else's learner: `python tests/stranger.py FOLDER` writes theirs.pkl, photos and `learn.predict`'s masks.

Another architecture, other classes, another size and another resize than the tutorial's, a photo normalization of its
own, and a label function and a metric that exist in this script alone.
"""

import sys
from pathlib import Path

import numpy as np
from fastai.vision.all import (
    Normalize,
    Resize,
    ResizeMethod,
    SegmentationDataLoaders,
    get_image_files,
    imagenet_stats,
    set_seed,
    unet_learner,
)
from PIL import Image, ImageDraw
from torchvision.models import squeezenet1_1

CODES = ["meadow", "pond", "barn"]
folder = Path(sys.argv[1])


def draw(rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A farm: a pond and a barn on a meadow, and the mask."""
    photo, mask = Image.new("RGB", (150, 100), (90, 150, 60)), Image.new("L", (150, 100))
    for index, color, shape in ((1, (60, 90, 170), "ellipse"), (2, (150, 60, 40), "rectangle")):
        x, y, w, h = (int(v) for v in rng.integers([0, 0, 30, 20], [100, 60, 70, 50]))
        for image, fill in ((photo, color), (mask, index)):
            getattr(ImageDraw.Draw(image), shape)((x, y, x + w, y + h), fill=fill)
    noise = rng.normal(0, 12, (100, 150, 3))
    return Image.fromarray((np.array(photo) + noise).clip(0, 255).astype(np.uint8)), mask


def mask_of(photo: Path) -> Path:
    return folder / "masks" / photo.name


def share_of_barn(predictions, targets):
    return (predictions.argmax(1) == CODES.index("barn")).float().mean()


if __name__ == "__main__":
    set_seed(0)
    rng = np.random.default_rng(0)
    for name in ("photos", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(8):
        photo, mask = draw(rng)
        photo.save(folder / "photos" / f"{i}.png")
        mask.save(folder / "masks" / f"{i}.png")
    dls = SegmentationDataLoaders.from_label_func(
        folder,
        get_image_files(folder / "photos"),
        mask_of,
        codes=CODES,
        bs=4,
        num_workers=0,
        item_tfms=Resize((72, 88), ResizeMethod.Pad, pad_mode="zeros"),
        batch_tfms=Normalize.from_stats(*imagenet_stats),
    )
    learn = unet_learner(dls, squeezenet1_1, pretrained=False, self_attention=True, metrics=share_of_barn, path=folder)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-3)
        for i in range(3):
            mask = learn.predict(folder / "photos" / f"{i}.png")[0]
            Image.fromarray(mask.numpy().astype(np.uint8)).save(folder / f"expected_{i}.png")
    learn.export("theirs.pkl")
