"""The data of the tutorial: where it comes from, how it is checked and split, how it is shown.

Everything here reads CamVid's layout, which deployment/export/dataset.py describes.
"""

import hashlib
import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

import scenes
from deployment.archive import near
from deployment.export.dataset import label_of, list_photos, split_photos

ROOT = Path(__file__).resolve().parents[1]
SIZE = (96, 128)  # what the model sees: height, width
N_TRAIN, N_VALID = 120, 30  # how many scenes there are
SAMPLE = ROOT / "sample" / "street_view_of_a_small_neighborhood.png"
SAMPLE_SEED = 201_521

# The folder is named after the code that draws it: when the code changes, the scenes are drawn again.
_DRAWN_BY = hashlib.sha256(Path(scenes.__file__).read_bytes() + bytes((N_TRAIN, N_VALID))).hexdigest()[:8]
SCENES = ROOT / "data" / f"scenes-{_DRAWN_BY}"


class DataError(Exception):
    """The data cannot be used; the message says why and what to do about it."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the message alone, since the stack below it would not help the reader."""
        return [f"{type(self).__name__}: {self}"]


# --- where the data comes from ---


def get_data(name: str | Path) -> Path:
    """The checked folder of a data set: "scenes", "camvid_tiny", or a folder in the layout described above.

    Scenes are drawn on the first call (some ten seconds), `camvid_tiny` is downloaded on the first call.

    Raises:
        DataError: the folder is missing or incomplete, a mask does not fit, or the download failed.
    """
    if name == "scenes":
        if not SCENES.exists():
            draw_scenes(SCENES)
        path = SCENES
    elif name == "camvid_tiny":
        from fastai.vision.all import URLs, untar_data  # slow to import, and needed here alone

        try:
            path = untar_data(URLs.CAMVID_TINY)
        except OSError as e:
            raise DataError(
                f"camvid_tiny could not be downloaded from {URLs.CAMVID_TINY} ({e}). Connect this machine to the "
                'network, or use DATA="scenes", which needs none.'
            ) from e
    else:
        path = Path(name).expanduser()
        if not path.is_dir():
            meant = near(str(name), ("scenes", "camvid_tiny"))
            raise DataError(
                f"there is no folder {name}{meant or '.'} "
                'DATA is "scenes", "camvid_tiny", or a folder with images/, labels/ and codes.txt.'
            )
    check_data(path)
    return path


def draw_scenes(folder: Path, n_train: int = N_TRAIN, n_valid: int = N_VALID) -> None:
    """Draw street scenes into `folder`, which appears whole or not at all. The seed of a scene is its number."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        (part / "images").mkdir()
        (part / "labels").mkdir()
        valid = range(100_000, 100_000 + n_valid)
        for seed in tqdm([*range(n_train), *valid], desc="drawing scenes", unit="scene"):
            photo, mask = scenes.draw_scene(seed, SIZE)
            photo.save(part / "images" / f"{seed:06}.png")
            mask.save(part / "labels" / f"{seed:06}_P.png")
        (part / "codes.txt").write_text("\n".join(scenes.CODES) + "\n")
        (part / "valid.txt").write_text("".join(f"{seed:06}.png\n" for seed in valid))
        part.chmod(0o755)
        os.replace(part, folder)
    except OSError:
        if not folder.exists():  # where it does, another process was faster and has drawn the same
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def draw_sample(folder: Path) -> Path:
    """Draw the tutorial's sample, a scene of 640 × 480 pixels that is in no data set, and its true mask beside it.

    Returns:
        The photo, `folder`/street_view_of_a_small_neighborhood.png; the mask's name ends in `_P.png`.
    """
    path = folder / SAMPLE.name
    for picture, target in zip(scenes.draw_scene(SAMPLE_SEED, (480, 640)), (path, label_of(path, folder)), strict=True):
        if target.exists() and np.array_equal(np.array(Image.open(target)), np.array(picture)):
            continue  # another Pillow may pack the same pixels into other bytes
        part = target.with_suffix(".part")
        picture.save(part, "PNG", optimize=True)
        os.replace(part, target)
    return path


# --- what it must look like ---


def check_data(path: Path) -> None:
    """Look at every photo and every mask before a training starts that would fail, or go wrong, an hour later.

    Raises:
        DataError: the first thing found wrong.
    """
    n_classes = len(read_codes(path))
    for photo in tqdm(sorted(itertools.chain(*split_files(path))), desc="checking photos and masks", leave=False):
        label = label_of(photo)
        if not label.exists():
            raise DataError(
                f"the photo {photo.name} has no mask: labels/{label.name} is missing. Add it, or take the photo away."
            )
        try:
            mask = Image.open(label)
            stored, seen = np.array(mask), np.array(mask.convert("L"))  # fastai reads masks as 8-bit gray
            photo_size = Image.open(photo).convert("RGB").size
        except OSError as e:
            raise DataError(f"{photo.name} or labels/{label.name} cannot be read: {e}. Replace the file.") from e
        if not np.array_equal(stored, seen):
            raise DataError(
                f"labels/{label.name} is a picture of mode {mask.mode}. A mask is an 8-bit gray PNG (mode L) whose "
                "pixels are class indices; save it as one."
            )
        if mask.size != photo_size:
            raise DataError(
                f"{photo.name} has {photo_size[0]} × {photo_size[1]} pixels, its mask {mask.size[0]} × {mask.size[1]}. "
                "They must be of one size."
            )
        if seen.max() >= n_classes:
            raise DataError(
                f"labels/{label.name} holds class {seen.max()}, but codes.txt names {n_classes} classes, 0 to "
                f"{n_classes - 1}. Add the missing names to codes.txt, or correct the mask."
            )


def read_codes(path: Path) -> list[str]:
    """The class names of the data set in `path`, in the order of their indices.

    Raises:
        DataError: there is no codes.txt, or it is empty.
    """
    try:
        codes = (path / "codes.txt").read_text(encoding="utf-8-sig").split("\n")
    except OSError as e:
        raise DataError(
            f"{path.name}/codes.txt cannot be read ({e.strerror}). It lists the class names, one a line, in the order "
            "of the masks' indices."
        ) from e
    codes = [code.strip() for code in codes]
    while codes and not codes[-1]:
        codes.pop()
    if not codes:
        raise DataError(f"{path.name}/codes.txt is empty. It lists the class names, one a line.")
    return codes


def split_files(path: Path) -> tuple[list[Path], list[Path]]:
    """The photos to train on and the photos to validate on, by valid.txt or, without it, by a fixed random fifth.

    Raises:
        DataError: there are no photos, or one of the two would be empty.
    """
    photos = list_photos(path) if (path / "images").is_dir() else []
    if not photos:
        raise DataError(f"there are no photos in {path.name}/images. Put them there, and their masks into labels/.")
    train, valid = split_photos(path)
    if not train or not valid:
        raise DataError(
            f"of the {len(photos)} photos in {path.name}/images, {len(train)} are left to train on and {len(valid)} to "
            "validate on. Both are needed: list some, not all, of the photos in valid.txt, or take that file away."
        )
    return train, valid


# --- what the reader sees ---


def sample_truth(codes: Sequence[str]) -> dict[str, np.ndarray]:
    """The true mask of the tutorial's sample, as "truth" for `show_segmentation`, beside masks of the classes `codes`.

    It is (480, 640) of class indices where `codes` are those of the scenes. Where only some names are the same, as in
    CamVid of 32 classes, it is (480, 640, 3) of colors, which go by name. Where none is, the dictionary is empty.
    """
    from deployment.answers import palette

    mask = np.asarray(Image.open(label_of(SAMPLE, SAMPLE.parent)))
    if list(codes) == list(scenes.CODES):
        return {"truth": mask}
    return {"truth": palette(list(scenes.CODES))[mask]} if set(codes) & set(scenes.CODES) else {}


def show_segmentation(
    photo: Image.Image | None,
    masks: Mapping[str, np.ndarray | Image.Image],
    codes: Sequence[str],
    file: Path | None = None,
) -> None:
    """Draw a photo (or none) and `masks` side by side, each under its name, with the names of the colors below.

    A mask is (H, W) of class indices; what has colors, (H, W, 3) or a PIL picture, is drawn as it is. With `file`, the
    drawing is written there as well.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    from deployment.answers import palette

    pictures = {} if photo is None else {"photo": np.asarray(photo)}
    pictures |= {title: np.asarray(picture) for title, picture in masks.items()}
    colors = palette(list(codes))
    shown = sorted({int(i) for picture in pictures.values() if picture.ndim == 2 for i in np.unique(picture)})
    n = len(pictures)
    fig, axes = plt.subplots(1, n, figsize=(3.6 * n, 3.6), squeeze=False, layout="constrained")
    for (title, picture), ax in zip(pictures.items(), axes.flat, strict=True):
        ax.imshow(colors[picture] if picture.ndim == 2 else picture, interpolation="nearest")
        ax.set_axis_off()
        ax.set_title(title)
    patches = [Patch(color=colors[i] / 255, label=codes[i]) for i in shown]
    rows = math.ceil(len(shown) / (3 * n)) or 1
    columns = math.ceil(len(shown) / rows)
    fig.legend(handles=patches, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    if file:
        part = file.with_suffix(".part")
        fig.savefig(part, format="png")
        os.replace(part, file)
    plt.show()
