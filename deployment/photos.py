"""From a file's bytes to pixels, as the learner's item transforms leave them, and back to the image's own size.

`Preprocessor` is the one implementation: the handler, the proof of the export, the conversion, the benchmark and the
notebooks all call it. NumPy and Pillow alone: what happens to the pixels after that is part of the served model.
"""

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from .config import Config
from .geometry import Frames, nearest_samples, resized_box
from .protocol import bad_image, bad_request, too_large
from .structure import check_structure

# The decoders that a request can reach. Pillow has many more, and some of them start other programs (EPS).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
MODES = {1: "L", 3: "RGB"}  # as fastai opens an image, by its channels
MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2}  # of a pixel; other modes: 4, for I;16B with the copy in `clips`
# What decoders take beside the image, in bytes of a pixel; measured, and rounded up. A progressive JPEG is kept whole.
DECODER_BYTES = {"WEBP": 12, "TIFF": 4, "GIF": 4}
PROGRESSIVE_BYTES = 2  # of a pixel, for each band
TILE_WIDTH, TILE_LENGTH = 322, 323  # tags of a TIFF
LARGE_TILE = 2048 * 2048  # pixels; none that is larger than this and larger than its image is decoded
TILE_BYTES = 8  # of a pixel of a tile, for the decoder
PADDING_BYTES = 14  # of a pixel of the padded image, for the arrays on the way there
CLIPPED = "more than 8 bits: values above 255 are white, as the learner opens the image; export with --open"
ANSWER_BYTES = 8  # of a pixel of an answer at the image's own size: mask, base64 and JSON, or the overlay
# numpy's names for the ways that fastai pads
PAD_MODES: dict[str, Literal["constant", "edge", "reflect"]] = {
    "zeros": "constant",
    "border": "edge",
    "reflection": "reflect",
}
Opener = Callable[[bytes], Image.Image | np.ndarray]  # from a file to the image, in open_image.py
Image.MAX_IMAGE_PIXELS = None  # `max_pixels` is the limit here, and each image's header is held against it


class Preprocessor:
    """The learner's way from a file to pixels, `to_array(resize(open(data)))`, and from a mask back to the image.

    Args:
        folder: what the export wrote, where the learner opens images itself: it holds `open_image.py`.

    `max_pixels` bounds the images of one request. The network holds about 2 kB for each pixel that it sees; without a
    resize it sees all of the image's.
    """

    def __init__(self, config: Config, folder: Path | str = "."):
        self.config = config
        self.max_pixels = config.max_pixels or (4_000_000 if config.keeps_image_size else 50_000_000)
        self.open_image = load_opener(Path(folder, "open_image.py")) if config.opener else None

    def __call__(self, data: bytes) -> np.ndarray:
        """The image in `data` as pixels: (height, width, channels) of the configuration's dtype."""
        return to_array(self.resize(self.open(data)))

    def open(self, data: bytes) -> Image.Image | np.ndarray:
        """The image in `data` as the learner opens it.

        Without an opener of its own that is fastai's `PILImage.create`: mode RGB, or L for one channel, not turned by
        its EXIF orientation.

        Raises:
            Rejected: 400 for what cannot be opened, 413 for an image above `max_pixels`.
        """
        if self.open_image:
            return self.open_own(data, self.open_image)
        return self.decode(self.identify(data))

    def open_own(self, data: bytes, open_image: Opener) -> Image.Image | np.ndarray:
        """The image in `data` as the reader's `open_image` returns it.

        Raises:
            Rejected: 400 where it raises ValueError or OSError, as Pillow does; 413 above `max_pixels`.
            TypeError: it returns something else than an image as the learner has them.
        """
        try:
            image = open_image(data)
        except (ValueError, OSError) as error:
            refusal = bad_image("open_image takes no such file")
            refusal.__cause__ = error
            raise refusal from error
        config, pixels = self.config, to_array(image)
        if pixels.ndim != 3 or pixels.shape[2] != config.channels or pixels.dtype != config.dtype:
            wanted = f"{config.channels} channels of {config.dtype}"
            raise TypeError(f"open_image returned {pixels.shape} of {pixels.dtype}, and the learner has {wanted}")
        self.check_size(size_of(image))
        return image

    def identify(self, data: bytes) -> Image.Image:
        """The image in `data` by its header alone: its size is known, its pixels are not decoded yet.

        Raises:
            Rejected: 400 for another format than FORMATS or one built to cost time or memory, 413 above `max_pixels`.
        """
        check_structure(data)
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Exception:  # decoders raise all kinds of errors on broken files
            raise bad_image(f"not an image of a known format: send {', '.join(FORMATS)}") from None
        self.check_size(image.size)
        if tile_pixels(image) > max(image.width * image.height, LARGE_TILE):
            raise bad_image("a TIFF with tiles that are larger than the image")
        return image

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises Rejected for an image of `size` (width, height): 413 above `max_pixels`, 400 if no model takes it."""
        if size[0] * size[1] > self.max_pixels:
            raise too_large(f"more than {self.max_pixels} pixels")
        if 0 in size:  # as an opener of the reader's own may return it
            raise bad_image("the image has no pixels")
        if not self.config.takes_size(size):
            raise bad_request("the model takes no photo of this size")

    def decode(self, image: Image.Image, whole: bool = False) -> Image.Image:
        """The pixels of what `identify` returned.

        Where the configuration's `decode` is fast, and `whole` is not asked for, a JPEG comes at a half, a quarter or
        an eighth of its size, by libjpeg's own scaling, while that is at least twice the size that it is resized to.

        Raises:
            Rejected: 400 when they are damaged or cut short.
        """
        mode = MODES[self.config.channels]
        try:
            if self.config.decode == "fast" and self.config.resize and not whole:
                h, w = self.config.resize["size"]
                image.draft(None, (2 * w, 2 * h))  # other formats have no such scaling, and stay as they are
            image.load()
            return image if image.mode == mode else image.convert(mode)  # Pillow has no way from LAB to L
        except MemoryError:
            raise
        except Exception:  # of Pillow alone: a fault in the code around it is not the image's
            raise bad_image("the photo is damaged or cut short") from None

    def memory(self, image: Image.Image) -> int:
        """The bytes that decoding and resizing what `identify` returned takes at most."""
        pixels, mode = image.width * image.height, MODES[self.config.channels]
        each = MODE_BYTES.get(image.mode, 4) + (0 if image.mode == mode else MODE_BYTES.get(mode, 4))
        each += DECODER_BYTES.get(image.format or "", 0)
        if image.info.get("progressive"):
            each += PROGRESSIVE_BYTES * len(image.getbands())
        tile = tile_pixels(image) * TILE_BYTES
        options = self.config.resize or {}
        if (size := options.get("size")) and options.get("method", "squish") != "squish":
            height, width = resized_box(image.size[::-1], size, options["method"])
            return pixels * each + tile + height * width * PADDING_BYTES
        return pixels * each + tile

    def counted_pixels(self, size: tuple[int, int]) -> int:
        """What an image of `size` (width, height) counts for: its pixels, or the model's where these are more."""
        h, w = (1, 1) if self.config.keeps_image_size else self.config.img_size
        return max(size[0] * size[1], h * w)

    def resize(self, image: Image.Image | np.ndarray, resample: str | None = None) -> Image.Image | np.ndarray:
        """`image` as the learner's item transforms leave it at validation time; they leave arrays as they are.

        The configuration's `resize` has the arguments of fastai's `Resize`: `size` as (height, width), `method`,
        `pad_mode`, `resample`; and `crop`, (height, width) that is then cut out of the middle or padded to with
        `crop_pad_mode`, as `CropPad`, `RandomCrop` and the last step of `RandomResizedCrop` do it.

        Args:
            resample: instead of the configuration's: "nearest" for labels.

        Raises:
            Rejected: 400 for an image so narrow that nothing of it is left.
        """
        options = self.config.resize or {}
        if not options or isinstance(image, np.ndarray):
            return image
        if size := options.get("size"):
            h, w = size
            method = options.get("method", "squish")
            if method != "squish":  # cut or pad to the aspect ratio of `size`
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

    def to_image_size(self, mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """`mask` (height × width), predicted on an image of `size` (width, height), at that size.

        Each pixel takes the class of the sample of the mask that lies nearest. Where the model saw only the middle of
        the image, the rest continues the mask's edge.
        """
        rows, columns = (nearest_samples(self.config, size[::-1], axis, mask.shape[axis]) for axis in (0, 1))
        return mask[rows][:, columns]

    def points_to_image(self, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Points that the model sees, in pixels of the image of `size` (width, height).

        Args:
            points: (n, 2) float, x and y, from -1 at the left and the top of the model's input to 1 at its other end:
                fastai's `PointScaler`. Augmentations that resample the image leave them as they are.

        Returns:
            (n, 2) float64; 0 is the outer edge of the first pixel. Points may lie outside the image.
        """
        frames, columns = Frames(self.config, size[::-1]), []
        for axis, values in ((1, points[:, 0]), (0, points[:, 1])):
            seen, start = frames.seen[axis], frames.start[axis]
            resized = (np.asarray(values, np.float64) + 1) * seen / 2 + start
            columns.append(frames.to_image(resized, axis))
        return np.stack(columns, axis=1)


def load_opener(path: Path) -> Opener:
    """The function `open_image` in the file at `path`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no such function, or fails when it is imported.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location("open_image", path)
    assert spec  # as there is for any file of Python
    module = importlib.util.module_from_spec(spec)
    try:
        exec(compile(path.read_bytes(), path, "exec"), module.__dict__)  # a loader would leave __pycache__ beside it
    except Exception as error:  # of the reader's code: any
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, "open_image", None)):
        raise ValueError(f"{path} has no function open_image(data: bytes)")
    return module.open_image


def to_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """`image` as pixels (height, width, channels), of its own dtype."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def size_of(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(width, height) of `image`."""
    return image.shape[1::-1] if isinstance(image, np.ndarray) else image.size


def clips(image: Image.Image) -> bool:
    """Whether `image`, decoded, has more than 8 bits, of which mode RGB or L keeps the values up to 255 alone."""
    if not image.mode.startswith(("I", "F")):
        return False
    if image.mode.startswith("I;16") and image.mode != "I;16":  # of these Pillow knows no extrema
        return bool(np.asarray(image).max() > 255)
    _, highest = image.getextrema()
    return isinstance(highest, int | float) and highest > 255


def tile_pixels(image: Image.Image) -> int:
    """The pixels of a tile of a TIFF, which may be larger than the image and is decoded whole; 0 without tiles."""
    tags = getattr(image, "tag_v2", {})
    return tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0)


def viewable(image: Image.Image | np.ndarray) -> Image.Image:
    """`image` as 8-bit RGB to look at: its first three channels, or its first; stretched to 0..255 where not uint8."""
    if isinstance(image, Image.Image) and image.mode in ("RGB", "L", "P", "RGBA", "1"):
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    pixels = to_array(image)
    pixels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, axis=2)
    if pixels.dtype != np.uint8:
        low, high = float(pixels.min()), float(pixels.max())
        pixels = (255 * (pixels - low) / max(high - low, 1e-9)).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels))


def crop_pad(image: Image.Image, left: int, top: int, width: int, height: int, pad_mode: str) -> Image.Image:
    """The part of `image` that begins at (`left`, `top`), padded where it reaches beyond the image."""
    right, bottom = left + width, top + height
    before, after = (max(-top, 0), max(-left, 0)), (max(bottom - image.height, 0), max(right - image.width, 0))
    image = image.crop((max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)))
    if not any(before + after):
        return image
    pixels = np.asarray(image)
    sides = [*zip(before, after, strict=True), (0, 0)][: pixels.ndim]
    return Image.fromarray(np.pad(pixels, sides, mode=PAD_MODES[pad_mode]))
