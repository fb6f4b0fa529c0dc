"""What computes: from logits to masks as fastai does it, PyTorch, OpenVINO, and what is told where one lacks."""

import base64
import dataclasses
import logging
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from conftest import SMALL, agreement, configured, draw_photo, encoded, photo_batch

from deployment import openvino_runtime, runtime, serve
from deployment.archive import make_archive, runtime_of, set_batch_size
from deployment.export import write_config
from deployment.export.convert import MIN_AGREEMENT
from deployment.handler import Handler, Photo
from deployment.photos import Preprocessor
from deployment.processes import cores, free_ports
from deployment.runtime import RuntimeUnavailable, choose_device, decode

CPU = torch.device("cpu")


# --- from logits to masks ---


def losses() -> dict:
    """Loss functions of fastai by what `decode` needs to do the same, and the number of channels."""
    from fastai.vision.all import BCEWithLogitsLossFlat, CrossEntropyLossFlat, DiceLoss, FocalLossFlat

    return {
        "cross entropy": (CrossEntropyLossFlat(axis=1), 7, "softmax", None),
        "focal": (FocalLossFlat(axis=1), 7, "softmax", None),
        "dice": (DiceLoss(), 7, "softmax", None),
        "two classes": (CrossEntropyLossFlat(axis=1), 2, "softmax", None),
        "one channel": (BCEWithLogitsLossFlat(), 1, "sigmoid", 0.5),
        "one channel, its own threshold": (BCEWithLogitsLossFlat(thresh=0.3), 1, "sigmoid", 0.3),
    }


@pytest.mark.parametrize("name", losses())
def test_decode_is_the_loss_function_s(name):
    loss, channels, activation, threshold = losses()[name]
    logits = 3 * torch.randn(2, channels, 9, 11, generator=torch.Generator().manual_seed(0))
    expected = loss.decodes(loss.activation(logits)).reshape(2, 9, 11)
    mask = decode(logits, activation, threshold)
    assert mask.dtype == torch.uint8 and len(mask.unique()) == max(channels, 2)
    assert torch.equal(mask.long(), expected.long())


@pytest.mark.parametrize(
    ("activation", "threshold", "logits", "expected"),
    [
        (None, None, [0.1, -2.0, 0.3], 2),
        ("sigmoid", None, [0.1, 4.0, 0.3], 1),
        (None, 0.0, [0.1], 1),
        (None, 0.0, [0.0], 0),
        ("sigmoid", 0.5, [0.0], 0),
        ("sigmoid", 0.3, [-0.8], 1),
        # what rounds to the same probability is a tie, and goes to the first class
        ("softmax", None, [1e-9, -9.0, 2e-9], 0),
        (None, None, [1e-9, -9.0, 2e-9], 2),
        ("sigmoid", None, [30.0, 0.0, 40.0], 0),
    ],
)
def test_decode_by_hand(activation, threshold, logits, expected):
    assert decode(torch.tensor(logits).reshape(1, -1, 1, 1), activation, threshold).tolist() == [[[expected]]]


# --- loading ---


@pytest.mark.parametrize(
    "choice", [("eager", "int8"), ("openvino", "fp16"), ("compile", "fp32"), ("compile", "int8"), ("tensorrt", "fp32")]
)
def test_refuses_a_runtime_that_there_is_not(small_store, choice):
    config = dataclasses.replace(SMALL, runtime=choice[0], precision=choice[1])
    with pytest.raises(RuntimeUnavailable, match=f"{choice[0]}.*{choice[1]}.*there are eager"):
        runtime.load(config, small_store, CPU)


def test_openvino_that_is_not_installed_is_named(converted, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(RuntimeUnavailable, match="pip install openvino"):
        runtime.load(*converted)


def test_a_missing_model_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"fastunet\.pth"):
        runtime.load(SMALL, tmp_path)


MAJOR, MINOR, *REST = torch.__version__.split(".")


@pytest.mark.parametrize(
    ("exported_with", "warns"),
    [
        ({"torch": str(torch.__version__)}, False),
        ({"torch": f"{MAJOR}.{MINOR}.99+cu130"}, False),
        ({}, False),
        ({"torch": f"{MAJOR}.{int(MINOR) + 1}.0"}, True),
        ({"torch": f"{MAJOR}.{MINOR}9.0"}, True),
        ({"torch": f"{int(MAJOR) - 1}.{MINOR}.0"}, True),
    ],
)
def test_another_torch_than_at_the_export_is_one_line_in_the_log(exported_with, warns, small_store, tmp_path, caplog):
    handler = Handler()
    with caplog.at_level(logging.WARNING):
        handler.load(configured(small_store, tmp_path, exported_with=exported_with))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == warns
    if warns:
        assert exported_with["torch"] in lines[0] and torch.__version__ in lines[0] and "\n" not in lines[0]


# --- devices ---


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without a GPU or an NVIDIA driver, whatever this one has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: str(path) != "/proc/driver/nvidia/version" and exists(path))
    for name in ("NVIDIA_VISIBLE_DEVICES", "REQUIRE_GPU"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("gpu", [None, 0])
def test_a_cpu_is_nothing_to_warn_of(gpu, no_gpu, caplog):
    with caplog.at_level(logging.WARNING):
        assert choose_device(gpu) == CPU
    assert not caplog.records


@pytest.mark.parametrize("gpu", [None, 0])
@pytest.mark.parametrize("devices", ["all", "0", "GPU-12345"])
def test_a_gpu_that_cannot_be_used_is_warned_of(gpu, devices, no_gpu, monkeypatch, caplog):
    monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", devices)
    with caplog.at_level(logging.WARNING):
        assert choose_device(gpu) == CPU
    (record,) = caplog.records
    assert "finds no GPU" in record.getMessage() and torch.__version__ in record.getMessage()


@pytest.mark.parametrize("devices", ["", "void", "none"])
def test_a_container_that_was_given_no_gpu_is_not(devices, no_gpu, monkeypatch, caplog):
    monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", devices)
    with caplog.at_level(logging.WARNING):
        assert choose_device() == CPU
    assert not caplog.records


def test_a_gpu_can_be_required(no_gpu, monkeypatch):
    monkeypatch.setenv("REQUIRE_GPU", "1")
    with pytest.raises(RuntimeUnavailable, match="REQUIRE_GPU=1.*no GPU"):
        choose_device(0)
    monkeypatch.setenv("REQUIRE_GPU", "0")
    assert choose_device(0) == CPU


def test_the_gpu_that_is_given_is_taken(no_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("REQUIRE_GPU", "1")
    assert choose_device(1) == torch.device("cuda:1")
    assert choose_device(None) == torch.device("cuda:0")  # TorchServe finds no nvidia-smi, PyTorch does find the GPU


# --- OpenVINO ---


@pytest.mark.parametrize("n", [1, 3])
def test_openvino_in_float32_gives_the_masks_of_pytorch(small_masks, converted, n):
    config, folder = converted
    predict = runtime.load(config, folder, CPU)
    expected = small_masks(photo_batch(n))
    assert len(expected.unique()) > 1
    assert agreement(predict(photo_batch(n)), expected) >= MIN_AGREEMENT["fp32"]


def test_handler_serves_a_converted_model(small_masks, converted):
    config, folder = converted
    write_config(config, folder)
    handler = Handler()
    handler.load(folder)
    batch = [Photo(x=x) for x in photo_batch(6)]
    handler.inference(batch)
    masks = torch.from_numpy(np.stack([photo.output for photo in batch]))
    assert agreement(masks, small_masks(photo_batch(6))) > 0.999


def test_openvino_masks_do_not_depend_on_the_batch(int8):
    config, folder = int8
    predict = runtime.load(config, folder, CPU)
    together, alone = predict(photo_batch(5)), torch.cat([predict(x[None]) for x in photo_batch(5)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_openvino_gives_a_lone_photo_all_threads_and_others_one_each(int8, monkeypatch, threads):
    monkeypatch.setattr(openvino_runtime, "available_cores", lambda: 4)
    path, used, infer, compiled = int8[1] / "fastunet.xml", [], openvino_runtime.infer, openvino_runtime.compile_model
    alone, inside, held = set(), threading.Barrier(threads + 1, timeout=20), threading.Event()

    def watched(model, n, streams=1, precision="fp32"):
        made = compiled(model, n, streams, precision)
        if n > streams:
            create = made.create_infer_request
            made = SimpleNamespace(create_infer_request=lambda: alone.add(id(request := create())) or request)
        return made

    def slow(request, x):
        used.append(id(request) in alone)
        if held.is_set():
            inside.wait()
        return infer(request, x)

    monkeypatch.setattr(openvino_runtime, "compile_model", watched)
    monkeypatch.setattr(openvino_runtime, "infer", slow)
    predict = openvino_runtime.load_openvino(path, threads)
    lone = [predict(x[None]) for x in photo_batch(3)]
    assert used == [True] * 3
    used.clear()
    assert torch.equal(predict(photo_batch(3)), torch.cat(lone)) and used == [False] * 3
    used.clear()
    held.set()  # now each waits inside until all threads, and one more that came first, are there
    with ThreadPoolExecutor(threads + 1) as pool:
        first = pool.submit(predict, photo_batch(3)[:1])
        while not used:
            time.sleep(0.001)
        rest = [pool.submit(predict, photo_batch(3)[:1]) for _ in range(threads)]
        masks = [future.result() for future in (first, *rest)]
    assert used == [True] + [False] * threads
    assert all(torch.equal(mask, lone[0]) for mask in masks)


def test_openvino_may_be_asked_by_many_threads(int8):
    predict = openvino_runtime.load_openvino(int8[1] / "fastunet.xml", 2)
    batches = [photo_batch(n) for n in (1, 2, 5)]
    expected = [predict(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        masks = [*pool.map(lambda i: predict(batches[i % 3]), range(60))]
    assert all(torch.equal(mask, expected[i % 3]) for i, mask in enumerate(masks))


def test_openvino_has_one_worker_that_uses_all_cores(int8, tmp_path, monkeypatch):
    """A real TorchServe. Its answers, also those to requests that come together, are those of the model in process."""
    config, folder = int8
    for file in folder.glob("*.*"):
        shutil.copy(file, tmp_path)
    write_config(config, tmp_path)
    written = (tmp_path / "model-config.yaml").read_text()
    for device in ("cuda", "cpu"):
        set_batch_size(tmp_path, device)
    assert (tmp_path / "model-config.yaml").read_text() == written
    make_archive(tmp_path)
    monkeypatch.delenv("TS_DEFAULT_WORKERS_PER_MODEL", raising=False)
    assert serve.workers_and_threads(runtime_of(tmp_path / "fastunet.mar")) == (1, cores())
    photos = [encoded(draw_photo(seed)) for seed in range(16)]
    predict = openvino_runtime.load_openvino(folder / "fastunet.xml", 1, "int8")
    expected = [predict(Preprocessor(config)(photo)[None])[0].numpy().tobytes() for photo in photos]
    port = free_ports(1)[0]

    def ask(photo: bytes) -> bytes:
        answer = httpx.post(f"{url}/predictions/fastunet", content=photo, timeout=60)
        return base64.b64decode(answer.json()["base64_prediction"])

    with serve.torchserve(tmp_path, management_port=port) as url, ThreadPoolExecutor(16) as clients:
        model = serve.model_status(port)
        assert list(clients.map(ask, photos * 4)) == expected * 4
    assert (model["batchSize"], len(model["workers"])) == (16, 1)


def test_openvino_lets_go_of_a_photo_that_fails(int8):
    predict = openvino_runtime.load_openvino(int8[1] / "fastunet.xml", 2)
    good = predict(photo_batch(2))
    for bad in (photo_batch(1, 32, 32), photo_batch(3, 32, 32)) * 3:  # more often than there are infer requests
        with pytest.raises(RuntimeError):
            predict(bad)
    assert torch.equal(predict(photo_batch(2)), good)


def test_eager_computes_with_the_same_threads_whoever_asks(small_store):
    predict = runtime.eager(SMALL, small_store, CPU)
    expected = [predict(x[None]) for x in photo_batch(4)]
    with ThreadPoolExecutor(4) as pool:
        masks = [*pool.map(lambda i: predict(photo_batch(4)[i % 4][None]), range(24))]
    assert all(torch.equal(mask, expected[i % 4]) for i, mask in enumerate(masks))
