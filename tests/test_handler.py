"""The handler in this process: decoding options, geometry, colours, shapes of one batch, memory that runs out."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ts
import yaml
from conftest import CODES, ROOT, draw_photo, encoded
from PIL import Image
from ts.context import Context, RequestProcessor
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from deployment import handler
from deployment.handler import (
    ANSWER_FORMATS,
    CAMVID_COLORS,
    Rejected,
    UnetHandler,
    mask_at_photo_size,
    overlay,
    palette,
)


def context_of(store: Path, batch_size: int = 8, **changes) -> Context:
    """TorchServe's context of a worker that serves what the export wrote into `store`, with `changes` to its config."""
    config = yaml.safe_load((store / "model-config.yaml").read_text())
    config["handler"] |= changes
    manifest = {"model": {"serializedFile": "fastunet.pth"}}
    metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
    metrics.initialize_cache()
    metrics.model_name = "fastunet"
    return Context("fastunet", str(store), manifest, batch_size, None, "0.12", True, metrics, config)


def answers(unet: UnetHandler, context: Context, *bodies: bytes | dict) -> list[tuple[int, bytes]]:
    """Status and body of the answers to one dynamic batch."""
    context.request_processor = [RequestProcessor({}) for _ in bodies]
    context.request_ids = context.metrics.request_ids = {i: f"request-{i}" for i in range(len(bodies))}
    requests = [body if isinstance(body, dict) else {"body": bytearray(body)} for body in bodies]
    results = unet.handle(requests, context)
    return [(context.get_response_status(i)[0], result) for i, result in enumerate(results)]


def loaded(context: Context) -> UnetHandler:
    unet = UnetHandler()
    unet.initialize(context)
    return unet


@pytest.fixture(scope="module")
def small(model_store) -> SimpleNamespace:
    """A loaded handler and its context."""
    context = context_of(model_store)
    return SimpleNamespace(unet=loaded(context), context=context)


def test_one_batch_many_kinds(small, photo):
    batch = answers(
        small.unet,
        small.context,
        photo,
        b"no photo",
        {"data": bytearray(photo), "format": bytearray(b"png")},
        json.dumps({"instances": [{"b64": "/9j/"}, {}]}).encode(),
        b"",
        {"data": bytearray(photo), "format": bytearray(b"overlay"), "size": bytearray(b"original")},
    )
    assert [status for status, _ in batch] == [200, 400, 200, 400, 400, 200]
    assert Image.open(__import__("io").BytesIO(batch[2][1])).mode == "P"
    assert len(json.loads(batch[3][1])["predictions"]) == 2


def test_the_same_answer_alone_and_in_a_full_batch(small):
    photos = [encoded(draw_photo(i)) for i in range(8)]
    together = answers(small.unet, small.context, *photos)
    assert together == [answers(small.unet, small.context, photo)[0] for photo in photos]


def test_json_that_torchserve_decoded(small, photo):
    """With decode_input_request=true, TorchServe's default, JSON arrives as objects and text as str."""
    import base64

    body = {"instances": [{"b64": base64.b64encode(photo).decode()}]}
    batch = answers(small.unet, small.context, {"body": body}, {"body": "text"}, {"body": [1]}, {"body": None})
    assert [status for status, _ in batch] == [200, 400, 400, 400]


@pytest.mark.parametrize(
    ("accept", "format"),
    [
        ("", "json"),
        ("*/*", "json"),
        ("image/png", "png"),
        ("IMAGE/JPEG;q=0.9", "overlay"),
        ("text/html, image/webp, image/jpeg, image/png", "overlay"),
        ("application/json, image/png", "json"),
        ("image/webp", "json"),
    ],
)
def test_accept(accept, format):
    assert handler.read_options({}, accept) == (format, "model")
    assert handler.read_options({"format": b"png"}, accept) == ("png", "model")


def test_header_names_in_any_case(small, photo):
    context = small.context
    for name in ("accept", "Accept", "ACCEPT"):
        context.request_processor = [RequestProcessor({name: "image/png"})]
        context.request_ids = {0: "r"}
        assert small.unet.handle([{"body": bytearray(photo)}], context)[0][:4] == b"\x89PNG"
    # A form field may have a header's name; its value is then no text.
    context.request_processor = [RequestProcessor({"Accept": {"content-type": "text/plain"}})]
    assert small.unet.handle([{"data": bytearray(photo)}], context)[0][:1] == b"{"


def test_max_pixels_is_configurable(model_store, photo):
    context = context_of(model_store, max_pixels=320 * 240 - 1)
    try:
        ((status, body),) = answers(loaded(context), context, photo)
        assert status == 413 and json.loads(body)["type"] == "TooLarge"
        context.model_yaml_config["handler"]["max_pixels"] = 320 * 240
        assert answers(loaded(context), context, photo)[0][0] == 200
    finally:
        loaded(context_of(model_store))  # sets Pillow's limit anew


def test_only_the_named_decoders_are_reached(monkeypatch):
    ppm = encoded(draw_photo(0), "PPM")
    with pytest.raises(Rejected, match="no photo that can be read"):
        handler.photo_size(ppm)
    assert handler.photo_size(encoded(draw_photo(0))) == (320, 240)


def test_photos_of_their_own_size(model_store, photo):
    """Without a resize, photos of several shapes meet in one batch; one that the network cannot take fails alone."""
    context = context_of(model_store, resize=None)
    unet = loaded(context)
    sizes = [(96, 64), (64, 96), (96, 64), (1, 1), (100, 70)]
    photos = [encoded(draw_photo(i, size)) for i, size in enumerate(sizes)]
    batch = answers(unet, context, *photos)
    for (width, height), (status, body) in zip(sizes, batch, strict=True):
        assert status == 200 and json.loads(body)["shape"] == [height, width] or (status, width) == (400, 1)
    assert [status for status, _ in batch][:3] == [200, 200, 200]
    assert batch[0] == answers(unet, context, photos[0])[0]


# --- geometry and colours ---


@pytest.mark.parametrize("size", [(320, 240), (97, 65), (1, 1), (5, 700), (4000, 3)])
def test_nearest_is_pillow_s(size):
    mask = np.random.default_rng(0).integers(0, 9, (64, 96), np.uint8)
    expected = np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    assert np.array_equal(mask_at_photo_size(mask, size, {"size": [64, 96], "method": "squish"}), expected)
    assert np.array_equal(mask_at_photo_size(mask, mask.shape[::-1], {}), mask)


@pytest.mark.parametrize("size", [(321, 240), (150, 400), (96, 64), (96, 640)])
@pytest.mark.parametrize(
    "config",
    [
        {"method": "squish"},
        {"method": "pad", "pad_mode": "zeros"},
        {"method": "crop"},
        {"method": "squish", "size": [80, 112], "crop": [64, 96]},
    ],
    ids=lambda config: config["method"] + ("+crop" if "crop" in config else ""),
)
def test_a_mask_comes_back_to_where_the_photo_was(size, config):
    """The photo itself, taken for a mask, goes through the resize and back: what was seen lies where it lay."""
    config = {"size": [64, 96], "pad_mode": "reflection"} | config
    width, height = size
    ramp = np.linspace(0, 250, width)[None, :] * 0.5 + np.linspace(0, 250, height)[:, None] * 0.5
    photo = Image.fromarray(ramp.astype(np.uint8))
    seen = np.array(handler.resize(photo, **config))
    back = mask_at_photo_size(seen, size, config).astype(int)
    middle = (slice(height // 2 - 5, height // 2 + 5), slice(width // 2 - 5, width // 2 + 5))
    cell = max(width / 96, height / 64)  # pixels of the photo to one of the mask
    assert back.shape == (height, width)
    assert np.abs(back - np.array(photo))[middle].max() <= cell * 125 * (1 / width + 1 / height) + 1


@pytest.mark.parametrize("n", [1, 2, 12, 32, 256])
def test_palette_has_a_color_for_each_class(n):
    codes = [*CAMVID_COLORS][:n] if n == 32 else [f"class {i}" for i in range(n)]
    colors = palette(codes)
    assert colors.shape == (n, 3) and colors.dtype == np.uint8
    assert len({tuple(c) for c in colors}) == n


def test_palette_is_camvid_s():
    assert palette(["Sky", "Road", "something"])[:2].tolist() == [[128, 128, 128], [128, 64, 128]]


def test_overlay_of_another_size():
    with pytest.raises(ValueError, match="the photo is"):
        overlay(Image.new("RGB", (3, 4)), np.zeros((3, 4), np.uint8), CODES)


def test_formats_have_media_types():
    assert ANSWER_FORMATS == {"json": "application/json", "png": "image/png", "overlay": "image/jpeg"}


# --- memory ---

MEMORY = """
import json, resource, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_handler import answers, context_of, loaded
from conftest import draw_photo, encoded
context = context_of(Path({store!r}), resize=None)
unet = loaded(context)
unet.photos_at_once = 8  # as on a GPU
photos = [encoded(draw_photo(i, (224, 160))) for i in range(4)]
alone = [answers(unet, context, photo)[0] for photo in photos]
assert [status for status, _ in alone] == [200] * 4
address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
forward = unet.forward
unet.forward = lambda photos: (passes.append(len(photos)), forward(photos))[1]
for extra in range(120, 720, 60):  # MiB; how much one photo needs differs between machines and builds of torch
    passes = []
    resource.setrlimit(resource.RLIMIT_AS, (address_space + extra * 2**20, resource.RLIM_INFINITY))
    together = answers(unet, context, *photos)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    statuses = [status for status, _ in together]
    if statuses == [200] * 4:
        break
print(json.dumps([passes, statuses, [json.loads(body).get('shape') for _, body in together]]))
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="no limit on address space here")
def test_out_of_memory_halves_the_batch(model_store):
    """Four photos of one shape in one batch, with little address space: the first that is enough for the four."""
    script = MEMORY.format(root=str(ROOT), tests=str(Path(__file__).parent), store=str(model_store))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    passes, statuses, shapes = json.loads(result.stdout.splitlines()[-1])
    assert passes[:2] == [4, 2] and passes.count(4) == 1, passes
    assert statuses == [200] * 4 and shapes == [[160, 224]] * 4


def test_out_of_memory_for_one_photo_is_507(small, photo):
    unet, context = small.unet, small.context
    model, calls = unet.model, []

    def starved(batch):
        calls.append(len(batch))
        if batch[:, :, 0, 0].eq(marked[:, 0, 0]).all(dim=1).any():  # the batch holds the photo that does not fit
            import torch

            torch.empty(2**50, dtype=torch.uint8)  # a real error of torch's allocator
        return model(batch)

    others = [encoded(draw_photo(i)) for i in range(3)]
    marked = handler.to_tensor(
        handler.resize(handler.open_image(photo), **unet.config["resize"]), unet.config["mean"], unet.config["std"]
    )
    unet.model, unet.photos_at_once = starved, 8  # as on a GPU
    try:
        batch = answers(unet, context, others[0], photo, *others[1:])
    finally:
        unet.model, unet.photos_at_once = model, 1
    assert [status for status, _ in batch] == [200, 507, 200, 200] and calls[0] == 4
    assert json.loads(batch[1][1])["type"] == "OutOfMemory"
    assert [json.loads(body)["shape"] for _, body in (batch[0], *batch[2:])] == [[64, 96]] * 3
