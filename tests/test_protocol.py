"""The HTTP contract without a server: how requests are read, what an error becomes, how answers are put together."""

import base64
import json
import tracemalloc
from http import HTTPStatus
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deployment import protocol
from deployment.answers import make_answer
from deployment.protocol import (
    Rejected,
    Request,
    read_accept,
    read_instance,
    read_options,
    read_request,
    rejection,
    respond,
)


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
    assert read_options({}, accept) == (format, "model", None)
    assert read_options({"format": b"png"}, accept) == ("png", "model", None)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("image/png;q=0.5, image/jpeg", ("overlay", False)),
        ("image/png;q=0.2, application/json;q=0.9", ("json", False)),
        ("image/png, application/json", ("png", True)),
        ("image/png, application/json;q=0", ("png", False)),
        ("image/png ; Q=0.8, */*;q=0.1", ("png", True)),
        ("image/*", ("png", True)),
        ("image/*, image/jpeg;q=0.1", ("png", True)),
        ("image/png", ("png", False)),
        ("application/*", ("json", False)),
        ("image/png;q=0", ("json", False)),
        ("image/jpeg;q=x, image/png;q=nan, a/b;;q=", ("overlay", False)),
        ("text/html", ("json", False)),
    ],
)
def test_accept_with_weights(accept, expected):
    assert read_accept(accept) == expected


@pytest.mark.parametrize(
    ("accept", "status"), [("image/png, application/json", 200), ("image/*", 200), ("image/png", 400)]
)
def test_a_classifier_answers_with_json_where_that_will_do(accept, status):
    preprocessor = SimpleNamespace(config=SimpleNamespace(task="classification", classes=["cat", "dog"]))
    request = read_request({"body": b"photo"}, accept)
    try:
        answer = make_answer(np.float32([0.25, 0.75]), preprocessor, request, (1, 1))
    except Rejected as error:
        answer = error
    response = respond(request, [answer])
    assert (response.status, response.content_type) == (status, "application/json")
    assert status != 200 or json.loads(response.body)["label"] == "dog"


def test_accept_chooses_the_format_but_of_json_which_is_answered_with_json():
    assert read_request({"body": b"photo"}, "image/png").format == "png"
    assert read_request({"data": b"photo"}, "image/png").format == "png"
    assert read_request({"body": b'{"instances": [{"b64": ""}]}'}, "image/png").format == "json"


@pytest.mark.parametrize(
    "fields",
    [{"format": "gif"}, {"format": b"\xff"}, {"format": 3}, {"format": ["png"]}, {"size": "large"}, {"size": b""}],
)
def test_refuses_options_that_there_are_not(fields):
    with pytest.raises(Rejected, match="must be one of") as error:
        read_options(fields)
    assert error.value.status == 400


@pytest.mark.parametrize("top", ["0", "-1", "²", "٣", b"\xb2", "1e3", "", 1.5, True, [1]])
def test_refuses_what_is_no_number_of_answers(top):
    with pytest.raises(Rejected, match="`top` must be") as error:
        read_options({"top": top})
    assert error.value.status == 400


def test_reads_the_three_forms():
    assert read_request({"body": bytearray(b"photo")}) == Request([b"photo"])
    form = {"data": bytearray(b"photo"), "format": bytearray(b"png"), "size": bytearray(b"original")}
    assert read_request(form) == Request([b"photo"], "png", "original")
    body = {"instances": [{"b64": "aGk="}, 3], "parameters": {"size": "original"}}
    for sent in (body, json.dumps(body), b" \n" + json.dumps(body).encode()):
        assert read_request({"body": sent}) == Request(body["instances"], "json", "original", is_json=True)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (None, 400),
        ([1], 400),
        (b'[{"b64": ""}]', 400),
        (b"{", 400),
        (b'{"a":[' + b"[" * 50_000, 400),
        (b'{"instances": [' + b"{}," * 100 + b"{}]}", 413),
        (b'{"instances": [' + b"{}," * 5_000_000 + b"{}]}", 413),
        (b'{"a":' * 200_000, 400),
        (b"{}", 400),
        ({"instances": []}, 400),
        ({"instances": "photo"}, 400),
        ({"instances": [1], "parameters": [1]}, 400),
        ({"instances": [1] * (protocol.MAX_INSTANCES + 1)}, 413),
    ],
    ids=lambda value: str(value)[:20],
)
def test_refuses_what_is_no_request(body, status):
    with pytest.raises(Rejected) as error:
        read_request({"body": body})
    assert error.value.status == status


def test_an_array_is_told_to_be_an_object():
    for body in (b'[{"b64": ""}]', b" \n[]", [1]):
        with pytest.raises(Rejected, match="an object, .* not an array"):
            read_request({"body": body})


def test_what_is_refused_costs_no_memory():
    """20 MB of JSON: of the values that it would become, none is made."""
    body = b'{"instances": [' + b"{}," * 6_600_000 + b"{}]}"
    spaces = {"b64": "A " * 10_000_000}
    tracemalloc.start()
    try:
        with pytest.raises(Rejected):
            read_request({"body": body})
        assert tracemalloc.get_traced_memory()[1] < 1e6
        tracemalloc.reset_peak()
        assert len(read_instance(spaces)) == 7_500_000
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally:
        tracemalloc.stop()


def test_options_beside_json_count_where_it_has_none():
    body = b'{"instances": [{"b64": ""}], "parameters": {"format": "png"}}'
    request = read_request({"body": body, "format": b"overlay", "size": b"original"})
    assert (request.format, request.size) == ("png", "original")


@pytest.mark.parametrize("instance", [b"photo", {"b64": "cGhv\ndG8="}, {"data": {"b64": "cGhvdG8="}}])
def test_reads_an_instance(instance):
    assert read_instance(instance) == b"photo"


@pytest.mark.parametrize("instance", [3, None, "cGhvdG8=", {}, {"b64": 3}, {"b64": "?"}, {"b64": "é"}, {"data": []}])
def test_refuses_what_is_no_instance(instance):
    with pytest.raises(Rejected) as error:
        read_instance(instance)
    assert error.value.status == 400


def from_the_allocator() -> RuntimeError:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50, dtype=torch.uint8)
    return error.value


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), 507),
        (from_the_allocator(), 507),
        (RuntimeError("[alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"), 507),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), 507),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), 507),
        (RuntimeError("CUDA error: out of memory"), 507),
        (RuntimeError("Exception from src/inference: std::bad_alloc"), 507),
        (RuntimeError("no locally allocated name"), 500),
        (RuntimeError("the allocator was reset"), 500),
        (ValueError("out of memory"), 500),
        (OSError("disk"), 500),
    ],
    ids=str,
)
def test_only_memory_that_ran_out_is_507(error, status):
    rejected = rejection(error)
    assert (rejected.status, rejected.type) == (status, {507: "OutOfMemory", 500: "InternalError"}[status])
    assert rejected.__cause__ is (error if status == 500 else None)  # of our own fault the log must have the stack
    assert str(error) not in rejected.message or not str(error)


def test_a_rejection_stays_what_it_is():
    rejected = protocol.too_large("too many pixels")
    assert rejection(rejected) is rejected
    assert rejected.as_json() == {"code": 413, "type": "TooLarge", "message": "too many pixels"}


PNG, BAD = {"png": b"\x89PNG", "shape": [1, 1]}, protocol.bad_image("damaged")
BROKEN = rejection(RuntimeError("boom"))


@pytest.mark.parametrize(
    ("request_", "answers", "status", "content"),
    [
        (Request([1]), [{"mask": b"\0"}], 200, {"mask": "AA=="}),
        (Request([1]), [BAD], 400, BAD.as_json()),
        (Request([1], "png"), [BAD], 400, BAD.as_json()),
        (Request([1], "png"), [PNG], 200, b"\x89PNG"),
        (Request([1], is_json=True), [{"mask": b"\0"}], 200, {"predictions": [{"mask": "AA=="}]}),
        (
            Request([1, 2], "png", is_json=True),
            [PNG, BAD],
            200,
            {"predictions": [{"png": "iVBORw==", "shape": [1, 1]}, {"error": BAD.as_json()}]},
        ),
        (
            Request([1, 2], is_json=True),
            [BAD, BROKEN],
            500,
            {
                "predictions": [{"error": BAD.as_json()}, {"error": BROKEN.as_json()}],
                "code": 500,
                "type": "InternalError",
                "message": f"no instance is good: {BROKEN.message}",
            },
        ),
        (
            Request([1], is_json=True),
            [protocol.too_large("much")],
            400,
            {
                "predictions": [{"error": protocol.too_large("much").as_json()}],
                "code": 400,
                "type": "TooLarge",
                "message": "no instance is good: much",
            },
        ),
    ],
)
def test_responses(request_, answers, status, content):
    response = respond(request_, answers)
    assert response.status == HTTPStatus(status)
    if isinstance(content, bytes):
        assert (response.content_type, response.body) == ("image/png", content)
    else:
        assert (response.content_type, json.loads(response.body)) == ("application/json", content)


def test_bytes_in_json_are_base64():
    data = bytes(range(256))
    (answer,) = json.loads(respond(Request([1], is_json=True), [{"png": data}]).body)["predictions"]
    assert base64.b64decode(answer["png"]) == data
