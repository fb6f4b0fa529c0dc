"""The same model, runtime and handler code as ours behind other servers, so that only the server differs.

Each module takes the folder of the model and a port: `python -m benchmark.peers.with_fastapi MODEL_DIR PORT`. They run
in an environment of their own, which `benchmark/requirements.txt` pins and `benchmark.run` makes.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import yaml

from deployment.handler import Job, Photo, UnetHandler

BATCH_SIZE, DELAY = 4, 0.001  # photos and seconds, as in our own configuration; for the servers that make batches


def load(model_dir: str) -> UnetHandler:
    """Our handler, ready to answer, without TorchServe around it."""
    handler = UnetHandler()
    config = yaml.safe_load(Path(model_dir, "model-config.yaml").read_text())
    handler.initialize(
        SimpleNamespace(
            system_properties={"model_dir": model_dir, "gpu_id": None, "batch_size": BATCH_SIZE},
            model_yaml_config=config,
            manifest={"model": {"serializedFile": "fastunet.pth"}},
        )
    )
    return handler


def read(handler: UnetHandler, body: bytes) -> Photo:
    """The photo in `body`, as the tensor that the model takes."""
    return handler.read_photo(body, Job([], pixels=handler.max_pixels))


def answer(handler: UnetHandler, photo: Photo) -> bytes:
    """The JSON answer for a photo that has its mask."""
    return json.dumps(handler.answer(Job([]), photo)).encode()
