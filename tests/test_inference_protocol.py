"""The Open Inference Protocol on our own server: KServe's and Triton's clients, for every task; what is refused."""

import base64
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from conftest import draw_photo, encoded
from starlette.testclient import TestClient

from deployment.answers import overlay
from deployment.export import export_learner
from deployment.handler import Handler
from deployment.protocol import MAX_INSTANCES
from deployment.server import app, connection, forms, tensors
from deployment.server.processes import reserve_port
from tests.test_app import problems
from tests.test_kserve import KSERVE
from tests.test_server import picture
from tests.test_tasks import CLASS, KINDS, MASK, MULTI, NORMALIZE, NUMBER, POINTS, make, served

TRITON = "tritonclient[http]==2.73.0"  # nor can this: it wants an older ml-dtypes and greenlet
INFER = "/v2/models/m/infer"
LENGTH = "Inference-Header-Content-Length"
PHOTOS = [encoded(draw_photo(i, (90, 60))) for i in range(2)]
TASKS = {CLASS: "", MULTI: "", NUMBER: "n_out=2", POINTS: "", MASK: ""}


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Path]:
    """What the export writes of a small learner of each task, by task."""
    folder = tmp_path_factory.mktemp("tasks")
    resize = "Resize((40, 56), 'squish')"
    return {
        task: export_learner(
            make(folder / task / "photos", (task, "own", resize, NORMALIZE, options, "")), folder / task / "store"
        )
        for task, options in TASKS.items()
    }


@contextlib.contextmanager
def serving(store: Path) -> Iterator[str]:
    """The address of our own server, in this process, with what is in `store` as the model m."""
    handler = Handler()
    handler.load(store)
    public = reserve_port("127.0.0.1", 0)
    application = app.application(handler, "m")
    config = uvicorn.Config(application, http=connection.Connection, ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [public]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{public.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def urls(stores) -> Iterator[dict[str, str]]:
    with contextlib.ExitStack() as stack:
        yield {task: stack.enter_context(serving(store)) for task, store in stores.items()}


@pytest.fixture(scope="module")
def client(stores) -> Iterator[TestClient]:
    """A client of a server with the model for masks."""
    handler = Handler()
    handler.load(stores[MASK])
    with TestClient(app.application(handler, "m")) as client:
        yield client


def text(photo: bytes) -> str:
    return base64.b64encode(photo).decode()


def body(*photos: bytes, **more) -> dict:
    """A request in JSON for `photos`, with `more` fields."""
    tensor = {"name": "image", "shape": [len(photos)], "datatype": "BYTES", "data": [text(photo) for photo in photos]}
    return {"inputs": [tensor]} | more


def outputs(answer: httpx.Response) -> dict[str, np.ndarray]:
    """The tensors in `answer`, each as JSON or as binary data."""
    assert answer.status_code == 200, answer.text
    length = int(answer.headers.get(LENGTH, len(answer.content)))
    at, found = length, {}
    for output in json.loads(answer.content[:length])["outputs"]:
        kind = {"UINT8": np.uint8, "FP32": np.float32, "BOOL": bool, "BYTES": object}[output["datatype"]]
        if "parameters" in output:
            size = output["parameters"]["binary_data_size"]
            data, at = answer.content[at : at + size], at + size
            values = split(data) if kind is object else np.frombuffer(data, kind)
        else:
            values = output["data"]
        found[output["name"]] = np.array(values, kind).reshape(output["shape"])
    assert at == len(answer.content)
    return found


def split(data: bytes) -> list[bytes]:
    elements = []
    while data:
        size = int.from_bytes(data[:4], "little")
        elements.append(data[4 : 4 + size])
        data = data[4 + size :]
    return elements


def expected(task: str, answers: list[dict]) -> dict[str, np.ndarray]:
    """The tensors that say what `answers`, those of `/predictions`, say."""
    if task == MASK:
        masks = [np.frombuffer(base64.b64decode(a["base64_prediction"]), np.uint8).reshape(a["shape"]) for a in answers]
        return {"mask": np.stack(masks), "names": np.array(KINDS, object)}
    if task in (NUMBER, POINTS):
        name = "values" if task == NUMBER else "points"
        return {name: np.array([answer[name] for answer in answers], np.float32)}
    classes = np.array([list(answer["probabilities"]) for answer in answers], object)
    probabilities = np.array([list(answer["probabilities"].values()) for answer in answers], np.float32)
    ranked = {"classes": classes, "probabilities": probabilities}
    if task == CLASS:
        return {"label": np.array([answer["label"] for answer in answers], object)} | ranked
    chosen = [[name in answer["labels"] for name in answer["probabilities"]] for answer in answers]
    return ranked | {"chosen": np.array(chosen)}


def same(found: dict, wanted: dict) -> bool:
    """Whether all tensors agree: names in their order, shapes, values."""

    def plain(array) -> list:
        values = np.array(array).reshape(-1).tolist()
        return [value.decode() if isinstance(value, bytes) else value for value in values]

    return list(found) == list(wanted) and all(
        np.shape(found[name]) == wanted[name].shape and plain(found[name]) == plain(wanted[name]) for name in wanted
    )


# --- the clients that people have ---

CLIENT = """
import asyncio, base64, json, sys
import numpy as np
import tritonclient.http as triton
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

urls, photos = json.load(sys.stdin)
photos = [base64.b64decode(photo) for photo in photos]
n = len(photos)

async def kserve(url):
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        assert await client.is_server_live(url) is True
        assert await client.is_server_ready(url) is True
        assert await client.is_model_ready(url, "m") is True
        assert await client.is_model_ready(url, "other") is False
        as_json = InferInput("image", [n], "BYTES", data=[base64.b64encode(photo).decode() for photo in photos])
        as_bytes = InferInput("image", [n], "BYTES")
        as_bytes.set_data_from_numpy(np.array(photos, object))
        found = {}
        for way, tensor, wanted in (("json", as_json, 0), ("binary in", as_bytes, 0), ("binary", as_bytes, 1)):
            request = InferRequest("m", [tensor], request_id=way, parameters={"binary_data_output": bool(wanted)})
            answer = await client.infer(url, request, model_name="m")
            assert answer.id == way and answer.model_name == "m"
            found[way] = {output.name: output.as_numpy().tolist() for output in answer.outputs}
        bad = InferRequest("m", [InferInput("image", [1], "BYTES", data=["no image"])])
        try:
            await client.infer(url, bad, model_name="m")
        except Exception as error:
            found["error"] = str(error)
    return found

def ask_triton(url):
    client = triton.InferenceServerClient(url.removeprefix("http://"))
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("m")
    assert client.is_model_ready("m", "1.0") and not client.is_model_ready("m", "2.0")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = client.get_model_metadata("m")
    tensor = triton.InferInput("image", [n], "BYTES")
    tensor.set_data_from_numpy(np.array(photos, object))
    everything = client.infer("m", [tensor], request_id="7")
    assert everything.get_response()["id"] == "7"
    found = {}
    for output in everything.get_response()["outputs"]:
        values = everything.as_numpy(output["name"])
        if values.dtype == object:
            values = np.array([value.decode() for value in values.reshape(-1)], object).reshape(values.shape)
        found[output["name"]] = values.tolist()
    last = list(found)[-1]
    some = client.infer("m", [tensor], outputs=[triton.InferRequestedOutput(last, binary_data=False)])
    assert [output["name"] for output in some.get_response()["outputs"]] == [last]
    assert "data" in some.get_response()["outputs"][0]
    try:
        client.infer("m", [tensor], outputs=[triton.InferRequestedOutput("other")])
    except triton.InferenceServerException as error:
        return {"triton": found, "metadata": metadata, "other": error.message()}

print(json.dumps({task: asyncio.run(kserve(url)) | ask_triton(url) for task, url in urls.items()}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of a new environment with both clients."""
    folder = tmp_path_factory.mktemp("clients")
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    program = folder / "bin" / "python"
    subprocess.run([*uv, "pip", "install", "--quiet", "--python", program, KSERVE, TRITON], check=True)
    return program


def test_the_clients_of_kserve_and_triton(python, stores, urls):
    given = json.dumps([urls, [text(photo) for photo in PHOTOS]])
    done = subprocess.run([python, "-c", CLIENT], input=given, capture_output=True, text=True, cwd=python.parent)
    assert done.returncode == 0, done.stderr
    for task, found in json.loads(done.stdout).items():
        wanted = expected(task, served(stores[task], PHOTOS))
        for way in ("json", "binary in", "binary", "triton"):
            assert same(found[way], wanted), (task, way)
        assert "'400 Bad Request'" in found["error"] and "base64" in found["error"]
        assert found["other"].startswith("`outputs` of this model are")
        described = {output["name"]: output for output in found["metadata"]["outputs"]}
        for name, tensor in wanted.items():
            assert described[name]["datatype"] == tensors.DATATYPES[tensor.dtype.name]
            assert all(a in (-1, b) for a, b in zip(described[name]["shape"], tensor.shape, strict=True))


# --- options, and what there is beside an answer ---


def test_pictures_and_masks_of_the_photos_own_size(client):
    mask = outputs(client.post(INFER, json=body(*PHOTOS)))["mask"]
    assert mask.shape == (2, 40, 56) and len(np.unique(mask)) > 1
    large = outputs(client.post(INFER, json=body(*PHOTOS, parameters={"size": "original"})))["mask"]
    assert large.shape == (2, 60, 90)
    asked = [{"name": "picture", "parameters": {"binary_data": True}}]
    made = outputs(client.post(INFER, json=body(*PHOTOS, parameters={"format": "png"}, outputs=asked)))
    assert list(made) == ["picture"] and all(
        (np.array(picture(png)) == single).all() for png, single in zip(made["picture"], mask, strict=True)
    )
    made = outputs(client.post(INFER, json=body(PHOTOS[0], parameters={"format": "overlay"})))
    jpeg = base64.b64decode(made["picture"][0])
    drawn = np.array(picture(jpeg), int) - np.array(overlay(picture(PHOTOS[0]), mask[0], KINDS), int)
    assert list(made["names"]) == KINDS and abs(drawn).mean() < 10


def test_a_large_mask_in_json_is_the_one_in_binary(client):
    photo = encoded(draw_photo(3, (1500, 1000)), "JPEG")
    options = {"size": "original"}
    plain = client.post(INFER, json=body(photo, parameters=options))
    binary = client.post(INFER, json=body(photo, parameters=options | {"binary_data_output": True}))
    assert plain.headers["content-type"] == "application/json" and LENGTH not in plain.headers
    assert binary.headers["content-type"] == "application/octet-stream" and len(binary.content) < 1_600_000
    assert (outputs(binary)["mask"] == outputs(plain)["mask"]).all() and plain.json()["model_version"] == "1.0"


def test_top_limits_probabilities(stores, urls):
    answer = httpx.post(urls[CLASS] + INFER, json=body(*PHOTOS, parameters={"top": 2}))
    assert same(outputs(answer), expected(CLASS, served(stores[CLASS], PHOTOS, top=2)))
    refused = httpx.post(urls[CLASS] + INFER, json=body(*PHOTOS, parameters={"format": "png"}))
    assert refused.status_code == 400 and "JSON" in refused.json()["error"]


def test_health_fails_with_the_model(client, stores):
    handler = Handler()
    handler.load(stores[MASK])
    with TestClient(app.application(handler, "m")) as other:
        for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/m/ready"):
            assert other.get(path).status_code == 200
            handler.broken = True
            assert other.get(path).status_code == 503 and not other.get(path).json()["ready"]
            handler.broken = False


# --- what is refused ---


def changed(**fields) -> dict:
    """A request with other `fields` in its tensor."""
    return {"inputs": [body(PHOTOS[0])["inputs"][0] | fields]}


BAD = {
    "no JSON": (b"\x89PNG", 400, "not JSON"),
    "an array": (b"[]", 400, '"inputs"'),
    "no inputs": ({"instances": []}, 400, '"inputs"'),
    "two inputs": ({"inputs": body(PHOTOS[0])["inputs"] * 2}, 400, '"inputs"'),
    "another name": (changed(name="input-0"), 400, "`image`"),
    "pixels": (changed(datatype="UINT8", data=[0]), 400, "BYTES"),
    "no shape": (changed(shape=None), 400, "`shape`"),
    "shape of strings": (changed(shape=["1"]), 400, "`shape`"),
    "empty shape": (changed(shape=[0], data=[]), 400, "`shape`"),
    "another shape": (changed(shape=[2]), 400, "`data`"),
    "numbers": (changed(data=[7]), 400, "`data`"),
    "no data": (changed(data=None), 400, "`data`"),
    "no base64": (changed(data=["é"]), 400, "base64"),
    "no image": (changed(data=["AAAA"]), 400, "image"),
    "parameters": (body(PHOTOS[0], parameters=[1]), 400, "`parameters`"),
    "format": (body(PHOTOS[0], parameters={"format": "bmp"}), 400, "`format`"),
    "a number for an id": (body(PHOTOS[0], id=7), 400, "`id`"),
    "a long id": (body(PHOTOS[0], id="7" * 257), 400, "`id`"),
    "outputs": (body(PHOTOS[0], outputs=["mask"]), 400, "`outputs`"),
    "other outputs": (body(PHOTOS[0], outputs=[{"name": "picture"}]), 400, "mask, names"),
    "binary data that is not there": (changed(parameters={"binary_data_size": 4}, data=None), 400, "binary_data_size"),
    "too many images": (changed(shape=[MAX_INSTANCES + 1]), 413, f"{MAX_INSTANCES}"),
    "far too many images": (changed(shape=[2**62] * 5000), 413, f"{MAX_INSTANCES}"),
    "too many values": (body(PHOTOS[0], parameters={"x": [1] * 10_001}), 413, "values"),
    "one bad image of two": (body(PHOTOS[0], b"no image"), 400, "image 1: "),
    "masks of two sizes": (
        body(PHOTOS[0], encoded(draw_photo(1, (50, 40))), parameters={"size": "original"}),
        400,
        "one image per request",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(client, name):
    content, status, message = BAD[name]
    answer = client.post(INFER, content=content if isinstance(content, bytes) else json.dumps(content))
    assert answer.status_code == status and answer.json().keys() == {"error"} and message in answer.json()["error"]


@pytest.mark.parametrize(
    "data, length",
    [(b"", None), (b"\x05\0\0\0abc", None), (b"\x03\0\0\0abcd", None), (b"\xff\xff\xff\xff", None), (b"a", "x"),
     (b"a", "-1"), (b"a", "99999"), (b"a", "9" * 30), (b"a", "²")],
)  # fmt: skip
def test_binary_data_that_is_none(client, data, length):
    head = json.dumps(changed(parameters={"binary_data_size": len(data)}, data=None)).encode()
    answer = client.post(INFER, content=head + data, headers={LENGTH: (length or str(len(head))).encode("latin-1")})
    assert answer.status_code == 400 and answer.json().keys() == {"error"}


def test_limits_and_tokens_are_those_of_predictions(client, stores, monkeypatch):
    monkeypatch.setattr(forms, "MAX_BYTES", 1000)
    answer = client.post(INFER, json=body(PHOTOS[0]))
    assert answer.status_code == 413 and answer.json() == {"error": "more than 1000 bytes"}
    monkeypatch.setattr(app, "MAX_REQUESTS", 0)
    answer = client.post(INFER, json=body(b"a"))
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1" and answer.json().keys() == {"error"}
    handler = Handler()
    handler.load(stores[MASK])
    with TestClient(app.application(handler, "m", token="secret")) as other:
        answer = other.post(INFER, json=body(PHOTOS[0]))
        assert answer.status_code == 401 and answer.json() == {"error": "the token is missing or wrong"}
        assert other.get("/v2/models/m/ready").status_code == 200


@pytest.mark.parametrize("method, path", [("GET", "/v2/models/other"), ("GET", INFER), ("POST", "/v2")])
def test_paths_that_are_not_there(client, method, path):
    answer = client.request(method, path)
    assert answer.status_code in (404, 405) and answer.json().keys() == {"error"}


# --- the description ---


def test_it_is_as_the_description_says(client, urls):
    description = client.get("/openapi.json").json()
    for task, url in urls.items():
        answer = httpx.post(url + INFER, json=body(*PHOTOS))
        assert problems(description, "InferenceResponse", answer.json()) == [], task
        assert problems(description, "ModelMetadata", httpx.get(f"{url}/v2/models/m").json()) == []
    assert problems(description, "InferenceRequest", body(*PHOTOS, parameters={"format": "png"})) == []
    assert problems(description, "InferenceRequest", changed(datatype="UINT8"))
    assert problems(description, "Health", client.get("/v2/health/live").json()) == []
    assert problems(description, "ServerMetadata", client.get("/v2").json()) == []
    assert problems(description, "InferenceError", client.post(INFER, content=b"").json()) == []
