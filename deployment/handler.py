"""TorchServe handler of a fastai U-Net: photos in, segmentation masks out, in four steps.

`initialize` builds the model that `model-config.yaml` describes, `preprocess` turns requests into a batch just as the
learner did, `inference` is one forward pass, `postprocess` makes one answer per request.
"""

import base64
import io

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as tvf

if __package__:
    from .model import DynamicUnetDIY
else:  # inside the archive, where the files lie side by side
    from model import DynamicUnetDIY


def open_image(data: bytes, n_in: int = 3) -> Image.Image:
    """The photo in `data` as fastai's `PILImage.create` opens it: mode RGB, or L for `n_in` 1; no EXIF rotation."""
    return Image.open(io.BytesIO(data)).convert({1: "L", 3: "RGB"}[n_in])


def resize(
    image: Image.Image, size: tuple[int, int], method: str = "squish", pad_mode: str = "reflection"
) -> Image.Image:
    """`image` at `size` (height, width), as fastai's `Resize(size, method, pad_mode)` does it at validation time."""
    h, w = size
    if method != "squish":
        larger = image.width / w > image.height / h
        scale = image.width / w if larger == (method == "pad") else image.height / h
        crop_w, crop_h = int(scale * w), int(scale * h)
        left, top = int(0.5 * (image.width - crop_w)), int(0.5 * (image.height - crop_h))
        box = max(left, 0), max(top, 0), min(left + crop_w, image.width), min(top + crop_h, image.height)
        padding = [
            max(-left, 0),
            max(-top, 0),
            max(crop_w - image.width + left, 0),
            max(crop_h - image.height + top, 0),
        ]
        mode = {"zeros": "constant", "border": "edge", "reflection": "reflect"}[pad_mode]
        image = tvf.pad(image.crop(box), padding, padding_mode=mode)
    return image.resize((w, h), Image.Resampling.BILINEAR)


def to_tensor(image: Image.Image, mean: list[float] | None = None, std: list[float] | None = None) -> torch.Tensor:
    """`image` as float32 (channels, height, width) in 0..1, then normalized where `mean` and `std` are given."""
    x = torch.from_numpy(np.array(image)).float().div_(255.0)
    x = x.permute(2, 0, 1) if x.ndim == 3 else x[None]
    if mean is not None:
        x = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    return x.contiguous()


class UnetHandler:
    """One instance per TorchServe worker."""

    def initialize(self, context) -> None:
        """Load the model named in the archive's manifest and configured in `model-config.yaml`."""
        properties = context.system_properties
        gpu = properties.get("gpu_id")
        self.device = torch.device(f"cuda:{gpu}" if torch.cuda.is_available() and gpu is not None else "cpu")
        self.config = context.model_yaml_config["handler"]
        weights = f"{properties['model_dir']}/{context.manifest['model']['serializedFile']}"
        self.model = load_model(self.config, weights).to(self.device)
        self.inference(torch.zeros(1, 3, *self.config["img_size"]))

    def preprocess(self, requests: list[dict]) -> torch.Tensor:
        """The photos of `requests` as one float32 batch (N, channels, H, W)."""
        c = self.config
        photos = []
        for request in requests:
            body = request.get("data") or request.get("body")
            instances = body["instances"] if isinstance(body, dict) else [body]
            for instance in instances:
                if isinstance(instance, dict):
                    instance = base64.b64decode(instance.get("b64") or instance["data"]["b64"])
                image = open_image(bytes(instance))
                if c["resize"]:
                    image = resize(image, **c["resize"])
                photos.append(to_tensor(image, c["mean"], c["std"]))
        return torch.stack(photos)

    @torch.inference_mode()
    def inference(self, batch: torch.Tensor) -> torch.Tensor:
        """The class of each pixel: float32 (N, channels, H, W) to uint8 (N, H, W)."""
        return self.model(batch.to(self.device)).argmax(dim=1).to(torch.uint8).cpu()

    def postprocess(self, masks: torch.Tensor, requests: list[dict]) -> list:
        """One answer per request, in order."""
        answers = []
        masks = iter(masks.numpy())
        for request in requests:
            body = request.get("data") or request.get("body")
            if isinstance(body, dict):
                answers.append({"predictions": [self.answer(next(masks)) for _ in body["instances"]]})
            else:
                answers.append(self.answer(next(masks)))
        return answers

    def answer(self, mask: np.ndarray) -> dict:
        """The JSON answer for one mask."""
        share = np.bincount(mask.ravel(), minlength=len(self.config["codes"])) / mask.size
        return {
            "base64_prediction": base64.b64encode(mask.tobytes()).decode(),
            "shape": list(mask.shape),
            "classes": {name: round(float(s), 6) for name, s in zip(self.config["codes"], share, strict=True) if s},
        }

    def handle(self, requests: list[dict], context) -> list:
        """TorchServe's entry point: a list of requests in, a list of answers out."""
        return self.postprocess(self.inference(self.preprocess(requests)), requests)


def load_model(config: dict, weights: str) -> DynamicUnetDIY:
    """The model that `config` (section `handler` of `model-config.yaml`) describes, with `weights`, in eval mode."""
    with torch.device("meta"):  # no memory, no random initialization: every tensor comes from the file
        model = DynamicUnetDIY(config["arch"], config["n_classes"], config["img_size"], **config["options"])
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), strict=True, assign=True)
    return model.eval()
