"""What a CPU can show of serving on a GPU: padding, sizes, the fall-back, workers. `benchmark.gpu` is the rest."""

import dataclasses
import logging
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, draw_photo, encoded, outputs_of
from torch import nn

from deployment import runtime
from deployment.archive import ArchiveError, make_archive, set_batch_size
from deployment.config import Config
from deployment.export import ExportError
from deployment.export.half import Rounding, half_precision
from deployment.handler import Handler
from deployment.runtime import cuda
from deployment.runtime.pytorch import ServedModel
from deployment.runtime.queue import ImageQueue
from deployment.server import torchserve
from deployment.server.processes import free_ports

CPU, SHAPE = torch.device("cpu"), (16, 24, 3)
RESIZE = {**SMALL.resize, "size": list(SHAPE[:2])}
CONFIG = dataclasses.replace(SMALL, n_classes=5, img_size=SHAPE[:2], resize=RESIZE, mean=None, std=None)


class Scaled(nn.Module):
    """A network of one convolution. It notes the sizes of its batches, and the types."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.scale, self.seen = nn.Conv2d(3, 5, 3, padding=1), scale, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((len(x), x.dtype))
        return self.conv(x * self.scale) / self.scale


def served(network: nn.Module, monkeypatch, config: Config = CONFIG) -> ServedModel:
    """`network` as the model of `config`."""
    monkeypatch.setattr("deployment.runtime.pytorch.load_network", lambda *_: network.eval())
    return ServedModel(config, Path(), exact=False)


def loaded(network: nn.Module, monkeypatch, precision: str = "fp32") -> tuple[ImageQueue, str]:
    return cuda.load(served(network, monkeypatch), CPU, precision)


def images(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, *SHAPE), np.uint8)


def masks(network: nn.Module, pixels: np.ndarray, monkeypatch) -> np.ndarray:
    """What `network` in float32 makes of `pixels`, all in one batch."""
    with torch.inference_mode():
        return served(network, monkeypatch)(torch.from_numpy(pixels)).numpy()


def test_batches_are_padded_to_a_few_sizes(monkeypatch):
    network = Scaled()
    model, _ = loaded(network, monkeypatch)
    photos = images(70)
    expected = masks(Scaled(), photos, monkeypatch)
    assert len(np.unique(expected)) > 1
    for n, sizes in [(1, [1]), (3, [4]), (7, [8]), (32, [32]), (37, [32, 8]), (70, [32, 32, 8])]:
        network.seen.clear()
        # whatever was in the places of the padding before
        assert np.array_equal(outputs_of(model, photos[:n]), expected[:n])
        assert [size for size, _ in network.seen] == sizes


def test_batches_that_do_not_fit_are_not_made(monkeypatch, caplog):
    prepare = cuda.prepare

    def small(model, pixels, dtype, pool):
        if len(pixels) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prepare(model, pixels, dtype, pool)

    monkeypatch.setattr(cuda, "prepare", small)
    network = Scaled()
    model, _ = loaded(network, monkeypatch)
    network.seen.clear()
    assert len(outputs_of(model, images(9))) == 9
    assert [size for size, _ in network.seen] == [4, 4, 1]
    assert "batches of 8 images do not fit" in caplog.text
    monkeypatch.setattr(cuda, "SIZES", (8,))
    with pytest.raises(torch.OutOfMemoryError):
        loaded(network, monkeypatch)


@pytest.mark.parametrize("affine", [[], [{"size": SHAPE[:2]}]], ids=["own size", "resized in the batch"])
def test_images_of_several_sizes_are_not_padded(affine, monkeypatch):
    config = dataclasses.replace(CONFIG, resize=None, affine=affine)
    network = Scaled()
    model, _ = cuda.load(served(network, monkeypatch, config), CPU, "fp32")
    network.seen.clear()
    others = np.random.default_rng(0).integers(0, 256, (5, 33, 50, 3), np.uint8)
    expected = ServedModel(config, Path())(torch.from_numpy(others))
    assert np.array_equal(outputs_of(model, others), expected)
    assert [size for size, _ in network.seen] == [5, 5]


def test_half_precision_is_used_where_it_agrees(monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    used = [loaded(Scaled(), monkeypatch, precision)[1] for precision in ("auto", "fp16", "bf16", "fp32")]
    assert used == ["fp16", "fp16", "bf16", "fp32"]
    assert not caplog.records
    assert loaded(Scaled(scale=1e6), monkeypatch, "auto")[1] == "bf16"  # more than fp16 can hold
    assert "fp16 agrees with fp32 on" in caplog.text
    model, used = loaded(Scaled(scale=1e6), monkeypatch, "fp16")
    assert used == "fp32"
    assert np.array_equal(outputs_of(model, images(3)), masks(Scaled(scale=1e6), images(3), monkeypatch))


def test_what_comes_before_the_network_stays_in_float32(monkeypatch):
    network = Scaled()
    half = cuda.in_half(served(network, monkeypatch), torch.float16)
    pixels = torch.from_numpy(images(2))
    assert half.batch_transforms(pixels).dtype == torch.float32
    assert cuda.compute(half, pixels, torch.float16).dtype == torch.uint8
    assert half.network.seen == [(2, torch.float16)]
    assert network.conv.weight.dtype == torch.float32  # the original is as it was


def test_what_insists_on_float32_gets_it(monkeypatch, caplog):
    class Insists(Scaled):
        def forward(self, x):
            if x.dtype != torch.float32:
                raise RuntimeError("expected float32")
            return super().forward(x)

    assert loaded(Insists(), monkeypatch, "auto")[1] == "fp32"
    assert "does not run in fp16: expected float32" in caplog.text


def test_the_warm_up_image_is_like_one():
    for shape in (SHAPE, (96, 128, 3), (1, 1, 1), (5, 300, 4)):
        image = cuda.warm_up_image(shape)
        assert image.dtype == torch.uint8 and image.shape == (1, *shape)
    assert len(cuda.warm_up_image((96, 128, 3)).unique()) > 100


def test_agreement():
    a = torch.tensor([0, 1, 2, 3], dtype=torch.uint8)
    assert cuda.agreement(a, torch.tensor([0, 1, 2, 9], dtype=torch.uint8)) == 0.75
    assert cuda.agreement(torch.tensor([[1.0, 0.5]]), torch.tensor([[1.004, 0.6]])) == 0.5


def test_emulated_rounding_is_that_of_the_type():
    x = torch.rand(1, 3, 16, 24)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Sigmoid()).eval()
    program = torch.export.export(model, (x,)).module()
    exact, half = model(x), model.bfloat16()(x.bfloat16()).float()
    model = model.float()
    with torch.no_grad(), Rounding(torch.bfloat16):
        rounded = [network.to(torch.bfloat16).float()(x.bfloat16().float()) for network in (model, program)]
    assert not torch.equal(half, exact) and torch.equal(rounded[0], rounded[1])
    assert torch.allclose(rounded[0], half, rtol=0.01) and (rounded[0] == half).float().mean() > 0.9


def test_half_precision_has_to_be_good_enough(small_store, camvid_folder, capsys):
    config = half_precision(SMALL, small_store, "fp16", camvid_folder)
    assert config.precision == "fp16" and config.accuracy["agreement"] > 0.98
    assert "no GPU here: fp16 is emulated" in capsys.readouterr().out
    with pytest.raises(ExportError, match="fp16 loses .* points"):
        half_precision(SMALL, small_store, "fp16", camvid_folder, max_drop=-1)
    assert half_precision(SMALL, small_store, "auto", camvid_folder).accuracy is None  # decided where it is served


def test_photos_are_decoded_in_threads(small_store, monkeypatch):
    handler = Handler()
    handler.load(small_store)
    photos = [encoded(draw_photo(seed)) for seed in range(2)]
    alone = [handler.preprocess({"body": photo}).items[0] for photo in photos]
    decode, both = handler.preprocessor.decode, threading.Barrier(2, timeout=10)

    def meet(header):
        both.wait()  # passes only when two photos are decoded at the same time
        return decode(header)

    monkeypatch.setattr(handler.preprocessor, "decode", meet)
    handler.threads = ThreadPoolExecutor(2)
    jobs = [handler.read({"body": photo}, "") for photo in photos]
    handler.decode(jobs)
    for job, expected in zip(jobs, alone, strict=True):
        (item,) = job.items
        assert np.array_equal(item.pixels, expected.pixels)
        assert item.header is None and item.shown is None and not item.data


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.delenv("TS_DEFAULT_WORKERS_PER_MODEL", raising=False)
    monkeypatch.setattr(torchserve, "gpus", lambda: 2)
    monkeypatch.setattr(torchserve, "cores", lambda: 8)


def test_one_worker_per_gpu(two_gpus, monkeypatch):
    assert torchserve.workers_and_threads() == torchserve.workers_and_threads("openvino") == (2, 4)
    monkeypatch.setenv("TS_DEFAULT_WORKERS_PER_MODEL", "3")
    assert torchserve.workers_and_threads()[0] == 3


def test_an_archive_for_a_gpu_has_larger_batches(two_gpus, small_store, tmp_path):
    """A real TorchServe that is told of two GPUs; its workers find none and serve on the CPU."""
    for file in small_store.glob("*.*"):
        shutil.copy(file, tmp_path)
    set_batch_size(tmp_path, "cuda")
    make_archive(tmp_path)
    port = free_ports(1)[0]
    with torchserve.torchserve(tmp_path, management_port=port):
        model = torchserve.model_status(port)
    assert (model["batchSize"], model["maxBatchDelay"], len(model["workers"])) == (32, 1, 2)
    set_batch_size(tmp_path, "cpu")
    assert (tmp_path / "model-config.yaml").read_text() == (small_store / "model-config.yaml").read_text()
    (tmp_path / "model-config.yaml").write_text("handler: {}\n")
    with pytest.raises(ArchiveError, match="no line `batchSize"):
        set_batch_size(tmp_path, "cuda")


def test_gpus_are_counted_only_where_there_is_a_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(runtime.os.path, "exists", lambda path: path == "/dev/nvidiactl")
    assert runtime.gpus.__wrapped__() == 1
    monkeypatch.setattr(runtime.os.path, "exists", lambda path: False)
    assert runtime.gpus.__wrapped__() == 0
