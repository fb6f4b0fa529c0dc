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
from PIL import Image, PngImagePlugin

from deployment.archive import make_archive
from deployment.export import write_config
from deployment.serve import is_healthy
from deployment.server.processes import free_ports

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

PREDICT = "/predictions/fastunet"
SECONDS = 6  # of each attack
# Bytes that the container has: PyTorch on either server, and the small image, which has no torch.
LIMITS = {"torchserve": 4 * 2**30, "uvicorn": 4 * 2**30, "light": 2**30}


Attack = Callable[[str, threading.Event], None]  # on a URL, until it is over


@dataclass
class Outcome:
    """What became of the good requests beside an attack, and of the memory."""

    statuses: Counter = field(default_factory=Counter)  # 0: no answer
    slowest: float = 0.0  # seconds
    peak: int = 0  # bytes

    def __str__(self) -> str:
        failed = {status: n for status, n in self.statuses.items() if status != 200}
        failures = ", ".join(f"{n} × {status or 'no answer'}" for status, n in failed.items()) or "none"
        return f"{self.peak / 2**20:.0f} MiB | {self.slowest:.2f} s | {failures} of {self.statuses.total()}"


@contextlib.contextmanager
def serving(kind: str, store: Path, python: Path | str, code: Path = ROOT) -> Iterator[tuple[str, int]]:
    """A server that is told to live with the memory of its container: its URL and its process."""
    port, management_port, metrics_port = free_ports(3)
    server = "torchserve" if kind == "torchserve" else "uvicorn"
    command = [python, "-m", "deployment.serve", f"--server={server}", f"--model-store={store}", f"--port={port}"]
    command += [f"--management-port={management_port}", f"--metrics-port={metrics_port}"]
    env = os.environ | {"PYTHONPATH": str(code), "MEMORY_LIMIT": str(LIMITS[kind])}
    log = store / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=env, cwd=store, stdout=output, stderr=output)
    try:
        while not is_healthy(port):
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(120)


@pytest.fixture(scope="module", params=LIMITS)
def limited(request, tmp_path_factory) -> Iterator[tuple[str, str, int]]:
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    config, store = None, request.getfixturevalue("small_store")
    if kind == "light":
        config, store = request.getfixturevalue("converted")
    shutil.copytree(store, folder, dirs_exist_ok=True)
    if config:
        write_config(config, folder)
    make_archive(folder)
    python = request.getfixturevalue("light_python") if kind == "light" else sys.executable
    with serving(kind, folder, python) as (url, pid):
        print(
            f"\n\n| {kind}, {LIMITS[kind] / 2**30:.0f} GiB | memory at most | slowest good answer | failures |", end=""
        )
        print("\n|---|--:|--:|---|", end="")
        yield kind, url, pid


def resident(pid: int) -> int:
    """The resident memory of a process and all its children, in bytes."""
    total = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total


def beside(attack: Attack, url: str, pid: int) -> Outcome:
    """What becomes of a client that sends a good request five times a second while `attack` runs."""
    outcome, over, photo = Outcome(), threading.Event(), encoded(draw_photo(1))

    def watch() -> None:
        while not over.wait(0.02):
            outcome.peak = max(outcome.peak, resident(pid))

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not over.is_set():
                began, status = time.monotonic(), 0
                with contextlib.suppress(httpx.TransportError):
                    status = client.post(PREDICT, content=photo).status_code
                outcome.statuses[status] += 1
                outcome.slowest = max(outcome.slowest, time.monotonic() - began)
                time.sleep(0.2)

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(work) for work in (watch, ask, lambda: attack(url, over))]
        time.sleep(SECONDS)
        over.set()
        for future in running:
            future.result()
    return outcome


def by_clients(clients: int, request: dict) -> Attack:
    """An attack of so many clients that send `request` again and again."""

    def attack(url: str, over: threading.Event) -> None:
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


def large_photo() -> bytes:
    return encoded(draw_photo(1, (4000, 3000)), "JPEG")


def empty_parts() -> dict:
    part = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n\r\n'
    return {"content": part * 80_000 + b"--b--\r\n", "headers": {"content-type": "multipart/form-data; boundary=b"}}


def many_images() -> dict:
    photo = base64.b64encode(encoded(draw_photo(2, (640, 480)), "JPEG")).decode()
    return {"json": {"instances": [{"b64": photo}] * 64}}


def damaged() -> dict:
    photo = bytearray(encoded(draw_photo(3), "JPEG"))
    photo[1000:1100] = bytes(100)
    return {"content": bytes(photo[:-2000])}


def many_scans() -> dict:
    photo = encoded(draw_photo(1, (4000, 3000)), "JPEG", progressive=True)
    return {"content": photo[:-2] + 2000 * photo[photo.rfind(b"\xff\xda") : -2][:40] + photo[-2:]}


def many_texts() -> dict:
    """64 PNGs of 8 kB, whose texts take 12 MB each once they are read."""
    info = PngImagePlugin.PngInfo()
    for i in range(3):
        info.add_itxt(f"k{i}", "a" * 1_000_000 + "\N{SLIGHTLY SMILING FACE}", zip=True)
    photo = base64.b64encode(encoded(draw_photo(4, (64, 48)), "PNG", pnginfo=info)).decode()
    return {"json": {"instances": [{"b64": photo}] * 64}}


ATTACKS: dict[str, Callable[[], Attack]] = {
    "nothing": lambda: lambda url, over: None,
    "a PNG of 6 kB and 49 megapixels, 8 clients": lambda: by_clients(8, {"content": bomb(7000, 7000)}),
    "that PNG, as an overlay at its own size, 8 clients": lambda: by_clients(8, overlay_of(bomb(7000, 7000))),
    "a JPEG of 12 megapixels, 32 clients": lambda: by_clients(32, {"content": large_photo()}),
    "that JPEG, as an overlay at its own size, 32 clients": lambda: by_clients(32, overlay_of(large_photo())),
    "a WebP of 36 megapixels, 4 clients": lambda: by_clients(
        4, {"content": encoded(Image.new("RGB", (6000, 6000)), "WEBP")}
    ),
    "forms of 80,000 empty parts, 4 clients": lambda: by_clients(4, empty_parts()),
    "20 MB of empty instances, 16 clients": lambda: by_clients(
        16, {"content": b'{"instances": [' + b"{}," * 6_900_000 + b"{}]}"}
    ),
    "JSON nested 10 million deep, 4 clients": lambda: by_clients(4, {"content": b'{"instances": ' + b"[" * 10_000_000}),
    "bodies that trickle, 100 clients": lambda: trickle,
    "requests of 64 images, 1 client": lambda: by_clients(1, many_images()),
    "requests of 64 images, 2 clients": lambda: by_clients(2, many_images()),
    "damaged photos, 8 clients": lambda: by_clients(8, damaged()),
    "a JPEG of 12 megapixels and 2,000 scans, 8 clients": lambda: by_clients(8, many_scans()),
    "64 PNGs with texts of 12 MB, 2 clients": lambda: by_clients(2, many_texts()),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_others_are_answered_and_memory_stays_within_the_limit(limited, name):
    kind, url, pid = limited
    outcome = beside(ATTACKS[name](), url, pid)
    print(f"\n| {name} | {outcome} |", end="")
    assert set(outcome.statuses) == {200}
    assert outcome.peak < LIMITS[kind]
