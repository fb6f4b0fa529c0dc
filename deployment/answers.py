"""What a model computed to what a client gets: JSON, or of a mask a colored PNG or an overlay on the photo.

| task | answer |
|---|---|
| segmentation | `{"base64_prediction": …, "shape": [height, width], "classes": {name: share, …}, "names": [name, …]}` |
| classification | `{"label": name, "probabilities": {name: probability, …}}`, most probable first |
| multi-label | `{"labels": [name, …], "probabilities": {name: probability, …}}`, likewise |
| regression | `{"values": [value, …]}` |
| points | `{"points": [[x, y], …]}` in pixels of the image as it was sent |

Of a mask there is a PNG or a JPEG as well. `names` has the name of each index of a mask; JSON objects lose their order
on the way through some clients. NumPy and Pillow alone.
"""

import colorsys
import io

import numpy as np
from PIL import Image

from .photos import Preprocessor
from .protocol import Request, bad_request

# The colors of the CamVid database (Brostow et al. 2009), and of the names that its 11-class subset goes by.
CAMVID_COLORS = {
    "animal": (64, 128, 64), "archway": (192, 0, 128), "bicyclist": (0, 128, 192), "bridge": (0, 128, 64),
    "building": (128, 0, 0), "car": (64, 0, 128), "cartluggagepram": (64, 0, 192), "child": (192, 128, 64),
    "column_pole": (192, 192, 128), "pole": (192, 192, 128), "fence": (64, 64, 128), "lanemkgsdriv": (128, 0, 192),
    "lanemkgsnondriv": (192, 0, 64), "misc_text": (128, 128, 64), "motorcyclescooter": (192, 0, 192),
    "othermoving": (128, 64, 64), "parkingblock": (64, 192, 128), "pedestrian": (64, 64, 0), "road": (128, 64, 128),
    "roadshoulder": (128, 128, 192), "sidewalk": (0, 0, 192), "pavement": (0, 0, 192), "signsymbol": (192, 128, 128),
    "sky": (128, 128, 128), "suvpickuptruck": (64, 128, 192), "trafficcone": (0, 0, 64), "trafficlight": (0, 64, 64),
    "train": (192, 64, 128), "tree": (128, 128, 0), "truck_bus": (192, 128, 192), "tunnel": (64, 0, 64),
    "vegetationmisc": (192, 192, 0), "void": (0, 0, 0), "wall": (64, 192, 0),
}  # fmt: skip
MAX_JPEG_SIDE = 65500  # pixels
STRIP_ROWS = 512  # of an overlay that are drawn at a time


def make_answer(
    output: np.ndarray,
    preprocessor: Preprocessor,
    request: Request,
    size: tuple[int, int],
    image: Image.Image | None = None,
) -> dict:
    """The answer for one image, of which the model made `output`: see `runtime.load`.

    Args:
        preprocessor: that made the model's input of the image; it holds the configuration.
        size: (width, height) of the image as it was sent.
        image: what an overlay is drawn on.

    Raises:
        Rejected: 400 where a picture is asked for and the task gives none.
        ValueError: the model's output is not a number.
    """
    config = preprocessor.config
    if config.task == "segmentation":
        mask = output if request.size == "model" else preprocessor.to_image_size(output, size)
        return segmentation_answer(mask, config.classes, request.format, image)
    if request.format != "json" and not request.or_json:
        raise bad_request(f"a model for {config.task} answers in JSON alone: leave out `format` and ask for no image")
    if not np.isfinite(output).all():
        raise ValueError("the model's output is not a finite number")
    if config.task == "classification":
        return classification_answer(output, config.classes, request.top)
    if config.task == "multi-label":
        assert config.threshold is not None  # the export writes it for this task
        return multilabel_answer(output, config.classes, config.threshold, request.top)
    if config.task == "points":
        points = preprocessor.points_to_image(output.reshape(-1, 2), size)
        return {"points": [[round(float(x), 3), round(float(y), 3)] for x, y in points]}
    return {"values": [number(value) for value in output]}


def classification_answer(probabilities: np.ndarray, classes: list[str], top: int | None = None) -> dict:
    """The most probable of `classes` and the probabilities (float32, one per class), of the `top` highest."""
    return {"label": classes[int(probabilities.argmax())], "probabilities": ranked(probabilities, classes, top)}


def multilabel_answer(probabilities: np.ndarray, classes: list[str], threshold: float, top: int | None = None) -> dict:
    """Those of `classes` whose probability is above `threshold`, in their own order, and the probabilities."""
    labels = [name for name, above in zip(classes, probabilities > threshold, strict=True) if above]
    return {"labels": labels, "probabilities": ranked(probabilities, classes, top)}


def ranked(probabilities: np.ndarray, classes: list[str], top: int | None) -> dict[str, float]:
    """The probability of each class, highest first; of equal ones the first class."""
    return {classes[i]: number(probabilities[i]) for i in np.argsort(-probabilities, kind="stable")[:top]}


def number(value: np.float32) -> float:
    """`value` as the shortest decimal number that is this float32 when it is read back."""
    return float(str(value))


def segmentation_answer(mask: np.ndarray, classes: list[str], format: str, image: Image.Image | None) -> dict:
    """The answer for one image: the mask (uint8, height × width) as bytes or as a picture, and what is in it.

    `format` is json, png or overlay; only an overlay needs `image`.
    """
    if format == "png":
        content = {"png": encode(mask_image(mask, classes), "PNG")}
    elif format == "overlay":
        assert image is not None
        content = {"jpeg": encode(overlay(image, mask, classes), "JPEG")}
    else:
        content = {"base64_prediction": mask.tobytes()}
    return content | {"shape": list(mask.shape), "classes": shares(mask, classes), "names": classes}


def shares(mask: np.ndarray, classes: list[str]) -> dict[str, float]:
    """The share of the pixels that each class has, of those that occur. Classes of one name are counted as one."""
    pixels = {}
    for name, n in zip(classes, Image.fromarray(mask).histogram(), strict=False):
        if n:
            pixels[name] = pixels.get(name, 0) + n
    return {name: round(n / mask.size, 6) for name, n in pixels.items()}


def palette(classes: list[str]) -> np.ndarray:
    """A color for each class name: uint8 (len(classes), 3), RGB. CamVid's where it has one, else distinct hues."""
    colors, taken = [], set()
    for i, name in enumerate(classes):
        color = CAMVID_COLORS.get(str(name).lower())
        step = 0
        while color is None or color in taken:  # the golden ratio spreads hues, however many there are
            hue, value = (0.07 + 0.618034 * (i + step)) % 1, (1.0, 0.75, 0.5)[(i + step) % 3]
            color, step = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.85, value)), step + 1
        colors.append(color)
        taken.add(color)
    return np.array(colors, np.uint8)


def mask_image(mask: np.ndarray, classes: list[str]) -> Image.Image:
    """`mask` (uint8, height × width) as a palette image: pixel value = class, colored by `palette`."""
    image = Image.fromarray(mask)
    image.putpalette(palette(classes).tobytes())
    return image


def overlay(image: Image.Image, mask: np.ndarray, classes: list[str]) -> Image.Image:
    """`image`, brought to the size of `mask` (uint8, height × width), with the mask's colors half transparent on it.

    An RGB image of that size is itself drawn on: a copy of the largest one has 200 MB.

    Raises:
        Rejected: 400 for a size that no JPEG can have.
    """
    size = mask.shape[::-1]
    if max(size) > MAX_JPEG_SIDE:
        raise bad_request("no JPEG can be as wide or high as this photo: ask for size=model or format=png")
    if image.mode != "RGB":
        image = image.convert("RGB")
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    for top in range(0, image.height, STRIP_ROWS):
        colors = mask_image(mask[top : top + STRIP_ROWS], classes).convert("RGB")
        strip = image.crop((0, top, image.width, top + colors.height))
        image.paste(Image.blend(strip, colors, 0.5), (0, top))
    return image


def encode(image: Image.Image, format: str) -> bytes:
    """`image` as the bytes of a PNG or JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()
