"""Processes, ports and files of this machine: start a server so that it never outlives its parent, find a free port."""

import contextlib
import errno
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Its input ends with the process that started it, however that ended: then the process group $1 has ten seconds to end.
GUARD = """
read _; kill -s TERM -- "-$1"
for second in 1 2 3 4 5 6 7 8 9 10; do sleep 1; kill -s 0 -- "-$1" || exit; done
kill -s KILL -- "-$1"
"""


def free_ports(n: int) -> list[int]:
    """`n` different TCP ports that are free on loopback now, and that no system gives to outgoing connections later.

    Raises:
        OSError: there are none.
    """
    ports = []
    with contextlib.ExitStack() as stack:
        for port in random.SystemRandom().sample(range(20000, 32000), 1000):
            with contextlib.suppress(OSError):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                ports.append(port)
            if len(ports) == n:
                return ports
    raise OSError(f"no {n} free ports between 20000 and 32000 on 127.0.0.1")


def own_route(variable: str) -> str | None:
    """The path that the environment's `variable` names for requests; None where it names none that can be one."""
    path = os.environ.get(variable, "")
    return path if path.startswith("/") and not set(path) & set("{}? ") else None


def reserve_port(host: str, port: int) -> socket.socket:
    """A socket that is bound to the port and does not listen yet: connections are refused.

    Another that does not listen either may be bound to it too: which one has the port is seen when they listen.

    Raises:
        OSError: as in `naming_port`.
    """
    s = socket.socket(proto=socket.IPPROTO_TCP)  # named: without it asyncio sets no TCP_NODELAY, which costs 40 ms
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        with naming_port(host, port):
            s.bind((host, port))
    except OSError:
        s.close()
        raise
    return s


@contextlib.contextmanager
def naming_port(host: str, port: int) -> Iterator[None]:
    """For a block that takes the port.

    Raises:
        OSError: it could not; the message names the port and says what to do.
    """
    try:
        yield
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} on {host} is taken: stop what listens there or choose another") from None
        what = "choose an IPv4 address of this machine, and a port that this user may open"
        raise OSError(f"cannot listen on {host}, port {port} ({e.strerror}): {what}") from None


def allow_files(number: int) -> None:
    """Let this process open `number` files, connections among them, where the system allows it: many say 1024."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextlib.contextmanager
def started(argv: list[str], env: dict[str, str], **popen_options: Any) -> Iterator[subprocess.Popen]:
    """A server as a child for the length of a `with` block; none of its processes outlives the block or this process.

    It has a process group of its own, so that no Ctrl-C of the terminal's reaches it, and keeps its files (tokens) to
    the user. A worker that TorchServe has just started does not notice that it ends, hence the guard over the group.
    """
    server = subprocess.Popen(argv, env=env, start_new_session=True, umask=0o077, **popen_options)
    guard = None
    try:
        quiet = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        guard = subprocess.Popen(["sh", "-c", GUARD, "guard", str(server.pid)], start_new_session=True, **quiet)
        yield server
    finally:
        stop(server)
        if guard:
            guard.kill()
            guard.communicate()


def stop(server: subprocess.Popen) -> None:
    """Ask the server to stop and wait for it; after 30 s, end it. End what it leaves behind."""
    server.terminate()
    try:
        server.wait(timeout=30)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)


@contextlib.contextmanager
def printed(without: tuple[bytes, ...] = ()) -> Iterator[tuple[int, deque[str]]]:
    """A file for the output of children, which is printed as it comes, and the last lines of it.

    Lines that begin as one of `without` are left out.
    """
    reading, writing = os.pipe()
    said = deque(maxlen=1000)

    def pass_on() -> None:
        with open(reading, "rb") as output:
            for line in output:
                if line.startswith(without):
                    continue
                said.append(line.decode(errors="replace"))
                with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, and children must not wait
                    sys.stdout.buffer.write(line)
                    sys.stdout.buffer.flush()

    printer = threading.Thread(target=pass_on, daemon=True)
    printer.start()
    try:
        yield writing, said
    finally:
        os.close(writing)
        printer.join(5)


def last_error(said: Iterable[str]) -> str:
    """What the last stack trace that workers printed ends with."""
    lines = [line.partition(" MODEL_LOG - ")[2].rstrip() for line in said if " MODEL_LOG - " in line]
    traces = re.findall(r"^Traceback .*\n(?:[ \t].*\n|\n)+(\S.*)", "\n".join(lines), re.M)
    return traces[-1] if traces else "its worker ended without saying why; the system may have ended it for its memory"


def own_folder() -> Path:
    """Where TorchServe runs and writes its tokens: the working directory, or where that is read-only one of the user's.

    Raises:
        PermissionError: other users can get at it.
    """
    if os.access(".", os.W_OK):
        return Path.cwd()
    folder = Path(tempfile.gettempdir(), f"torchserve-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if (folder.lstat().st_uid, folder.lstat().st_mode) != (os.getuid(), stat.S_IFDIR | 0o700):
        raise PermissionError(f"{folder} is not this user's alone: remove it, or start in a folder of your own")
    return folder
