"""The same handler on a maintained Python server, Starlette on uvicorn: one process, no Java.

`python -m deployment.app` takes the options of `python -m deployment.serve`; the contract is that of `protocol`. The
port opens once the model has answered a warm-up, so `/ping` never says 200 before an answer can be given. Of the
archive only configuration and weights are read: the code that runs is this folder's.
"""

import asyncio
import json
import logging
import os
import secrets
import signal
import socket
import tempfile
import time
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path

import anyio
import prometheus_client
import python_multipart
import torch
import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from .handler import Handler
from .processes import cores
from .protocol import Rejected, bad_request, rejection, too_large
from .runtime import choose_device

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
MAX_BYTES = 20 * 2**20  # of a request, as config.properties has it for TorchServe
MAX_REQUESTS = 100  # that are read, wait or are computed at one time; TorchServe's queue holds as many
READ_SECONDS, WAIT_SECONDS = 60, 120  # that a request may take to arrive, and to wait for its turn
DRAIN_SECONDS = 25  # that requests in flight have when the server is asked to stop

LABELS = ("ModelName", "Level")
STEPS = {
    step: prometheus_client.Histogram(f"{step}_seconds", "Of a request in this step", LABELS)
    for step in ("preprocess", "inference", "postprocess")
}
REQUESTS = prometheus_client.Counter("ts_inference_requests_total", "Requests that were let in", LABELS)
WAITED = prometheus_client.Counter("ts_queue_latency_microseconds", "That requests waited for their turn", LABELS)
PHOTOS = prometheus_client.Histogram("batch_photos", "Photos in a request", LABELS)
# A gauge, because the client would call a counter rejected_inputs_total; TorchServe does not.
REJECTED = prometheus_client.Gauge("rejected_inputs", "Requests and photos that got an error", ("Reason", *LABELS))


def application(handler: Handler, name: str, token: str | None = None) -> Starlette:
    """The HTTP side of `handler`, which has its model loaded: predictions at /predictions/`name`.

    With `token`, predictions are for those who send it: `Authorization: Bearer TOKEN`.
    """
    labels = {"ModelName": name, "Level": "Model"}
    # While one photo is in the model, the next is read and the last one drawn.
    at_once = 2 * cores()
    pool, turn, inside = ThreadPoolExecutor(at_once), asyncio.Semaphore(at_once), 0
    description = yaml.safe_load((HERE / "openapi.yaml").read_text().replace("NAME", name))

    async def predict(request: Request) -> Response:
        nonlocal inside
        request_id = str(uuid.uuid4())
        given = request.headers.get("authorization", "").encode()
        if token and not secrets.compare_digest(given, f"Bearer {token}".encode()):
            return failure(Rejected(HTTPStatus.UNAUTHORIZED, "Unauthorized", "the token is missing or wrong"))
        if inside >= MAX_REQUESTS:
            return failure(busy())
        inside += 1
        try:
            REQUESTS.labels(**labels).inc()
            with anyio.fail_after(READ_SECONDS):
                body = await read_body(request)
            waiting = time.perf_counter()
            with anyio.move_on_after(WAIT_SECONDS) as waited:
                await turn.acquire()
            if waited.cancelled_caught:
                return failure(busy())
            try:
                WAITED.labels(**labels).inc(1e6 * (time.perf_counter() - waiting))
                if await request.is_disconnected():
                    return Response(status_code=499)  # nobody hears it
                headers = {key: request.headers.get(key, "") for key in ("content-type", "accept")}
                run = asyncio.get_running_loop().run_in_executor
                response, errors = await run(pool, answer, body, headers["content-type"], headers["accept"])
            finally:
                turn.release()
        except TimeoutError:
            return failure(Rejected(HTTPStatus.REQUEST_TIMEOUT, "Timeout", "the request took too long to arrive"))
        except ClientDisconnect:
            return Response(status_code=499)
        except Rejected as error:
            response, errors = failure(error), [error]
        finally:
            inside -= 1
        log(request_id, response.status_code, errors)
        response.headers["x-request-id"] = request_id
        return response

    def answer(body: bytes, content_type: str, accept: str) -> tuple[Response, list[Rejected]]:
        """The answer to one request, in a thread of its own, and the errors that became part of it."""
        try:
            times = [time.perf_counter()]
            fields = read_form(body, content_type) if content_type.startswith("multipart/") else {"body": body}
            job = handler.preprocess(fields, accept)
            times.append(time.perf_counter())
            photos = [photo for photo in job.photos if not photo.error]
            handler.inference(photos)
            times.append(time.perf_counter())
            made = handler.postprocess(job)
            times.append(time.perf_counter())
        except Exception as error:
            return failure(rejection(error)), [rejection(error)]
        for i, step in enumerate(STEPS.values()):
            step.labels(**labels).observe(times[i + 1] - times[i])
        PHOTOS.labels(**labels).observe(len(photos))
        response = Response(made.body, made.status, media_type=made.content_type)
        return response, [photo.error for photo in job.photos if photo.error]

    def log(request_id: str, status: int, errors: list[Rejected]) -> None:
        """One line for a request with errors, with the stack of a fault of our own, and their counts."""
        for error in errors:
            REJECTED.labels(Reason=error.type, **labels).inc()
        if errors:
            reasons = ", ".join(sorted({f"{error.type}: {error.message}" for error in errors}))
            fault = next((error.__cause__ for error in errors if error.__cause__), None)
            logger.warning("request %s answered with %d: %s", request_id, status, reasons, exc_info=fault)

    async def ping(request: Request) -> Response:
        return JSONResponse({"status": "Healthy"})

    async def openapi(request: Request) -> Response:
        return JSONResponse(description)

    async def page(request: Request) -> Response:
        policy = "default-src 'self' 'unsafe-inline'; img-src 'self' blob:; frame-ancestors 'none'"
        return FileResponse(HERE / "try.html", headers={"Content-Security-Policy": policy})

    async def no_route(request: Request, error: HTTPException) -> Response:
        status = HTTPStatus(error.status_code)
        return failure(Rejected(status, status.phrase.title().replace(" ", ""), f"predictions: POST {path}"))

    path = f"/predictions/{name}"
    routes = [Route(path, predict, methods=["POST", "PUT"]), Route("/ping", ping), Route("/openapi.json", openapi)]
    return Starlette(routes=[*routes, Route("/", page)], exception_handlers={HTTPException: no_route})


def busy() -> Rejected:
    return Rejected(HTTPStatus.SERVICE_UNAVAILABLE, "Busy", "too many requests wait: try again in a second")


def failure(error: Rejected) -> Response:
    """`error` as the answer to a whole request."""
    more = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status, {})
    return JSONResponse(error.as_json(), error.status, headers=more)


async def read_body(request: Request) -> bytes:
    """The body, of at most MAX_BYTES; Rejected, 413, for more, before the rest of it is read."""
    body = bytearray()
    length = request.headers.get("content-length", "0")
    if int(length) <= MAX_BYTES:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BYTES:
                break
        else:
            return bytes(body)
    raise too_large(f"more than {MAX_BYTES} bytes")


def read_form(body: bytes, content_type: str) -> dict[str, bytes]:
    """The fields of a multipart form by their names; Rejected, 400, for what is none."""
    fields = {}

    def keep_file(file) -> None:
        file.file_object.seek(0)
        fields[(file.field_name or b"").decode(errors="replace")] = file.file_object.read()

    def keep_field(field) -> None:
        fields[(field.field_name or b"").decode(errors="replace")] = field.value or b""

    try:
        limits = {"MAX_MEMORY_FILE_SIZE": MAX_BYTES}  # nothing of it goes to the disk
        headers = {"Content-Type": content_type.encode("latin-1")}
        parser = python_multipart.create_form_parser(headers, keep_field, keep_file, config=limits)
        parser.write(body)
        parser.finalize()
    except ValueError:  # the parser's own errors are of that kind
        raise bad_request("the body is no multipart form") from None
    return fields


def serve_app(archive: Path, name: str, public: socket.socket, metrics_port: int, key_file: Path | None = None) -> None:
    """Serve `archive` as `name` on `public`, in the foreground, until SIGTERM or SIGINT; what is in flight is answered.

    With `key_file` predictions need a token, which is written there for the user alone.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s [%(levelname)-5s] %(name)s - %(message)s")
    for number in (signal.SIGTERM, signal.SIGINT):  # while the model loads, and again once uvicorn is through
        signal.signal(number, lambda *_: os._exit(0))
    token = None
    if key_file:
        token = secrets.token_urlsafe(32)
        key_file.unlink(missing_ok=True)
        with open(os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"inference": {"key": token}}, file)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores())
    handler = Handler()
    with tempfile.TemporaryDirectory(prefix="model-") as folder, zipfile.ZipFile(archive) as content:
        content.extractall(folder)
        handler.load(folder, choose_device(0))
    prometheus_client.start_http_server(metrics_port, "127.0.0.1")
    config = uvicorn.Config(
        application(handler, name, token), http="h11", loop="asyncio", ws="none", lifespan="off", log_config=None,
        access_log=False, server_header=False, timeout_keep_alive=60, timeout_graceful_shutdown=DRAIN_SECONDS,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[public])


if __name__ == "__main__":
    from .serve import main  # the command line of either server

    main("uvicorn")
