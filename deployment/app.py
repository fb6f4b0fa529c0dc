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
import sys
import tempfile
import time
import uuid
import zipfile
from contextlib import nullcontext
from http import HTTPStatus
from pathlib import Path

import anyio
import anyio.to_thread
import prometheus_client
import torch
import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from . import metrics
from .bodies import read_body, read_fields
from .handler import Handler
from .processes import cores
from .protocol import Rejected, rejection
from .runtime import choose_device

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
MAX_REQUESTS = 100  # that are read, wait or are computed at one time; TorchServe's queue holds as many
WAIT_SECONDS = 120  # that a request may wait for its turn
DRAIN_SECONDS = 25  # that requests in flight have when the server is asked to stop


def application(handler: Handler, name: str, token: str | None = None) -> Starlette:
    """The HTTP side of `handler`, which has loaded its model: predictions are at /predictions/`name`.

    With `token` they are for those who send it: `Authorization: Bearer TOKEN`.
    """
    path = f"/predictions/{name}"
    description = yaml.safe_load((HERE / "openapi.yaml").read_text().replace("NAME", name))
    at_once = 2 * cores()  # while photos are in the model, the next are read and the last drawn
    threads, turn, inside = anyio.CapacityLimiter(at_once), asyncio.Semaphore(at_once), 0

    async def predict(request: Request) -> Response:
        nonlocal inside
        request_id, errors = str(uuid.uuid4()), []
        inside += 1
        try:
            admit(request)
            body = await read_body(request)
            response, errors = await answer_in_turn(request, body)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody hears it
        except Exception as error:
            errors = [rejection(error)]
            response = refusal(errors[0])
        finally:
            inside -= 1
        log_errors(request_id, response.status_code, errors)
        response.headers["x-request-id"] = request_id
        return response

    def admit(request: Request) -> None:
        """Raises Rejected for a request without the token, or one too many."""
        given = request.headers.get("authorization", "")
        if token and not secrets.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise Rejected(HTTPStatus.UNAUTHORIZED, "Unauthorized", "the token is missing or wrong")
        if inside > MAX_REQUESTS:
            raise busy()
        metrics.count_request(name)

    async def answer_in_turn(request: Request, body: bytes) -> tuple[Response, list[Rejected]]:
        """What `answer` says; ClientDisconnect where nobody waits for it any more."""
        waits = turn.locked()
        with anyio.move_on_after(WAIT_SECONDS) if waits else nullcontext() as timeout:
            await turn.acquire()
        if waits and timeout.cancelled_caught:
            raise busy()
        try:
            if waits and await request.is_disconnected():
                raise ClientDisconnect
            # Of idle threads the one used last: its caches are warm, and so is the core on which it wakes.
            return await anyio.to_thread.run_sync(answer, request.headers, body, limiter=threads)
        finally:
            turn.release()

    def answer(headers, body: bytes) -> tuple[Response, list[Rejected]]:
        """The answer to one request, in a thread, and the errors that are part of it."""
        times = [time.perf_counter()]
        job = handler.preprocess(read_fields(body, headers.get("content-type", "")), headers.get("accept", ""))
        times.append(time.perf_counter())
        photos = [photo for photo in job.photos if not photo.error]
        handler.inference(photos)
        times.append(time.perf_counter())
        made = handler.postprocess(job)
        times.append(time.perf_counter())
        metrics.observe_answer(name, times, len(photos))
        response = Response(made.body, made.status, media_type=made.content_type)
        return response, [photo.error for photo in job.photos if photo.error]

    def log_errors(request_id: str, status: int, errors: list[Rejected]) -> None:
        """One line for a request with errors, with the stack of a fault of our own; their counts."""
        if errors:
            reasons = ", ".join(sorted({f"{error.type}: {error.message}" for error in errors}))
            fault = next(filter(None, (error.__cause__ for error in errors)), None)
            logger.warning("request %s answered with %d: %s", request_id, status, reasons, exc_info=fault)
        metrics.count_errors(name, errors)

    async def ping(request: Request) -> Response:
        return JSONResponse({"status": "Healthy"})

    async def openapi(request: Request) -> Response:
        return JSONResponse(description)

    async def page(request: Request) -> Response:
        policy = "default-src 'self' 'unsafe-inline'; img-src 'self' blob:; frame-ancestors 'none'"
        return FileResponse(HERE / "try.html", headers={"Content-Security-Policy": policy})

    async def no_route(request: Request, error: HTTPException) -> Response:
        status = HTTPStatus(error.status_code)
        return refusal(Rejected(status, status.phrase.title().replace(" ", ""), f"predictions: POST {path}"))

    gets = [Route("/", page), Route("/openapi.json", openapi), Route("/ping", ping)]
    routes = [Route(path, predict, methods=["POST", "PUT"]), *gets]
    return Starlette(routes=routes, exception_handlers={HTTPException: no_route})


def busy() -> Rejected:
    return Rejected(HTTPStatus.SERVICE_UNAVAILABLE, "Busy", "too many requests: try again in a second")


def refusal(error: Rejected) -> Response:
    """`error` as the answer to a whole request."""
    headers = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
    return JSONResponse(error.as_json(), error.status, headers)


def write_token(key_file: Path) -> str:
    """A new token, written to `key_file` for this user alone, in the form of TorchServe's."""
    token = secrets.token_urlsafe(32)
    key_file.unlink(missing_ok=True)
    with open(os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"inference": {"key": token}}, file)
    return token


def serve_archive(archive: Path, name: str, public: socket.socket, metrics_port: int, key_file: Path | None) -> None:
    """Serve `archive` as `name` on `public` until SIGTERM or SIGINT, then finish what is in flight. Metrics: loopback.

    With `key_file` predictions need the token that is written there.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # while the model loads, and again when uvicorn is through
        signal.signal(number, lambda *_: sys.exit(0))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s [%(levelname)-5s] %(name)s - %(message)s")
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it quotes what clients send
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores())
    handler, token = Handler(), write_token(key_file) if key_file else None
    with tempfile.TemporaryDirectory(prefix="model-") as folder, zipfile.ZipFile(archive) as content:
        content.extractall(folder)
        handler.load(folder, choose_device(0))
    prometheus_client.start_http_server(metrics_port, "127.0.0.1")
    settings = {"http": "h11", "loop": "asyncio", "ws": "none", "lifespan": "off", "log_config": None}
    settings |= {"access_log": False, "server_header": False, "timeout_graceful_shutdown": DRAIN_SECONDS}
    uvicorn.Server(uvicorn.Config(application(handler, name, token), **settings)).run(sockets=[public])


if __name__ == "__main__":
    from .serve import main  # the command line of both servers

    main("uvicorn")
