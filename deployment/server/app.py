"""A handler on a maintained Python server, Starlette on uvicorn: one process, no Java.

The contract is that of `protocol`, and the same as on TorchServe. The port opens once the model has answered a warm-up,
so `/ping` never says 200 before an answer can be given. Of the archive only configuration and weights are read: the
code that runs is this folder's.
"""

import contextlib
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
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

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

from ..answers import palette
from ..handler import Handler, Job
from ..memory import memory_limit
from ..protocol import Rejected, busy, reasons, rejection
from ..runtime import cores
from . import inference_protocol, metrics, tracing
from .connection import Connection
from .forms import Bodies, read_fields, read_query, twice
from .processes import allow_files, naming_port, own_route

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
MAX_ARRIVING = 1000  # requests whose bodies are read at one time; slow ones take no place of those that may compute
MAX_REQUESTS = 100  # that wait or are computed at one time; TorchServe's queue holds as many
QUICK_PIXELS = 3_000_000  # of an image that is decoded in less than a tenth of a second
WAIT_SECONDS = 120  # that a request may wait for its turn
DRAIN_SECONDS = 25  # that requests in flight have when the server is asked to stop

Reader = Callable[[Request, bytes], Job]  # of a request with this body; raises Rejected
Answered = tuple[Response, list[Rejected]]  # the answer to a request, and the errors that are part of it


class Application:
    """The HTTP side of `handler`, which has loaded its model `name`."""

    def __init__(self, handler: Handler, name: str, token: str | None = None, version: str = "1.0"):
        self.handler, self.name, self.token = handler, name, token
        self.path = f"/predictions/{name}"
        self.paths = [f"{self.path}{rest}" for rest in ("", "/", f"/{version}", f"/{version}/")]  # as TorchServe has it
        self.description = described(name)
        self.inference_protocol = inference_protocol.InferenceProtocol(handler, name, version, self.answer)
        if handler.config.task == "segmentation":
            self.description["x-legend"] = legend(handler.config.classes)
        self.tracer = tracing.make_tracer()
        self.end: Callable[[], object] = lambda: None  # the process, so that another can be started
        self.arriving = self.requests = 0  # requests whose bodies are read, and those that wait or are computed
        self.bodies = Bodies(memory_limit() // 8)
        # While images are in the model, others are read and drawn. A GPU's batch is gathered from those that wait.
        self.turns = anyio.CapacityLimiter(cores() + max(cores(), handler.model.batch))
        # Requests of several images, or of a large one, have turns of their own, for which no other request waits. Most
        # of their time goes into decoding, which more threads than cores make slower for all.
        self.long_turns = anyio.CapacityLimiter(cores() + handler.model.batch - 1)

    def starlette(self) -> Starlette:
        """The ASGI application."""
        # The routes that AI Platform names come first: its health checks may be where the page is.
        health, predict = own_route("AIP_HEALTH_ROUTE"), own_route("AIP_PREDICT_ROUTE")
        routes = [Route(health, self.ping)] if health else []
        paths = [predict, *self.paths] if predict else self.paths
        routes += [Route(path, self.predict, methods=["POST", "PUT"]) for path in paths]
        routes.append(Route("/", self.page))
        routes.append(Route("/openapi.json", self.openapi))
        routes += [Route(path, self.ping) for path in ("/ping", "/ping/")]
        routes += self.inference_protocol.routes()
        return Starlette(routes=routes, exception_handlers={HTTPException: self.no_route})

    async def predict(self, request: Request) -> Response:
        return await self.answer(request, self.read, refusal)

    async def answer(self, request: Request, read: Reader, refuse: Callable[[Rejected], Response]) -> Response:
        """The answer to `request`, of which `read` makes a job, and `refuse` the answer to an error before that."""
        request_id = str(uuid.uuid4())
        errors: list[Rejected] = []
        try:
            self.admit(request)
            async with self.arrived(request) as body:
                response, errors = await self.answer_in_turn(request, body, read)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody hears it
        except Exception as error:
            errors = [rejection(error)]
            response = refuse(errors[0])
        self.log_errors(request_id, response.status_code, errors)
        if self.handler.broken:
            logger.critical("the model fails on every image: this process ends, so that another can be started")
            self.end()
        response.headers["x-request-id"] = request_id
        return response

    def admit(self, request: Request) -> None:
        """Raises Rejected for a request without the token."""
        given = request.headers.get("authorization", "")
        if self.token and not secrets.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            raise Rejected(HTTPStatus.UNAUTHORIZED, "Unauthorized", "the token is missing or wrong")

    @contextlib.asynccontextmanager
    async def arrived(self, request: Request) -> AsyncIterator[bytes]:
        """The body of `request`, which has one of the places of those that wait or are computed.

        Raises:
            Rejected: as `Bodies.read`; 503 where all places are taken.
        """
        if self.arriving >= MAX_ARRIVING or self.requests >= MAX_REQUESTS:
            raise busy()
        async with contextlib.AsyncExitStack() as stack:
            self.arriving += 1
            try:
                body = await stack.enter_async_context(self.bodies.read(request))
            finally:
                self.arriving -= 1
            if self.requests >= MAX_REQUESTS:
                raise busy()
            self.requests += 1
            metrics.count_request(self.name)
            try:
                yield body
            finally:
                self.requests -= 1

    async def answer_in_turn(self, request: Request, body: bytes, read: Reader) -> Answered:
        """The answer to one request, made in a thread, once one of the turns is free.

        Raises:
            Rejected: 503 where that takes longer than WAIT_SECONDS, or too many answers wait for their clients.
            starlette.requests.ClientDisconnect: nobody waits for the answer any more.
        """
        await self.bodies.wait_for_room(0)  # answers that nobody takes would become more with each request
        job, began, answered = await self.in_turn(self.turns, self.begin, request, body, read)
        return answered or await self.in_turn(self.long_turns, self.finish, request, job, began)

    async def in_turn(self, turns: anyio.CapacityLimiter, work: Callable, request: Request, *arguments: Any):
        waits = turns.available_tokens == 0
        with anyio.move_on_after(WAIT_SECONDS):  # ends the wait alone: what a thread has begun is awaited
            # Of idle threads anyio takes the one used last: its caches are warm, and so is the core on which it wakes.
            return await anyio.to_thread.run_sync(self.unless_gone, waits, work, request, *arguments, limiter=turns)
        raise busy()

    def unless_gone(self, waited: bool, work: Callable, request: Request, *arguments: Any):
        if waited and anyio.from_thread.run(request.is_disconnected):
            raise ClientDisconnect
        return work(request, *arguments)

    def read(self, request: Request, body: bytes) -> Job:
        """The request as a job. Raises Rejected, 400, for a form or an address that cannot be read."""
        fields = read_fields(body, request.headers.get("content-type", ""))
        options = read_query(request.query_params.multi_items())
        for name in options.keys() & fields.keys():
            raise twice(name)
        return self.handler.read(fields | options, request.headers.get("accept", ""))

    def begin(self, request: Request, body: bytes, read: Reader) -> tuple[Job, float, Answered | None]:
        """The request as a job, when it was begun, and its answer unless that takes long."""
        began = time.perf_counter()
        job = read(request, body)
        return job, began, self.finish(request, job, began) if is_quick(job) else None

    def finish(self, request: Request, job: Job, began: float) -> Answered:
        [made], seconds, photos = self.handler.answer([job], began)
        metrics.observe_answer(self.name, seconds, photos)
        if self.tracer:
            tracing.record(self.tracer, self.name, request.headers, made.status, began, seconds)
        response = Response(made.body, made.status, made.headers, media_type=made.content_type)
        return response, [item.error for item in job.items if item.error]

    def log_errors(self, request_id: str, status: int, errors: list[Rejected]) -> None:
        """One line for a request with errors, with the stack of a fault of our own; their counts."""
        if errors:
            fault = next((error.__cause__ for error in errors if error.__cause__), None)
            logger.warning("request %s answered with %d: %s", request_id, status, reasons(errors), exc_info=fault)
        metrics.count_errors(self.name, errors)

    async def ping(self, request: Request) -> Response:
        if self.handler.broken:
            return JSONResponse({"status": "Unhealthy"}, HTTPStatus.SERVICE_UNAVAILABLE)
        return JSONResponse({"status": "Healthy"})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self.description)

    async def page(self, request: Request) -> Response:
        policy = "default-src 'self' 'unsafe-inline'; img-src 'self' blob:; frame-ancestors 'none'"
        return FileResponse(HERE / "try.html", headers={"Content-Security-Policy": policy})

    async def no_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = HTTPStatus(error.status_code)
        refused = Rejected(status, status.phrase.title().replace(" ", ""), f"predictions: POST {self.path}")
        return inference_protocol.refusal(refused) if request.url.path.startswith("/v2") else refusal(refused)


def application(handler: Handler, name: str, token: str | None = None, version: str = "1.0") -> Starlette:
    """The ASGI application of `handler`, which has loaded its model: predictions are at /predictions/`name`.

    With `token` they are for those who send it: `Authorization: Bearer TOKEN`.
    """
    return Application(handler, name, token, version).starlette()


def is_quick(job: Job) -> bool:
    """Whether `job` is answered in about the time that the model takes: it is one image, and not a large one."""
    return len(job.items) == 1 and job.items[0].counted <= QUICK_PIXELS


def refusal(error: Rejected) -> Response:
    """`error` as the answer to a whole request."""
    return JSONResponse(error.as_json(), error.status, error.headers)


def write_token(key_file: Path) -> str:
    """A new token, written to `key_file` for this user alone, in the form of TorchServe's."""
    token = secrets.token_urlsafe(32)
    key_file.unlink(missing_ok=True)
    with open(os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"inference": {"key": token}}, file)
    return token


def described(name: str) -> dict[str, Any]:
    """The description of the server's requests, as OpenAPI has it, where its model is `name`."""
    description = yaml.safe_load((HERE / "openapi.yaml").read_text(encoding="utf-8"))
    description["info"]["title"] = name
    paths = description["paths"].items()
    description["paths"] = {path.replace("NAME", quote(name)): operations for path, operations in paths}
    return description


def legend(classes: list[str]) -> list[dict[str, str]]:
    """Name and color of each class, for the page."""
    return [
        {"name": name, "color": f"#{bytes(color).hex()}"} for name, color in zip(classes, palette(classes), strict=True)
    ]


def version_of(folder: Path | str) -> str:
    """The version of the model in an archive that lies unpacked in `folder`."""
    manifest = Path(folder, "MAR-INF", "MANIFEST.json")
    return json.loads(manifest.read_text(encoding="utf-8"))["model"]["modelVersion"] if manifest.is_file() else "1.0"


class Server(uvicorn.Server):
    """uvicorn's, which calls `ready` once it listens."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()


def serve_archive(
    archive: Path,
    name: str,
    public: socket.socket,
    metrics_address: tuple[str, int],
    key_file: Path | None,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve `archive` as `name` on `public` until SIGTERM or SIGINT, then finish what is in flight.

    With `key_file` predictions need the token that is written there. `ready` is called once they are answered.

    Raises:
        RuntimeError: the model fails on every image.
        OSError: another process took a port while the model was loaded.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # while the model loads, and again when uvicorn is through
        signal.signal(number, lambda *_: sys.exit(0))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s [%(levelname)-5s] %(name)s - %(message)s")
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it quotes what clients send
    allow_files(2 * MAX_ARRIVING)
    token = write_token(key_file) if key_file else None
    handler = Handler()
    with tempfile.TemporaryDirectory(prefix="model-") as folder, zipfile.ZipFile(archive) as content:
        content.extractall(folder)
        handler.load(folder, threads=None if os.environ.get("OMP_NUM_THREADS") else cores())
        version = version_of(folder)
    host, port = metrics_address
    with naming_port(host, port):
        prometheus_client.start_http_server(port, host)
    application = Application(handler, name, token, version)
    config = uvicorn.Config(
        application.starlette(),
        http=Connection,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    server = Server(config, ready)
    application.end = lambda: setattr(server, "should_exit", True)
    with naming_port(*public.getsockname()):
        public.listen(config.backlog)
    server.run(sockets=[public])
    if handler.broken:
        raise RuntimeError("the model fails on every image")
