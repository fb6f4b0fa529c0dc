"""The baseline: a handler in the style of the tutorials that people copy, for TorchServe's default settings.

One photo at a time through the eager model, transforms typed again by hand, nothing about threads or batches.
"""

import base64
import io
import json
import os

import numpy as np
import torch
from model import DynamicUnetDIY
from PIL import Image
from torchvision import transforms
from ts.torch_handler.base_handler import BaseHandler


class SegmentationHandler(BaseHandler):
    def initialize(self, context):
        folder = context.system_properties["model_dir"]
        with open(os.path.join(folder, "baseline.json")) as f:
            config = json.load(f)
        self.model = DynamicUnetDIY(config["arch"], config["n_classes"], config["img_size"], **config["options"])
        weights = os.path.join(folder, context.manifest["model"]["serializedFile"])
        self.model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.model.eval()
        steps = [transforms.Resize(config["img_size"]), transforms.ToTensor()]
        if config["mean"]:
            steps.append(transforms.Normalize(config["mean"], config["std"]))
        self.transform = transforms.Compose(steps)
        self.initialized = True

    def preprocess(self, data):
        image = data[0].get("data") or data[0].get("body")
        return self.transform(Image.open(io.BytesIO(image)).convert("RGB")).unsqueeze(0)

    def inference(self, data):
        with torch.no_grad():
            return self.model(data)

    def postprocess(self, data):
        mask = data.argmax(dim=1)[0].numpy().astype(np.uint8)
        return [{"base64_prediction": base64.b64encode(mask).decode("utf-8")}]
