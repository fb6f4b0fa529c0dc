"""What a CPU can show of serving on a GPU: padding, sizes, the fall-back, workers. `benchmark.gpu` is the rest."""

import logging
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from deployment import gpu_runtime, processes, serve
from deployment.archive import ArchiveError, make_archive, set_batch_size
from deployment.export import ExportError
from deployment.export.half import Rounding, half_precision
from deployment.handler import Handler
from tests.conftest import SMALL, draw_photo, encoded

CPU, SHAPE = torch.device("cpu"), (3, 16, 24)


class Classes(nn.Module):
    """A network with classes for an answer: uint8 (N, H, W). It notes the sizes of its batches, and the types."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.scale, self.seen = nn.Conv2d(3, 5, 3, padding=1), scale, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((len(x), x.dtype))
        return (self.conv(x * self.scale) / self.scale).argmax(dim=1).to(torch.uint8)


def loaded(model: nn.Module, precision: str = "fp32"):
    predict, used = gpu_runtime.load(model, SHAPE, CPU, precision)
    return predict, used


def test_batches_are_padded_to_a_few_sizes():
    model = Classes()
    predict, _ = loaded(model)
    photos = torch.randn(70, *SHAPE)
    with torch.inference_mode():
        expected = model(photos)
    for n, sizes in [(1, [1]), (3, [4]), (7, [8]), (32, [32]), (37, [32, 8]), (70, [32, 32, 8])]:
        model.seen.clear()
        assert torch.equal(predict(photos[:n]), expected[:n])  # whatever was in the places of the padding before
        assert [size for size, _ in model.seen] == sizes


def test_batches_that_do_not_fit_are_not_made(monkeypatch, caplog):
    prepare = gpu_runtime.prepare

    def small(model, x, pool):
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prepare(model, x, pool)

    monkeypatch.setattr(gpu_runtime, "prepare", small)
    model = Classes()
    predict, _ = loaded(model)
    model.seen.clear()
    assert len(predict(torch.randn(9, *SHAPE))) == 9
    assert [size for size, _ in model.seen] == [4, 4, 1]
    assert "batches of 8 photos do not fit" in caplog.text
    monkeypatch.setattr(gpu_runtime, "SIZES", (8,))
    with pytest.raises(torch.OutOfMemoryError):
        loaded(model)


def test_half_precision_is_used_where_it_agrees(caplog):
    caplog.set_level(logging.WARNING)
    model = Classes()
    assert [loaded(model, precision)[1] for precision in ("auto", "fp16", "bf16", "fp32")] == [
        "fp16", "fp16", "bf16", "fp32",
    ]  # fmt: skip
    assert not caplog.records
    assert loaded(Classes(scale=1e6), "auto")[1] == "bf16"  # more than fp16 can hold
    assert "fp16 agrees with fp32 on" in caplog.text
    predict, used = loaded(Classes(scale=1e6), "fp16")
    assert used == "fp32"
    photos = torch.randn(3, *SHAPE)
    with torch.inference_mode():
        assert torch.equal(predict(photos), Classes(scale=1e6)(photos))


def test_what_insists_on_float32_gets_it(caplog):
    class Insists(Classes):
        def forward(self, x):
            if x.dtype != torch.float32:
                raise RuntimeError("expected float32")
            return super().forward(x)

    assert loaded(Insists(), "auto")[1] == "fp32"
    assert "does not run in fp16: expected float32" in caplog.text


def test_agreement():
    a = torch.tensor([0, 1, 2, 3], dtype=torch.uint8)
    assert gpu_runtime.agreement(a, torch.tensor([0, 1, 2, 9], dtype=torch.uint8)) == 0.75
    assert gpu_runtime.agreement(torch.tensor([[1.0, 0.5]]), torch.tensor([[1.004, 0.6]])) == 0.5


def test_emulated_rounding_is_that_of_the_type():
    x = torch.rand(1, *SHAPE)
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
    alone = [handler.preprocess({"body": photo}).photos[0] for photo in photos]
    decode, both = handler.preprocessor.decode, threading.Barrier(2, timeout=10)

    def meet(image):
        both.wait()  # passes only when two photos are decoded at the same time
        return decode(image)

    monkeypatch.setattr(handler.preprocessor, "decode", meet)
    handler.threads = ThreadPoolExecutor(2)
    jobs = [handler.read({"body": photo}, "") for photo in photos]
    handler.decode(jobs)
    for job, expected in zip(jobs, alone, strict=True):
        assert torch.equal(job.photos[0].x, expected.x) and job.photos[0].image is None


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.delenv("TS_DEFAULT_WORKERS_PER_MODEL", raising=False)
    for module in (processes, serve):
        monkeypatch.setattr(module, "gpus", lambda: 2)
    monkeypatch.setattr(serve, "cores", lambda: 8)


def test_one_worker_per_gpu(two_gpus, monkeypatch):
    assert serve.workers_and_threads() == serve.workers_and_threads("openvino") == (2, 4)
    monkeypatch.setenv("TS_DEFAULT_WORKERS_PER_MODEL", "3")
    assert serve.workers_and_threads()[0] == 3


def test_an_archive_for_a_gpu_has_larger_batches(two_gpus, small_store, tmp_path):
    """A real TorchServe that is told of two GPUs; its workers find none and serve on the CPU."""
    for file in small_store.glob("*.*"):
        shutil.copy(file, tmp_path)
    set_batch_size(tmp_path, "cuda")
    make_archive(tmp_path)
    port = serve.free_ports(1)[0]
    with serve.torchserve(tmp_path, management_port=port):
        model = serve.model_status(port)
    assert (model["batchSize"], model["maxBatchDelay"], len(model["workers"])) == (32, 1, 2)
    set_batch_size(tmp_path, "cpu")
    assert (tmp_path / "model-config.yaml").read_text() == (small_store / "model-config.yaml").read_text()
    (tmp_path / "model-config.yaml").write_text("handler: {}\n")
    with pytest.raises(ArchiveError, match="no line `batchSize"):
        set_batch_size(tmp_path, "cuda")


def test_gpus_are_counted_only_where_there_is_a_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(processes.os.path, "exists", lambda path: path == "/dev/nvidiactl")
    assert processes.gpus.__wrapped__() == 1
    monkeypatch.setattr(processes.os.path, "exists", lambda path: False)
    assert processes.gpus.__wrapped__() == 0
