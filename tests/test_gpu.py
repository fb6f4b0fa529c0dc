"""Serving on a GPU, as far as a CPU can show it: `cuda` runs there too, but for graphs. `pytest -m gpu` is the rest."""

import asyncio
import contextlib
import dataclasses
import json
import math
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from conftest import SMALL, draw_photo, encoded, outputs_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmark import gpu
from deployment import runtime
from deployment.archive import ArchiveError, about_half_precision, make_archive, set_batch_size
from deployment.config import Config
from deployment.export import ExportError
from deployment.export.half import Rounding, half_precision
from deployment.export.program import capture_network
from deployment.handler import Handler
from deployment.runtime import cuda
from deployment.runtime.program import load_program
from deployment.runtime.pytorch import ServedModel
from deployment.runtime.queue import ImageQueue
from deployment.server import torchserve
from deployment.server.app import Application
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


class Insists(Scaled):
    """A network that takes float32 alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("expected float32")
        return super().forward(x)


def served(network: nn.Module, monkeypatch, config: Config = CONFIG) -> ServedModel:
    """`network` as the model of `config`."""
    monkeypatch.setattr("deployment.runtime.pytorch.load_network", lambda *_: network.eval())
    return ServedModel(config, Path(), exact=False)


def loaded(network: nn.Module, monkeypatch, **settings) -> tuple[ImageQueue, str]:
    """`network` as it is loaded on a GPU, with other `settings` in its configuration."""
    return cuda.load(served(network, monkeypatch, dataclasses.replace(CONFIG, **settings)), CPU)


def images(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, *SHAPE), np.uint8)


def masks(network: nn.Module, pixels: np.ndarray, monkeypatch) -> np.ndarray:
    """What `network` in float32 makes of `pixels`, all in one batch."""
    with torch.inference_mode():
        return served(network, monkeypatch)(torch.from_numpy(pixels)).numpy()


# --- batches ---


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
    padded = cuda.padded

    def small(model, pixels, dtype):
        if len(pixels) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return padded(model, pixels, dtype)

    monkeypatch.setattr(cuda, "padded", small)
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
    model, _ = cuda.load(served(network, monkeypatch, config), CPU)
    network.seen.clear()
    others = np.random.default_rng(0).integers(0, 256, (5, 33, 50, 3), np.uint8)
    expected = ServedModel(config, Path())(torch.from_numpy(others))
    assert np.array_equal(outputs_of(model, others), expected)
    assert [size for size, _ in network.seen] == [5, 5]


def test_images_of_their_own_size_share_the_pixels_of_one_request(monkeypatch):
    network = Scaled()
    model, _ = loaded(network, monkeypatch, resize=None, max_pixels=2 * 33 * 50)
    others = np.random.default_rng(0).integers(0, 256, (5, 33, 50, 3), np.uint8)
    outputs_of(model, others)
    assert [size for size, _ in network.seen] == [2, 2, 1]
    model, _ = loaded(Scaled(), monkeypatch, resize=None)
    assert model.pixels == 4_000_000


def test_requests_to_uvicorn_share_batches(small_store):
    """The first is held back until the others wait: then these are one batch, more of them than there are cores."""
    handler, n = Handler(), 2 * runtime.cores() + 5
    handler.load(small_store)
    handler.model, _ = cuda.load(ServedModel(handler.config, small_store), CPU)
    forward, sizes, waiting = handler.model.compute, [], threading.Semaphore(0)

    def compute(batch, alone):
        sizes.append(len(batch))
        if len(sizes) == 1:
            for _ in range(n):
                assert waiting.acquire(timeout=20)
        return forward(batch, alone)

    handler.model.compute = compute
    infer = handler.inference

    def inference(items):
        waiting.release()
        infer(items)

    handler.inference = inference

    async def ask() -> list[int]:
        app = httpx.ASGITransport(Application(handler, "small").starlette())
        async with httpx.AsyncClient(transport=app, base_url="http://here", timeout=60) as client:
            photo = encoded(draw_photo(0))
            answers = await asyncio.gather(*[client.post("/predictions/small", content=photo) for _ in range(n)])
            return [answer.status_code for answer in answers]

    assert asyncio.run(ask()) == [200] * n
    assert sizes[0] == 1 and len(sizes) <= 3 and sum(sizes) == n


# --- what is computed ---


def test_float32_is_the_default_and_all_of_it_is_used(monkeypatch):
    assert runtime.PRECISIONS["eager"][0] == Config.precision == "fp32"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    network = Scaled()
    model, precision = loaded(network, monkeypatch)
    assert precision == "fp32" and {dtype for _, dtype in network.seen} == {torch.float32}
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_half_precision_is_used_where_it_is_chosen(monkeypatch):
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        network = Scaled()
        _, used = loaded(network, monkeypatch, precision=precision)
        assert used == precision and {dtype for _, dtype in network.seen} == {dtype}


def test_bf16_is_asked_of_the_gpu_that_computes(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(8, 0), (7, 5)][device.index])
    assert cuda.has_bf16(torch.device("cuda:0")) and not cuda.has_bf16(torch.device("cuda:1"))
    monkeypatch.setattr(cuda, "has_bf16", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert loaded(Scaled(), monkeypatch, precision="bf16")[1] == "fp32"
    assert "Tesla T4 has no bf16: serving in fp32" in caplog.text


def test_what_comes_before_the_network_stays_in_float32(monkeypatch):
    network = Scaled()
    half = cuda.placed(served(network, monkeypatch), CPU, "fp16")
    pixels = torch.from_numpy(images(2))
    assert half.batch_transforms(pixels).dtype == torch.float32
    assert cuda.compute(half, pixels, torch.float16).dtype == torch.uint8
    assert network.seen == [(2, torch.float16)]


def test_pixels_are_divided_as_on_the_cpu(monkeypatch):
    """By a tensor on the device: CUDA multiplies by the reciprocal of a number."""
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    model = served(Scaled(), monkeypatch)
    expected = model.batch_transforms(pixels)
    transforms = cuda.placed(model, CPU).batch_transforms
    assert isinstance(transforms.divisor, torch.Tensor) and torch.equal(transforms(pixels), expected)


class Moves(TorchDispatchMode):
    """Notes the type of each tensor that goes from the CPU to another device."""

    def __init__(self):
        super().__init__()
        self.types = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        for tensor in args:
            if isinstance(tensor, torch.Tensor) and isinstance(output, torch.Tensor):
                if tensor.device.type == "cpu" != output.device.type:
                    self.types.append(tensor.dtype)
        return output


def test_bytes_go_to_the_gpu_and_the_rest_happens_there(monkeypatch):
    """A device without memory stands for a GPU: what would still be on the CPU could not be computed with there."""
    config = dataclasses.replace(
        CONFIG, affine=[{"size": [8, 12], "align_corners": False}], mean=[0.5] * 3, std=[0.2] * 3
    )
    meta = torch.device("meta")
    model = cuda.placed(served(Scaled(), monkeypatch, config), meta)
    with Moves() as moves:
        mask = cuda.compute(model, torch.from_numpy(images(2)), torch.float32)
    assert moves.types == [torch.uint8] and (mask.device, mask.shape) == (meta, (2, 8, 12))


# --- programs ---

# By architecture: the arguments that make it small, and the side of an image.
NETWORKS = {
    "edgenext_xx_small": ({"depths": (1, 2, 2, 2)}, 64),
    "levit_128s": ({"img_size": 64, "depth": (1, 1, 1)}, 64),
    "vit_tiny_patch16_224": ({"img_size": 64, "depth": 2}, 64),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 64, "depths": (2,), "num_heads": (2,), "embed_dim": 32, "window_size": 4},
        64,
    ),
    "convnext_atto": ({"depths": (1, 1, 1, 1)}, 64),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_program_is_served_on_another_device(name, tmp_path):
    """It moves there whole, and what prepares it for a GPU leaves its answers as they are."""
    import timm

    options, side = NETWORKS[name]
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, num_classes=5, **options).eval()
    torch.export.save(capture_network(network, [], (3, side, side), free_size=False), tmp_path / "fastunet.pt2")
    assert load_program(tmp_path / "fastunet.pt2", "meta")(torch.zeros(1, 3, side, side, device="meta")).is_meta
    config = Config(None, 5, (side, side), resize={"size": (side, side)}, task="classification", classes=list("abcde"))
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8))
    model = ServedModel(config, tmp_path)
    with torch.inference_mode():
        expected = model(pixels)
    assert torch.allclose(cuda.compute(cuda.placed(model, CPU), pixels, torch.float32), expected, atol=1e-5)
    model.network.to(torch.bfloat16)
    assert torch.allclose(cuda.compute(model, pixels, torch.bfloat16), expected, atol=0.02)


# --- graphs, with a stand-in for CUDA's side of them ---


@pytest.fixture
def graphs(monkeypatch):
    """What `graphed` asks of CUDA, as a record of what happened; `end` is called where a capture ends."""

    class Stream:
        def __init__(self, *device):
            pass

        def wait_stream(self, other) -> None:
            pass

    record = SimpleNamespace(closed=[], captures=0, end=lambda: None, Stream=Stream)

    @contextlib.contextmanager
    def capture(graph, **options):
        record.captures += 1
        try:
            yield
        finally:
            record.end()

    class Graph:
        def replay(self) -> None:
            pass

    for name, value in {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "current_stream": Stream,
        "device": contextlib.nullcontext,
        "stream": contextlib.nullcontext,
        "graph": capture,
        "graph_pool_handle": lambda: (0, 1),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cuda, "no_waiting", contextlib.nullcontext)
    monkeypatch.setattr(cuda, "close_pool", lambda device, pool: record.closed.append(pool))
    return record


def test_a_capture_that_fails_is_cleaned_up_and_not_tried_again(graphs, monkeypatch, caplog):
    def fail() -> None:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    model = cuda.placed(served(Scaled(), monkeypatch), CPU)
    pixels = torch.zeros(4, *SHAPE, dtype=torch.uint8)
    assert cuda.graphed(model, pixels, torch.float32, graphs.Stream(), (0, 1))(pixels[:3]).shape == (3, *SHAPE[:2])
    graphs.end = fail
    assert cuda.graphed(model, pixels, torch.float32, graphs.Stream(), (0, 1)) is None
    assert graphs.closed == [(0, 1)] and "no CUDA graphs for batches of up to 4 images: CUDA error" in caplog.text

    model.network.forward = lambda x: (_ for _ in ()).throw(torch.OutOfMemoryError("too little"))
    with pytest.raises(torch.OutOfMemoryError, match="too little"):  # not what the capture ends with
        cuda.graphed(model, pixels, torch.float32, graphs.Stream(), (0, 1))


def test_without_graphs_batches_are_padded(graphs, monkeypatch):
    class Device:  # of type cuda as far as graphs go; tensors are on the CPU
        type = "cuda"

    tried, zeros = [], torch.zeros
    monkeypatch.setattr(cuda, "graphed", lambda model, pixels, *_: tried.append(len(pixels)))
    monkeypatch.setattr(torch, "zeros", lambda *size, device, dtype: zeros(*size, dtype=dtype))
    model = cuda.placed(served(Scaled(), monkeypatch), CPU)
    passes = cuda.prepared_batches(model, Device(), torch.float32)
    assert tried == [32] and sorted(passes) == [*cuda.SIZES]


# --- a GPU that has failed for good ---


def test_only_a_gpu_that_is_lost_ends_the_process(monkeypatch):
    ended, lost = [], False
    monkeypatch.setattr(cuda, "end_soon", lambda: ended.append(True))
    monkeypatch.setattr(cuda, "is_lost", lambda device: lost)
    network = Scaled()
    model, _ = loaded(network, monkeypatch)
    for error in (
        RuntimeError("bad"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: assert"),
    ):
        lost = "CUDA error" in str(error)

        def fail(x, error=error):
            raise error

        network.forward = fail
        assert model(images(1)) == [error]
    assert ended == [True]


# --- half precision is measured ---


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


def test_half_precision_has_to_be_measured_and_good_enough(small_store, camvid_folder, tmp_path, monkeypatch, capsys):
    config = half_precision(SMALL, small_store, "fp16", camvid_folder)
    assert config.precision == "fp16" and config.accuracy["agreement"] > 0.98
    assert "computes in fp16: it is emulated" in capsys.readouterr().out
    assert half_precision(SMALL, small_store, "fp32").accuracy is None
    with pytest.raises(ExportError, match="fp16 must be measured: .* --calibrate"):
        half_precision(SMALL, small_store, "fp16")
    with pytest.raises(ExportError, match="fp16 loses .* points"):
        half_precision(SMALL, small_store, "fp16", camvid_folder, max_drop=-1)
    unlabeled = shutil.copytree(camvid_folder, tmp_path / "unlabeled", ignore=shutil.ignore_patterns("labels"))
    assert half_precision(SMALL, small_store, "fp16", unlabeled).accuracy["agreement"] > 0.98
    for network, message in (
        (Scaled(scale=1e6), "of the answers are in fp16 as in fp32"),
        (Insists(), "does not run in fp16"),
    ):
        monkeypatch.setattr(
            "deployment.runtime.pytorch.load_network", lambda *_, network=network: network.eval().float()
        )
        with pytest.raises(ExportError, match=message):
            half_precision(CONFIG, small_store, "fp16", unlabeled)


def test_half_precision_that_answers_with_nan_is_refused(small_store, camvid_folder, tmp_path, monkeypatch):
    unlabeled = shutil.copytree(camvid_folder, tmp_path / "unlabeled", ignore=shutil.ignore_patterns("labels"))
    network = nn.Sequential(Scaled(scale=1e6), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    monkeypatch.setattr("deployment.runtime.pytorch.load_network", lambda *_: network.eval().float())
    config = dataclasses.replace(CONFIG, task="regression", classes=[])
    with pytest.raises(ExportError, match="the converted model answers with NaN or infinity"):
        half_precision(config, small_store, "fp16", unlabeled)


def test_photos_that_half_precision_cannot_be_measured_on_are_named(small_store, camvid_folder, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    with pytest.raises(ExportError, match="holds no photos"):
        half_precision(SMALL, small_store, "fp16", tmp_path)
    for i in range(4):
        shutil.copy(camvid_folder / "images" / f"{i}.png", images)
    with pytest.raises(ExportError, match="4 photos.* none to measure fp16 on: .*five.*valid.txt"):
        half_precision(SMALL, small_store, "fp16", tmp_path)
    (images / "3.png").write_bytes(b"no image")
    (tmp_path / "valid.txt").write_text("3.png")
    with pytest.raises(ExportError, match=r"3\.png: not an image"):
        half_precision(SMALL, small_store, "fp16", tmp_path)


@pytest.fixture
def tf32() -> Iterator[tuple]:
    """The two switches of TF32, which are on, as a program may have them."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = True
    yield backends
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def test_half_precision_leaves_tf32_as_it_was(small_store, camvid_folder, tf32):
    half_precision(SMALL, small_store, "fp16", camvid_folder, max_drop=100)
    assert all(backend.allow_tf32 for backend in tf32)
    with pytest.raises(ExportError, match="more than --max-drop nan"):
        half_precision(SMALL, small_store, "fp16", camvid_folder, max_drop=math.nan)
    assert all(backend.allow_tf32 for backend in tf32)


def test_an_archive_for_a_gpu_says_what_half_precision_brings():
    assert "--precision fp16 --calibrate" in about_half_precision(SMALL)
    assert "CPU" in about_half_precision(dataclasses.replace(SMALL, runtime="openvino"))
    measured = dataclasses.replace(SMALL, precision="fp16", accuracy={"agreement": 0.998, "drop": 0.04})
    assert about_half_precision(measured).startswith("fp16: 99.80% of the answers as in fp32, 0.04 points lost")


# --- around the model ---


def test_photos_are_decoded_in_threads(small_store, monkeypatch):
    handler = Handler()
    handler.load(small_store)
    photos = [encoded(draw_photo(seed)) for seed in range(2)]
    alone = [handler.preprocess({"body": photo}).items[0] for photo in photos]
    decode, both = handler.preprocessor.decode, threading.Barrier(2, timeout=10)

    def meet(header, **options):
        both.wait()  # passes only when two photos are decoded at the same time
        return decode(header, **options)

    monkeypatch.setattr(handler.preprocessor, "decode", meet)
    handler.threads = ThreadPoolExecutor(2)
    jobs = [handler.read({"body": photo}, "") for photo in photos]
    handler.decode(jobs)
    for job, expected in zip(jobs, alone, strict=True):
        (item,) = job.items
        assert np.array_equal(item.pixels, expected.pixels)
        assert item.shown is None and not item.data


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


# --- the check ---

TINY = dataclasses.replace(gpu.CPU, seconds=0.02, clients=(2,))


@pytest.mark.parametrize("part", ["exactness", "failed capture", "out of memory", "threads"])
def test_a_part_of_the_check_runs_on_a_cpu(part, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "SIZES", (1, 8))
    rows = [*gpu.rows_of(part, dataclasses.replace(TINY, folder=tmp_path))]
    assert rows and all(row.holds is not False for row in rows), rows


def test_a_part_that_fails_is_a_row(tmp_path, monkeypatch, capsys):
    def broken(bench):
        yield gpu.Row("first", 1.5, True)
        raise RuntimeError("no\nway")

    monkeypatch.setitem(gpu.PARTS, "machine", (broken, 60))
    assert [*gpu.rows_of("machine", TINY)][-1] == gpu.Row("failed", "RuntimeError: no way", False)
    monkeypatch.undo()
    (row,) = gpu.run_part("machine", TINY, 0.01)
    assert (row.what, row.holds) == ("failed", False) and "given up" in row.value


def test_the_check_writes_a_table_and_the_figures(tmp_path, monkeypatch, capsys):
    rows = {"machine": [gpu.Row("torch", "2.15")], "HTTP": [gpu.Row("uvicorn fp32: answers/s by clients", {1: 90.0})]}
    monkeypatch.setattr(gpu, "run_part", lambda part, bench, seconds: rows[part])
    assert gpu.check(TINY, [*rows], tmp_path)
    (entry,) = json.loads((tmp_path / "gpu_results.json").read_text()).values()
    assert entry["answers/s over HTTP"] == {"uvicorn fp32": {"1": 90.0}}  # as benchmark.cost reads it
    table = (tmp_path / "gpu_results.md").read_text()
    assert "| HTTP | uvicorn fp32: answers/s by clients | 1: 90 |  |" in table and table in capsys.readouterr().out
    rows["machine"].append(gpu.Row("failed", "no", False))
    assert not gpu.check(TINY, [*rows], tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("part", gpu.PARTS)
def test_on_a_gpu(part):
    rows = gpu.run_part(part, gpu.GPU, gpu.PARTS[part][1])
    assert rows and all(row.holds is not False for row in rows), rows
