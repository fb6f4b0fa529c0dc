"""Shared fixtures: a small learner, its model store with a real archive, one TorchServe for the whole session."""

import functools
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from deployment.export import export_learner
from deployment.serve import free_ports, torchserve, workers_and_threads

ROOT = Path(__file__).parents[1]
CODES = ["Sky", "Building", "Pole", "Road", "Sidewalk", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian"]


def draw_photo(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """A reproducible RGB picture of `size` (width, height): shapes on a gradient with some noise."""
    rng = np.random.default_rng(seed)
    width, height = size
    ramp = np.linspace(0, 1, height)[:, None, None] * rng.uniform(50, 200, 3)
    noise = rng.normal(0, 12, (height, width, 3))
    image = Image.fromarray((ramp + noise + rng.uniform(0, 60, 3)).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.integers(-40, width), rng.integers(-40, height)
        w, h = rng.integers(10, max(width // 2, 11)), rng.integers(10, max(height // 2, 11))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape([int(x), int(y), int(x + w), int(y + h)], fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
    return image


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    """`image` as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def learner(tmp_path_factory):
    """A fastai learner: a resnet18 U-Net for 64 × 96 pixels and ten classes, random weights, all classes in use."""
    from fastai.vision.all import Resize, SegmentationDataLoaders, resnet18, set_seed, unet_learner

    folder = tmp_path_factory.mktemp("photos")
    for i in range(4):
        draw_photo(i).save(folder / f"{i}.png")
        classes = np.random.default_rng(i).integers(0, len(CODES), (240, 320), np.uint8)
        Image.fromarray(classes).save(folder / f"{i}_mask.png")
    files = sorted(f for f in folder.glob("?.png"))
    set_seed(0)
    dls = SegmentationDataLoaders.from_label_func(
        folder,
        files,
        lambda f: f.with_name(f"{f.stem}_mask.png"),
        codes=np.array(CODES),
        item_tfms=Resize((64, 96), method="squish"),
        bs=2,
        num_workers=0,
    )
    learner = unet_learner(dls, resnet18, pretrained=False, n_out=len(CODES))
    spread_classes(learner, files)
    return learner


def spread_classes(learner, files: list[Path]) -> None:
    """Shift and scale the last layer so that each class has the highest logit somewhere in `files`."""
    x = torch.cat([learner.dls.test_dl([f]).one_batch()[0] for f in files]).as_subclass(torch.Tensor)
    with torch.inference_mode():
        logits = learner.model.eval()(x).as_subclass(torch.Tensor)
    last = learner.model.layers[-2][0]
    with torch.no_grad():
        mean, std = logits.mean((0, 2, 3)), logits.std((0, 2, 3))
        last.weight /= std[:, None, None, None]
        last.bias.copy_((last.bias - mean) / std)


@pytest.fixture(scope="session")
def model_store(learner, tmp_path_factory) -> Path:
    """A model store with `fastunet.mar`, made of `learner` by the export and the plain torch-model-archiver."""
    store = export_learner(learner, tmp_path_factory.mktemp("model_store"))
    archive(store)
    return store


def archive(store: Path) -> None:
    """Make `store`/fastunet.mar of what the export wrote into `store`."""
    archiver = shutil.which("torch-model-archiver", path=Path(sys.executable).parent) or "torch-model-archiver"
    arguments = {
        "model-name": "fastunet",
        "version": "1.0",
        "handler": ROOT / "deployment" / "handler.py",
        "model-file": ROOT / "deployment" / "model.py",
        "serialized-file": store / "fastunet.pth",
        "config-file": store / "model-config.yaml",
        "export-path": store,
    }
    command = [archiver, "--force", *(f"--{name}={value}" for name, value in arguments.items())]
    with tempfile.TemporaryDirectory() as scratch:  # the archiver works in $TMPDIR/fastunet, whoever else does
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"TMPDIR": scratch})


@pytest.fixture(scope="session")
def next_version(model_store, tmp_path_factory) -> Path:
    """The store of a second version of the model, which gives every pixel the class after the first version's."""
    store = tmp_path_factory.mktemp("next_version")
    shutil.copy(model_store / "model-config.yaml", store)
    weights = torch.load(model_store / "fastunet.pth", weights_only=True)
    for name in list(weights)[-2:]:  # the last layer's weight and bias: a row per class
        weights[name] = weights[name].roll(1, dims=0)
    torch.save(weights, store / "fastunet.pth")
    archive(store)
    return store


@pytest.fixture(scope="session")
def ports() -> dict[str, int]:
    """The ports of `server`: `port`, `management_port`, `metrics_port`."""
    return dict(zip(("port", "management_port", "metrics_port"), free_ports(3), strict=True))


@pytest.fixture(scope="session")
def server_folder(tmp_path_factory) -> Path:
    """The working directory of `server`, with its log, torchserve.log."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="session")
def server(model_store, ports, server_folder) -> Iterator[str]:
    """The URL of a TorchServe that serves `model_store`; every test of the session shares it."""
    with torchserve(model_store, folder=server_folder, **ports) as url:
        yield url


@pytest.fixture(scope="session")
def photo() -> bytes:
    """A PNG photo of 320 × 240 pixels."""
    return encoded(draw_photo(100))


@pytest.fixture
def client(server) -> Iterator[httpx.Client]:
    """An HTTP client of `server`."""
    with httpx.Client(base_url=server, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def predict(learner):
    """A function from a photo's bytes to the class mask (uint8, height × width) that `learn.predict` gives.

    It computes with as many threads as a worker of `server`: their number decides how torch rounds.
    """

    @functools.cache
    def mask_of(data: bytes) -> np.ndarray:
        threads = torch.get_num_threads()
        torch.set_num_threads(workers_and_threads()[1])
        try:
            with learner.no_bar(), learner.no_logging():
                return learner.predict(data)[0].numpy().astype(np.uint8)
        finally:
            torch.set_num_threads(threads)

    return mask_of
