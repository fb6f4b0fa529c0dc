"""What computes: from logits to masks as fastai does it, PyTorch, OpenVINO, and what is told where one lacks."""

import dataclasses
import fcntl
import logging
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, agreement, configured, photo_batch

from deployment import runtime
from deployment.export import write_config
from deployment.export.convert import MIN_AGREEMENT
from deployment.handler import Handler, Photo
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
    "choice", [("eager", "fp16"), ("openvino", "fp16"), ("compile", "fp32"), ("compile", "int8"), ("tensorrt", "fp32")]
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
        ({"torch": torch.__version__}, False),
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


# --- OpenVINO ---


@pytest.mark.parametrize("n", [1, 3])
def test_openvino_in_float32_gives_the_masks_of_pytorch(small_masks, converted, n):
    config, folder = converted
    predict = runtime.load(config, folder, CPU)
    expected = small_masks(photo_batch(n))
    assert len(expected.unique()) > 1
    assert agreement(predict(photo_batch(n)), expected) >= MIN_AGREEMENT


def test_handler_serves_a_converted_model(small_masks, converted):
    config, folder = converted
    write_config(config, folder)
    handler = Handler()
    handler.load(folder)
    batch = [Photo(x=x) for x in photo_batch(6)]
    handler.inference(batch)
    masks = torch.from_numpy(np.stack([photo.mask for photo in batch]))
    assert agreement(masks, small_masks(photo_batch(6))) > 0.999


def test_openvino_masks_do_not_depend_on_the_batch(int8):
    config, folder = int8
    predict = runtime.load(config, folder, CPU)
    together, alone = predict(photo_batch(5)), torch.cat([predict(x[None]) for x in photo_batch(5)])
    assert torch.equal(together, alone)


def test_openvino_takes_more_threads_only_while_no_other_worker_computes(int8, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    used, model = [], runtime.openvino_model

    def watched(path, threads):
        predict = model(path, threads)
        return lambda x: (used.append(threads), predict(x))[1]

    monkeypatch.setattr(runtime, "openvino_model", watched)
    path = int8[1] / "fastunet.xml"
    predict = runtime.openvino_models(path, 1)
    os.utime(path, (0, 0))
    alone = predict(photo_batch(2))
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # another worker computes
        together = predict(photo_batch(2))
    just_after = predict(photo_batch(2))
    os.utime(path, (0, 0))
    later = predict(photo_batch(2))
    assert used == [2, 2, 1, 1, 1, 1, 2, 2]
    assert all(torch.equal(alone, masks) for masks in (together, just_after, later))
