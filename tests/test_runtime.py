"""What computes: the queue of images, from logits to masks as fastai does it, PyTorch, OpenVINO, and what lacks."""

import base64
import dataclasses
import itertools
import locale
import logging
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    agreement,
    configured,
    draw_photo,
    encoded,
    image_batch,
    outputs_of,
)

from deployment import runtime
from deployment.archive import make_archive, runtime_of, set_batch_size
from deployment.export import write_config
from deployment.export.convert import MIN_AGREEMENT
from deployment.handler import Handler, Item
from deployment.photos import Preprocessor
from deployment.runtime import RuntimeUnavailable, cores, threads_wanted
from deployment.runtime import openvino as openvino_runtime
from deployment.runtime.openvino import load_openvino
from deployment.runtime.pytorch import choose_device, decode, eager, resample_affine, resample_in_graph
from deployment.runtime.queue import ImageQueue
from deployment.server.processes import free_ports
from deployment.server.torchserve import model_status, torchserve, workers_and_threads

CPU = torch.device("cpu")


# --- the queue ---


class Watched:
    """A model that gives each image its own first value, and keeps what it was asked for.

    `gate` holds every pass back until it is set. An image whose value is in `bad` makes its pass fail.
    """

    def __init__(self, bad: tuple[int, ...] = (), failure: Callable[[], Exception] = lambda: RuntimeError("bad")):
        self.bad, self.failure = bad, failure
        self.passes: list[list[int]] = []
        self.alone: list[bool] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.lock, self.inside, self.most = threading.Lock(), 0, 0

    def __call__(self, batch: np.ndarray, alone: bool) -> np.ndarray:
        values = [int(image.flat[0]) for image in batch]
        with self.lock:
            self.passes.append(values)
            self.alone.append(alone)
            self.inside += 1
            self.most = max(self.most, self.inside)
        self.entered.release()
        assert self.gate.wait(20)
        with self.lock:
            self.inside -= 1
        if {*values} & {*self.bad}:
            raise self.failure()
        return batch[:, 0, 0, 0]


def numbered(first: int, n: int = 1, shape: tuple[int, int] = (2, 3)) -> list[np.ndarray]:
    """`n` images whose values are `first` and those after it."""
    return [np.full((*shape, 3), value, np.uint8) for value in range(first, first + n)]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def together(model: Watched, images: ImageQueue, *requests: list[np.ndarray]) -> list[list]:
    """What `images` says to each of `requests`, which come one after another while the first pass is held back."""
    model.gate.clear()
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = [pool.submit(images, requests[0])]
        assert model.entered.acquire(timeout=20)
        for request in requests[1:]:
            there = len(images.requests)
            answers.append(pool.submit(images, request))
            wait_until(lambda there=there: len(images.requests) > there)
        model.gate.set()
        return [answer.result(timeout=20) for answer in answers]


def test_one_image_never_waits_for_all_of_another_request():
    model = Watched()
    images = ImageQueue(model)
    many, one = together(model, images, numbered(0, 64), numbered(100))
    assert many == [*range(64)] and one == [100]
    order = [value for (value,) in model.passes]
    assert sorted(order) == [*range(64), 100] and order.index(100) <= 2
    assert [value for value in order if value != 100] == [*range(64)]  # in their own order


def test_requests_take_turns():
    model = Watched()
    answers = together(model, ImageQueue(model), numbered(0, 4), numbered(10, 3), numbered(20, 2))
    assert answers == [[0, 1, 2, 3], [10, 11, 12], [20, 21]]
    assert [value for (value,) in model.passes] == [0, 1, 10, 20, 2, 11, 21, 3, 12]


def test_a_batch_holds_images_of_several_requests():
    model = Watched()
    answers = together(model, ImageQueue(model, batch=4), numbered(0), numbered(10, 5), numbered(20), numbered(30))
    assert answers == [[0], [10, 11, 12, 13, 14], [20], [30]]
    assert model.passes == [[0], [10, 20, 30, 11], [12, 13, 14]]


def test_a_batch_holds_images_of_one_shape():
    model = Watched()
    wide = numbered(20, 2, (2, 9))
    answers = together(model, ImageQueue(model, batch=4), numbered(0), numbered(10, 2) + wide, numbered(30))
    assert answers == [[0], [10, 11, 20, 21], [30]]
    assert model.passes == [[0], [10, 30, 11], [20, 21]]


def test_a_batch_has_no_more_pixels_than_allowed():
    model = Watched()  # of images of 6 pixels each
    assert together(model, ImageQueue(model, batch=4, pixels=20), numbered(0), numbered(10, 4)) == [
        [0],
        [10, 11, 12, 13],
    ]
    assert model.passes == [[0], [10, 11, 12], [13]]
    model.passes.clear()
    assert ImageQueue(model, batch=4, pixels=5)(numbered(0, 2)) == [0, 1]  # too many go alone
    assert model.passes == [[0], [1]]


@pytest.mark.parametrize("bad", [(), (3,), (0, 7), tuple(range(8))])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_failed_batch_is_halved_until_the_image_at_fault_is_alone(batch, bad):
    model = Watched(bad)
    outputs = ImageQueue(model, batch=batch)(numbered(0, 8))
    for value, output in enumerate(outputs):
        assert isinstance(output, RuntimeError) if value in bad else output == value
    assert all([value] in model.passes for value in bad)
    if not bad:
        assert [len(values) for values in model.passes] == {1: [1] * 8, 3: [3, 3, 2], 8: [8]}[batch]


def test_a_failure_costs_no_other_request_its_answer():
    model = Watched(bad=(11,))
    answers = together(model, ImageQueue(model, batch=4), numbered(0), numbered(10, 3), numbered(20), numbered(30))
    assert answers[0] == [0] and answers[2:] == [[20], [30]]
    good, bad, other = answers[1]
    assert (good, str(bad), other) == (10, "bad", 12)
    assert model.passes == [[0], [10, 20, 30, 11], [10, 20], [30, 11], [30], [11], [12]]


def test_memory_is_given_back_where_it_ran_out():
    freed = []
    model = Watched(bad=(2,), failure=MemoryError)
    outputs = ImageQueue(model, batch=4, free_memory=lambda: freed.append(True))(numbered(0, 4))
    assert outputs[:2] + outputs[3:] == [0, 1, 3] and isinstance(outputs[2], MemoryError)
    assert len(freed) == 3  # of four, of two, of one
    assert outputs[2].__traceback__ is None  # which would keep what the pass had made


def test_a_model_that_answers_for_too_few_images_is_an_error():
    outputs = ImageQueue(lambda batch, alone: batch[1:, 0, 0, 0], batch=4)(numbered(0, 3))
    assert all(isinstance(output, ValueError) for output in outputs)


def test_no_images_no_outputs():
    model = Watched()
    assert ImageQueue(model)([]) == [] and not model.passes


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_a_request_of_several_images_is_computed_side_by_side(at_once):
    model = Watched()
    model.gate.clear()
    images = ImageQueue(model, at_once)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(images, numbered(0, 6))
        for _ in range(at_once):
            assert model.entered.acquire(timeout=20)
        model.gate.set()
        assert answer.result(timeout=20) == [*range(6)]
    assert model.most == at_once


def test_only_a_lone_image_is_told_that_it_is_alone():
    model = Watched()
    images = ImageQueue(model, at_once=2)
    assert images(numbered(0)) == [0] and model.alone == [True]
    model.alone.clear()
    images(numbered(0, 4))
    assert model.alone == [False] * 4
    model.alone.clear()
    model.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        answers = []
        for value in (1, 2):
            answers.append(pool.submit(images, numbered(value)))
            wait_until(lambda value=value: len(model.alone) == value)
        model.gate.set()
        assert [answer.result(timeout=20) for answer in answers] == [[1], [2]]
    assert model.alone == [True, False]


@pytest.mark.parametrize(("at_once", "batch"), [(1, 1), (4, 1), (1, 8), (3, 4)])
def test_many_threads_each_get_their_own(at_once, batch):
    bad = (50, 51, 120)
    images = ImageQueue(Watched(bad), at_once, batch)

    def ask(i: int) -> bool:
        first, n = i % 200, 1 + i % 7
        outputs = images(numbered(first, n, (2, 3 + i % 2)))
        pairs = zip(range(first, first + n), outputs, strict=True)
        return all(isinstance(output, RuntimeError) if value in bad else output == value for value, output in pairs)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(600)))
    assert not images.requests and images.computing == 0


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
        runtime.load(config, small_store)


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


def test_one_of_several_gpus_is_a_line_in_the_log(no_gpu, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, gpu, lines in ((2, 1, 0), (1, None, 0), (2, None, 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        choose_device(gpu)
        assert len(caplog.records) == lines
    assert "one of 2 GPUs" in caplog.text


# --- what resamples an image ---


SAMPLED = [  # (height, width) of the image and of the samples
    ((48, 64), (48, 64)),
    ((100, 100), (48, 64)),
    ((37, 91), (64, 96)),
    ((300, 700), (24, 32)),
    ((601, 443), (17, 33)),
    ((5, 3), (64, 96)),
    ((2, 9), (4, 6)),
    ((64, 96), (1, 5)),
    ((193, 200), (64, 96)),  # where the image is hardly shrunk
    ((301, 700), (96, 100)),  # where the number of areas hangs on the last bit
    ((1111, 1500), (224, 160)),
]


@pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid:UserWarning")  # of a side of one pixel
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_resampling_in_a_graph_is_fastai_s_to_within_rounding(mode):
    cuts = ({}, {"ratio": [0.75, 4 / 3], "scale": 0.9}, {"ratio": [1.0, 1.0], "scale": 0.9})
    for (shape, size), align_corners, cut in itertools.product(SAMPLED, (True, False), cuts):
        x = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
        options = {"size": size, "mode": mode, "pad_mode": "reflection", "align_corners": align_corners} | cut
        expected, made = resample_affine(x, **options), resample_in_graph(x, **options)
        assert made.shape == expected.shape == (2, 3, *size)
        if mode == "bilinear":
            assert torch.allclose(made, expected, atol=1e-4), (shape, options)
        else:  # samples in the middle between two pixels may take either
            assert (made == expected).float().mean() > 0.9, (shape, options)


@pytest.mark.parametrize("pad_mode", ["reflection", "border", "zeros"])
def test_resampling_in_a_graph_at_the_borders(pad_mode):
    x = torch.rand(1, 3, 50, 40, generator=torch.Generator().manual_seed(0))
    options = {"size": (90, 120), "pad_mode": pad_mode, "align_corners": True}
    assert torch.allclose(resample_in_graph(x, **options), resample_affine(x, **options), atol=1e-4)


def test_without_a_size_each_sample_is_a_pixel():
    x = torch.rand(1, 3, 50, 40, generator=torch.Generator().manual_seed(0))
    for align_corners in (True, False):
        assert torch.equal(resample_in_graph(x, align_corners=align_corners), x)
        assert torch.allclose(resample_affine(x, align_corners=align_corners), x, atol=1e-4)


class Resampling(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, x):
        return resample_in_graph(x, **self.options)


@pytest.mark.parametrize("shape", [(301, 700), (417, 333), (611, 900), (1201, 803)], ids=str)
@pytest.mark.parametrize("ratio", [None, [0.75, 4 / 3]], ids=str)
def test_openvino_resamples_images_of_a_fixed_size_as_fastai_does(shape, ratio):
    """It has no float64, on whose last bit the number of areas hangs."""
    import openvino

    options = {"size": (96, 100)} | ({"ratio": ratio, "scale": 0.9} if ratio else {})
    x = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(0))
    model = openvino.convert_model(torch.export.export(Resampling(**options), (x,)))
    model.reshape([1, 3, *shape])
    made = openvino_runtime.compile_model(model, 1)(x.numpy())[0]
    assert np.allclose(made, resample_affine(x, **options).numpy(), atol=1e-4)


# --- OpenVINO ---


@pytest.mark.parametrize("n", [1, 3])
def test_openvino_in_float32_gives_the_masks_of_pytorch(small_masks, converted, n):
    expected = small_masks(image_batch(n))
    assert len(np.unique(expected)) > 1
    assert agreement(outputs_of(runtime.load(*converted), image_batch(n)), expected) >= MIN_AGREEMENT["fp32"]


def test_handler_serves_a_converted_model(small_masks, converted):
    config, folder = converted
    write_config(config, folder)
    handler = Handler()
    handler.load(folder)
    items = [Item(pixels=pixels) for pixels in image_batch(6)]
    handler.inference(items)
    masks = np.stack([item.output for item in items])
    assert agreement(masks, small_masks(image_batch(6))) > 0.999


WITHOUT_TORCH = """
import base64, json, sys
sys.modules["torch"] = sys.modules["torchvision"] = sys.modules["fastai"] = None
import numpy as np
import deployment.handler
handler = deployment.handler.Handler()
handler.load(sys.argv[1])
job = handler.preprocess({"data": open(sys.argv[2], "rb").read()})
handler.inference([item for item in job.items if not item.error])
answer = handler.postprocess(job)
assert answer.status == 200, answer.body
sys.stdout.buffer.write(base64.b64decode(json.loads(answer.body)["base64_prediction"]))
"""


def test_a_converted_model_is_served_without_torch(small_masks, converted, tmp_path):
    config, folder = converted
    write_config(config, folder)
    photo = encoded(draw_photo(5))
    (tmp_path / "photo.png").write_bytes(photo)
    command = [sys.executable, "-c", WITHOUT_TORCH, folder, tmp_path / "photo.png"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    mask = np.frombuffer(done.stdout, np.uint8).reshape(64, 64)
    assert agreement(mask, small_masks([Preprocessor(config)(photo)])[0]) > 0.999


def test_openvino_masks_do_not_depend_on_the_batch(int8):
    model = runtime.load(*int8)
    alone = np.stack([outputs_of(model, [image])[0] for image in image_batch(5)])
    assert np.array_equal(outputs_of(model, image_batch(5)), alone)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_openvino_gives_a_lone_photo_all_threads_and_others_one_each(int8, monkeypatch, threads):
    monkeypatch.setattr(openvino_runtime, "available_cores", lambda: 4)
    path, used, infer, compiled = int8[1] / "fastunet.xml", [], openvino_runtime.infer, openvino_runtime.compile_model
    alone, inside, held = set(), threading.Barrier(threads + 1, timeout=20), threading.Event()

    def watched(model, n, streams=1, **options):
        made = compiled(model, n, streams, **options)
        if n > streams:
            create = made.create_infer_request
            made = SimpleNamespace(create_infer_request=lambda: alone.add(id(request := create())) or request)
        return made

    def slow(request, batch):
        used.append(id(request) in alone)
        if held.is_set():
            inside.wait()
        return infer(request, batch)

    monkeypatch.setattr(openvino_runtime, "compile_model", watched)
    monkeypatch.setattr(openvino_runtime, "infer", slow)
    model, images = load_openvino(path, threads), image_batch(3)

    def lone_request_is_there() -> bool:
        used.clear()
        outputs_of(model, images[:1])
        return used == [True]

    wait_until(lone_request_is_there)  # it is made in the background
    used.clear()
    lone = [outputs_of(model, [image])[0] for image in images]
    assert used == [True] * 3
    used.clear()
    assert np.array_equal(outputs_of(model, images), lone) and used == [False] * 3
    used.clear()
    held.set()  # now each waits inside until all threads, and one more that came first, are there
    with ThreadPoolExecutor(threads + 1) as pool:
        first = pool.submit(outputs_of, model, images[:1])
        wait_until(lambda: bool(used))
        rest = [pool.submit(outputs_of, model, images[:1]) for _ in range(threads)]
        masks = [future.result() for future in (first, *rest)]
    assert used == [True] + [False] * threads
    assert all(np.array_equal(mask[0], lone[0]) for mask in masks)


def test_a_compiled_model_is_found_in_the_cache_wherever_the_model_lies(int8, tmp_path, monkeypatch):
    import openvino

    cache, copy = tmp_path / "cache", tmp_path / "copy"
    monkeypatch.setenv("OPENVINO_CACHE_DIR", str(cache))
    before = locale.setlocale(locale.LC_ALL)
    expected = outputs_of(load_openvino(int8[1] / "fastunet.xml", 1), image_batch(2))
    assert locale.setlocale(locale.LC_ALL) == before  # which OpenVINO changes
    copy.mkdir()
    for suffix in ("xml", "bin"):
        shutil.copy(int8[1] / f"fastunet.{suffix}", copy)
    model = openvino.Core().read_model(copy / "fastunet.xml")
    assert openvino_runtime.compile_model(model, 1, keep=True).get_property("LOADED_FROM_CACHE")
    assert np.array_equal(outputs_of(load_openvino(copy / "fastunet.xml", 1), image_batch(2)), expected)


def test_openvino_may_be_asked_by_many_threads(int8):
    model = load_openvino(int8[1] / "fastunet.xml", 2)
    batches = [image_batch(n) for n in (1, 2, 5)]
    expected = [outputs_of(model, batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        masks = [*pool.map(lambda i: outputs_of(model, batches[i % 3]), range(60))]
    assert all(np.array_equal(mask, expected[i % 3]) for i, mask in enumerate(masks))


def test_threads_are_as_openmp_counts_them(monkeypatch):
    for value, threads in (("3", 3), ("4,2", 4), (" 2 ", 2), ("", cores())):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert threads_wanted() == threads
    for value in ("0", "-1", "many", ",2"):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        with pytest.raises(ValueError, match=f"OMP_NUM_THREADS={value}: give a whole number, 1 or more"):
            threads_wanted()


def test_cores_are_those_that_a_cgroup_grants(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8), raising=False)
    assert cores(tmp_path) == 8
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    for quota, granted in (("-1", 8), ("50000", 1), ("250000", 3), ("900000", 8)):  # -1: no limit, in version 1
        (tmp_path / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert cores(tmp_path) == granted
    for limit, granted in (("max 100000", 8), ("150000 100000", 2)):
        (tmp_path / "cpu.max").write_text(f"{limit}\n")
        assert cores(tmp_path) == granted


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
    assert workers_and_threads(runtime_of(tmp_path / "fastunet.mar")) == (1, cores())
    photos = [encoded(draw_photo(seed)) for seed in range(16)]
    model = load_openvino(folder / "fastunet.xml", 1, "int8")
    expected = [mask.tobytes() for mask in outputs_of(model, [*map(Preprocessor(config), photos)])]
    port = free_ports(1)[0]

    def ask(photo: bytes) -> bytes:
        answer = httpx.post(f"{url}/predictions/fastunet", content=photo, timeout=60)
        return base64.b64decode(answer.json()["base64_prediction"])

    with torchserve(tmp_path, management_port=port) as url, ThreadPoolExecutor(16) as clients:
        served = model_status(port)
        assert list(clients.map(ask, photos * 4)) == expected * 4
    assert (served["batchSize"], len(served["workers"])) == (16, 1)


def test_openvino_lets_go_of_an_image_that_fails(int8):
    model = load_openvino(int8[1] / "fastunet.xml", 2)
    good = outputs_of(model, image_batch(2))
    for bad in (image_batch(1, 32, 32), image_batch(3, 32, 32)) * 3:  # more often than there are infer requests
        assert all(isinstance(output, RuntimeError) for output in model(bad))
    assert np.array_equal(outputs_of(model, image_batch(2)), good)


def test_eager_computes_with_the_same_threads_whoever_asks(small_store):
    model, images = eager(SMALL, small_store), image_batch(4)
    expected = [outputs_of(model, [image]) for image in images]
    with ThreadPoolExecutor(4) as pool:
        masks = [*pool.map(lambda i: outputs_of(model, [images[i % 4]]), range(24))]
    assert all(np.array_equal(mask, expected[i % 4]) for i, mask in enumerate(masks))
