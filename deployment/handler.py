"""TorchServe handler of a fastai U-Net: photos in, segmentation masks out, in four steps.

`initialize` builds the model that `model-config.yaml` describes, `preprocess` reads the requests and makes tensors of
their photos just as the learner did, `inference` gives each its mask, `postprocess` makes one answer per request.
A request, or a photo among several of one request, that cannot be answered becomes a `Rejected`; all others go on.
"""

import base64
import binascii
import colorsys
import importlib
import io
import json
import logging
import re
import time
import warnings
from dataclasses import dataclass
from http import HTTPStatus

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import functional as tvf

if __package__:
    from .model import DynamicUnetDIY, decode
else:  # inside the archive, where the files lie side by side
    from model import DynamicUnetDIY, decode

logger = logging.getLogger(__name__)

# The decoders that a request can reach. Pillow has many more, and some of them start other programs (EPS).
PHOTO_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
ANSWER_FORMATS = {"json": "application/json", "png": "image/png", "overlay": "image/jpeg"}
SIZES = ("model", "original")
MAX_INSTANCES = 64  # photos in one JSON request


class Rejected(Exception):
    """Why a request, or one photo of it, gets an error for an answer. `message` never repeats what was sent."""

    def __init__(self, status: HTTPStatus, type: str, message: str):
        super().__init__(message)
        self.status, self.type, self.message = status, type, message

    def as_json(self) -> dict:
        return {"code": self.status.value, "type": self.type, "message": self.message}


def bad_request(message: str) -> Rejected:
    return Rejected(HTTPStatus.BAD_REQUEST, "BadRequest", message)


def too_large(message: str) -> Rejected:
    return Rejected(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "TooLarge", message)


def no_memory() -> Rejected:
    return Rejected(HTTPStatus.INSUFFICIENT_STORAGE, "OutOfMemory", "not enough memory for this photo")


@dataclass
class Photo:
    """One photo on its way: what `preprocess` read, then the mask or the error that `inference` adds."""

    size: tuple[int, int] = (0, 0)  # width and height as sent
    shown: Image.Image | None = None  # what an overlay is drawn on
    x: torch.Tensor | None = None  # float32 (channels, height, width), as the model takes it
    mask: np.ndarray | None = None  # uint8 (height, width)
    error: Rejected | None = None


@dataclass
class Job:
    """One request: its photos, and how to answer."""

    photos: list[Photo]
    format: str = "json"
    size: str = "model"
    is_json: bool = False  # one answer per instance, under "predictions"
    pixels: int = 0  # that may still be decoded


# --- reading requests ---


def read_request(fields: dict, accept: str) -> tuple[list, str, str, bool]:
    """What one request asks for: its photos, the format and the size of the answer, and whether it is JSON.

    `fields` is TorchServe's form of a request: `body`, or the fields of a multipart form. A photo is bytes, or, in
    JSON, still `{"b64": …}` or `{"data": {"b64": …}}`: each of those fails alone, in `read_instance`.

    Raises:
        Rejected: 400 for what is none of the three forms of a request, 413 for too many instances.
    """
    body = fields.get("data", fields.get("body"))
    if isinstance(body, str):
        body = body.encode()
    if isinstance(body, bytes | bytearray):
        if not body:
            raise bad_request("the request is empty: send a photo as the body or in the multipart field `data`")
        if body[:100].lstrip()[:1] != b"{":
            return [bytes(body)], *read_options(fields, accept), False
        try:
            body = json.loads(body)
        except (ValueError, RecursionError):
            raise bad_request("the body begins like JSON but is not JSON") from None
    if not isinstance(body, dict):
        raise bad_request('no photo: send it as the body, in the field `data`, or as {"instances": [{"b64": …}]}')
    instances, parameters = body.get("instances"), body.get("parameters")
    if not isinstance(instances, list) or not instances:
        raise bad_request('JSON must be {"instances": [{"b64": …}, …]} with at least one instance')
    if len(instances) > MAX_INSTANCES:
        raise too_large(f"more than {MAX_INSTANCES} instances in one request")
    if not isinstance(parameters, dict | None):
        raise bad_request("`parameters` must be an object")
    return instances, *read_options(parameters or {}, ""), True


def read_options(fields: dict, accept: str) -> tuple[str, str]:
    """The format and the size of the answer: of the fields, else the first type in `accept` that can be made.

    Raises:
        Rejected: 400 for a format or a size that does not exist.
    """
    accepted = (media_type.split(";")[0].strip().lower() for media_type in accept.split(","))
    names = {media_type: name for name, media_type in ANSWER_FORMATS.items()} | {"*/*": "json"}
    default = next((names[media_type] for media_type in accepted if media_type in names), "json")
    values = []
    for name, choices, value in (("format", ANSWER_FORMATS, default), ("size", SIZES, "model")):
        given = fields.get(name)
        if isinstance(given, bytes | bytearray):
            given = given.decode(errors="replace")
        if given is not None and not (isinstance(given, str) and given in choices):
            raise bad_request(f"`{name}` must be one of: {', '.join(choices)}")
        values.append(given or value)
    return values[0], values[1]


def read_instance(instance) -> bytes:
    """The bytes of the photo in an instance of a JSON request.

    Raises:
        Rejected: 400 when it is not `{"b64": …}` or `{"data": {"b64": …}}`, or not base64.
    """
    if isinstance(instance, bytes):
        return instance
    if isinstance(instance, dict) and isinstance(instance.get("data"), dict):
        instance = instance["data"]
    if not isinstance(instance, dict) or not isinstance(instance.get("b64"), str):
        raise bad_request('an instance must be {"b64": …} or {"data": {"b64": …}}')
    try:
        return base64.b64decode("".join(instance["b64"].split()), validate=True)
    except (binascii.Error, ValueError):
        raise bad_request("`b64` is not base64") from None


# --- photos to tensors, as fastai does it at validation time ---


def photo_size(data: bytes) -> tuple[int, int]:
    """Width and height of the photo in `data`, from its header alone.

    Raises:
        Rejected: 400 when it is no photo in one of PHOTO_FORMATS, 413 above Pillow's MAX_IMAGE_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(data), formats=PHOTO_FORMATS) as image:
            return image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise too_large(f"more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    except Exception:  # decoders raise all kinds of errors on broken files
        message = f"no photo that can be read: send {', '.join(PHOTO_FORMATS)}"
        raise Rejected(HTTPStatus.BAD_REQUEST, "BadImage", message) from None


def open_image(data: bytes, n_in: int = 3) -> Image.Image:
    """The photo in `data` as fastai's `PILImage.create` opens it: mode RGB, or L for `n_in` 1; no EXIF rotation."""
    return Image.open(io.BytesIO(data)).convert({1: "L", 3: "RGB"}[n_in])


def resize(
    image: Image.Image,
    size: tuple[int, int] | None = None,
    method: str = "squish",
    pad_mode: str = "reflection",
    resample: str = "bilinear",
    crop: tuple[int, int] | None = None,
    crop_pad_mode: str = "zeros",
) -> Image.Image:
    """`image` as fastai's item transforms leave it at validation time.

    Args:
        size, method, pad_mode, resample: as in `Resize`, with `size` as (height, width); None does not resize.
        crop, crop_pad_mode: (height, width) that is then cut out of the middle, or padded to, as `CropPad`,
            `RandomCrop` and the last step of `RandomResizedCrop` do it.
    """
    if size is not None:
        h, w = size
        if method != "squish":  # first cut or pad the photo to the aspect ratio of `size`
            wider = image.width / w > image.height / h
            scale = image.width / w if wider == (method == "pad") else image.height / h
            box_w, box_h = int(scale * w), int(scale * h)
            left, top = int(0.5 * (image.width - box_w)), int(0.5 * (image.height - box_h))
            image = crop_pad(image, left, top, box_w, box_h, pad_mode)
        image = image.resize((w, h), Image.Resampling[resample.upper()])
    if crop is not None:
        h, w = crop
        image = crop_pad(image, (image.width - w) // 2, (image.height - h) // 2, w, h, crop_pad_mode)
    return image


def crop_pad(image: Image.Image, left: int, top: int, width: int, height: int, pad_mode: str) -> Image.Image:
    """The part of `image` that begins at (`left`, `top`), padded where it reaches beyond the image."""
    right, bottom = left + width, top + height
    padding = max(-left, 0), max(-top, 0), max(right - image.width, 0), max(bottom - image.height, 0)
    image = image.crop((max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)))
    mode = {"zeros": "constant", "border": "edge", "reflection": "reflect"}[pad_mode]
    return tvf.pad(image, padding, padding_mode=mode) if any(padding) else image


def to_tensor(
    image: Image.Image,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    affine: list[dict] | None = None,
) -> torch.Tensor:
    """`image` as float32 (channels, height, width) in 0..1, as fastai's batch transforms leave it at validation time.

    `affine` holds the options of `resample` for each affine augmentation of the learner; `mean` and `std` normalize.
    """
    x = torch.from_numpy(np.array(image)).float().div_(255.0)
    x = x.permute(2, 0, 1) if x.ndim == 3 else x[None]
    for options in affine or ():
        x = resample(x, **options)
    if mean is not None:
        x = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    return x.contiguous()


def resample(
    x: torch.Tensor,
    size: tuple[int, int] | None = None,
    mode: str = "bilinear",
    pad_mode: str = "reflection",
    align_corners: bool | None = True,
) -> torch.Tensor:
    """`x` (channels, height, width) as fastai's affine augmentations leave it at validation time.

    They do not turn or zoom it then, but still sample it anew, at `size` (height, width) where that is given: see
    `AffineCoordTfm`, `affine_coord` and `_grid_sample` in fastai.vision.augment, whose arithmetic this is.
    """
    x = x[None]
    grid = F.affine_grid(torch.eye(2, 3)[None], [*x.shape[:2], *(size or x.shape[-2:])], align_corners=align_corners)
    if mode == "bilinear":
        zoom = 1 / (grid.max() - grid.min()).item() * 2
        shrink = min(x.shape[-2] / grid.shape[-2], x.shape[-1] / grid.shape[-1]) / 2
        if shrink > 1 and shrink > zoom:
            x = F.interpolate(x, scale_factor=1 / shrink, mode="area", recompute_scale_factor=True)
    return F.grid_sample(x, grid, mode=mode, padding_mode=pad_mode, align_corners=align_corners)[0]


def load_model(config: dict, weights: str) -> DynamicUnetDIY:
    """The model that `config` (section `handler` of `model-config.yaml`) describes, with `weights`, in eval mode."""
    with torch.device("meta"):  # no memory, no random initialization: every tensor comes from the file
        model = DynamicUnetDIY(config["arch"], config["n_classes"], config["img_size"], **config["options"])
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), strict=True, assign=True)
    return model.eval()


# --- masks to answers ---

# The colours of the CamVid database (Brostow et al. 2009), and of the names that its 11-class subset goes by.
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


def palette(codes: list[str]) -> np.ndarray:
    """A colour for each class name: uint8 (len(codes), 3), RGB. CamVid's where it has one, else distinct hues."""
    colors, taken = [], set()
    for i, name in enumerate(codes):
        color = CAMVID_COLORS.get(str(name).lower())
        step = 0
        while color is None or color in taken:  # the golden ratio spreads hues, however many there are
            hue, value = (0.07 + 0.618034 * (i + step)) % 1, (1.0, 0.75, 0.5)[(i + step) % 3]
            color, step = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.85, value)), step + 1
        colors.append(color)
        taken.add(color)
    return np.array(colors, np.uint8)


def mask_image(mask: np.ndarray, codes: list[str]) -> Image.Image:
    """`mask` (uint8, height × width) as a palette image: pixel value = class, coloured by `palette`."""
    image = Image.fromarray(mask)
    image.putpalette(palette(codes).tobytes())
    return image


def overlay(photo: Image.Image, mask: np.ndarray, codes: list[str]) -> Image.Image:
    """`photo` with the colours of `mask` (uint8, height × width, of the photo's size) laid half transparent over it.

    Raises:
        ValueError: photo and mask differ in size.
    """
    if photo.size != mask.shape[::-1]:
        raise ValueError(f"the photo is {photo.size}, the mask {mask.shape[::-1]} (width, height)")
    return Image.blend(photo.convert("RGB"), mask_image(mask, codes).convert("RGB"), 0.5)


def mask_at_photo_size(mask: np.ndarray, size: tuple[int, int], resize: dict) -> np.ndarray:
    """`mask`, predicted on a photo of `size` (width, height) that went through `resize(photo, **resize)`, at that size.

    Each pixel takes the class of the nearest pixel of the mask. Where the model saw only the middle of the photo,
    the rest continues the mask's edge.
    """
    box = resized = np.array(size[::-1])  # the part of the photo that was resized, and to what; height, width
    if resize.get("size"):
        resized = np.array(resize["size"])
        if (method := resize.get("method", "squish")) != "squish":
            scale = (max if method == "pad" else min)(box / resized)
            box = np.maximum((scale * resized).astype(int), 1)
    sides = zip(size[::-1], box, resized, resize.get("crop") or resized, mask.shape, strict=True)
    rows, columns = (nearest(*side) for side in sides)
    return mask[rows][:, columns]


def nearest(n: int, box: int, resized: int, crop: int, cells: int) -> np.ndarray:
    """For each of the `n` pixels along one side of a photo, the index of the nearest of the mask's `cells`.

    Of the `n`, the `box` in the middle were resized to `resized`, of which the `crop` in the middle make the cells.
    """
    step = resized / box
    first = (0.5 - int(0.5 * (n - box))) * step - (resized - crop) // 2
    positions = np.cumsum(np.r_[first, np.full(n - 1, step)] * (cells / crop))  # summed up: it rounds as Pillow does
    return positions.astype(int).clip(0, cells - 1)


def encode(image: Image.Image, format: str) -> bytes:
    """`image` as the bytes of a PNG or JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def out_of_memory(error: Exception) -> bool:
    """Whether `error` says that memory ran out: Python's own, torch's on a GPU, or a runtime's on the CPU."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and bool(re.search("alloc|out of memory", str(error), re.I)))


class UnetHandler:
    """One instance per TorchServe worker."""

    def initialize(self, context) -> None:
        """Load the model named in the archive's manifest and configured in `model-config.yaml`, and warm it up."""
        properties = context.system_properties
        gpu = properties.get("gpu_id")
        self.device = torch.device(f"cuda:{gpu}" if torch.cuda.is_available() and gpu is not None else "cpu")
        self.config = config = context.model_yaml_config["handler"]
        # On a CPU a batch takes as long as its photos one by one, and rounds a few logits differently: a mask could
        # then depend on who else asks at the moment.
        batch_size = properties.get("batch_size") or 1
        self.photos_at_once = 1 if self.device.type == "cpu" else batch_size
        self.n_in = config["options"].get("n_in", 3)
        self.own_size = not config["resize"] and not any(options["size"] for options in config.get("affine") or ())
        # The network holds about 2 kB for each pixel that it sees; without a resize it sees all of the photo's.
        self.max_pixels = config.get("max_pixels") or (4_000_000 if self.own_size else 50_000_000)
        Image.MAX_IMAGE_PIXELS = self.max_pixels  # where Pillow warns, and we refuse
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if config["runtime"] == "eager":
            weights = f"{properties['model_dir']}/{context.manifest['model']['serializedFile']}"
            network = load_model(config, weights).to(self.device)
            self.model = lambda batch: decode(network(batch.to(self.device)), **config.get("decode", {})).cpu()
        else:
            runtime = importlib.import_module(".runtime" if __package__ else "runtime", __package__)
            self.model = runtime.load(config, properties["model_dir"], self.device, batch_size)
        self.inference([Photo(x=torch.zeros(self.n_in, *config["img_size"]))])

    def preprocess(self, requests: list[dict], context) -> list[Job]:
        """Each request as a `Job`, with its photos as tensors."""
        jobs = []
        for i, fields in enumerate(requests):
            try:
                instances, format, size, is_json = read_request(fields, header(context, i, "accept"))
                job = Job([], format, size, is_json, self.max_pixels)
                for instance in instances:
                    job.photos.append(self.read_photo(instance, job))
            except Rejected as error:
                job = Job([Photo(error=error)])
            jobs.append(job)
        return jobs

    def read_photo(self, instance, job: Job) -> Photo:
        """The photo in one instance as the tensor that the model takes; `error` is set where that fails."""
        c, photo = self.config, Photo()
        try:
            data = read_instance(instance)
            photo.size = photo_size(data)
            if self.cost(photo) > job.pixels:
                raise too_large(f"the photos of one request have more than {self.max_pixels} pixels")
            job.pixels -= self.cost(photo)
            if job.format == "overlay" and job.size == "original" and max(photo.size) > 65500:
                raise bad_request("no JPEG can be as wide or high as this photo: ask for size=model or format=png")
            image = shown = open_image(data, self.n_in)
            if c["resize"]:
                image = resize(image, **c["resize"])
                shown = shown if job.size == "original" else image
            photo.shown = shown if job.format == "overlay" else None
            photo.x = to_tensor(image, c["mean"], c["std"], c.get("affine"))
        except Rejected as error:
            photo.error = error
        except MemoryError:
            photo.error = no_memory()
        except Exception:  # decoders raise all kinds of errors on broken files
            photo.error = Rejected(HTTPStatus.BAD_REQUEST, "BadImage", "the photo is damaged or cut short")
        return photo

    def cost(self, photo: Photo) -> int:
        """Pixels that a photo counts for: its own, or the model's where these are more (time and answer grow so)."""
        h, w = (1, 1) if self.own_size else self.config["img_size"]
        return max(photo.size[0] * photo.size[1], h * w)

    def inference(self, photos: list[Photo]) -> None:
        """Set the mask of each photo. Those of one shape go through the model together, `photos_at_once` of them."""
        groups = {}
        for photo in photos:
            groups.setdefault(photo.x.shape, []).append(photo)
        for group in groups.values():
            for i in range(0, len(group), self.photos_at_once):
                self.forward(group[i : i + self.photos_at_once])

    @torch.inference_mode()
    def forward(self, photos: list[Photo]) -> None:
        """One forward pass; where memory runs out the batch is halved, and a photo that does not fit alone fails."""
        try:
            masks = self.model(torch.stack([photo.x for photo in photos])).numpy()
            for photo, mask in zip(photos, masks, strict=True):
                photo.mask = mask
            return
        except Exception as error:
            if not out_of_memory(error):
                if not self.own_size:
                    raise
                for photo in photos:  # the warm-up went well: it is the photo's own size that does not fit
                    photo.error = bad_request("the model takes no photo of this size")
                return
        # Only here, outside of `except`, are the tensors of the failed pass free again.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(photos) == 1:
            photos[0].error = no_memory()
            return
        logger.warning("out of memory with a batch of %d photos: halving it", len(photos))
        half = len(photos) // 2
        self.forward(photos[:half])
        self.forward(photos[half:])

    def postprocess(self, jobs: list[Job], context) -> list[bytes]:
        """One answer per request, in order; its status and content type go into `context`."""
        answers = []
        for i, job in enumerate(jobs):
            errors = [photo.error for photo in job.photos if photo.error]
            parts = [self.answer(job, photo) for photo in job.photos]
            status, content_type = HTTPStatus.OK, "application/json"
            if len(errors) == len(job.photos):
                status = errors[0].status if not job.is_json else HTTPStatus.BAD_REQUEST
                status = next((error.status for error in errors if error.status >= 500), status)
            if job.is_json:
                answer = {"predictions": parts}
                if status != HTTPStatus.OK:
                    answer |= Rejected(status, errors[0].type, f"no instance is good: {errors[0].message}").as_json()
            elif errors:
                answer = errors[0].as_json()
            else:
                answer, content_type = parts[0], ANSWER_FORMATS[job.format]
            if errors:
                log_rejected(context, i, status, errors)
            context.set_response_status(status.value, status.phrase, i)
            context.set_response_content_type(i, content_type)
            answers.append(answer if isinstance(answer, bytes) else json.dumps(answer).encode())
        return answers

    def answer(self, job: Job, photo: Photo) -> dict | bytes:
        """The answer for one photo: a picture as bytes, or what JSON says of the mask or of the error."""
        if photo.error:
            return {"error": photo.error.as_json()}
        codes, mask = self.config["codes"], photo.mask
        if job.size == "original":
            mask = mask_at_photo_size(mask, photo.size, self.config["resize"] or {})
        if job.format == "json":
            content = {"base64_prediction": base64.b64encode(mask.tobytes()).decode()}
        else:
            png = job.format == "png"
            picture = (
                encode(mask_image(mask, codes), "PNG") if png else encode(overlay(photo.shown, mask, codes), "JPEG")
            )
            if not job.is_json:
                return picture
            content = {"png" if png else "jpeg": base64.b64encode(picture).decode()}
        counts = Image.fromarray(mask).histogram()
        classes = {name: round(n / mask.size, 6) for name, n in zip(codes, counts[: len(codes)], strict=True) if n}
        return content | {"shape": list(mask.shape), "classes": classes}

    def handle(self, requests: list[dict], context) -> list[bytes]:
        """A dynamic batch of requests in, as many answers out; the time of each step goes into the metrics."""
        times = [time.perf_counter()]
        jobs = self.preprocess(requests, context)
        times.append(time.perf_counter())
        photos = [photo for job in jobs for photo in job.photos if not photo.error]
        self.inference(photos)
        times.append(time.perf_counter())
        answers = self.postprocess(jobs, context)
        times.append(time.perf_counter())
        for i, step in enumerate(("preprocess", "inference", "postprocess")):
            observe(context, f"{step}_seconds", times[i + 1] - times[i])
        observe(context, "batch_requests", len(requests))
        observe(context, "batch_photos", len(photos))
        return answers


# --- TorchServe ---


def header(context, i: int, name: str) -> str:
    """The header `name` of request `i`, or "". Clients write header names in any case."""
    headers = {key.lower(): value for key, value in context.get_all_request_header(i).items()}
    return value if isinstance(value := headers.get(name), str) else ""


def observe(context, name: str, value: float) -> None:
    """Add `value` to the histogram `name` on TorchServe's metrics address."""
    from ts.metrics.metric_type_enum import MetricTypes  # there when TorchServe runs this

    context.metrics.add_metric(name, round(value, 6), "count", dimensions=[], metric_type=MetricTypes.HISTOGRAM)


def log_rejected(context, i: int, status: HTTPStatus, errors: list[Rejected]) -> None:
    """One line in the log for request `i`, and one count per error in the metric `rejected_inputs`."""
    from ts.metrics.dimension import Dimension

    reasons = ", ".join(sorted({f"{error.type}: {error.message}" for error in errors}))
    logger.warning("request %s answered with %d: %s", context.get_request_id(i), status, reasons)
    for error in errors:
        context.metrics.add_counter("rejected_inputs", 1, dimensions=[Dimension("Reason", error.type)])


_handler = UnetHandler()


def handle(requests: list[dict] | None, context) -> list[bytes] | None:
    """TorchServe's entry point. It calls once with None to have the model loaded, then with each dynamic batch."""
    return _handler.initialize(context) if requests is None else _handler.handle(requests, context)
