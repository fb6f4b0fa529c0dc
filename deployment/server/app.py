"""A handler on a maintained Python server, Starlette on uvicorn: one process, no Java.

The contract is that of `protocol`, and the same as on TorchServe. The port opens once the model has answered a warm-up,
so `/ping` never says 200 before an answer can be given. Of the archive only configuration and weights are read: the
code that runs is this folder's.
"""

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
from http import HTTPStatus
from pathlib import Path

import anyio
import anyio.from_thread
import anyio.to_thread
import prometheus_client
import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from ..handler import Handler
from ..protocol import Rejected, reasons, rejection
from ..runtime import cores
from . import metrics
from .forms import read_body, read_fields

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
MAX_REQUESTS = 100  # that are read, wait or are computed at one time; TorchServe's queue holds as many
WAIT_SECONDS = 120  # that a request may wait for its turn
DRAIN_SECONDS = 25  # that requests in flight have when the server is asked to stop


class Application:
    """The HTTP side of `handler`, which has loaded its model `name`."""

    def __init__(self, handler: Handler, name: str, token: str | None = None, version: str = "1.0"):
        self.handler, self.name, self.token = handler, name, token
        self.path = f"/predictions/{name}"
        self.paths = [f"{self.path}{rest}" for rest in ("", "/", f"/{version}", f"/{version}/")]  # as TorchServe has it
        self.description = yaml.safe_load((HERE / "openapi.yaml").read_text().replace("NAME", name))
        self.requests = 0  # that are here now
        # While images are in the model, others are read and drawn. A GPU's batch is gathered from those that wait.
        self.turns = anyio.CapacityLimiter(cores() + max(cores(), handler.model.batch))

    def starlette(self) -> Starlette:
        """The ASGI application."""
        routes = [Route(path, self.predict, methods=["POST", "PUT"]) for path in self.paths]
        routes.append(Route("/", self.page))
        routes.append(Route("/openapi.json", self.openapi))
        routes.append(Route("/ping", self.ping))
        return Starlette(routes=routes, exception_handlers={HTTPException: self.no_route})

    async def predict(self, request: Request) -> Response:
        request_id = str(uuid.uuid4())
        errors: list[Rejected] = []
        self.requests += 1
        try:
            self.admit(request)
            body = await read_body(request)
            response, errors = await self.answer_in_turn(request, body)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody hears it
        except Exception as error:
            errors = [rejection(error)]
            response = refusal(errors[0])
        finally:
            self.requests -= 1
        self.log_errors(request_id, response.status_code, errors)
        response.headers["x-request-id"] = request_id
        return response

    def admit(self, request: Request) -> None:
        """Raises Rejected for a request without the token, or one too many."""
        given = request.headers.get("authorization", "")
        if self.token and not secrets.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            raise Rejected(HTTPStatus.UNAUTHORIZED, "Unauthorized", "the token is missing or wrong")
        if self.requests > MAX_REQUESTS:
            raise busy()
        metrics.count_request(self.name)

    async def answer_in_turn(self, request: Request, body: bytes) -> tuple[Response, list[Rejected]]:
        """What `answer` says, in a thread, once one of the turns is free.

        Raises:
            Rejected: 503 where that takes longer than WAIT_SECONDS.
            starlette.requests.ClientDisconnect: nobody waits for the answer any more.
        """
        waits = self.turns.available_tokens == 0
        with anyio.move_on_after(WAIT_SECONDS):  # ends the wait alone: what a thread has begun is awaited
            # Of idle threads anyio takes the one used last: its caches are warm, and so is the core on which it wakes.
            return await anyio.to_thread.run_sync(self.answer, request, body, waits, limiter=self.turns)
        raise busy()

    def answer(self, request: Request, body: bytes, waited: bool) -> tuple[Response, list[Rejected]]:
        """The answer to one request, and the errors that are part of it."""
        if waited and anyio.from_thread.run(request.is_disconnected):
            raise ClientDisconnect
        began = time.perf_counter()
        fields = read_fields(body, request.headers.get("content-type", ""))
        job = self.handler.preprocess(fields, request.headers.get("accept", ""))
        read = time.perf_counter()
        items = [item for item in job.items if not item.error]
        self.handler.inference(items)
        computed = time.perf_counter()
        made = self.handler.postprocess(job)
        metrics.observe_answer(self.name, began, read, computed, time.perf_counter(), len(items))
        response = Response(made.body, made.status, media_type=made.content_type)
        return response, [item.error for item in job.items if item.error]

    def log_errors(self, request_id: str, status: int, errors: list[Rejected]) -> None:
        """One line for a request with errors, with the stack of a fault of our own; their counts."""
        if errors:
            fault = next((error.__cause__ for error in errors if error.__cause__), None)
            logger.warning("request %s answered with %d: %s", request_id, status, reasons(errors), exc_info=fault)
        metrics.count_errors(self.name, errors)

    async def ping(self, request: Request) -> Response:
        return JSONResponse({"status": "Healthy"})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self.description)

    async def page(self, request: Request) -> Response:
        policy = "default-src 'self' 'unsafe-inline'; img-src 'self' blob:; frame-ancestors 'none'"
        return FileResponse(HERE / "try.html", headers={"Content-Security-Policy": policy})

    async def no_route(self, request: Request, error: HTTPException) -> Response:
        status = HTTPStatus(error.status_code)
        return refusal(Rejected(status, status.phrase.title().replace(" ", ""), f"predictions: POST {self.path}"))


def application(handler: Handler, name: str, token: str | None = None, version: str = "1.0") -> Starlette:
    """The ASGI application of `handler`, which has loaded its model: predictions are at /predictions/`name`.

    With `token` they are for those who send it: `Authorization: Bearer TOKEN`.
    """
    return Application(handler, name, token, version).starlette()


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


def version_of(folder: Path | str) -> str:
    """The version of the model in an archive that lies unpacked in `folder`."""
    manifest = Path(folder, "MAR-INF", "MANIFEST.json")
    return json.loads(manifest.read_text())["model"]["modelVersion"] if manifest.is_file() else "1.0"


def serve_archive(archive: Path, name: str, public: socket.socket, metrics_port: int, key_file: Path | None) -> None:
    """Serve `archive` as `name` on `public` until SIGTERM or SIGINT, then finish what is in flight. Metrics: loopback.

    With `key_file` predictions need the token that is written there.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # while the model loads, and again when uvicorn is through
        signal.signal(number, lambda *_: sys.exit(0))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s [%(levelname)-5s] %(name)s - %(message)s")
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it quotes what clients send
    token = write_token(key_file) if key_file else None
    handler = Handler()
    with tempfile.TemporaryDirectory(prefix="model-") as folder, zipfile.ZipFile(archive) as content:
        content.extractall(folder)
        handler.load(folder, threads=None if os.environ.get("OMP_NUM_THREADS") else cores())
        version = version_of(folder)
    prometheus_client.start_http_server(metrics_port, "127.0.0.1")
    config = uvicorn.Config(
        application(handler, name, token, version),
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    uvicorn.Server(config).run(sockets=[public])
