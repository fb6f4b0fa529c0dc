"""In front of TorchServe in a container: a port that opens when a worker is ready, with the paths a service names.

Where TorchServe refuses a request because its queue is full, the client is told to come again in a second. TorchServe
does not say so, and clients that come again at once keep it so busy with refusing that hardly anybody is answered.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path

from .torchserve import is_ready

LINE_SECONDS = 10  # that a request's first line may take to arrive


def open_when_ready(
    public: socket.socket, port: int, management_port: int, folder: Path | str, name: str, routes: dict[str, str]
) -> None:
    """Let `public` listen once a worker is ready, and pass each of its connections on to loopback's `port`.

    Args:
        routes: for paths that TorchServe does not know, those that it has for them.
    """
    while not is_ready(management_port, folder, name):
        time.sleep(0.2)

    async def copy(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, changed: Callable[[bytes], bytes] = bytes
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                writer.write(changed(data))
                await writer.drain()
            writer.write_eof()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.TimeoutError, EOFError, ValueError):
            begin = b""
            if routes:
                line = await asyncio.wait_for(reader.readline(), LINE_SECONDS)
                begin = rerouted(line, routes)
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(there_writer):
                there_writer.write(begin)
                await asyncio.gather(copy(reader, there_writer), copy(there_reader, writer, told_to_wait))

    async def listen() -> None:
        async with await asyncio.start_server(connect, sock=public) as server:
            await server.serve_forever()

    asyncio.run(listen())


def rerouted(line: bytes, routes: dict[str, str]) -> bytes:
    """The first `line` of a request with its path as `routes` has it, for a connection that has no second request."""
    method, target, *rest = line.split(b" ") if line.count(b" ") == 2 else (line, b"")
    path, query, options = target.partition(b"?")
    if known := routes.get(path.decode("latin-1")):
        line = b" ".join([method, known.encode() + query + options, *rest])
    return line + b"Connection: close\r\n"


def told_to_wait(data: bytes) -> bytes:
    """`data`, with the header `Retry-After` where an answer with status 503 begins that has none."""
    line, _, rest = data.partition(b"\r\n")
    if not line.startswith(b"HTTP/1.1 503 ") or b"\r\nretry-after:" in data.lower():
        return data
    return b"\r\n".join([line, b"Retry-After: 1", rest])
