"""The HTTP contract, row by row, against either server; metrics, logs, security, start and stop."""

import asyncio
import base64
import contextlib
import gc
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from conftest import CODES, ROOT, bomb, draw_photo, encoded
from PIL import Image

from deployment.answers import palette
from deployment.archive import find_archive, make_archive
from deployment.serve import is_healthy, is_open
from deployment.server.front import open_front, rerouted, told_to_wait
from deployment.server.processes import free_ports, last_error, own_folder, printed, reserve_port, started
from deployment.server.torchserve import (
    HARMLESS,
    command,
    ignored_variables,
    is_ready,
    model_status,
    workers_and_threads,
)

PREDICT = "/predictions/fastunet"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def mask_of(answer: dict) -> np.ndarray:
    """The mask in the JSON answer for one photo."""
    return np.frombuffer(base64.b64decode(answer["base64_prediction"]), np.uint8).reshape(answer["shape"])


def nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`mask` at `size` (width, height), as Pillow does it."""
    return np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def picture(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


# --- what can be sent and what comes back ---


def test_body_gives_json(client, photo, predict):
    answer = client.post(PREDICT, content=photo)
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    answer, mask = answer.json(), predict(photo)
    assert set(answer) == {"base64_prediction", "shape", "classes", "names"}
    assert answer["shape"] == [64, 96] and answer["names"] == CODES
    assert np.array_equal(mask_of(answer), mask)
    share = np.bincount(mask.ravel(), minlength=len(CODES)) / mask.size
    assert answer["classes"] == {c: pytest.approx(s, abs=1e-6) for c, s in zip(CODES, share, strict=True) if s}


@pytest.mark.parametrize("content_type", ["image/png", "application/octet-stream", "text/plain", "application/json"])
def test_any_content_type_of_a_photo(client, photo, predict, content_type):
    answer = client.post(PREDICT, content=photo, headers={"content-type": content_type})
    assert answer.status_code == 200 and np.array_equal(mask_of(answer.json()), predict(photo))


def test_multipart(client, photo, predict):
    answer = client.post(PREDICT, files={"data": ("street.png", photo, "image/png")})
    assert answer.status_code == 200 and np.array_equal(mask_of(answer.json()), predict(photo))


@pytest.mark.parametrize("size", [None, "model", "original"])
@pytest.mark.parametrize("how", ["header", "field", "json"])
def test_png(client, photo, predict, how, size):
    fields = {"size": size} if size else {}
    if how == "header":
        request = {"headers": {"Accept": "image/png"}} | (
            {"files": {"data": photo}, "data": fields} if size else {"content": photo}
        )
    elif how == "field":
        request = {"files": {"data": photo}, "data": fields | {"format": "png"}}
    else:
        request = {"json": {"instances": [{"b64": b64(photo)}], "parameters": fields | {"format": "png"}}}
    answer = client.post(PREDICT, **request)
    assert answer.status_code == 200
    expected = predict(photo)
    if how == "json":
        (answer,) = answer.json()["predictions"]
        assert set(answer) == {"png", "shape", "classes", "names"}
        data = base64.b64decode(answer["png"])
    else:
        assert answer.headers["content-type"] == "image/png"
        data = answer.content
    if size == "original":
        expected = nearest(expected, (320, 240))
    image = picture(data)
    assert image.format == "PNG" and image.mode == "P" and np.array_equal(np.array(image), expected)
    assert np.array_equal(np.array(image.convert("RGB")), palette(CODES)[expected])


@pytest.mark.parametrize("size", ["model", "original"])
@pytest.mark.parametrize("how", ["header", "field", "json"])
def test_overlay(client, photo, predict, how, size):
    if how == "header":
        request = {"headers": {"Accept": "image/jpeg"}, "files": {"data": photo}, "data": {"size": size}}
    elif how == "field":
        request = {"files": {"data": photo}, "data": {"size": size, "format": "overlay"}}
    else:
        request = {"json": {"instances": [{"b64": b64(photo)}], "parameters": {"format": "overlay", "size": size}}}
    answer = client.post(PREDICT, **request)
    assert answer.status_code == 200
    data = base64.b64decode(answer.json()["predictions"][0]["jpeg"]) if how == "json" else answer.content
    assert how == "json" or answer.headers["content-type"] == "image/jpeg"
    size = (320, 240) if size == "original" else (96, 64)
    colors = palette(CODES)[nearest(predict(photo), size)]
    expected = Image.blend(picture(photo).resize(size, Image.Resampling.BILINEAR), Image.fromarray(colors), 0.5)
    assert picture(data).format == "JPEG" and picture(data).size == size
    assert np.array_equal(np.array(picture(data)), np.array(picture(encoded(expected, "JPEG"))))


def test_json_size_original(client, photo, predict):
    answer = client.post(PREDICT, files={"data": photo}, data={"size": "original"}).json()
    assert np.array_equal(mask_of(answer), nearest(predict(photo), (320, 240)))


def test_json_instances(client, predict):
    photos = [encoded(draw_photo(200 + i, (100 + 50 * i, 80))) for i in range(10)]  # more than one batch
    instances = [{"b64": b64(p)} if i % 2 else {"data": {"b64": b64(p)}} for i, p in enumerate(photos)]
    answer = client.post(PREDICT, json={"instances": instances})
    assert answer.status_code == 200
    predictions = answer.json()["predictions"]
    assert [np.array_equal(mask_of(p), predict(data)) for p, data in zip(predictions, photos, strict=True)] == [
        True
    ] * 10


def test_base64_may_have_line_breaks(client, photo, predict):
    body = {"instances": [{"b64": base64.encodebytes(photo).decode()}]}
    assert np.array_equal(mask_of(client.post(PREDICT, json=body).json()["predictions"][0]), predict(photo))


def test_bad_instances_fail_at_their_place(client, photo, predict):
    bad = [{"b64": "no base64!"}, {"b64": b64(b"no photo")}, {"b64": b64(photo[:2000])}, {"x": 1}, None, 5, {"b64": 7}]
    instances = [bad[0], {"b64": b64(photo)}, *bad[1:]]
    answer = client.post(PREDICT, json={"instances": instances})
    predictions = answer.json()["predictions"]
    assert answer.status_code == 200 and np.array_equal(mask_of(predictions.pop(1)), predict(photo))
    assert [list(p) for p in predictions] == [["error"]] * len(bad)
    assert all(set(p["error"]) == {"code", "type", "message"} and p["error"]["code"] == 400 for p in predictions)

    answer = client.post(PREDICT, json={"instances": bad})
    assert answer.status_code == 400 and answer.json()["code"] == 400
    assert len(answer.json()["predictions"]) == len(bad)


def people_s_photos() -> dict[str, bytes]:
    """Photos in the forms that people have them in."""
    rgb = draw_photo(7, (200, 150))
    gray = rgb.convert("L")
    deep = Image.fromarray(np.array(gray).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90°
    frames = [draw_photo(i, (200, 150)) for i in (7, 8)]
    return {
        "jpeg": encoded(rgb, "JPEG"),
        "jpeg progressive": encoded(rgb, "JPEG", progressive=True),
        "jpeg exif": encoded(rgb, "JPEG", exif=exif),
        "jpeg gray": encoded(gray, "JPEG"),
        "jpeg cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "jpeg large": encoded(draw_photo(9, (2000, 1500)), "JPEG"),
        "png": encoded(rgb),
        "png gray": encoded(gray),
        "png 16 bit": encoded(deep),
        "png 1 bit": encoded(gray.convert("1")),
        "png palette": encoded(rgb.quantize(16)),
        "png palette transparent": encoded(rgb.quantize(16), transparency=3),
        "png alpha": encoded(Image.merge("RGBA", (*rgb.split(), gray))),
        "png gray alpha": encoded(Image.merge("LA", (gray, gray.rotate(180)))),
        "png 1 x 1": encoded(draw_photo(1, (1, 1))),
        "png 3 x 500": encoded(draw_photo(1, (3, 500))),
        "png 4000 x 2": encoded(draw_photo(1, (4000, 2))),
        "webp": encoded(rgb, "WEBP"),
        "webp lossless alpha": encoded(Image.merge("RGBA", (*rgb.split(), gray)), "WEBP", lossless=True),
        "bmp": encoded(rgb, "BMP"),
        "tiff": encoded(rgb, "TIFF"),
        "tiff lzw cmyk": encoded(rgb.convert("CMYK"), "TIFF", compression="tiff_lzw"),
        "tiff 16 bit": encoded(deep, "TIFF"),
        "gif": encoded(rgb, "GIF"),
        "gif animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    }


def test_photos_as_people_have_them(client, predict):
    photos = people_s_photos()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda data: client.post(PREDICT, content=data), photos.values()))
    same = {
        name: answer.status_code == 200 and np.array_equal(mask_of(answer.json()), predict(data))
        for (name, data), answer in zip(photos.items(), answers, strict=True)
    }
    assert all(same.values()), same


def test_dynamic_batches_change_no_mask(client, predict):
    photos = [encoded(draw_photo(300 + i)) for i in range(8)]
    expected = [predict(data) for data in photos]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: client.post(PREDICT, content=photos[i % 8]).json(), range(48)))
    assert [np.array_equal(mask_of(a), expected[i % 8]) for i, a in enumerate(answers)] == [True] * 48


# --- bad input ---


BAD_BODIES = {
    "empty": (b"", 400),
    "text": (b"good morning", 400),
    "html": (b"<!doctype html><title>street</title>", 400),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3", 400),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", 400),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', 400),
    "cut png": (encoded(draw_photo(1))[:3000], 400),
    "cut jpeg": (encoded(draw_photo(1), "JPEG")[:3000], 400),
    "png header": (encoded(draw_photo(1))[:30], 400),
    "other format": (encoded(draw_photo(1), "PPM"), 400),
    "too many pixels": (lambda: bomb(10_001, 5_000), 413),  # made when it is sent: collecting tests takes no seconds
    "decompression bomb": (lambda: bomb(60_000, 60_000), 413),
    "no json": (b'{"instances": [', 400),
    "nested json": (b'{"a":' * 100_000, 400),
    "nan": (b'{"instances": NaN}', 400),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies(client, name):
    body, status = BAD_BODIES[name]
    answer = client.post(PREDICT, content=body() if callable(body) else body)
    assert answer.status_code == status and answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"code", "type", "message"} and answer.json()["code"] == status
    assert "Traceback" not in answer.text and '.py"' not in answer.text


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"instances": []},
        {"instances": {"b64": ""}},
        {"instances": "b64"},
        {"instances": [{"b64": ""}]},
        {"instances": [{"b64": "AAAA"}], "parameters": []},
        {"instances": [{"b64": "AAAA"}], "parameters": {"format": "tiff"}},
        {"instances": [{"b64": "AAAA"}], "parameters": {"format": ["png"]}},
        {"instances": [{"b64": "AAAA"}], "parameters": {"size": float("nan")}},
        {"instances": [{"b64": "AAAA"}], "parameters": {"size": 1e400}},
        {"instances": [{"b64": "AAAA"}], "parameters": {"size": -1}},
        {"instance": [{"b64": "AAAA"}]},
        [],
        None,
        "street.png",
        7,
    ],
    ids=lambda body: json.dumps(body)[:50],
)
def test_json_of_the_wrong_shape(client, body):
    answer = client.post(PREDICT, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 400 and {"code", "type", "message"} <= set(answer.json())


@pytest.mark.parametrize("fields", [{"format": "gif"}, {"format": ""}, {"size": "huge"}, {"size": "NaN"}])
def test_unknown_fields(client, photo, fields):
    answer = client.post(PREDICT, files={"data": photo}, data=fields)
    assert answer.status_code == 400 and "must be one of" in answer.json()["message"]


def test_multipart_without_data(client, photo):
    assert client.post(PREDICT, files={"image": photo}).status_code == 400
    assert client.post(PREDICT, files={"data": photo[:500]}).status_code == 400


def test_too_many_instances_or_pixels(client, photo):
    tiny = {"b64": b64(encoded(Image.new("RGB", (1, 1))))}
    answer = client.post(PREDICT, json={"instances": [tiny] * 65})
    assert answer.status_code == 413 and answer.json()["type"] == "TooLarge"
    big = {"b64": b64(bomb(6000, 6000))}  # 36 million: one is well, two are too many for one request
    answer = client.post(PREDICT, json={"instances": [big, big, tiny]})
    assert answer.status_code == 200
    assert [p.get("error", {}).get("code") for p in answer.json()["predictions"]] == [None, 413, None]


def test_largest_answer(client):
    answer = client.post(PREDICT, files={"data": bomb(7_000, 7_000)}, data={"size": "original"})
    assert answer.status_code == 200 and answer.json()["shape"] == [7_000, 7_000]
    answer = client.post(PREDICT, files={"data": bomb(70_000, 10)}, data={"size": "original", "format": "overlay"})
    assert answer.status_code == 400 and "JPEG" in answer.json()["message"]


def test_what_the_server_answers_itself(client, kind, photo, predict):
    """Pinned, because the README describes it: what never reaches the handler, a photo called a form, and versions."""
    assert client.post(PREDICT, content=bytes(21_000_000)).status_code == 413
    assert client.post("/predictions/other", content=photo).status_code == 404
    assert client.post(f"{PREDICT}/2.0", content=photo).status_code == 404
    for same in (f"{PREDICT}/", f"{PREDICT}/1.0"):
        assert np.array_equal(mask_of(client.post(same, content=photo).json()), predict(photo))
    form = {"content-type": "application/x-www-form-urlencoded"}
    answer = client.post(PREDICT, content=photo, headers=form)  # as `curl --data-binary @photo.png`
    stripped = client.post(PREDICT, content=photo.translate(None, b"\r\n\0"), headers=form)  # as `curl -d @photo.png`
    if kind == "torchserve":
        for refused in (answer, stripped):
            assert refused.status_code == 500 and refused.json()["type"] == "ErrorDataDecoderException"
            assert re.match("Bad string: |Bad end of line|Invalid hex byte at index", refused.json()["message"])
    else:
        assert stripped.status_code == 400
        assert np.array_equal(mask_of(answer.json()), predict(photo))


def test_bad_requests_do_not_harm_their_batch(client, photo, predict):
    expected = predict(photo)
    bad = [body() if callable(body) else body for body, _ in BAD_BODIES.values()]
    bodies = [photo if i % 3 == 0 else bad[i % len(bad)] for i in range(90)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: client.post(PREDICT, content=body), bodies))
    for body, answer in zip(bodies, answers, strict=True):
        if body is photo:
            assert answer.status_code == 200 and np.array_equal(mask_of(answer.json()), expected)
        else:
            assert 400 <= answer.status_code < 500


# --- metrics and logs ---


def metrics(ports) -> dict[str, float]:
    """The samples on the metrics address, by name and labels."""
    text = httpx.get(f"http://127.0.0.1:{ports['metrics_port']}/metrics").text
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[:1] != "#"}


def count(samples: dict[str, float], name: str, label: str = "") -> float:
    return sum(value for key, value in samples.items() if key.startswith(name + "{") and label in key)


def test_metrics(client, photo, ports):
    before = metrics(ports)
    client.post(PREDICT, content=photo)
    client.post(PREDICT, content=b"no photo")
    time.sleep(0.5)
    after = metrics(ports)
    for step in ("preprocess", "inference", "postprocess"):
        assert count(after, f"{step}_seconds_count") == count(before, f"{step}_seconds_count") + 2
    assert count(after, "inference_seconds_sum") > count(before, "inference_seconds_sum")
    assert count(after, "batch_requests_sum") == count(before, "batch_requests_sum") + 2
    assert count(after, "batch_photos_sum") == count(before, "batch_photos_sum") + 1
    reason = 'Reason="BadImage"'
    assert count(after, "rejected_inputs", reason) == count(before, "rejected_inputs", reason) + 1


def test_log_has_a_line_per_rejected_request_and_no_contents(client, kind, server_folder):
    secret = "carol-7f3a9c"
    log = server_folder / f"{kind}.log"
    start = log.stat().st_size
    rejected = [
        client.post(PREDICT, content=secret.encode()),
        client.post(PREDICT, content=b'{"instances": [{"b64": "' + secret.encode() + b'"}]}'),
        client.post(PREDICT, content=b"{" + secret.encode()),
        client.post(PREDICT, files={"data": secret.encode()}, data={"format": secret}),
        client.post(PREDICT, content=b"x" + secret.encode() + bytes(range(256)), headers={"authorization": secret}),
    ]
    form = {"content-type": "application/x-www-form-urlencoded"}  # TorchServe quotes its body in an exception
    client.post(PREDICT, content=(secret + "%zz").encode(), headers=form)
    time.sleep(0.5)
    new = log.read_bytes()[start:].decode()
    for answer in rejected:
        assert answer.status_code == 400 and secret not in answer.text
        lines = [line for line in new.splitlines() if answer.headers["x-request-id"] in line]
        assert len(lines) == 1 and "answered with 400" in lines[0]
    assert secret not in new and "Traceback" not in new


# --- who may do what ---


def listening(pid: int) -> set[str]:
    """The addresses that the process `pid` listens on."""
    return {c.laddr.ip for c in psutil.Process(pid).net_connections("inet") if c.status == psutil.CONN_LISTEN}


def test_addresses_are_loopback_and_models_stay(server, kind, ports, computing):
    pid = min(computing())
    pid = psutil.Process(pid).ppid() if kind == "torchserve" else pid
    assert {ip.removeprefix("::ffff:") for ip in listening(pid)} == {"127.0.0.1"}
    management = f"http://127.0.0.1:{ports['management_port']}" if kind == "torchserve" else server
    assert httpx.post(f"{management}/models", params={"url": "fastunet.mar"}).status_code in (404, 405)
    assert httpx.delete(f"{management}/models/fastunet").status_code in (404, 405)


# --- start, stop and faults ---


ONE_WORKER = {"TS_DEFAULT_WORKERS_PER_MODEL": "1"}


@contextlib.contextmanager
def foreground(model_store: Path, folder: Path, *arguments: str, **environment: str):
    """`python -m deployment.serve`; yields the process and its ports."""
    ports = dict(zip(("port", "management_port", "metrics_port"), free_ports(3), strict=True))
    command = [sys.executable, "-m", "deployment.serve", "--model-store", str(model_store), *arguments]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in ports.items()]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process, ports
    finally:
        process.terminate()
        process.wait(120)


def wait_for(condition, timeout: float = 180) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


def answers(url: str) -> bool:
    """Whether `url` answers with 200."""
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


def check(ports: dict[str, int], folder: Path, *arguments: str, **environment: str) -> int:
    """The exit status of `python -m deployment.serve --check`."""
    command = [sys.executable, "-m", "deployment.serve", "--check", f"--management-port={ports['management_port']}"]
    command.append(f"--port={ports['port']}")
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([*command, *arguments], env=env, cwd=folder).returncode


def test_check_and_a_stop_that_loses_nothing(kind, model_store, tmp_path, photo, predict):
    dead = f"http://127.0.0.1:{free_ports(1)[0]}"  # a proxy for the network is none of a local server's business
    settings = {"http_proxy": dead, "HTTP_PROXY": dead, "no_proxy": "", "NO_PROXY": "", "SERVER": kind}
    with foreground(model_store, tmp_path, "--name", "street", **settings) as (process, ports):
        url, route = f"http://127.0.0.1:{ports['port']}", "/predictions/street"
        assert check(ports, tmp_path, "--name=street", **settings) == 1  # it has not even begun
        wait_for(lambda: serves(kind, ports, "street"))
        assert check(ports, tmp_path, "--name=street", **settings) == 0
        assert kind == "uvicorn" or check(ports, tmp_path, "--name=another") == 1
        body = {"instances": [{"b64": b64(photo)}] * 4}
        with ThreadPoolExecutor(3) as pool:
            sent = [pool.submit(httpx.post, url + route, json=body, timeout=300) for _ in range(3)]
            wait_for(lambda: count(metrics(ports), "ts_inference_requests_total") == 3)
            process.send_signal(signal.SIGTERM)
            for answer in sent:
                assert answer.result().status_code == 200
                masks = [mask_of(p) for p in answer.result().json()["predictions"]]
                assert all(np.array_equal(mask, predict(photo)) for mask in masks)
        assert process.wait(120) == 0
        assert check(ports, tmp_path, "--name=street", SERVER=kind) == 1


def test_says_how_to_call_it_once_it_is_ready_and_an_interrupt_is_quiet(kind, model_store, tmp_path, photo):
    log, settings = tmp_path / "server.log", {"SERVER": kind, "TMPDIR": str(tmp_path)} | ONE_WORKER
    with foreground(model_store, tmp_path, "--auth", "--name=fastune", **settings) as (process, ports):
        wait_for(lambda: "ready: " in log.read_text())
        unpacked = [path.parents[2] for path in tmp_path.glob("*/models/*/handler.py")]
        assert len(unpacked) == (kind == "torchserve")  # in a folder that no other user can read or make before
        assert all(folder.stat().st_mode & 0o777 == 0o700 for folder in unpacked)
        lines = log.read_text().splitlines()
        url, key_file = f"http://127.0.0.1:{ports['port']}/predictions/fastune", tmp_path / "key_file.json"
        assert lines[-1] == (
            f'ready: curl -T PHOTO.png -H "Authorization: Bearer TOKEN" {url}  '
            f"(TOKEN: the key of `inference` in {key_file})"
        )
        assert "there is no fastune.mar: fastunet.mar, the only archive, is served by that name" in lines
        assert not [line for line in lines if re.search("WARN|nvidia-smi not|ERROR|error:", line)]
        token = json.loads(key_file.read_text())["inference"]["key"]
        answer = httpx.put(url, content=photo, headers={"Authorization": f"Bearer {token}"}, timeout=60)
        assert answer.status_code == 200
        children = psutil.Process(process.pid).children(recursive=True)
        assert bool(children) == (kind == "torchserve")
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
        assert not psutil.wait_procs(children, timeout=10)[1]
        assert "Traceback" not in log.read_text() and not [path for path in tmp_path.iterdir() if path.is_dir()]


def serves(kind: str, ports: dict[str, int], name: str = "fastunet") -> bool:
    return is_healthy(ports["port"]) and (kind == "uvicorn" or is_ready(ports["management_port"], name=name))


@pytest.mark.parametrize("seconds", [0, 2], ids=["at a worker's birth", "while it imports torch"])
def test_nothing_outlives_a_killed_parent(model_store, tmp_path, seconds):
    def has_worker(p: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return any("--sock-name" in child.cmdline() for child in p.children(recursive=True))

    with foreground(model_store, tmp_path, **ONE_WORKER) as (process, _):
        parent = psutil.Process(process.pid)
        wait_for(lambda: has_worker(parent))
        time.sleep(seconds)
        children = parent.children(recursive=True)
        process.kill()
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive


ELSEWHERE = "--metrics-host=127.0.0.2"  # an address of this machine that nothing listens on by default


def metrics_are_elsewhere(ports: dict[str, int]) -> bool:
    there, here = (f"http://{host}:{ports['metrics_port']}/metrics" for host in ("127.0.0.2", "127.0.0.1"))
    return answers(there) and not answers(here)


MESSY = {  # what a shell, an image or a service may have set
    "LC_ALL": "C",
    "TS_CONFIG_FILE": "/not/there",
    "TS_ENABLE_MODEL_API": "true",
    "TS_METRICS_ADDRESS": "http://0.0.0.0:1",
    "LOG_LOCATION": "/not/there",
    "TEMP": "/not/there",
    "JAVA_TOOL_OPTIONS": "-Xmx1k",
}


def test_on_ai_platform_the_port_opens_when_an_answer_can_be_given(kind, model_store, tmp_path, photo, predict):
    store = tmp_path / "Jürgen Müller" / "модель"
    store.mkdir(parents=True)
    os.link(model_store / "fastunet.mar", store / "fastunet.mar")
    model = "/v1/endpoints/1/deployedModels/2"  # as the service names it where the upload names nothing
    routes = {"AIP_PREDICT_ROUTE": f"{model}:predict", "AIP_HEALTH_ROUTE": model}
    settings = {"AIP_HTTP_PORT": "1", "SERVER": kind} | MESSY | routes
    with foreground(store, tmp_path, "--host=127.0.0.1", **settings) as (process, ports):
        url = f"http://127.0.0.1:{ports['port']}"
        wait_for(lambda: answers(f"{url}/ping"))
        assert serves(kind, ports)
        assert check(ports, tmp_path, **settings) == 0  # knowing neither the archive nor its name
        assert answers(url + model) and not answers(f"{url}/v1")
        for route in (f"{model}:predict", PREDICT):
            answer = httpx.post(url + route, content=photo, headers={"accept": "image/png"}, timeout=60)
            assert np.array_equal(np.array(picture(answer.content)), predict(photo))
        if kind == "torchserve":
            management = f"http://127.0.0.1:{ports['management_port']}/models"
            assert httpx.post(management, params={"url": "fastunet.mar"}).status_code == 405
        body = {"instances": [{"b64": b64(photo)}] * 8}
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(httpx.post, url + PREDICT, json=body, timeout=60)
            wait_for(lambda: count(metrics(ports), "ts_inference_requests_total") == 3)
            process.terminate()
            masks = [mask_of(p) for p in sent.result().json()["predictions"]]
        assert len(masks) == 8 and all(np.array_equal(mask, predict(photo)) for mask in masks)
        assert process.wait(60) == 0


def test_tokens_of_uvicorn(model_store, tmp_path, photo):
    with foreground(model_store, tmp_path, "--auth", ELSEWHERE, SERVER="uvicorn") as (process, ports):
        url = f"http://127.0.0.1:{ports['port']}"
        wait_for(lambda: answers(f"{url}/ping"))
        assert metrics_are_elsewhere(ports)  # and need no token
        assert not psutil.Process(process.pid).children()  # nothing that could outlive it
        key_file = tmp_path / "key_file.json"
        assert key_file.stat().st_mode & 0o777 == 0o600
        key = json.loads(key_file.read_text())["inference"]["key"]
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": key}):
            answer = httpx.post(url + PREDICT, content=photo, headers=headers)
            assert answer.status_code == 401 and set(answer.json()) == {"code", "type", "message"}
        good = {"Authorization": f"Bearer {key}"}
        assert httpx.post(url + PREDICT, content=photo, headers=good, timeout=60).status_code == 200
        assert key not in (tmp_path / "server.log").read_text()


def test_tokens_local_models_only_and_no_worker_outlives_java(model_store, tmp_path, photo):
    """One server for three questions: tokens, a model API that the environment cannot switch on, and a killed Java."""
    settings = {"TS_ENABLE_MODEL_API": "true", "TMPDIR": str(tmp_path)} | ONE_WORKER
    with foreground(model_store, tmp_path, "--auth", ELSEWHERE, **settings) as (process, ports):
        wait_for(lambda: is_open("127.0.0.1", ports["port"]))
        key_file = tmp_path / "key_file.json"
        assert key_file.stat().st_mode & 0o777 == 0o600
        written = key_file.read_text()
        keys = {name: key.get("key") for name, key in json.loads(written).items()}
        url = f"http://127.0.0.1:{ports['port']}{PREDICT}"
        management = f"http://127.0.0.1:{ports['management_port']}/models"
        with_key = {name: {"Authorization": f"Bearer {key}"} for name, key in keys.items()}
        # TorchServe 0.12 says 400, with the type InvalidKeyException, where one expects 401.
        for headers in ({}, {"Authorization": "Bearer no"}, with_key["management"]):
            answer = httpx.post(url, content=photo, headers=headers)
            assert answer.status_code == 400 and answer.json()["type"] == "InvalidKeyException"
        assert httpx.post(url, content=photo, headers=with_key["inference"], timeout=60).status_code == 200
        assert httpx.get(management).status_code == 400
        assert httpx.get(management, headers=with_key["management"]).status_code == 200
        assert metrics_are_elsewhere(ports)
        assert not any(key in (tmp_path / "server.log").read_text() for key in keys.values())

        other = tmp_path / "other.mar"
        other.write_bytes((model_store / "fastunet.mar").read_bytes())
        (remote,) = free_ports(1)
        for source in (other.as_uri(), str(other), "../other.mar", f"http://127.0.0.1:{remote}/other.mar"):
            answer = httpx.post(
                management, params={"url": source, "model_name": "other"}, headers=with_key["management"], timeout=60
            )
            assert 400 <= answer.status_code < 500, (source, answer.text)
        models = httpx.get(management, headers=with_key["management"]).json()["models"]
        assert [model["modelName"] for model in models] == ["fastunet"]

        # TorchServe refuses a key that has expired as it refuses a wrong one.
        key_file.write_text(json.dumps(json.loads(key_file.read_text()) | {"management": {"key": "no longer"}}))
        assert check(ports, tmp_path) == 0
        renewed = json.loads(key_file.read_text())
        assert {**renewed, "management": None} == {**json.loads(written), "management": None}
        assert renewed["management"]["key"] not in ("no longer", keys["management"])
        assert key_file.stat().st_mode & 0o777 == 0o600

        java = psutil.Process(process.pid).children()[0]
        workers = java.children()
        assert workers
        java.kill()
        _, alive = psutil.wait_procs(workers, timeout=45)
        assert not alive and process.wait(10) != 0
        assert not [path for path in tmp_path.iterdir() if path.is_dir()]  # nothing is left of the unpacked archive


def test_a_port_that_is_taken_is_named(model_store, server, ports):
    command = [sys.executable, "-m", "deployment.serve", "--model-store", str(model_store), f"--port={ports['port']}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and re.search(rf"error: port {ports['port']} .* is taken", result.stderr)


@pytest.mark.parametrize("taken", ["port", "metrics_port"])
def test_a_port_that_is_taken_while_the_model_loads_is_named(model_store, tmp_path, taken):
    log = tmp_path / "server.log"
    with foreground(model_store, tmp_path, "--server=uvicorn") as (process, ports):
        wait_for(lambda: "starting" in log.read_text())
        with reserve_port("127.0.0.1", ports[taken]) as other:
            other.listen()
            assert process.wait(120) == 1
    assert log.read_text().splitlines()[-1].startswith(f"error: port {ports[taken]} on 127.0.0.1 is taken: ")


def test_the_front_s_port_that_is_taken_is_named():
    with reserve_port("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with reserve_port("127.0.0.1", port) as second:
            first.listen()
            with pytest.raises(OSError, match=f"port {port} on 127.0.0.1 is taken"):
                open_front(second, free_ports(1)[0], {})


@pytest.mark.parametrize("host", ["::1", "203.0.113.7", "localhost.invalid"])
def test_an_address_that_is_not_this_machine_s_is_no_port_that_is_taken(host):
    with pytest.raises(OSError, match=f"cannot listen on {host}, port 8080 .* choose an IPv4 address"):
        reserve_port(host, 8080)


def test_ports_that_cannot_be_are_refused_at_the_start(tmp_path):
    for server, arguments in (("torchserve", ["--port=8081"]), ("uvicorn", ["--metrics-port=8080"])):
        message = serve_error(tmp_path, *arguments, SERVER=server)
        assert f"error: port {arguments[0][-4:]} is asked for twice: " in message
    for port in ("80800", "0", "http"):
        command = [sys.executable, "-m", "deployment.serve", "--port", port]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 2 and result.stderr.endswith(f"--port: {port} is no port: give 1 to 65535\n")


def test_answers_do_not_wait_for_acknowledgments():
    """asyncio sets TCP_NODELAY on a socket whose protocol is named alone; without it small answers take 40 ms more."""

    async def accepted() -> int:
        delays = asyncio.Queue()

        async def connected(reader, writer):
            await delays.put(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        reserved = reserve_port("127.0.0.1", 0)
        async with await asyncio.start_server(connected, sock=reserved):
            await asyncio.open_connection(*reserved.getsockname())
            return await delays.get()

    assert asyncio.run(accepted()) == 1


def serve_error(folder: Path, *arguments: str, **environment: str) -> str:
    """What `python -m deployment.serve` says, in one line, where it cannot start."""
    command = [sys.executable, "-m", "deployment.serve", "--model-store", str(folder), *arguments]
    env = os.environ | environment
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    return result.stderr


def test_says_in_one_line_why_it_cannot_start(tmp_path):
    assert "error: SERVER=Uvicorn: choose torchserve or uvicorn" in serve_error(tmp_path, SERVER="Uvicorn")
    assert "no archive fastunet.mar" in serve_error(tmp_path)
    typo = tmp_path.with_name(f"{tmp_path.name}_")
    assert f"there is no folder {typo}: did you mean {tmp_path.name}?" in serve_error(typo)
    for name in ("street", "field"):
        (tmp_path / f"{name}.mar").touch()
    assert "there are field.mar, street.mar: choose with --name" in serve_error(tmp_path)
    assert "is not a zip file" in serve_error(tmp_path, "--name=street", "--server=uvicorn")
    assert "is not a zip file" in serve_error(tmp_path, "--name=street")
    zipfile.ZipFile(tmp_path / "street.mar", "w").close()
    assert "must not be negative" in serve_error(tmp_path, "--name=street", TS_DEFAULT_WORKERS_PER_MODEL="-1")
    assert "error: JAVA_HOME is /not/there, " in serve_error(tmp_path, "--name=street", JAVA_HOME="/not/there")
    assert "finds no GPU it can use" in serve_error(tmp_path, "--name=street", "--require-gpu", CUDA_VISIBLE_DEVICES="")
    with zipfile.ZipFile(tmp_path / "street.mar", "w") as archive:
        for name in ("fastunet.xml", "fastunet.bin"):
            archive.writestr(name, "")
    assert "OpenVINO, which computes on the CPU" in serve_error(tmp_path, "--name=street", REQUIRE_GPU="1")


def test_what_is_left_in_the_environment_has_no_effect_on_torchserve(tmp_path, monkeypatch):
    zipfile.ZipFile(tmp_path / "fastunet.mar", "w").close()
    for name, value in (MESSY | {"TS_JOB_QUEUE_SIZE": "7", "TS_MANAGEMENT_ADDRESS": "http://0.0.0.0:1"}).items():
        monkeypatch.setenv(name, value)
    ports = dict(zip(("port", "management_port", "metrics_port"), free_ports(3), strict=True))
    _, env = command(tmp_path, **ports)
    assert not {"TS_CONFIG_FILE", "TS_ENABLE_MODEL_API", "LOG_LOCATION", "TEMP", "JAVA_TOOL_OPTIONS"} & set(env)
    assert (
        env["TS_MANAGEMENT_ADDRESS"].startswith("http://127.0.0.1:")
        and env["TS_METRICS_ADDRESS"] != MESSY["TS_METRICS_ADDRESS"]
    )
    assert (env["LC_ALL"], env["TS_JOB_QUEUE_SIZE"]) == ("C.UTF-8", "7")
    assert {"TS_CONFIG_FILE", "TEMP"} <= set(ignored_variables()) and "TS_JOB_QUEUE_SIZE" not in ignored_variables()


def test_requests_to_the_paths_that_a_service_names_are_rerouted():
    routes = {"/v1/a:predict": "/predictions/a"}
    assert (
        rerouted(b"POST /v1/a:predict HTTP/1.1\r\n", routes) == b"POST /predictions/a HTTP/1.1\r\nConnection: close\r\n"
    )
    assert rerouted(b"POST /v1/a:predict?a=b HTTP/1.1\r\n", routes).startswith(b"POST /predictions/a?a=b HTTP")
    for line in (b"GET /ping HTTP/1.1\r\n", b"GET\r\n", b"\xff\xff \xff x\r\n", b"a b c d\r\n"):
        assert rerouted(line, routes) == line + b"Connection: close\r\n"


def test_a_refusal_says_when_to_come_again():
    refused = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}"
    assert told_to_wait(refused) == refused.replace(b"\r\n", b"\r\nRetry-After: 1\r\n", 1)
    own = refused.replace(b"\r\n", b"\r\nRetry-After: 5\r\n", 1)
    for as_it_is in (own, b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 503 ", b"\x89PNG\r\n", b""):
        assert told_to_wait(as_it_is) == as_it_is


def test_clients_that_do_not_wait_for_their_answer_leave_nothing_in_the_log(caplog):
    public, silent = reserve_port("127.0.0.1", 0), socket.create_server(("127.0.0.1", 0))
    open_front(public, silent.getsockname()[1], {})
    held = []
    for _ in range(10):
        with socket.create_connection(public.getsockname()) as client:
            client.sendall(b"POST / HTTP/1.1\r\n\r\n")
            held.append(silent.accept()[0])
            assert held[-1].recv(100).startswith(b"POST")
    for server_side in held:  # the front has passed on that the client is gone
        assert server_side.recv(100) == b""
    gc.collect()
    for server_side in held:
        server_side.close()
    assert not caplog.records


def test_in_a_container_a_full_queue_refuses_with_a_time_to_come_again(model_store, tmp_path, photo):
    settings = {"AIP_HTTP_PORT": "1", "SERVER": "torchserve", "TS_JOB_QUEUE_SIZE": "1"} | ONE_WORKER
    with foreground(model_store, tmp_path, "--host=127.0.0.1", **settings) as (_, ports):
        url = f"http://127.0.0.1:{ports['port']}"
        wait_for(lambda: answers(f"{url}/ping"))
        body = {"instances": [{"b64": b64(photo)}] * 64}
        with ThreadPoolExecutor(8) as pool:
            sent = list(pool.map(lambda _: httpx.post(url + PREDICT, json=body, timeout=60), range(8)))
    refused = [answer for answer in sent if answer.status_code == 503]
    assert refused and all(answer.headers["retry-after"] == "1" for answer in refused)
    assert {answer.status_code for answer in sent} == {200, 503}


def test_the_error_that_a_worker_ended_with():
    said = """\
2026-01-01T10:00:00,000 [INFO ] MODEL_LOG - Traceback (most recent call last):
2026-01-01T10:00:00,000 [INFO ] MODEL_LOG -   File "handler.py", line 1, in load
2026-01-01T10:00:00,000 [INFO ] MODEL_LOG -     read()
2026-01-01T10:00:00,000 [WARN ] ModelServer - Traceback of its own
2026-01-01T10:00:00,000 [INFO ] MODEL_LOG - FileNotFoundError: fastunet.pth
2026-01-01T10:00:00,000 [INFO ] MODEL_LOG - Frontend disconnected.
"""
    assert last_error(said.splitlines(keepends=True)) == "FileNotFoundError: fastunet.pth"
    assert "without saying why" in last_error(["nothing\n"])


def test_what_is_harmless_is_not_printed_and_errors_are(capfdbinary):
    errors = b"nvidia-smi: cannot open the driver\nWARNING: the heap is full\n"
    script = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"
    with printed(HARMLESS) as (output, said):
        said_by_java = b"\n".join([*HARMLESS, b""]) + errors
        subprocess.run([sys.executable, "-c", script], input=said_by_java, stdout=output, check=True)
    assert capfdbinary.readouterr().out == errors
    assert "".join(said).encode() == errors


@pytest.mark.soak
def test_torchserve_ends_with_the_error_of_workers_that_cannot_load_the_model(exported, tmp_path):
    shutil.copy(exported / "model-config.yaml", tmp_path)
    (tmp_path / "fastunet.pth").write_bytes(b"no weights")
    make_archive(tmp_path)
    with foreground(tmp_path, tmp_path, SERVER="torchserve", **ONE_WORKER) as (process, ports):
        assert process.wait(120) == 1
        last = (tmp_path / "server.log").read_text().splitlines()[-1]
    assert last.startswith("error: the model cannot be loaded: ") and "Error" in last


def test_the_only_archive_is_served_by_any_name(tmp_path):
    (tmp_path / "street.mar").touch()
    assert find_archive(tmp_path) == (tmp_path / "street.mar", "street")
    assert find_archive(tmp_path, "canary") == (tmp_path / "street.mar", "canary")
    (tmp_path / "fastunet.mar").touch()
    assert find_archive(tmp_path) == (tmp_path / "fastunet.mar", "fastunet")
    assert find_archive(tmp_path, "street") == (tmp_path / "street.mar", "street")


def test_the_tokens_that_uvicorn_left_do_not_disturb_torchserve(tmp_path):
    (tmp_path / "key_file.json").write_text('{"inference": {"key": "of uvicorn"}}')
    assert not is_ready(free_ports(1)[0], tmp_path)


def test_no_workers_are_as_many_as_by_default(monkeypatch):
    default = workers_and_threads()
    monkeypatch.setenv("TS_DEFAULT_WORKERS_PER_MODEL", "0")
    assert workers_and_threads() == default


def test_a_guard_that_cannot_start_leaves_no_server_behind(monkeypatch):
    begun, popen = [], subprocess.Popen

    def without_sh(argv, **options):
        if argv[0] == "sh":
            raise FileNotFoundError("sh")
        begun.append(popen(argv, **options))
        return begun[-1]

    monkeypatch.setattr(subprocess, "Popen", without_sh)
    with pytest.raises(FileNotFoundError, match="sh"), started(["sleep", "60"], dict(os.environ)):
        pass
    assert begun[0].poll() is not None


def test_tokens_go_to_no_folder_that_others_may_read(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = own_folder()
    assert own_folder() == folder and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    with pytest.raises(PermissionError, match="not this user's alone"):
        own_folder()


def test_tokens_go_where_the_user_may_write(model_store, tmp_path):
    """As in the image, where the working directory is not the user's."""
    (tmp_path / "read only").mkdir(mode=0o555)
    script = (
        "import os; access = os.access; os.access = lambda path, mode: path != '.' and access(path, mode); "
        "from deployment.serve import main; main()"
    )
    command = [sys.executable, "-c", script, "--model-store", str(model_store), "--auth"]
    command += [f"--{name}-port={port}" for name, port in zip(("management", "metrics"), free_ports(2), strict=True)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)} | ONE_WORKER
    process = subprocess.Popen(
        [*command, f"--port={free_ports(1)[0]}"], cwd=tmp_path / "read only", env=env, stdout=subprocess.PIPE, text=True
    )
    try:
        process.stdout.readline()
        key_file = Path(process.stdout.readline().removeprefix("tokens: ").strip())
        assert tmp_path in key_file.parents and (tmp_path / "read only") not in key_file.parents
        wait_for(key_file.exists)
        assert key_file.stat().st_mode & 0o777 == 0o600
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.parametrize("kind", ["torchserve"], indirect=True)
def test_a_killed_worker_costs_only_its_own_requests(server, ports, photo, predict):
    expected = predict(photo)
    workers = {worker["pid"] for worker in model_status(ports["management_port"])["workers"]}
    killed = None
    answers = []  # when, status, right

    def ask(_: int) -> None:
        until = time.monotonic() + 8
        with httpx.Client(base_url=server, timeout=60) as own:
            while time.monotonic() < until:
                answer = own.post(PREDICT, content=photo)
                right = answer.status_code == 200 and np.array_equal(mask_of(answer.json()), expected)
                answers.append((time.monotonic(), answer.status_code, right))

    with ThreadPoolExecutor(8) as pool:
        running = pool.map(ask, range(8))
        time.sleep(2)
        killed = time.monotonic()
        os.kill(min(workers), signal.SIGKILL)
        list(running)
    failed = [a for a in answers if a[1] != 200]
    good = [a for a in answers if a[1] == 200]
    assert all(right for _, _, right in good) and all(a[1] >= 500 for a in failed)
    assert len(failed) <= 8  # at most what was in flight
    after = min(when for when, _, _ in good if when > killed) - killed
    print(
        f"\nSIGKILL of a worker: {len(good)} good answers, {len(failed)} failed, the next good one after {after:.1f} s"
    )
    assert after < 15
    wait_for(
        lambda: [w["status"] for w in model_status(ports["management_port"])["workers"]] == ["READY"] * len(workers)
    )
    assert {worker["pid"] for worker in model_status(ports["management_port"])["workers"]} != workers
