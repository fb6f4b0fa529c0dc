"""What `deployment.server.app` does and TorchServe does not: limits, clients that have gone, description and page."""

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import prometheus_client
import pytest
import uvicorn
import yaml
from conftest import ROOT, draw_photo, encoded

from deployment.handler import Handler
from deployment.runtime import cores
from deployment.server import app, forms
from deployment.server.processes import reserve_port

PREDICT = "/predictions/small"
PHOTO = encoded(draw_photo(5, (90, 60)))


class Held(Handler):
    """The handler, which computes only while `open` is set: what waits for it can be arranged."""

    def load(self, folder) -> None:
        super().load(folder)
        self.open = threading.Event()
        self.open.set()

    def inference(self, items) -> None:
        assert self.open.wait(30)
        super().inference(items)


@pytest.fixture(scope="module")
def handler(small_store):
    handler = Held()
    handler.load(small_store)
    return handler


@pytest.fixture(scope="module")
def url(handler):
    public = reserve_port("127.0.0.1", 0)
    config = uvicorn.Config(app.application(handler, "small"), http="h11", ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [public]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{public.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def sample(name: str, **labels: str) -> float:
    return prometheus_client.REGISTRY.get_sample_value(name, {"ModelName": "small", "Level": "Model", **labels}) or 0


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def test_one_request_too_many_is_told_to_come_again(url, handler, monkeypatch):
    monkeypatch.setattr(app, "MAX_REQUESTS", 3)
    handler.open.clear()
    let_in = sample("ts_inference_requests_total")
    with ThreadPoolExecutor(3) as pool:
        sent = [pool.submit(httpx.post, url + PREDICT, content=PHOTO, timeout=60) for _ in range(3)]
        wait_for(lambda: sample("ts_inference_requests_total") == let_in + 3)
        answer = httpx.post(url + PREDICT, content=PHOTO)
        handler.open.set()
        assert [future.result().status_code for future in sent] == [200] * 3
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1" and answer.json()["code"] == 503
    assert httpx.post(url + PREDICT, content=PHOTO).status_code == 200


def test_nothing_is_computed_for_clients_that_have_gone(url, handler, monkeypatch):
    handler.open.clear()
    at_once, let_in, computed = 2 * cores(), sample("ts_inference_requests_total"), sample("batch_requests_sum")
    host, port = url.removeprefix("http://").split(":")
    with ThreadPoolExecutor(at_once) as pool:
        first = [pool.submit(httpx.post, url + PREDICT, content=PHOTO, timeout=60) for _ in range(at_once)]
        wait_for(lambda: sample("ts_inference_requests_total") == let_in + at_once)
        gone = []
        for _ in range(5):  # they wait for their turn
            connection = http.client.HTTPConnection(host, int(port))
            connection.request("POST", PREDICT, PHOTO)
            gone.append(connection)
        wait_for(lambda: sample("ts_inference_requests_total") == let_in + at_once + 5)
        for connection in gone:
            connection.close()
        time.sleep(0.2)
        handler.open.set()
        assert all(future.result().status_code == 200 for future in first)
    assert httpx.post(url + PREDICT, content=PHOTO).status_code == 200
    assert sample("batch_requests_sum") == computed + at_once + 1


def test_a_request_that_waits_too_long_is_told_to_come_again(url, handler, monkeypatch):
    monkeypatch.setattr(app, "WAIT_SECONDS", 0.2)
    handler.open.clear()
    at_once, let_in = 2 * cores(), sample("ts_inference_requests_total")
    with ThreadPoolExecutor(at_once) as pool:
        sent = [pool.submit(httpx.post, url + PREDICT, content=PHOTO, timeout=60) for _ in range(at_once)]
        wait_for(lambda: sample("ts_inference_requests_total") == let_in + at_once)
        answer = httpx.post(url + PREDICT, content=PHOTO)
        handler.open.set()
        assert [future.result().status_code for future in sent] == [200] * at_once
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"


def test_a_request_that_takes_too_long_to_arrive(url, monkeypatch):
    monkeypatch.setattr(forms, "READ_SECONDS", 0.3)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"POST {PREDICT} HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nslow".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_body_without_a_length_has_the_same_limit(url):
    answer = httpx.post(url + PREDICT, content=(bytes(2**20) for _ in range(21)))
    assert answer.status_code == 413 and answer.json()["type"] == "TooLarge"


@pytest.mark.parametrize(
    "body, content_type",
    [
        (b"x", "multipart/form-data"),
        (b"x", "multipart/form-data; boundary=b"),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n", "multipart/form-data; boundary=b"),
        (b"--b--\r\n", "multipart/mixed; boundary=b"),
        (b'--b\r\nContent-Disposition: form-data; name="data"\r\n\r\n', "multipart/form-data; boundary=b"),
        (b'--b\r\nContent-Disposition: form-data; name="\xff"\r\n\r\nx\r\n--b--', "multipart/form-data; boundary=\xe9"),
    ],
)
def test_forms_that_are_none(url, body, content_type, caplog):
    answer = httpx.post(url + PREDICT, content=body, headers={"content-type": content_type.encode("latin-1")})
    assert answer.status_code == 400 and set(answer.json()) == {"code", "type", "message"}


def test_a_large_form_stays_in_memory(url, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", None)
    photo = encoded(draw_photo(6, (1200, 900)))
    assert len(photo) > 2**20
    assert httpx.post(url + PREDICT, files={"data": photo}, timeout=60).status_code == 200


@pytest.mark.parametrize("rest, status", [("/", 200), ("/1.0", 200), ("/1.0/", 200), ("/2.0", 404), ("er", 404)])
def test_a_version_may_follow_the_name(url, rest, status):
    assert httpx.post(url + PREDICT + rest, content=PHOTO).status_code == status


def test_the_version_is_the_archive_s(tmp_path):
    assert app.version_of(tmp_path) == "1.0"
    (tmp_path / "MAR-INF").mkdir()
    (tmp_path / "MAR-INF" / "MANIFEST.json").write_text('{"model": {"modelName": "small", "modelVersion": "2.1"}}')
    assert app.version_of(tmp_path) == "2.1"


def test_description_and_page(url):
    description = httpx.get(f"{url}/openapi.json").json()
    written = (ROOT / "deployment" / "server" / "openapi.yaml").read_text()
    assert description == yaml.safe_load(written.replace("NAME", "small"))
    page = httpx.get(url)
    assert (
        page.status_code == 200 and "openapi.json" in page.text and "//" not in page.headers["content-security-policy"]
    )
    schemas = json.dumps(description)
    words = ("instances", "b64", "overlay", "original", "top", "names", "Retry-After")
    assert all(f'"{word}"' in schemas for word in words)
    references = [part.split('"')[0] for part in schemas.split('"$ref": "#/')[1:]]
    for reference in references:
        node = description
        for key in reference.split("/"):
            node = node[key]
    assert references and description["paths"][PREDICT]["post"]


def test_faults_of_our_own_are_logged_with_their_stack(url, handler, monkeypatch, caplog):
    monkeypatch.setattr(Held, "inference", lambda self, items: 1 / 0)
    answer = httpx.post(url + PREDICT, content=PHOTO)
    assert answer.status_code == 500 and "division" not in answer.text
    [record] = [r for r in caplog.records if answer.headers["x-request-id"] in r.getMessage()]
    assert record.exc_info[0] is ZeroDivisionError
