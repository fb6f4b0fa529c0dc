"""What one client can do to the others: attack by attack, memory, the slowest good answer, failures.

`make soak` runs them and prints a row for each, as SECURITY.md has them.
"""

import base64
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import ROOT, bomb, draw_photo, encoded
from PIL import Image

from deployment.archive import make_archive
from deployment.export import write_config
from deployment.serve import is_healthy
from deployment.server.processes import free_ports
from deployment.server.torchserve import is_ready

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

PREDICT = "/predictions/fastunet"
SECONDS = 12  # of each attack
LIMITS = {"uvicorn": 2**30, "torchserve": 4 * 2**30}  # bytes of the container: OpenVINO's image, PyTorch's


@dataclass
class Outcome:
    """What became of the good requests beside an attack, and of the memory."""

    statuses: Counter = field(default_factory=Counter)
    slowest: float = 0.0  # seconds
    peak: int = 0  # bytes


@pytest.fixture(scope="module", params=LIMITS)
def limited(request, tmp_path_factory) -> Iterator[tuple[str, int, int]]:
    """A server told to live with the memory of its container: its URL, its process and the limit."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    if kind == "uvicorn":
        config, store = request.getfixturevalue("converted")
        shutil.copytree(store, folder, dirs_exist_ok=True)
        write_config(config, folder)
    else:
        shutil.copytree(request.getfixturevalue("exported"), folder, dirs_exist_ok=True)
    make_archive(folder)
    port, management_port, metrics_port = free_ports(3)
    command = [sys.executable, "-m", "deployment.serve", f"--server={kind}", f"--model-store={folder}"]
    command += [f"--port={port}", f"--management-port={management_port}", f"--metrics-port={metrics_port}"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "MEMORY_LIMIT": str(LIMITS[kind])}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log)
    try:
        while not (is_healthy(port) if kind == "uvicorn" else is_ready(management_port)):
            assert process.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process.pid, LIMITS[kind]
    finally:
        process.terminate()
        process.wait(120)


def resident(pid: int) -> int:
    """The resident memory of a process and all its children, in bytes."""
    total = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total


def beside(attack: Callable[[str, threading.Event], None], url: str, pid: int) -> Outcome:
    """What becomes of a client that sends a good request five times a second while `attack` runs."""
    outcome, over, photo = Outcome(), threading.Event(), encoded(draw_photo(1))

    def watch() -> None:
        while not over.wait(0.02):
            outcome.peak = max(outcome.peak, resident(pid))

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=120) as client:
            while not over.is_set():
                began = time.monotonic()
                outcome.statuses[client.post(PREDICT, content=photo).status_code] += 1
                outcome.slowest = max(outcome.slowest, time.monotonic() - began)
                time.sleep(0.2)

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(work) for work in (watch, ask, lambda: attack(url, over))]
        time.sleep(SECONDS)
        over.set()
        for future in running:
            future.result()
    return outcome


def by_clients(clients: int, make_request: Callable[[], dict]) -> Callable[[str, threading.Event], None]:
    """An attack of so many clients that send the same request again and again."""

    def attack(url: str, over: threading.Event) -> None:
        request = make_request()

        def send(_: int) -> None:
            with httpx.Client(base_url=url, timeout=120) as client:
                while not over.is_set():
                    with contextlib.suppress(httpx.TransportError):  # an early answer ends the connection
                        client.post(PREDICT, **request)

        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(send, range(clients)))

    return attack


def trickle(url: str, over: threading.Event) -> None:
    """100 clients that send a byte a second, and come again when they are cut off."""
    host, port = url.removeprefix("http://").split(":")
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n".encode()

    def drip(_: int) -> None:
        while not over.is_set():
            with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as connection:
                connection.sendall(head)
                while not over.wait(1):
                    connection.sendall(b"x")

    with ThreadPoolExecutor(100) as pool:
        list(pool.map(drip, range(100)))


def overlay_of(data: bytes) -> dict:
    return {"files": {"data": data}, "data": {"format": "overlay", "size": "original"}}


def empty_parts() -> dict:
    part = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n\r\n'
    return {"content": part * 80_000 + b"--b--\r\n", "headers": {"content-type": "multipart/form-data; boundary=b"}}


def many_images() -> dict:
    photo = base64.b64encode(encoded(draw_photo(2, (640, 480)), "JPEG")).decode()
    return {"json": {"instances": [{"b64": photo}] * 64}}


ATTACKS = {
    "nothing": lambda url, over: None,
    "the worst PNG, overlay at its own size": by_clients(8, lambda: overlay_of(bomb(7000, 7000))),
    "a JPEG of 12 megapixels, 32 clients": by_clients(
        32, lambda: {"content": encoded(draw_photo(1, (4000, 3000)), "JPEG")}
    ),
    "a WebP of 36 megapixels": by_clients(4, lambda: {"content": encoded(Image.new("RGB", (6000, 6000)), "WEBP")}),
    "forms of empty parts": by_clients(4, empty_parts),
    "20 MB of empty instances": by_clients(4, lambda: {"content": b'{"instances": [' + b"{}," * 6_900_000 + b"{}]}"}),
    "100 clients that trickle": trickle,
    "requests of 64 images": by_clients(2, many_images),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_others_are_answered_and_memory_stays_within_the_limit(limited, name):
    url, pid, limit = limited
    before = resident(pid)
    outcome = beside(ATTACKS[name], url, pid)
    row = f"{before / 2**20:.0f} MiB before, {outcome.peak / 2**20:.0f} at most; slowest good answer"
    print(f"\n{Path(url).name} {name}: {row} {outcome.slowest:.2f} s; {dict(outcome.statuses)}")
    assert set(outcome.statuses) == {200}
    assert outcome.peak < limit
