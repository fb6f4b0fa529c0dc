"""In front of TorchServe: the public port, which opens once a worker is ready, with the paths that a service names.

Where TorchServe refuses a request because its queue is full, the client is told to come again in a second. TorchServe
does not say so, and clients that come again at once keep it so busy with refusing that hardly anybody is answered.
"""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable

from .processes import allow_files, naming_port

MOST_FILES = 4096  # two for each connection
WAITING = 1024  # connections that nobody has taken yet
LINE_SECONDS = 10  # that a request's first line may take to arrive


def open_front(public: socket.socket, port: int, routes: dict[str, str]) -> None:
    """Let `public` listen, and pass each of its connections on to loopback's `port`, in a thread of its own.

    Args:
        routes: for paths that TorchServe does not know, those that it has for them.

    Raises:
        OSError: another process listens there by now.
    """
    allow_files(MOST_FILES)
    with naming_port(*public.getsockname()):
        public.listen(WAITING)
    connections: set[asyncio.Task] = set()  # asyncio does not hold them, and Python clears away what nobody holds

    async def copy(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, changed: Callable[[bytes], bytes] = bytes
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                writer.write(changed(data))
                await writer.drain()
            writer.write_eof()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if task := asyncio.current_task():
            connections.add(task)
            task.add_done_callback(connections.discard)
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
        async with await asyncio.start_server(connect, sock=public, backlog=WAITING) as server:
            await server.serve_forever()

    threading.Thread(target=lambda: asyncio.run(listen()), daemon=True).start()


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
