"""The handler in this process: batches of many kinds, errors of one photo, memory that runs out."""

import base64
import dataclasses
import gc
import io
import json
import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import ts
from conftest import ROOT, SMALL, configured, draw_photo, encoded
from PIL import Image
from ts.context import Context, RequestProcessor
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

import deployment.handler
from deployment import answers, protocol
from deployment.export import write_config
from deployment.handler import Handler
from deployment.memory import MemoryBudget
from deployment.model import DynamicUnetDIY
from deployment.protocol import MEDIA_TYPES
from deployment.runtime.queue import ImageQueue


def context_of(store: Path, batch_size: int = 8) -> Context:
    """TorchServe's context of a worker that serves what the export wrote into `store`."""
    manifest = {"model": {"serializedFile": "fastunet.pth"}}
    metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
    metrics.initialize_cache()
    metrics.model_name = "fastunet"
    return Context("fastunet", str(store), manifest, batch_size, None, "0.12", True, metrics, {})


def loaded(store: Path) -> SimpleNamespace:
    """A handler that serves `store`, and its context."""
    worker = SimpleNamespace(handler=Handler(), context=context_of(store))
    worker.handler.initialize(worker.context)
    return worker


def ask(worker: SimpleNamespace, *bodies: bytes | dict) -> list[tuple[int, bytes]]:
    """Status and body of the answers to one dynamic batch."""
    context = worker.context
    context.request_processor = [RequestProcessor({}) for _ in bodies]
    context.request_ids = context.metrics.request_ids = {i: f"request-{i}" for i in range(len(bodies))}
    requests = [body if isinstance(body, dict) else {"body": bytearray(body)} for body in bodies]
    results = worker.handler.handle(requests, context)
    return [(context.get_response_status(i)[0], result) for i, result in enumerate(results)]


def form(photo: bytes, **fields: str) -> dict:
    """A multipart form as TorchServe hands it over."""
    return {"data": bytearray(photo)} | {name: bytearray(value.encode()) for name, value in fields.items()}


@pytest.fixture(scope="module")
def worker(small_store) -> SimpleNamespace:
    return loaded(small_store)


@pytest.fixture(scope="module")
def own_size(small_store, tmp_path_factory) -> SimpleNamespace:
    """A worker whose photos keep their size."""
    return loaded(configured(small_store, tmp_path_factory.mktemp("own_size"), resize=None))


def test_one_batch_many_kinds(worker, photo):
    batch = ask(
        worker,
        photo,
        b"no photo",
        form(photo, format="png"),
        json.dumps({"instances": [{"b64": "/9j/"}, {}]}).encode(),
        b"",
        form(photo, format="overlay", size="original"),
    )
    assert [status for status, _ in batch] == [200, 400, 200, 400, 400, 200]
    assert Image.open(io.BytesIO(batch[2][1])).mode == "P"
    assert len(json.loads(batch[3][1])["predictions"]) == 2


@pytest.mark.parametrize("format", MEDIA_TYPES)
def test_an_answer_is_what_its_content_type_says(format, worker, photo):
    ((status, body),) = ask(worker, form(photo, format=format))
    content_type = worker.context.get_response_headers(0)["content-type"]
    assert status == 200 and content_type == {"json": "application/json", "png": "image/png"}.get(format, "image/jpeg")
    if format == "json":
        assert json.loads(body)["shape"] == [64, 64]
    else:
        assert Image.MIME[Image.open(io.BytesIO(body)).format] == content_type


def test_the_same_answer_alone_and_in_a_full_batch(worker):
    photos = [encoded(draw_photo(i)) for i in range(8)]
    together = ask(worker, *photos)
    assert together == [ask(worker, photo)[0] for photo in photos]


def test_json_that_torchserve_decoded(worker, photo):
    """With decode_input_request=true, TorchServe's default, JSON arrives as objects and text as str."""
    body = {"instances": [{"b64": base64.b64encode(photo).decode()}]}
    batch = ask(worker, {"body": body}, {"body": "text"}, {"body": [1]}, {"body": None})
    assert [status for status, _ in batch] == [200, 400, 400, 400]


def test_header_names_in_any_case(worker, photo):
    context = worker.context
    for name in ("accept", "Accept", "ACCEPT"):
        context.request_processor = [RequestProcessor({name: "image/png"})]
        context.request_ids = {0: "r"}
        assert worker.handler.handle([{"body": bytearray(photo)}], context)[0][:4] == b"\x89PNG"
    # A form field may have a header's name; its value is then no text.
    context.request_processor = [RequestProcessor({"Accept": {"content-type": "text/plain"}})]
    assert worker.handler.handle([{"data": bytearray(photo)}], context)[0][:1] == b"{"


def test_a_form_of_which_torchserve_dropped_a_field_is_told_so(worker, photo):
    context = worker.context
    context.request_ids = context.metrics.request_ids = {0: "r"}
    form_type = "multipart/form-data; boundary=b"
    for length, content_type, status in (
        (len(photo) + 400, form_type, 200),
        (2 * len(photo) + 800, form_type, 400),
        (2 * len(photo) + 800, "image/png", 200),
        ("chunked", form_type, 200),
    ):
        headers = {"Content-Length": str(length), "Content-Type": content_type}
        context.request_processor = [RequestProcessor(headers)]
        worker.handler.handle([form(photo, format="png")], context)
        assert context.get_response_status(0)[0] == status


def test_max_pixels_is_configurable(small_store, photo, tmp_path):
    ((status, body),) = ask(loaded(configured(small_store, tmp_path, max_pixels=320 * 240 - 1)), photo)
    assert status == 413 and json.loads(body)["type"] == "TooLarge"
    assert ask(loaded(configured(small_store, tmp_path, max_pixels=320 * 240)), photo)[0][0] == 200


def test_the_photos_of_one_request_have_one_limit(small_store, photo, tmp_path):
    worker = loaded(configured(small_store, tmp_path, max_pixels=2 * 320 * 240))
    instance = {"b64": base64.b64encode(photo).decode()}
    three, one = ask(worker, {"body": {"instances": [instance] * 3}}, photo)
    assert [part.get("error", {}).get("code") for part in json.loads(three[1])["predictions"]] == [None, None, 413]
    assert one[0] == 200


@pytest.mark.parametrize("size", ["model", "original"])
def test_overlay_where_the_mask_has_another_size_than_the_resized_photo(size, small_store, photo, tmp_path):
    """As with `Resize(100)` and `aug_transforms(size=(48, 64))`."""
    resize = {"size": [100, 100], "method": "squish", "pad_mode": "reflection", "resample": "bilinear"}
    affine = [{"size": [48, 64], "mode": "bilinear", "pad_mode": "reflection", "align_corners": True}]
    worker = loaded(configured(small_store, tmp_path, resize=resize, affine=affine, img_size=[48, 64]))
    drawn, other = ask(worker, form(photo, format="overlay", size=size), photo)
    assert (drawn[0], other[0]) == (200, 200)
    overlay = Image.open(io.BytesIO(drawn[1]))
    assert (overlay.format, overlay.size) == ("JPEG", {"model": (64, 48), "original": (320, 240)}[size])


# --- photos of their own size ---


def test_photos_of_their_own_size(own_size):
    """Without a resize, photos of several shapes meet in one batch."""
    sizes = [(96, 64), (64, 96), (96, 64), (1, 1), (100, 70)]
    photos = [encoded(draw_photo(i, size)) for i, size in enumerate(sizes)]
    batch = ask(own_size, *photos)
    for (width, height), (status, body) in zip(sizes, batch, strict=True):
        assert status == 200 and json.loads(body)["shape"] == [height, width]
    assert batch[0] == ask(own_size, photos[0])[0]


def test_a_photo_that_the_network_cannot_take_fails_alone(tmp_path):
    """A VGG halves a photo of one pixel to none."""
    arch, options = "vgg11_bn", {"cut": ["features", 8]}
    torch.save(DynamicUnetDIY(arch, 4, (64, 64), **options).state_dict(), tmp_path / "fastunet.pth")
    write_config(dataclasses.replace(SMALL, arch=arch, options=options, resize=None), tmp_path)
    photos = [encoded(draw_photo(i, size)) for i, size in enumerate([(96, 64), (1, 1), (96, 64), (70, 1)])]
    batch = ask(loaded(tmp_path), *photos)
    assert [status for status, _ in batch] == [200, 400, 200, 400]
    for i in (1, 3):
        assert json.loads(batch[i][1]) == protocol.bad_request("the model takes no photo of this size").as_json()


def test_a_broken_model_is_not_the_photo_s_fault(own_size, monkeypatch):
    def broken(batch, alone):
        raise RuntimeError("broken")

    monkeypatch.setattr(own_size.handler.model, "compute", broken)
    batch = ask(own_size, encoded(draw_photo(0, (96, 64))), encoded(draw_photo(1, (64, 96))), b"no photo")
    assert [status for status, _ in batch] == [500, 500, 400]
    assert json.loads(batch[0][1])["type"] == "InternalError"


def test_memory_that_runs_short_while_the_fault_is_sought_is_not_the_photo_s_fault(own_size, monkeypatch):
    real, calls = own_size.handler.model.compute, []

    def short(batch, alone):
        calls.append(batch.shape)
        if batch.shape[2] == 96:
            raise RuntimeError("broken") if batch.any() else torch.OutOfMemoryError("out of memory")
        return real(batch, alone)

    monkeypatch.setattr(own_size.handler.model, "compute", short)
    [(status, _)] = ask(own_size, encoded(draw_photo(0, (96, 64))))
    assert status == 500 and len(calls) == 3


def test_a_photo_that_breaks_the_model_is_not_refused_for_its_size(own_size, monkeypatch):
    real = own_size.handler.model.compute

    def broken(batch, alone):
        if batch.shape[2] == 96 and batch.any():
            raise RuntimeError("broken")
        return real(batch, alone)

    monkeypatch.setattr(own_size.handler.model, "compute", broken)
    batch = ask(own_size, encoded(draw_photo(0, (96, 64))), encoded(draw_photo(1, (64, 96))))
    assert [status for status, _ in batch] == [500, 200]


# --- faults of our own: whichever step fails, each request fails alone ---


def faulty(worker, step: str, monkeypatch) -> None:
    """Make `step` fail for the request whose photo is 123 pixels wide."""

    def failing(real, is_marked, error):
        def function(*args, **options):
            if is_marked(*args):
                raise error("boom")
            return real(*args, **options)

        return function

    pixels = worker.handler.preprocessor(encoded(draw_photo(7, (123, 77))))
    size = (123, 77)
    preprocessor = worker.handler.preprocessor
    owner, name, is_marked, error = {
        "read_request": (protocol, "read_request", lambda fields, accept: len(fields["data"]) == len(MARKED), Boom),
        # as a learner's own code, and NumPy and Pillow, raise them: a ValueError is not the client's fault either
        "resize": (preprocessor, "resize", lambda image: image.size == size, ValueError),
        "to_array": (
            deployment.handler,
            "to_array",
            lambda image: np.array_equal(np.asarray(image), pixels),
            ValueError,
        ),
        "model": (worker.handler.model, "compute", lambda batch, alone: (batch == pixels).all((1, 2, 3)).any(), Boom),
        "to_image_size": (preprocessor, "to_image_size", lambda mask, image_size: image_size == size, Boom),
        "encode": (answers, "encode", lambda image, format: image.size == size, Boom),
    }[step]
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), is_marked, error))


class Boom(RuntimeError):
    """A fault of our own."""


MARKED = encoded(draw_photo(7, (123, 77)))


@pytest.mark.parametrize("step", ["read_request", "resize", "to_array", "model", "to_image_size", "encode"])
def test_an_error_costs_one_request_and_is_logged_once(step, worker, monkeypatch, caplog):
    photos = [encoded(draw_photo(0)), MARKED, encoded(draw_photo(1)), encoded(draw_photo(2))]
    requests = [form(photo, format="overlay", size="original") for photo in photos]
    before = ask(worker, *requests)
    faulty(worker, step, monkeypatch)
    with caplog.at_level(logging.WARNING):
        batch = ask(worker, *requests)
    assert [status for status, _ in batch] == [200, 500, 200, 200]
    error = json.loads(batch[1][1])
    assert set(error) == {"code", "type", "message"} and (error["code"], error["type"]) == (500, "InternalError")
    assert "boom" not in error["message"]
    assert [batch[0], *batch[2:]] == [before[0], *before[2:]]
    (record,) = [record for record in caplog.records if "request" in record.getMessage()]
    assert record.getMessage().startswith("request request-1 answered with 500: InternalError")
    assert str(record.exc_info[1]) == "boom" and record.exc_info[2]  # with its stack


def test_an_error_costs_one_instance_of_a_request(worker, monkeypatch):
    faulty(worker, "model", monkeypatch)
    instances = [{"b64": base64.b64encode(photo).decode()} for photo in (encoded(draw_photo(0)), MARKED)]
    ((status, body),) = ask(worker, {"body": {"instances": instances}})
    good, bad = json.loads(body)["predictions"]
    assert (status, good["shape"], bad["error"]["code"]) == (200, [64, 64], 500)


# --- memory ---

MEMORY = """
import json, resource, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from conftest import draw_photo, encoded
from deployment.runtime.queue import ImageQueue
from test_handler import ask, loaded
worker = loaded(Path({store!r}))
eager, passes = worker.handler.model.compute, []

def compute(batch, alone):
    passes.append(len(batch))
    return eager(batch, alone)

worker.handler.model = ImageQueue(compute, batch=4)  # all at once, as on a GPU
photos = [encoded(draw_photo(i, (224, 160))) for i in range(4)]
alone = [ask(worker, photo)[0] for photo in photos]
assert [status for status, _ in alone] == [200] * 4
assert ask(worker, *photos) == alone  # and now all threads have begun: a thread needs memory too
address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
for extra in range(10, 400, 10):  # MiB; what is needed differs between builds
    passes.clear()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + extra * 2**20, resource.RLIM_INFINITY))
    together = ask(worker, *photos)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    statuses = [status for status, _ in together]
    if statuses == [200] * 4:
        break
print(json.dumps([passes, statuses, [json.loads(body).get('shape') for _, body in together]]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says how large the address space is")
def test_out_of_memory_halves_the_batch(small_store, tmp_path):
    """Four photos of one shape in one batch, with little address space: the first that is enough for the four."""
    store = configured(small_store, tmp_path, resize=None)
    script = MEMORY.format(root=str(ROOT), tests=str(Path(__file__).parent), store=str(store))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    passes, statuses, shapes = json.loads(result.stdout.splitlines()[-1])
    assert passes[:2] == [4, 2] and passes.count(4) == 1, passes
    assert statuses == [200] * 4 and shapes == [[160, 224]] * 4


def test_out_of_memory_for_one_photo_is_507(worker, photo, monkeypatch):
    compute, calls = worker.handler.model.compute, []
    marked = worker.handler.preprocessor(photo)

    def starved(batch, alone):
        calls.append(len(batch))
        if (batch == marked).all((1, 2, 3)).any():  # the batch holds the photo that does not fit
            torch.empty(2**50, dtype=torch.uint8)  # a real error of torch's allocator
        return compute(batch, alone)

    others = [encoded(draw_photo(i)) for i in range(3)]
    monkeypatch.setattr(worker.handler, "model", ImageQueue(starved, batch=4))
    batch = ask(worker, others[0], photo, *others[1:])
    assert [status for status, _ in batch] == [200, 507, 200, 200] and calls[0] == 4
    assert json.loads(batch[1][1])["type"] == "OutOfMemory"
    assert [json.loads(body)["shape"] for _, body in (batch[0], *batch[2:])] == [[64, 64]] * 3


def test_images_wait_for_a_place_in_the_budget(worker, monkeypatch):
    """Of images that together are more than the budget, not all are decoded at one time; each is decoded."""
    photos = [encoded(draw_photo(i, (100, 80))) for i in range(6)]
    inside, most, lock, decode = 0, [], threading.Lock(), worker.handler.preprocessor.decode

    def watched(header, **options):
        nonlocal inside
        with lock:
            inside += 1
            most.append(inside)
        image = decode(header, **options)
        time.sleep(0.02)
        with lock:
            inside -= 1
        return image

    monkeypatch.setattr(worker.handler.preprocessor, "decode", watched)
    monkeypatch.setattr(worker.handler, "threads", ThreadPoolExecutor(6))
    monkeypatch.setattr(worker.handler, "budget", MemoryBudget(2 * 100 * 80 * 4))
    assert [status for status, _ in ask(worker, *photos)] == [200] * 6
    assert len(most) == 6 and max(most) <= 2


def test_a_16_bit_image_that_loses_its_values_has_a_warning(worker, photo):
    deep = np.asarray(draw_photo(0).convert("L")).astype(np.uint16)
    for pixels, format in ((deep * 257, "PNG"), (deep * 257, "TIFF"), ((deep * 257).astype(np.int32), "TIFF")):
        [(status, _)] = ask(worker, encoded(Image.fromarray(pixels), format))
        warning = worker.context.get_response_headers(0)["Warning"]
        assert status == 200 and warning.startswith('199 - "') and "--open" in warning and warning.isascii()
    for harmless in (encoded(Image.fromarray(deep)), photo):
        assert ask(worker, harmless)[0][0] == 200
        assert "Warning" not in worker.context.get_response_headers(0)


def test_what_is_drawn_at_its_own_size_keeps_its_room_until_then(worker, monkeypatch):
    """Of a batch whose images do not fit together, as many are answered at a time as do."""
    requests = [form(encoded(draw_photo(i, (100, 80))), size="original", format="overlay") for i in range(5)]
    expected = ask(worker, *requests)
    room = 100 * 80 * 8
    budget, used = MemoryBudget(2 * room, seconds=0.1), []
    draw = worker.handler.make_answer
    monkeypatch.setattr(worker.handler, "budget", budget)
    monkeypatch.setattr(worker.handler, "make_answer", lambda *item: used.append(budget.used) or draw(*item))
    assert ask(worker, *requests) == expected
    assert used == [2 * room] * 4 + [room] and budget.used == 0
    photo = encoded(draw_photo(9, (100, 80)))
    assert [status for status, _ in ask(worker, requests[0], photo, requests[1])] == [200] * 3
    with budget.hold(room + 1):
        [(status, body)] = ask(worker, requests[0])
        assert (status, json.loads(body)["type"]) == (503, "Busy")
        assert worker.context.get_response_headers(0)["Retry-After"] == "1"
    [(status, _)] = ask(worker, form(encoded(draw_photo(0, (200, 180))), size="original"))
    assert status == 507


def test_free_memory_goes_back_after_every_hundred_batches(worker, monkeypatch):
    given = []
    monkeypatch.setattr(deployment.handler, "give_free_memory_back", lambda: given.append(1))
    for _ in range(2 * deployment.handler.TRIM_EVERY):
        ask(worker, b"no image")
    assert len(given) == 2


def test_a_refused_image_leaves_nothing_for_the_garbage_collector(worker, photo):
    """An error whose stack holds the image that holds the error would stay for thousands of requests."""
    bad = [photo[:300], photo[:2000], b"no photo", b'{"instances": [{"b64": "?"}]}', b"{", form(photo, size="x")]
    ask(worker, photo, *bad)  # what is made once
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        assert {status for status, _ in ask(worker, *bad)} == {400}
        ask(worker, photo)
        gc.collect()
        left = [kind for kind in map(type, gc.garbage) if kind.__module__.startswith("deployment")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert left == []


def test_a_few_images_are_decoded_beside_many(worker, monkeypatch):
    """The threads are at work on 64 images of one request: another request's two do not wait for them."""
    begun, go, decode = threading.Event(), threading.Event(), worker.handler.decode_item

    def slow(item, job):
        if len(job.items) == 20:
            begun.set()
            assert go.wait(20)
        decode(item, job)

    monkeypatch.setattr(worker.handler, "decode_item", slow)
    instance = {"b64": base64.b64encode(encoded(draw_photo(0, (10, 10)))).decode()}
    with ThreadPoolExecutor(2) as pool:
        many = pool.submit(worker.handler.preprocess, {"body": {"instances": [instance] * 20}})
        assert begun.wait(20)
        few = pool.submit(worker.handler.preprocess, {"body": {"instances": [instance] * 2}})
        assert all(item.pixels is not None for item in few.result(20).items)
        go.set()
        assert all(item.pixels is not None for item in many.result(20).items)


def test_a_worker_whose_model_fails_on_every_image_ends(small_store, photo, monkeypatch):
    worker = loaded(small_store)

    def broken(batch, alone):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(worker.handler.model, "compute", broken)
    assert [ask(worker, photo)[0][0] for _ in range(5)] == [500] * 5
    with pytest.raises(SystemExit):
        ask(worker, photo)


def test_a_jpeg_that_is_decoded_at_a_fraction_keeps_its_size_in_the_answer(small_store, tmp_path):
    worker = loaded(configured(small_store, tmp_path, decode="fast"))
    photo = encoded(draw_photo(0, (800, 600)), "JPEG")
    (_, answer), (_, overlay) = ask(
        worker, form(photo, size="original"), form(photo, size="original", format="overlay")
    )
    assert json.loads(answer)["shape"] == [600, 800]
    assert Image.open(io.BytesIO(overlay)).size == (800, 600)
    assert json.loads(ask(worker, photo)[0][1])["shape"] == [64, 64]


def test_no_thread_starts_after_the_model_is_loaded(small_store, monkeypatch):
    """A thread that cannot start, since memory is short, must not cost a batch."""
    worker = loaded(small_store)

    def no_memory(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_memory)
    answers = ask(worker, *[encoded(draw_photo(i)) for i in range(4)])
    assert [status for status, _ in answers] == [200] * 4
