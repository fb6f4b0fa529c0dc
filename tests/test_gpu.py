"""What a CPU can show of serving on a GPU: padding, sizes, the fall-back, workers. `benchmark.gpu` is the rest."""

import logging

import pytest
import torch
from torch import nn

from deployment import gpu_runtime, processes, serve
from deployment.export.half import round_as

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
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), torch.rand(1, *SHAPE)
    exact = model(x)
    round_as(torch.bfloat16, model)
    rounded = model(x)
    assert not torch.equal(rounded, exact) and torch.allclose(rounded, exact, rtol=0.05, atol=0.02)
    assert torch.equal(rounded, rounded.bfloat16().float())


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.delenv("TS_DEFAULT_WORKERS_PER_MODEL", raising=False)
    for module in (processes, serve):
        monkeypatch.setattr(module, "gpus", lambda: 2)
    monkeypatch.setattr(serve, "cores", lambda: 8)


def test_one_worker_per_gpu(two_gpus, monkeypatch):
    assert serve.workers_and_threads() == (2, 4)
    monkeypatch.setenv("TS_DEFAULT_WORKERS_PER_MODEL", "3")
    assert serve.workers_and_threads()[0] == 3


def test_torchserve_hands_a_gpu_larger_batches(two_gpus, model_store):
    """A real TorchServe that is told of two GPUs; its workers find none and serve on the CPU."""
    port = serve.free_ports(1)[0]
    with serve.torchserve(model_store, management_port=port):
        model = serve.model_status(port)
    assert (model["batchSize"], model["maxBatchDelay"], len(model["workers"])) == (32, 1, 2)


def test_torchserve_hands_a_cpu_smaller_batches(server, ports):
    assert serve.model_status(ports["management_port"])["batchSize"] == 4


def test_gpus_are_counted_only_where_there_is_a_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(processes.os.path, "exists", lambda path: path == "/dev/nvidiactl")
    assert processes.gpus.__wrapped__() == 1
    monkeypatch.setattr(processes.os.path, "exists", lambda path: False)
    assert processes.gpus.__wrapped__() == 0
