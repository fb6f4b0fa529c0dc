"""From a photo's bytes to the tensor that the model takes, as fastai does it at validation time, and back.

`Preprocessor` is the one implementation: the handler, the proof of the export, the conversion, the benchmark and the
notebooks all call it.
"""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import functional as tvf

if __package__:
    from .config import Config
    from .protocol import bad_image, too_large
else:  # in the archive, where the files lie side by side
    from config import Config
    from protocol import bad_image, too_large

# The decoders that a request can reach. Pillow has many more, and some of them start other programs (EPS).
PHOTO_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


class Preprocessor:
    """The learner's way from a photo to a tensor: `to_tensor(resize(open(data)))`, and back from a mask to the photo.

    `max_pixels` bounds the photos of one request. The network holds about 2 kB for each pixel that it sees; without a
    resize it sees all of the photo's.
    """

    def __init__(self, config: Config):
        self.config = config
        self.max_pixels = config.max_pixels or (4_000_000 if config.keeps_photo_size else 50_000_000)
        self.mean, self.std = (values and torch.tensor(values)[:, None, None] for values in (config.mean, config.std))

    def __call__(self, data: bytes) -> torch.Tensor:
        """The photo in `data` as float32 (channels, height, width)."""
        return self.to_tensor(self.resize(self.open(data)))

    def open(self, data: bytes) -> Image.Image:
        """The photo in `data` as fastai's `PILImage.create` opens it: mode RGB, or L for one channel; no EXIF rotation.

        Raises:
            Rejected: as `identify` and `decode`.
        """
        return self.decode(self.identify(data))

    def identify(self, data: bytes) -> Image.Image:
        """The photo in `data` by its header alone: its size is known, its pixels are not decoded yet.

        Raises:
            Rejected: 400 when it is none of PHOTO_FORMATS, 413 above `max_pixels`.
        """
        try:
            image = Image.open(io.BytesIO(data), formats=PHOTO_FORMATS)
        except Image.DecompressionBombError:
            raise too_large(f"more than {self.max_pixels} pixels") from None
        except Exception:  # decoders raise all kinds of errors on broken files
            raise bad_image(f"not an image of a known format: send {', '.join(PHOTO_FORMATS)}") from None
        if image.width * image.height > self.max_pixels:
            raise too_large(f"more than {self.max_pixels} pixels")
        return image

    def decode(self, image: Image.Image) -> Image.Image:
        """The pixels of what `identify` returned.

        Raises:
            Rejected: 400 when they are damaged or cut short.
        """
        try:
            return image.convert({1: "L", 3: "RGB"}[self.config.n_in])
        except MemoryError:
            raise
        except Exception:
            raise bad_image("the photo is damaged or cut short") from None

    def counted_pixels(self, size: tuple[int, int]) -> int:
        """What a photo of `size` counts for: its pixels, or the model's where these are more."""
        h, w = (1, 1) if self.config.keeps_photo_size else self.config.img_size
        return max(size[0] * size[1], h * w)

    def resize(self, image: Image.Image, resample: str | None = None) -> Image.Image:
        """`image` as the learner's item transforms leave it at validation time.

        The configuration's `resize` has the arguments of fastai's `Resize`: `size` as (height, width), `method`,
        `pad_mode`, `resample`; and `crop`, (height, width) that is then cut out of the middle or padded to with
        `crop_pad_mode`, as `CropPad`, `RandomCrop` and the last step of `RandomResizedCrop` do it.

        Args:
            resample: instead of the configuration's: "nearest" for labels.

        Raises:
            Rejected: 400 for a photo so narrow that nothing of it is left.
        """
        options = self.config.resize or {}
        if size := options.get("size"):
            h, w = size
            if (method := options.get("method", "squish")) != "squish":  # cut or pad to the aspect ratio of `size`
                box_h, box_w = resized_box(image.size[::-1], size, method)
                if not box_h or not box_w:
                    raise bad_image("the photo is too narrow for the model")
                left, top = int(0.5 * (image.width - box_w)), int(0.5 * (image.height - box_h))
                image = crop_pad(image, left, top, box_w, box_h, options.get("pad_mode", "reflection"))
            filter = resample or options.get("resample", "bilinear")
            image = image.resize((w, h), Image.Resampling[filter.upper()])
        if crop := options.get("crop"):
            h, w = crop
            left, top = (image.width - w) // 2, (image.height - h) // 2
            image = crop_pad(image, left, top, w, h, options.get("crop_pad_mode", "zeros"))
        return image

    def to_tensor(self, image: Image.Image) -> torch.Tensor:
        """`image` as float32 (channels, height, width), as the batch transforms leave it at validation time."""
        x = torch.from_numpy(np.array(image))
        x = (x.permute(2, 0, 1) if x.ndim == 3 else x[None]).contiguous().float().div_(255.0)
        for options in self.config.affine:
            x = resample_affine(x, **options)
        if self.mean is not None:
            x = x.sub_(self.mean).div_(self.std)
        return x.contiguous()

    def label(self, image: Image.Image) -> torch.Tensor:
        """A label (mode L, pixel value = class) where its photo's pixels are: uint8 (height, width)."""
        label = torch.from_numpy(np.array(self.resize(image, resample="nearest"), np.uint8))[None]
        for options in self.config.affine:
            label = resample_affine(label.float(), **options | {"mode": "nearest"}).to(torch.uint8)
        return label[0]

    def to_photo_size(self, mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """`mask` (height × width), predicted on a photo of `size` (width, height), at that size.

        Each pixel takes the class of the nearest pixel of the mask. Where the model saw only the middle of the photo,
        the rest continues the mask's edge.
        """
        sides = zip(*self.geometry(size), mask.shape, strict=True)
        rows, columns = (nearest(*side) for side in sides)
        return mask[rows][:, columns]

    def points_to_photo(self, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Points that the model sees, in pixels of the photo of `size` (width, height).

        Args:
            points: (n, 2) float, x and y, from -1 at the left and the top of the model's input to 1 at its other end:
                fastai's `PointScaler`. Augmentations that sample the photo anew leave them as they are.

        Returns:
            (n, 2) float64; 0 is the outer edge of the first pixel. Points may lie outside the photo.
        """
        x_and_y = zip(np.asarray(points, np.float64).T, *(side[::-1] for side in self.geometry(size)), strict=True)
        columns = []
        for values, n, box, resized, start, seen in x_and_y:
            pixels = (values + 1) * seen / 2 + start  # of the photo as it was resized
            columns.append(pixels * box / resized + int(0.5 * (n - box)))
        return np.stack(columns, axis=1)

    def geometry(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """What the model sees of a photo of `size` (width, height), as five pairs of (height, width).

        They are: the photo, its part in the middle that is resized, to what, and of that the upper left corner and the
        size of what the model sees, which reaches beyond it where it is padded.
        """
        options = self.config.resize or {}
        photo = box = resized = size[::-1]
        if options.get("size"):
            resized = tuple(options["size"])
            if (method := options.get("method", "squish")) != "squish":
                box = tuple(max(side, 1) for side in resized_box(photo, resized, method))
        seen = tuple(options.get("crop") or resized)
        start = tuple((whole - part) // 2 for whole, part in zip(resized, seen, strict=True))
        for step in self.config.affine:
            if "ratio" in step:
                part = middle_of_ratio(seen, step["ratio"], step["scale"])
                start = tuple(x + (whole - side) // 2 for x, whole, side in zip(start, seen, part, strict=True))
                seen = part
        return [photo, box, resized, start, seen]


def resized_box(photo: tuple[int, int], size: tuple[int, int], method: str) -> tuple[int, int]:
    """The box of the aspect ratio of `size` around (method pad) or inside (crop) `photo`; all are (height, width)."""
    by_height, by_width = photo[0] / size[0], photo[1] / size[1]
    scale = max(by_height, by_width) if method == "pad" else min(by_height, by_width)
    return int(scale * size[0]), int(scale * size[1])


def middle_of_ratio(photo: tuple[int, int], ratio: tuple[float, float], scale: float) -> tuple[int, int]:
    """(height, width) of the middle of `photo`, of a width of ratio[0] to ratio[1] times the height, times `scale`."""
    h, w = photo
    if w / h < ratio[0]:
        h = int(w / ratio[0])
    elif w / h > ratio[1]:
        w = int(h * ratio[1])
    return int(h * scale), int(w * scale)


def crop_pad(image: Image.Image, left: int, top: int, width: int, height: int, pad_mode: str) -> Image.Image:
    """The part of `image` that begins at (`left`, `top`), padded where it reaches beyond the image."""
    right, bottom = left + width, top + height
    padding = max(-left, 0), max(-top, 0), max(right - image.width, 0), max(bottom - image.height, 0)
    image = image.crop((max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)))
    mode = {"zeros": "constant", "border": "edge", "reflection": "reflect"}[pad_mode]
    return tvf.pad(image, padding, padding_mode=mode) if any(padding) else image


def resample_affine(
    x: torch.Tensor,
    size: tuple[int, int] | None = None,
    mode: str = "bilinear",
    pad_mode: str = "reflection",
    align_corners: bool | None = True,
    ratio: tuple[float, float] | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """`x` (channels, height, width) as fastai's affine augmentations leave it at validation time.

    They do not turn or zoom it then, but still sample it anew, at `size` (height, width) where that is given: see
    `AffineCoordTfm`, `affine_coord` and `_grid_sample` in fastai.vision.augment, whose arithmetic this is. With `ratio`
    and `scale` the middle is cut out first, as `RandomResizedCropGPU` does it.

    Raises:
        Rejected: 400 for a photo of which nothing is left.
    """
    x = x[None]
    if ratio:
        h, w = middle_of_ratio(x.shape[-2:], ratio, scale)
        if not h or not w:
            raise bad_image("the photo is too narrow for the model")
        top, left = (x.shape[-2] - h) // 2, (x.shape[-1] - w) // 2
        x = x[..., top : top + h, left : left + w]
    grid = F.affine_grid(torch.eye(2, 3)[None], [*x.shape[:2], *(size or x.shape[-2:])], align_corners=align_corners)
    if mode == "bilinear":
        zoom = 1 / (grid.max() - grid.min()).item() * 2
        shrink = min(x.shape[-2] / grid.shape[-2], x.shape[-1] / grid.shape[-1]) / 2
        if shrink > 1 and shrink > zoom:
            x = F.interpolate(x, scale_factor=1 / shrink, mode="area", recompute_scale_factor=True)
    return F.grid_sample(x, grid, mode=mode, padding_mode=pad_mode, align_corners=align_corners)[0]


def nearest(n: int, box: int, resized: int, start: int, seen: int, cells: int) -> np.ndarray:
    """For each of the `n` pixels along one side of a photo, the index of the nearest of the mask's `cells`.

    Of the `n`, the `box` in the middle were resized to `resized`, of which the `seen` from `start` on make the cells.
    """
    step = resized / box
    first = (0.5 - int(0.5 * (n - box))) * step - start
    positions = np.cumsum(np.r_[first, np.full(n - 1, step)] * (cells / seen))  # summed up: it rounds as Pillow does
    return positions.astype(int).clip(0, cells - 1)
