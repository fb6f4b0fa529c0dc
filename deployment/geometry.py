"""Where the model's pixels lie in an image: what it sees of it, and the way back to the image's own size.

All of it follows from the configuration: the item transforms and the batch transforms that resample an image.
"""

from collections.abc import Sequence

import numpy as np

from .config import Config


class Frames:
    """What the model sees of an image of `size`; all sizes are (height, width) in pixels.

    The `box` in the middle of the image is resized to `resized`. Of that the model sees `seen`, from the corner `start`
    on, which reaches beyond it where it is padded.
    """

    def __init__(self, config: Config, size: tuple[int, int]):
        options = config.resize or {}
        self.image = self.box = self.resized = size
        if options.get("size"):
            self.resized = tuple(options["size"])
            method = options.get("method", "squish")
            if method != "squish":
                self.box = tuple(max(side, 1) for side in resized_box(size, self.resized, method))
        self.seen = tuple(options.get("crop") or self.resized)
        self.start = tuple((whole - part) // 2 for whole, part in zip(self.resized, self.seen, strict=True))
        for step in config.affine:
            if "ratio" in step:
                part = middle_of_ratio(self.seen, step["ratio"], step["scale"])
                corner = ((whole - side) // 2 for whole, side in zip(self.seen, part, strict=True))
                self.start = tuple(x + offset for x, offset in zip(self.start, corner, strict=True))
                self.seen = part

    def to_image(self, positions: np.ndarray, axis: int) -> np.ndarray:
        """`positions` along `axis` of the resized image, in pixels of the image."""
        left = int(0.5 * (self.image[axis] - self.box[axis]))
        return positions * self.box[axis] / self.resized[axis] + left


def nearest_samples(config: Config, size: tuple[int, int], axis: int, cells: int) -> np.ndarray:
    """For each pixel along `axis` of an image of `size` (height, width), the index of the nearest of a mask's `cells`.

    Where the model sees the image as Pillow resized it, that rounds as Pillow's own nearest neighbor does.
    """
    frames = Frames(config, size)
    steps = [step for step in config.affine if step["size"] is not None]
    if any(step["align_corners"] for step in steps):
        centers = frames.to_image(sample_positions(config, size, axis), axis)
        borders = (centers[1:] + centers[:-1]) / 2
        return np.searchsorted(borders, np.arange(size[axis]) + 0.5, side="right")
    n, box, resized = frames.image[axis], frames.box[axis], frames.resized[axis]
    step = resized / box
    first = (0.5 - int(0.5 * (n - box))) * step - frames.start[axis]
    positions = np.cumsum(np.r_[first, np.full(n - 1, step)] * (cells / frames.seen[axis]))
    return positions.astype(int).clip(0, cells - 1)


def sample_positions(config: Config, size: tuple[int, int], axis: int) -> np.ndarray:
    """Where the model's samples along `axis` lie in the resized image, in its pixels: the middle of the first is 0.5.

    `size` is the image's, (height, width). fastai resamples with `align_corners=True`: the first and the last sample
    are the first and the last pixel, of the image or, where it is much larger, of its means over areas.
    """
    options = config.resize or {}
    shape = tuple(options.get("crop") or options.get("size") or size)
    positions = np.arange(shape[axis]) + 0.5
    resized = tuple(options.get("size") or size)
    positions = positions + (resized[axis] - shape[axis]) // 2
    for step in config.affine:
        if "ratio" in step:
            part = middle_of_ratio(shape, step["ratio"], step["scale"])
            corner = (shape[axis] - part[axis]) // 2
            positions, shape = positions[corner : corner + part[axis]], part
        out, n = tuple(step["size"] or shape), shape[axis]
        cells = sampled_cells(shape, out, step["mode"], step["align_corners"])[axis]
        numbers = np.arange(cells)
        first, last = numbers * n // cells, -((numbers + 1) * -n // cells) - 1  # pixels of each
        centers = (first + last) / 2
        if not step["align_corners"]:
            indices = (np.arange(out[axis]) + 0.5) * cells / out[axis] - 0.5
        elif out[axis] > 1:
            indices = np.linspace(0, cells - 1, out[axis])
        else:
            indices = np.array([(cells - 1) / 2])
        indices = np.interp(indices, numbers, centers)
        positions, shape = np.interp(indices, np.arange(n), positions), out
    return positions


def sampled_cells(shape: Sequence[int], out: Sequence[int], mode: str, align_corners: bool) -> tuple[int, int]:
    """How many cells (height, width) fastai samples at `out` of an image of `shape`: pixels, or areas of them."""
    zoom = 1.0 if align_corners else max(out) / max(max(out) - 1, 1)
    shrink = shrink_factor(shape, out) if mode == "bilinear" else 1.0
    if shrink <= zoom:
        return shape[0], shape[1]
    return int(shape[0] * (1 / shrink)), int(shape[1] * (1 / shrink))  # as `F.interpolate` rounds


def shrink_factor(shape: Sequence[int], out: Sequence[int]) -> float:
    """By how much fastai shrinks an image of `shape` (height, width) by area before it samples it at `out`.

    It looks at the last two dimensions of the sampling grid, (N, height, width, 2): at the width, and at 2. See
    `_grid_sample` in fastai.vision.augment.
    """
    return min(shape[0] / out[1], shape[1] / 2) / 2


def resized_box(image: Sequence[int], size: Sequence[int], method: str) -> tuple[int, int]:
    """The box of the aspect ratio of `size` around (method pad) or inside (crop) `image`; all are (height, width)."""
    by_height, by_width = image[0] / size[0], image[1] / size[1]
    scale = max(by_height, by_width) if method == "pad" else min(by_height, by_width)
    return int(scale * size[0]), int(scale * size[1])


def middle_of_ratio(image: Sequence[int], ratio: tuple[float, float], scale: float) -> tuple[int, int]:
    """(height, width) of the middle of `image`, of a width of ratio[0] to ratio[1] times the height, times `scale`."""
    h, w = image
    if w / h < ratio[0]:
        h = int(w / ratio[0])
    elif w / h > ratio[1]:
        w = int(h * ratio[1])
    return int(h * scale), int(w * scale)
