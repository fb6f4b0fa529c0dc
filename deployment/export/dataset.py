"""The one reader of CamVid's layout, the one that fastai's downloads have. A folder of photos alone is read as well.

images/NAME.png      a photo
labels/NAME_P.png    its label: 8 bits a pixel, the pixel's value is the index of its class
codes.txt            the class names, one a line, in the order of the indices
valid.txt            the photos to validate on, one a line, as NAME.png or NAME (optional)
"""

from pathlib import Path

import torch

PHOTO_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif"}


def list_photos(folder: Path | str) -> list[Path]:
    """The photos in `folder`/images, or in `folder` itself where there is no such folder, sorted by name.

    Where there are none, those in its own folders: one for each class. Hidden files are left out, as by fastai.
    """
    images = Path(folder, "images")
    images = images if images.is_dir() else Path(folder)
    photos = [
        sorted(p for p in images.glob(form) if p.suffix.lower() in PHOTO_SUFFIXES) for form in ("[!.]*", "[!.]*/[!.]*")
    ]
    return photos[0] or photos[1]


def split_photos(folder: Path | str) -> tuple[list[Path], list[Path]]:
    """The photos to train on and those to validate on: those in valid.txt, else a fifth drawn with a fixed seed.

    The fifth is the one that fastai's `RandomSplitter(0.2, seed=42)` takes. Either list may be empty.
    """
    photos, listing = list_photos(folder), Path(folder, "valid.txt")
    if listing.is_file():
        listed = {line.strip() for line in listing.read_text(encoding="utf-8-sig").splitlines()}
        chosen = {photo for photo in photos if photo.name in listed or photo.stem in listed}
    else:
        order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(42)).tolist()
        chosen = {photos[i] for i in order[: int(0.2 * len(photos))]}
    return [p for p in photos if p not in chosen], [p for p in photos if p in chosen]


def label_of(photo: Path, folder: Path | None = None) -> Path:
    """Where the label of `photo` lies: images/NAME.png → labels/NAME_P.png; with `folder`, there."""
    return (folder or photo.parent.parent / "labels") / f"{photo.stem}_P.png"
