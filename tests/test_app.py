"""What `deployment.server.app` does and TorchServe does not: limits, clients that have gone, description and page."""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import http.client
import http.server
import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import anyio
import httpx
import jsonschema
import numpy as np
import prometheus_client
import pytest
import uvicorn
import yaml
from conftest import ROOT, SMALL, draw_photo, encoded
from starlette.requests import Request
from starlette.testclient import TestClient

from deployment import protocol
from deployment.answers import make_answer, palette
from deployment.handler import Handler
from deployment.photos import Preprocessor
from deployment.protocol import Rejected
from deployment.runtime import cores
from deployment.server import app, connection, forms
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
    config = uvicorn.Config(
        app.application(handler, "small"), http=connection.Connection, ws="none", lifespan="off", log_config=None
    )
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
            client = http.client.HTTPConnection(host, int(port))
            client.request("POST", PREDICT, PHOTO)
            gone.append(client)
        wait_for(lambda: sample("ts_inference_requests_total") == let_in + at_once + 5)
        for client in gone:
            client.close()
        time.sleep(0.2)
        handler.open.set()
        assert all(future.result().status_code == 200 for future in first)
    assert httpx.post(url + PREDICT, content=PHOTO).status_code == 200
    assert sample("batch_requests_sum") == computed + at_once + 1


def test_a_small_image_does_not_wait_for_large_ones(url, handler, monkeypatch):
    monkeypatch.setattr(app, "QUICK_PIXELS", 10_000)
    decode, go = handler.decode_item, threading.Event()

    def decode_slowly(item, job):
        assert item.counted < 10_000 or go.wait(30)
        decode(item, job)

    monkeypatch.setattr(handler, "decode_item", decode_slowly)
    let_in, large = sample("ts_inference_requests_total"), encoded(draw_photo(5, (200, 150)))
    n = 4 * cores()
    with ThreadPoolExecutor(n) as pool:
        sent = [pool.submit(httpx.post, url + PREDICT, content=large, timeout=60) for _ in range(n)]
        wait_for(lambda: sample("ts_inference_requests_total") == let_in + n)
        assert httpx.post(url + PREDICT, content=PHOTO, timeout=20).status_code == 200
        go.set()
        assert [future.result().status_code for future in sent] == [200] * n


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


def slow_request(url: str, head: str) -> socket.socket:
    """A connection that has sent `head` and nothing more."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(head.encode())
    return connection


SLOW = f"POST {PREDICT} HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nx"


def test_clients_that_trickle_take_nobody_s_place(url):
    slow = [slow_request(url, SLOW) for _ in range(app.MAX_REQUESTS + 5)]
    try:
        for _ in range(3):
            for connection in slow:
                connection.sendall(b"x")
            assert httpx.post(url + PREDICT, content=PHOTO).status_code == 200
    finally:
        for connection in slow:
            connection.close()


def test_more_that_arrive_at_one_time_than_may(url, monkeypatch):
    monkeypatch.setattr(app, "MAX_ARRIVING", 1)
    with slow_request(url, SLOW):
        wait_for(lambda: httpx.post(url + PREDICT, content=PHOTO).status_code == 503)
    wait_for(lambda: httpx.post(url + PREDICT, content=PHOTO).status_code == 200)


def test_a_request_slower_than_the_slowest_is_cut_off(url, monkeypatch):
    monkeypatch.setattr(forms, "SLOW_SECONDS", 0.2)
    with slow_request(url, SLOW) as connection:
        answer = connection.recv(1000)
        assert answer.startswith(b"HTTP/1.1 408") and b"10000 bytes a second" in answer


def test_headers_that_do_not_arrive_end_the_connection(url, monkeypatch):
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.3)
    for head in ("", "POST", f"POST {PREDICT} HTTP/1.1\r\nHost: "):
        with slow_request(url, head) as silent, pytest.raises(ConnectionError):
            assert silent.recv(10) == b""
            raise ConnectionError  # closed, which is as good as reset
    with slow_request(url, "GET /ping HTTP/1.1\r\nHost: a\r\n\r\n") as kept:
        assert kept.recv(10_000).startswith(b"HTTP/1.1 200")
        time.sleep(0.5)  # an idle connection is no slow one
        kept.sendall(b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n")
        assert kept.recv(10_000).startswith(b"HTTP/1.1 200")


def test_an_answer_that_is_not_taken_ends_the_connection(url, handler, monkeypatch):
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.2)
    large = protocol.Response(200, "application/json", bytes(30_000_000))
    monkeypatch.setattr(handler, "postprocess", lambda job: large)
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(PHOTO)}\r\n\r\n"
    with slow_request(url, head) as deaf:
        deaf.sendall(PHOTO)
        wait_for(lambda: connection.Connection.unsent > 10_000_000)
        assert forms.Bodies(0).has_room(0) and not forms.Bodies(0).has_room(30_000_000)
        wait_for(lambda: connection.Connection.unsent == 0)
        received = 0
        with contextlib.suppress(ConnectionError):
            while data := deaf.recv(2**20):
                received += len(data)
    assert received < 30_000_000
    assert len(httpx.post(url + PREDICT, content=PHOTO).content) == 30_000_000  # who takes it gets it


def test_bodies_wait_until_there_is_room_for_them(monkeypatch):
    monkeypatch.setattr(forms, "MAX_BYTES", 100)
    monkeypatch.setattr(forms, "ROOM_SECONDS", 0.1)

    async def arrive(bodies: forms.Bodies, size: int, seconds: float) -> bytes | int:
        async def receive():
            return {"type": "http.request", "body": bytes(size)}

        try:
            async with bodies.read(Request({"type": "http", "headers": []}, receive)) as body:
                await anyio.sleep(seconds)
                return body
        except Rejected as error:
            return error.status

    async def together(*seconds: float) -> list:
        bodies = forms.Bodies(0)
        answers = await asyncio.gather(*(arrive(bodies, 80, s) for s in seconds))
        assert bodies.used == 0 and bodies.limit == 200
        return answers

    assert asyncio.run(together(0.05, 0.05, 0)) == [bytes(80)] * 3
    assert asyncio.run(together(0.5, 0.5, 0)) == [bytes(80), bytes(80), 503]
    assert asyncio.run(arrive(forms.Bodies(0), 101, 0)) == 413


def test_bodies_that_are_here_in_part_do_not_wait_for_each_other(monkeypatch):
    """Each sends two chunks, and the first chunks would fill the room; a small body comes in between."""
    monkeypatch.setattr(forms, "MAX_BYTES", 100)
    monkeypatch.setattr(forms, "SMALL_BODY", 20)
    bodies, here = forms.Bodies(400), []

    async def arrive(name: str, small_is_here: anyio.Event, *chunks: int) -> None:
        left = list(chunks)

        async def receive():
            await anyio.sleep(0)
            return {"type": "http.request", "body": bytes(left.pop(0)), "more_body": bool(left)}

        headers = [(b"content-length", str(sum(chunks)).encode())]
        async with bodies.read(Request({"type": "http", "headers": headers}, receive)):
            here.append(name)
            if name == "small":
                small_is_here.set()
            await small_is_here.wait()

    async def together() -> None:
        small_is_here = anyio.Event()
        async with anyio.create_task_group() as group:
            for _ in range(12):
                group.start_soon(arrive, "large", small_is_here, 50, 50)
            while bodies.used < 350:  # all of it, but for what is left to small ones
                await anyio.sleep(0.001)
            group.start_soon(arrive, "small", small_is_here, 20)

    asyncio.run(together())
    assert bodies.used == 0 and not bodies.line
    assert here.count("large") == 12 and "small" in here[:4]


def test_a_request_that_takes_too_long_to_arrive(url, monkeypatch):
    monkeypatch.setattr(forms, "READ_SECONDS", 0.3)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(f"POST {PREDICT} HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nslow".encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 408")


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


def part(name: str, content: bytes = b"") -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + content + b"\r\n"


@pytest.mark.parametrize(
    "body, message",
    [
        (part("data", b"a") + part("data", b"b"), "the field `data` came more than once: send several images as JSON"),
        (part("data", b"a") + part("top", b"1") + part("top", b"1"), "the field `top` came more than once"),
        (part("data", b"a") + part("x7f") + part("x7f"), "a field came more than once"),
        (part("data", b"a") + part("x") * 80_000, "more than 16 fields in a form"),
        (b"".join(part(f"x{i}") for i in range(17)), "more than 16 fields in a form"),
    ],
    ids=lambda value: str(value)[-20:],
)
def test_forms_are_bounded_before_they_are_read(body, message):
    began = time.process_time()
    with pytest.raises(Rejected) as error:
        forms.read_fields(body + b"--b--\r\n", "multipart/form-data; boundary=b")
    assert error.value.status == 400 and error.value.message == message
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    "body",
    [
        b"--b" * 6_000_000,
        b"\r\n" * 9_000_000,
        part("data", b"\r\n--a" * 3_000_000),
        part("data", b"\r" * 18_000_000),
        part("data", b"\r\n" * 9_000_000),
        part("data", b"a") + b"--b--\r\n" + b"\n" * 18_000_000,
    ],
    ids=lambda value: str(value)[-20:],
)
def test_no_form_takes_longer_to_read_than_an_image_to_decode(body):
    began = time.process_time()
    with contextlib.suppress(Rejected):
        forms.read_fields(body + b"--b--\r\n", "multipart/form-data; boundary=b")
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "fields", [{"format": "png"}, {"size": "original"}, {"top": "2"}, {"format": "png", "size": "original"}]
)
def test_options_in_the_address(url, fields):
    expected = httpx.post(url + PREDICT, files={"data": PHOTO}, data=fields)
    for request in ({"content": PHOTO}, {"files": {"data": PHOTO}}):
        answer = httpx.post(url + PREDICT, params=fields, **request)
        assert (answer.status_code, answer.content) == (200, expected.content)
    instances = {"instances": [{"b64": base64.b64encode(PHOTO).decode()}]}
    [answer] = httpx.post(url + PREDICT, params=fields, json=instances).json()["predictions"]
    [same] = httpx.post(url + PREDICT, json=instances | {"parameters": fields}).json()["predictions"]
    assert answer == same


@pytest.mark.parametrize(
    "query", ["format=gif", "top=0", "top=a", "size=", "topp=1", "top=1&top=1", "a%ff=1&b", "data=x"]
)
def test_an_address_that_cannot_be_read(url, query):
    answer = httpx.post(f"{url}{PREDICT}?{query}", content=PHOTO)
    assert answer.status_code == 400 and set(answer.json()) == {"code", "type", "message"}
    assert httpx.post(f"{url}{PREDICT}?format=png", files={"data": PHOTO}, data={"format": "png"}).status_code == 400


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
    legend = description.pop("x-legend")
    assert [entry["name"] for entry in legend] == SMALL.classes
    assert [bytes.fromhex(entry["color"][1:]) for entry in legend] == [bytes(c) for c in palette(SMALL.classes)]
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


@pytest.mark.parametrize("name", ["model #1", "a: b", "@a", "7", "null"])
def test_the_description_takes_any_name(handler, name):
    client = TestClient(app.application(handler, name))
    description = client.get("/openapi.json").json()
    assert description["info"]["title"] == name
    path = next(path for path in description["paths"] if path.startswith("/predictions/"))
    assert client.post(path, content=PHOTO).status_code == 200  # as the page asks
    assert client.get(f"/v2/models/{quote(name)}").status_code == 200
    assert f"/v2/models/{quote(name)}" in description["paths"]


def test_faults_of_our_own_are_logged_with_their_stack(url, handler, monkeypatch, caplog):
    monkeypatch.setattr(Held, "inference", lambda self, items: 1 / 0)
    answer = httpx.post(url + PREDICT, content=PHOTO)
    assert answer.status_code == 500 and "division" not in answer.text
    [record] = [r for r in caplog.records if answer.headers["x-request-id"] in r.getMessage()]
    assert record.exc_info[0] is ZeroDivisionError


def test_ping_fails_and_the_process_ends_once_the_model_fails_on_every_image(small_store, monkeypatch):
    handler = Handler()
    handler.load(small_store)
    server, ended = app.Application(handler, "small"), []
    server.end = lambda: ended.append(True)
    compute = handler.model.compute
    with TestClient(server.starlette()) as client:

        def statuses(times: int) -> list[int]:
            return [client.post(PREDICT, content=PHOTO).status_code for _ in range(times)]

        def fails(batch, alone, on_blank: bool = True):
            if on_blank or batch.any():
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return compute(batch, alone)

        monkeypatch.setattr(handler.model, "compute", functools.partial(fails, on_blank=False))
        assert statuses(11) == [500] * 11  # it is the images that it fails on
        assert client.get("/ping").status_code == 200 and not ended
        monkeypatch.setattr(handler.model, "compute", compute)
        assert statuses(1) == [200]

        monkeypatch.setattr(handler.model, "compute", fails)
        assert statuses(4) == [500] * 4 and client.get("/ping").status_code == 200
        assert statuses(1) == [500] and client.get("/ping").status_code == 503 and ended


def test_the_routes_that_a_service_names_are_answered_too(handler, monkeypatch):
    monkeypatch.setenv("AIP_PREDICT_ROUTE", "/v1/models/2:predict")
    monkeypatch.setenv("AIP_HEALTH_ROUTE", "/")
    with TestClient(app.application(handler, "small")) as client:
        assert client.get("/").json() == {"status": "Healthy"}
        for route in ("/v1/models/2:predict", PREDICT):
            assert client.post(route, content=PHOTO).status_code == 200
    monkeypatch.setenv("AIP_PREDICT_ROUTE", "no path {x}")
    with TestClient(app.application(handler, "small")) as client:
        assert client.post(PREDICT, content=PHOTO).status_code == 200


# --- traces ---


class Collector(http.server.BaseHTTPRequestHandler):
    """An OTLP receiver: `received` has the bodies that were sent to /v1/traces."""

    received: list[bytes] = []

    def do_POST(self):
        assert self.path == "/v1/traces"
        self.received.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass


def test_spans_of_the_three_steps_go_to_a_collector(handler, monkeypatch):
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    collector = http.server.HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = app.Application(handler, "small")
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with TestClient(server.starlette()) as client:
        client.post(PREDICT, content=PHOTO, headers={"traceparent": f"00-{trace}-{parent}-01"})
    server.tracer.span_processor.force_flush()
    collector.shutdown()
    collector.server_close()
    exported = ExportTraceServiceRequest.FromString(Collector.received[-1])
    spans = [s for r in exported.resource_spans for scope in r.scope_spans for s in scope.spans]
    steps, [request] = [s for s in spans if s.name != "predict small"], [s for s in spans if s.name == "predict small"]
    assert [s.name for s in steps] == ["preprocess", "inference", "postprocess"]
    assert {s.trace_id.hex() for s in spans} == {trace} and request.parent_span_id.hex() == parent
    assert {s.parent_span_id for s in steps} == {request.span_id}
    edges = [edge for s in steps for edge in (s.start_time_unix_nano, s.end_time_unix_nano)]
    assert edges == sorted(edges) and request.start_time_unix_nano <= edges[0]
    assert edges[-1] <= request.end_time_unix_nano + 1e6


def test_there_are_no_traces_where_nobody_collects_them(handler, monkeypatch, caplog):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert app.Application(handler, "small").tracer is None and not caplog.records
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)  # not installed
    assert app.Application(handler, "small").tracer is None
    assert "pip install opentelemetry-sdk" in caplog.text


# --- the description ---


def problems(description: dict, name: str, content: dict) -> list[str]:
    """What keeps `content` from being what the schema `name` of the description says, fields without one included."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": description["components"]}
    errors = [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(content)]
    parts = description["components"]["schemas"][name]
    known = set().union(*(part["properties"] for part in parts.get("oneOf", [parts])))
    return errors + [f"no field {field}" for field in content.keys() - known]


def test_real_answers_are_as_the_description_says(url):
    description = httpx.get(f"{url}/openapi.json").json()
    b64 = base64.b64encode(PHOTO).decode()
    for format in protocol.MEDIA_TYPES:
        body = {"instances": [{"b64": b64}, {"b64": "no"}], "parameters": {"format": format}}
        answer = httpx.post(url + PREDICT, json=body).json()
        assert problems(description, "Predictions", answer) == []
        assert problems(description, "Answer", answer["predictions"][0]) == []
    assert problems(description, "Answer", httpx.post(url + PREDICT, content=PHOTO).json()) == []
    for bad in ({"content": b"no photo"}, {"json": {"instances": [{"b64": "no"}]}}, {"json": []}):
        answer = httpx.post(url + PREDICT, **bad)
        assert str(answer.status_code) in description["paths"][PREDICT]["post"]["responses"]
        assert problems(description, "Error", answer.json()) == []
    assert problems(description, "Answer", {"label": "cat"}) and problems(description, "Error", {"code": "400"})


@pytest.mark.parametrize("task", ["classification", "multi-label", "regression", "points"])
def test_answers_of_other_tasks_are_as_the_description_says(url, task):
    description = httpx.get(f"{url}/openapi.json").json()
    config = dataclasses.replace(SMALL, task=task, classes=["cat", "dog"], threshold=0.5)
    answer = make_answer(np.float32([0.25, 0.75]), Preprocessor(config), protocol.Request([], top=1), (90, 60))
    assert problems(description, "Answer", answer) == []
