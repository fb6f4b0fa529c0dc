"""Shared fixtures: a small learner, its model store with a real archive, a server of each kind for all tests."""

import contextlib
import functools
import io
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from deployment.archive import make_archive
from deployment.config import Config
from deployment.export import export_learner, write_config
from deployment.export.convert import convert
from deployment.model import DynamicUnetDIY
from deployment.photos import Preprocessor
from deployment.runtime import cores
from deployment.runtime.pytorch import eager
from deployment.runtime.queue import ImageQueue
from deployment.serve import is_healthy
from deployment.server.processes import free_ports, started
from deployment.server.torchserve import model_status, torchserve, workers_and_threads

ROOT = Path(__file__).parents[1]
LONGEST = ("test_readme.py", "test_notebooks.py", "test_ai_platform.py", "test_benchmark.py")
# Idle OpenMP threads of servers and notebooks must not spin: tests run two at a time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
torch.set_num_threads(1)  # networks as small as the tests' are no faster with more, and slow where others compute
# The exports in these processes prove their copy on an image of one megapixel in place of twelve; commands, which tests
# also run, take twelve.
sys.modules["deployment.export.prove"].LARGE = (750, 1000)

CODES = ["Sky", "Building", "Pole", "Road", "Sidewalk", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian"]


def pytest_collection_modifyitems(items: list) -> None:
    """Begin with the files of the longest tests, or one of them runs alone at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


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


@functools.cache
def bomb(width: int, height: int) -> bytes:
    """A PNG of `width` × `height` black pixels, a bit each; packed by the row, since Pillow takes a byte for each."""
    packer, row = zlib.compressobj(), bytes(1 + (width + 7) // 8)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in (b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""):
        file += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return file


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
def exported(learner, tmp_path_factory) -> Path:
    """What the export writes of `learner`."""
    return export_learner(learner, tmp_path_factory.mktemp("model_store"))


@pytest.fixture(scope="session")
def model_store(exported) -> Path:
    """`exported` with its archive, `fastunet.mar`."""
    make_archive(exported)
    return exported


def configured(store: Path, folder: Path, **settings) -> Path:
    """`folder`, with the weights of `store` and its configuration, in whose section `handler` are other `settings`."""
    config = yaml.safe_load((store / "model-config.yaml").read_text())
    config["handler"] |= settings
    (folder / "model-config.yaml").write_text(yaml.safe_dump(config))
    if not (folder / "fastunet.pth").exists():
        (folder / "fastunet.pth").symlink_to(store / "fastunet.pth")
    return folder


@pytest.fixture(autouse=True)
def same_number_of_threads() -> Iterator[None]:
    """A test that changes the number of torch's threads, as serving with OpenVINO does, changes it for itself alone."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def next_version(exported, tmp_path_factory) -> Path:
    """The store of a second version of the model, which gives every pixel the class after the first version's."""
    store = tmp_path_factory.mktemp("next_version")
    shutil.copy(exported / "model-config.yaml", store)
    weights = torch.load(exported / "fastunet.pth", weights_only=True)
    for name in list(weights)[-2:]:  # the last layer's weight and bias: a row per class
        weights[name] = weights[name].roll(1, dims=0)
    torch.save(weights, store / "fastunet.pth")
    make_archive(store)
    return store


SERVERS = ("torchserve", "uvicorn")


@pytest.fixture(scope="session", params=SERVERS)
def kind(request) -> str:
    """Which server `server` is. A test that uses it, also through other fixtures, runs once with each."""
    return request.param


@pytest.fixture(scope="session")
def ports(kind) -> dict[str, int]:
    """The ports of `server`: `port`, `management_port` (TorchServe's), `metrics_port`."""
    return dict(zip(("port", "management_port", "metrics_port"), free_ports(3), strict=True))


@pytest.fixture(scope="session")
def server_folder(kind, tmp_path_factory) -> Path:
    """The working directory of `server`, with its log, `kind`.log."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="session")
def server(kind, model_store, ports, server_folder) -> Iterator[str]:
    """The URL of a server of `kind` that serves `model_store`; every test of the session shares it."""
    serve = torchserve if kind == "torchserve" else uvicorn
    with serve(model_store, folder=server_folder, **ports) as url:
        yield url


@pytest.fixture(scope="session")
def computing(kind, ports, server):
    """A function that returns the ids of the processes of `server` that compute: they change where one restarted."""

    def pids() -> set[int]:
        if kind == "torchserve":
            return {worker["pid"] for worker in model_status(ports["management_port"])["workers"]}
        return {c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == ports["port"]}

    return pids


@contextlib.contextmanager
def uvicorn(model_store: Path, folder: Path, **ports: int) -> Iterator[str]:
    """`python -m deployment.serve --server uvicorn`; yields its URL once it answers."""
    command = [sys.executable, "-m", "deployment.serve", "--server=uvicorn", "--model-store", str(model_store)]
    command += [f"--{name.replace('_', '-')}={port}" for name, port in ports.items()]
    env, log = os.environ | {"PYTHONPATH": str(ROOT)}, folder / "uvicorn.log"
    with log.open("wb") as output, started(command, env, cwd=folder, stdout=output, stderr=output) as process:
        while not is_healthy(ports["port"]):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{ports['port']}"


@pytest.fixture(scope="session")
def photo() -> bytes:
    """A PNG photo of 320 × 240 pixels."""
    return encoded(draw_photo(100))


@pytest.fixture
def client(server) -> Iterator[httpx.Client]:
    """An HTTP client of `server`."""
    with httpx.Client(base_url=server, timeout=60) as client:
        yield client


def learner_masks(learner, threads: int):
    """A function from a photo's bytes to the mask (uint8, height × width) of `learn.predict` on so many threads."""

    @functools.cache
    def mask_of(data: bytes) -> np.ndarray:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with learner.no_bar(), learner.no_logging():
                return learner.predict(data)[0].numpy().astype(np.uint8)
        finally:
            torch.set_num_threads(before)

    return mask_of


@pytest.fixture(scope="session")
def predict(learner, kind):
    """What `learn.predict` gives on as many threads as `server` computes a photo with: they decide how torch rounds."""
    return learner_masks(learner, workers_and_threads()[1] if kind == "torchserve" else cores())


# --- a small network with random weights, which needs no fastai ---

SMALL = Config(
    arch="resnet18",
    n_classes=4,
    img_size=[64, 64],
    options={"cut": 5},
    resize={"size": [64, 64], "method": "squish", "pad_mode": "reflection", "resample": "bilinear"},
    mean=[0.4, 0.5, 0.6],
    std=[0.2, 0.3, 0.25],
    classes=["Sky", "Road", "Tree", "Void"],
)


@pytest.fixture(scope="session")
def small_store(tmp_path_factory) -> Path:
    """The store of a network as `SMALL` says, in whose masks every class occurs."""
    torch.manual_seed(0)
    model = DynamicUnetDIY(SMALL.arch, SMALL.n_classes, SMALL.img_size, **SMALL.options)
    with torch.no_grad():  # statistics that are not trivial, and logits in which every class wins somewhere
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        head = list(model.layers)[-1][0]
        head.weight.mul_(20)
    folder = tmp_path_factory.mktemp("small")
    torch.save(model.state_dict(), folder / "fastunet.pth")
    write_config(SMALL, folder)
    return folder


def image_batch(n: int, height: int = 64, width: int = 64) -> np.ndarray:
    """`n` random images as the served model takes them, uint8 (n, height, width, 3), the same each time."""
    return np.random.default_rng(n).integers(0, 256, (n, height, width, 3), np.uint8)


def outputs_of(model: ImageQueue, images: Sequence[np.ndarray]) -> np.ndarray:
    """What `model` makes of `images`, all of one shape, as one array; raises the error that an image ended with."""
    outputs = model(images)
    for output in outputs:
        if isinstance(output, Exception):
            raise output
    return np.stack(outputs)


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """The share of the pixels that are equal in both masks."""
    assert a.dtype == b.dtype == np.uint8 and a.shape == b.shape
    return float((a == b).mean())


@pytest.fixture(scope="session")
def small_masks(small_store) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
    """A function from images to the masks that PyTorch gives with `small_store`."""
    return functools.partial(outputs_of, eager(SMALL, small_store))


@pytest.fixture(scope="session")
def camvid_folder(small_masks, tmp_path_factory) -> Path:
    """Ten images in CamVid's layout; their labels are what the network says, so that it is right everywhere."""
    folder = tmp_path_factory.mktemp("camvid")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for i in range(10):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
        coarse.save(folder / "images" / f"{i}.png")
        mask = small_masks([Preprocessor(SMALL)(encoded(coarse))])[0]
        Image.fromarray(mask).save(folder / "labels" / f"{i}_P.png")
    (folder / "valid.txt").write_text("0.png\n1.png\n2.png\n")
    return folder


def convert_copy(small_store: Path, folder: Path, *arguments, **options) -> tuple[Config, Path]:
    """`small_store` converted in `folder`: its configuration, and the folder."""
    shutil.copy(small_store / "fastunet.pth", folder)
    return convert(SMALL, folder, *arguments, **options), folder


@pytest.fixture(scope="session")
def light_python(tmp_path_factory) -> Path:
    """The Python of a new environment with `deployment/requirements-openvino.txt` alone."""
    folder = tmp_path_factory.mktemp("light")
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    program = folder / "bin" / "python"
    command = [*uv, "pip", "install", "--quiet", "--python", program]
    command += ["--requirements", ROOT / "deployment/requirements-openvino.txt"]
    subprocess.run([*command, "--constraints", ROOT / "constraints.txt"], check=True)
    return program


@pytest.fixture(scope="session")
def converted(small_store, tmp_path_factory) -> tuple[Config, Path]:
    """The float32 model on OpenVINO."""
    return convert_copy(small_store, tmp_path_factory.mktemp("openvino"))


@pytest.fixture(scope="session")
def int8(small_store, camvid_folder, tmp_path_factory) -> tuple[Config, Path]:
    """The int8 model on OpenVINO."""
    return convert_copy(small_store, tmp_path_factory.mktemp("int8"), "int8", camvid_folder, max_drop=100)
