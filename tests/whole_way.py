"""The whole way on a machine without make: `python -m tests.whole_way` trains, exports, proves, archives and serves.

It needs what deployment/requirements.txt has, fastai and torch-model-archiver; no pytest. CI runs it where the tests do
not run, on macOS and Windows.
"""

import base64
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

from deployment.server.processes import free_ports

ROOT = Path(__file__).parents[1]
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
START = 120  # seconds that the server has


def run(*command: object) -> None:
    """Runs Python with `command` in the repository; CalledProcessError where it fails."""
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def ask(url: str, photo: Path) -> np.ndarray:
    """The server's mask of a photo, uint8 (height, width)."""
    with DIRECT.open(urllib.request.Request(url, photo.read_bytes(), method="POST"), timeout=60) as answer:
        said = json.load(answer)
    return np.frombuffer(base64.b64decode(said["base64_prediction"]), np.uint8).reshape(said["shape"])


def wait_for(server: subprocess.Popen, url: str) -> None:
    """Returns once `url` answers; RuntimeError where the server ends or takes too long."""
    end = time.monotonic() + START
    while server.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), DIRECT.open(url, timeout=5):
            return
        time.sleep(0.2)
    raise RuntimeError("the server does not answer")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        farm, store = Path(scratch, "farm"), Path(scratch, "store")
        run("tests/stranger.py", farm)
        run("-m", "deployment.export", farm / "theirs.pkl", "--trust", "--out", store, "--check", farm / "photos")
        run("-m", "deployment.archive", store)
        port, metrics = free_ports(2)
        command = ["-m", "deployment.serve", "--server", "uvicorn", "--model-store", store]
        command += [f"--port={port}", f"--metrics-port={metrics}"]
        server = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
        try:
            wait_for(server, f"http://127.0.0.1:{port}/ping")
            for i in range(3):
                mask = ask(f"http://127.0.0.1:{port}/predictions/fastunet", farm / "photos" / f"{i}.png")
                expected = np.array(Image.open(farm / f"expected_{i}.png"))
                if not np.array_equal(mask, expected):
                    sys.exit(f"error: {np.sum(mask != expected)} pixels of photo {i} differ from learn.predict's")
        finally:
            server.terminate()
            server.wait(60)
    print("three served masks are learn.predict's, pixel for pixel")


if __name__ == "__main__":
    main()
