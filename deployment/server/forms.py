"""The body of a request to our own server, within limits, and the fields of a form. TorchServe does this in Java."""

import contextlib
from collections.abc import AsyncIterator, Iterable
from http import HTTPStatus
from typing import Any

import anyio
import python_multipart
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from ..protocol import OPTIONS, Rejected, bad_request, busy, too_large
from .connection import Connection

MAX_BYTES = 20 * 2**20  # of a request, as config.properties has it for TorchServe
MAX_FIELDS = 16  # of a form; four have a meaning
READ_SECONDS = 60  # that a request may take to arrive
SLOW_SECONDS = 5  # of these, that it may be slower than SLOWEST
SLOWEST = 10_000  # bytes a second
ROOM_SECONDS = 20  # that a request may wait until there is memory for it
SMALL_BODY = 2**18  # bytes, up to which a body has room that larger ones leave to it


class Bodies:
    """The bodies of all requests that are here, and the answers that wait for their clients: at most `limit` bytes."""

    def __init__(self, limit: int):
        self.limit, self.used = max(limit, 2 * MAX_BYTES), 0
        self.line: dict[int, None] = {}  # the ids of large bodies that had to wait, until all of each is here

    def has_room(self, size: int, leave: int = 0) -> bool:
        """Whether `size` bytes fit beside what is there, and `leave` bytes more."""
        return self.used + Connection.unsent + size + leave <= self.limit

    def left_by(self, body: bytes | bytearray, length: int) -> int:
        """The bytes that `body`, which will have `length`, leaves to others.

        An eighth of the room is for small ones. Of the large ones the first in line has room for a whole body, or those
        that are here in part would wait for each other.
        """
        if length <= SMALL_BODY:
            return 0
        return self.limit // 8 + (0 if next(iter(self.line), None) == id(body) else MAX_BYTES)

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body of `request`, which takes its room until the block ends.

        Raises:
            Rejected: 413 for more than MAX_BYTES, before the rest is read; 408 where it does not arrive in time or is
                slower than SLOWEST; 503 where there is no room for it.
            starlette.requests.ClientDisconnect: the client has gone.
        """
        length = int(request.headers.get("content-length", MAX_BYTES))
        if length > MAX_BYTES:
            raise too_large(f"more than {MAX_BYTES} bytes")
        arriving, size = bytearray(), 0
        try:
            try:
                await self.receive(request, arriving, length)
            finally:
                self.line.pop(id(arriving), None)
            body, size = bytes(arriving), len(arriving)
            arriving.clear()
            yield body
        finally:
            self.used -= size or len(arriving)

    async def receive(self, request: Request, body: bytearray, length: int) -> None:
        """Append what arrives to `body`, as fast as there is room for it."""
        with anyio.move_on_after(min(SLOW_SECONDS, READ_SECONDS)) as arrival:
            began = anyio.current_time()
            async for chunk in request.stream():
                if len(body) + len(chunk) > MAX_BYTES:
                    raise too_large(f"more than {MAX_BYTES} bytes")
                if not self.has_room(len(chunk), self.left_by(body, length)):
                    arrival.deadline = float("inf")  # this wait is not the client's fault
                    if length > SMALL_BODY:
                        self.line.setdefault(id(body))
                    began += await self.wait_for_room(len(chunk), body, length)
                self.used += len(chunk)
                body += chunk
                arrival.deadline = began + min(SLOW_SECONDS + len(body) / SLOWEST, READ_SECONDS)
            return
        message = f"a request may take {READ_SECONDS} s to arrive, at {SLOWEST} bytes a second or more"
        raise Rejected(HTTPStatus.REQUEST_TIMEOUT, "Timeout", message)

    async def wait_for_room(self, size: int, body: bytes | bytearray = b"", length: int = 0) -> float:
        """Wait until `size` bytes of `body` fit; the seconds that it took. Raises Rejected, 503, after ROOM_SECONDS."""
        began = anyio.current_time()
        while not self.has_room(size, self.left_by(body, length)):
            if anyio.current_time() > began + ROOM_SECONDS:
                raise busy()
            await anyio.sleep(0.02)
        return anyio.current_time() - began


def read_fields(body: bytes, content_type: str) -> dict[str, bytes]:
    """The fields of a multipart form, by name; any other body is the one field `body`, whatever its type says.

    Clients call an image all kinds of things; curl --data-binary and urllib call it a form of text fields.

    Raises:
        Rejected: 400 for a multipart form that cannot be read, has a field twice, or more than MAX_FIELDS of them.
    """
    if not content_type.lower().startswith("multipart/"):
        return {"body": body}
    fields = {}

    def keep(part: Any, value: bytes | None) -> None:
        name = (part.field_name or b"").decode(errors="replace")
        if name in fields:
            raise twice(name)
        fields[name] = value or b""

    def keep_file(part: Any) -> None:
        part.file_object.seek(0)
        keep(part, part.file_object.read())

    _, options = parse_options_header(content_type.encode("latin-1"))
    # Counted before they are parsed, which takes the parser as long for an empty part as for many kB of an image.
    if body.count(b"\r\n--" + options.get(b"boundary", b"")) > MAX_FIELDS:
        raise bad_request(f"more than {MAX_FIELDS} fields in a form")
    try:
        parser = python_multipart.create_form_parser(
            {"Content-Type": content_type.encode("latin-1")},
            lambda part: keep(part, part.value),
            keep_file,
            config={"MAX_MEMORY_FILE_SIZE": MAX_BYTES},  # nothing goes to the disk
        )
        parser.write(body)
        parser.finalize()
    except ValueError:  # of which the parser's own errors are
        raise bad_request("the body is no multipart form") from None
    return fields


def read_query(pairs: Iterable[tuple[str, str]]) -> dict[str, bytes]:
    """The options in the address: `?format=png`.

    Raises:
        Rejected: 400 for what is no option, or is there twice.
    """
    options = {}
    for name, value in pairs:
        if name not in OPTIONS:
            raise bad_request(f"the address may have the parameters {', '.join(OPTIONS)} and no other")
        if name in options:
            raise twice(name)
        options[name] = value.encode()
    return options


def twice(name: str) -> Rejected:
    """The error for a field that came twice; another name than our own is not repeated."""
    known = f"the field `{name}`" if name in ("data", *OPTIONS) else "a field"
    more = ": send several images as JSON" if name == "data" else ""
    return bad_request(f"{known} came more than once{more}")
