"""What is measured: each contender is a context manager that serves on loopback and yields the URL to post photos to.

All serve the same weights. `prepare` writes what they need into a folder: one model store per runtime and one for the
baseline, and the learner.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from deployment.archive import make_archive
from deployment.config import Config, read_config
from deployment.export import write_config
from deployment.export.convert import convert
from deployment.runtime import cores
from deployment.server.processes import free_ports, started
from deployment.server.torchserve import DIRECT, java

HERE = Path(__file__).parent
ROOT = HERE.parent
PEERS_PYTHON = HERE / ".venv" / "bin" / "python"
FASTEST = "openvino-int8"
OURS = {  # on TorchServe: runtime and precision
    "eager": ("eager", "fp32"),
    "openvino-fp32": ("openvino", "fp32"),
    "openvino-bf16": ("openvino", "bf16"),
    FASTEST: ("openvino", "int8"),
}
UVICORN = {f"uvicorn-{precision}": f"openvino-{precision}" for precision in ("fp32", "bf16", "int8")}  # same stores
UVICORN["uvicorn-int8-fast"] = FAST = f"{FASTEST}-fast"  # large JPEGs decoded at a fraction of their size
BASELINES = ("baseline", "baseline-1-thread")
CHOSEN = ("fastapi", "litserve", "bentoml", "ray")  # that may run as one process, or as one for each core
PEERS = ("fastai", *CHOSEN)
ALONE = ("in-process", "limit")  # without a server: see benchmark.limit
ALL = (*BASELINES, "fastai", *OURS, *UVICORN, *CHOSEN, *ALONE)


def store_of(name: str) -> str:
    """The folder of the model that the contender `name` serves."""
    if name in BASELINES:
        return "baseline"
    return UVICORN.get(name, FASTEST if name in (*CHOSEN, *ALONE) else name)


# --- models ---


def read_store(model_store: Path, names: list[str]) -> Config:
    """The configuration of the model in `model_store`, which has all that the contenders `names` are made of.

    Raises:
        FileNotFoundError: it lacks the exported model or the learner.
        RuntimeError: its configuration is of another version of this project.
    """
    for file in ("fastunet.pth", "model-config.yaml", *(["learner.pkl"] if "fastai" in names else [])):
        if not (model_store / file).is_file():
            raise FileNotFoundError(f"no {model_store / file}: run `make demo` first")
    try:
        return read_config(model_store)
    except ValueError as error:
        raise RuntimeError(f"{error}: run `make demo` again") from None


def prepare(names: list[str], model_store: Path, folder: Path, calibrate: Path) -> None:
    """Write into `folder` what the contenders `names` serve, made of `model_store`: NAME/fastunet.mar and its parts.

    What is there already is kept while it is newer than the weights and the code.

    Raises:
        FileNotFoundError, RuntimeError: as `read_store`, and when OpenVINO or NNCF is missing.
        deployment.export.ExportError: int8 loses too much accuracy on the photos in `calibrate`.
        deployment.archive.ArchiveError: an archive cannot be made.
    """
    config, weights = read_store(model_store, names), model_store / "fastunet.pth"
    stores = {store_of(name) for name in names}
    if FAST in stores:
        stores.add(FASTEST)
    for name in [name for name in OURS if name in stores]:
        store = folder / name
        if is_fresh(store, weights):
            continue
        store.mkdir(parents=True, exist_ok=True)
        shutil.copy(weights, store)
        kind, precision = OURS[name]
        served = dataclasses.replace(config, runtime=kind, precision=precision, accuracy=None)
        if kind == "openvino":
            served = convert(served, store, precision, calibrate)
        write_config(served, store)
        make_archive(store)
    if FAST in stores and not is_fresh(folder / FAST, weights):
        shutil.copytree(folder / FASTEST, folder / FAST, dirs_exist_ok=True)
        write_config(dataclasses.replace(read_config(folder / FASTEST), decode="fast"), folder / FAST)
        make_archive(folder / FAST)
    if "baseline" in stores and not is_fresh(folder / "baseline", weights):
        store = folder / "baseline"
        store.mkdir(parents=True, exist_ok=True)
        shutil.copy(weights, store)
        (store / "baseline.json").write_text(json.dumps(dataclasses.asdict(config)))
        archive_baseline(store)
    if "fastai" in names:
        shutil.copy(model_store / "learner.pkl", folder)


def is_fresh(store: Path, weights: Path) -> bool:
    """Whether the archive in `store` is newer than the weights and than all code that it was made by and of."""
    archive = store / "fastunet.mar"
    sources = [weights, HERE / "baseline_handler.py", *(ROOT / "deployment").rglob("*.py")]
    return archive.is_file() and archive.stat().st_mtime > max(path.stat().st_mtime for path in sources)


def archive_baseline(store: Path) -> None:
    """Make `store`/fastunet.mar with the baseline's handler, of the weights and the settings in `store`."""
    options = {
        "model-name": "fastunet",
        "version": "1.0",
        "handler": HERE / "baseline_handler.py",
        "model-file": ROOT / "deployment" / "model.py",
        "serialized-file": store / "fastunet.pth",
        "extra-files": store / "baseline.json",
        "export-path": store,
    }
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--force"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with tempfile.TemporaryDirectory() as scratch:  # it works in $TMPDIR/fastunet, which two at once would share
        subprocess.run(command, check=True, env=os.environ | {"TMPDIR": scratch}, capture_output=True)


# --- servers ---


@contextlib.contextmanager
def contender(name: str, folder: Path, workers: int = 1) -> Iterator[str]:
    """Start the contender `name` with what `prepare` wrote into `folder`; yields the URL of its predictions.

    `workers` is how many processes hold the model, for those in CHOSEN.

    Raises:
        RuntimeError: it ended or did not answer in time; the message holds its last lines.
    """
    if name in BASELINES:
        with baseline(folder / "baseline", threads=1 if name == "baseline-1-thread" else None) as url:
            yield url
    elif name in OURS or name in UVICORN:
        port, management, metrics = free_ports(3)
        argv = [sys.executable, "-m", "deployment.serve", f"--model-store={folder / store_of(name)}"]
        argv += [f"--server={'torchserve' if name in OURS else 'uvicorn'}", f"--port={port}"]
        argv += [f"--management-port={management}", f"--metrics-port={metrics}"]
        with server(argv, port, timeout=300):
            yield f"http://127.0.0.1:{port}/predictions/fastunet"
    else:
        port = free_ports(1)[0]
        model = folder if name == "fastai" else folder / store_of(name)
        argv = [str(PEERS_PYTHON), "-m", f"benchmark.peers.with_{name}", str(model), str(port)]
        with server(argv, port, workers=workers, threads=cores() // workers):
            yield f"http://127.0.0.1:{port}/predict"


@contextlib.contextmanager
def baseline(store: Path, threads: int | None = None) -> Iterator[str]:
    """TorchServe as its own command starts it, with every setting at its default but the addresses.

    `threads` is OMP_NUM_THREADS, for each of its workers; None leaves it to torch.
    """
    import ts

    home = Path(ts.__file__).parent
    port, management, metrics, grpc, grpc_management, worker = free_ports(6)
    with tempfile.TemporaryDirectory() as scratch:
        settings = Path(scratch, "config.properties")
        settings.write_text(
            f"inference_address=http://127.0.0.1:{port}\nmanagement_address=http://127.0.0.1:{management}\n"
            f"metrics_address=http://127.0.0.1:{metrics}\ngrpc_inference_port={grpc}\n"
            f"grpc_management_port={grpc_management}\ninitial_worker_port={worker}\n"
        )
        argv = [java(), f"-Dmodel_server_home={home.parent}", "-cp", f"{home}/frontend/*"]
        argv += ["org.pytorch.serve.ModelServer", "--python", sys.executable, "-f", str(settings), "-s", str(store)]
        argv += ["-ncs", "-m", "fastunet=fastunet.mar", "--disable-token"]
        with server(argv, port, threads=threads):
            yield f"http://127.0.0.1:{port}/predictions/fastunet"


@contextlib.contextmanager
def server(
    argv: list[str], port: int, timeout: float = 120, workers: int = 1, threads: int | None = None
) -> Iterator[None]:
    """The command `argv` as a server on `port`; it and all its processes end with the block, or with this process.

    It gets `workers` as WORKERS, and `threads` as OMP_NUM_THREADS; None leaves that unset.
    """
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'notebook'}",
        "WORKERS": str(workers),
        "RAY_USAGE_STATS_ENABLED": "0",
        "BENTOML_DO_NOT_TRACK": "True",
    }
    env.pop("OMP_NUM_THREADS", None)
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "log")
        streams = {"stdout": (output := log.open("wb")), "stderr": subprocess.STDOUT}
        with output, started(argv, env | {"TMPDIR": scratch}, cwd=scratch, **streams) as process:
            try:
                deadline = time.monotonic() + timeout
                while not listens(port):
                    if process.poll() is not None or time.monotonic() > deadline:
                        lines = ["Its last lines:", *log.read_text(errors="replace").splitlines()[-30:]]
                        raise RuntimeError("\n".join([f"{' '.join(argv[:4])} … does not listen.", *lines]))
                    time.sleep(0.05)
                yield
            finally:
                end(process)


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def end(process: subprocess.Popen) -> None:
    """End `process` and every process below it: asked first, then killed."""
    family = [process]
    with contextlib.suppress(psutil.NoSuchProcess):
        family += psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=15)
    for member in family[1:]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    if process.poll() is None:
        process.kill()
        process.wait()


def first_answer(url: str, photo: bytes, timeout: float = 300) -> bytes:
    """The first good answer to `photo`, asked for again and again.

    Raises:
        TimeoutError: there was none in time.
    """
    request = urllib.request.Request(url, photo, {"Content-Type": "application/octet-stream"})
    deadline = time.monotonic() + timeout
    while True:
        try:
            with DIRECT.open(request, timeout=timeout) as answer:
                return answer.read()
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url} gave no answer within {timeout:.0f} s: {error}") from None
            time.sleep(0.1)


def install_peers() -> None:
    """Make the peers' environment when it is missing or older than its requirements."""
    stamp, requirements = HERE / ".venv" / "installed", HERE / "requirements.txt"
    if stamp.is_file() and stamp.stat().st_mtime > requirements.stat().st_mtime:
        return
    print("installing the peers into benchmark/.venv", flush=True)
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--allow-existing", "--python", sys.executable, HERE / ".venv"], check=True)
    subprocess.run([*uv, "pip", "install", "--quiet", "--python", PEERS_PYTHON, "-r", requirements], check=True)
    stamp.touch()
