"""What is measured: each contender is a context manager that serves on loopback and yields the URL to post photos to.

All serve the same weights. `prepare` writes what they need into a folder: one model store per runtime and one for the
baseline, and the learner.
"""

import contextlib
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
import yaml

from deployment import runtime
from deployment.serve import cores, free_ports, java, started, torchserve

HERE = Path(__file__).parent
ROOT = HERE.parent
PEERS_PYTHON = HERE / ".venv" / "bin" / "python"
FASTEST = "openvino-int8"
OURS = {  # runtime and precision
    "eager": ("eager", "fp32"),
    "compile": ("compile", "fp32"),
    "openvino-fp32": ("openvino", "fp32"),
    FASTEST: ("openvino", "int8"),
}
PEERS = ("fastai", "fastapi", "litserve", "bentoml", "ray")
ALL = ("baseline", "fastai", *OURS, "fastapi", "litserve", "bentoml", "ray", "limit")


# --- models ---


def prepare(names: list[str], model_store: Path, folder: Path, calibrate: Path) -> None:
    """Write into `folder` what the contenders `names` serve, made of `model_store`: NAME/fastunet.mar and its parts.

    What is there already is kept while it is newer than the weights.

    Raises:
        FileNotFoundError: `model_store` lacks the exported model or the learner.
        deployment.runtime.ConversionError: int8 loses too much accuracy on the photos in `calibrate`.
    """
    weights, settings = model_store / "fastunet.pth", model_store / "model-config.yaml"
    for path in (weights, settings, *([model_store / "learner.pkl"] if "fastai" in names else [])):
        if not path.is_file():
            raise FileNotFoundError(f"no {path}: run `make demo` first")
    config = yaml.safe_load(settings.read_text())
    needed = [name for name in OURS if name in names]
    if FASTEST not in needed and {*PEERS, "limit"} & {*names}:
        needed.append(FASTEST)
    for name in needed:
        store = folder / name
        if is_fresh(store, weights):
            continue
        kind, precision = OURS[name]
        handler = config["handler"] | {"runtime": kind, "precision": precision}
        if kind == "openvino":
            handler = runtime.convert(config["handler"], weights, store, precision, calibrate)
        else:
            store.mkdir(parents=True, exist_ok=True)
            shutil.copy(weights, store)
        (store / "model-config.yaml").write_text(yaml.safe_dump(config | {"handler": handler}, sort_keys=False))
        archive(store, handler)
    if "baseline" in names and not is_fresh(folder / "baseline", weights):
        store = folder / "baseline"
        store.mkdir(parents=True, exist_ok=True)
        shutil.copy(weights, store)
        (store / "baseline.json").write_text(json.dumps(config["handler"]))
        command = ["--handler", HERE / "baseline_handler.py", "--extra-files", store / "baseline.json"]
        archiver(store, [*command, "--serialized-file", store / "fastunet.pth"])
    if "fastai" in names:
        shutil.copy(model_store / "learner.pkl", folder)


def is_fresh(store: Path, weights: Path) -> bool:
    made = store / "fastunet.mar"
    return made.is_file() and made.stat().st_mtime > weights.stat().st_mtime


def archive(store: Path, handler: dict) -> None:
    """The archive of one of our runtimes, as the README makes it by hand."""
    extra = []
    if handler["runtime"] != "eager":
        extra.append(ROOT / "deployment" / "runtime.py")
    if handler["runtime"] == "openvino":
        extra.append(store / "fastunet.xml")
    serialized = store / ("fastunet.bin" if handler["runtime"] == "openvino" else "fastunet.pth")
    command = ["--handler", ROOT / "deployment" / "handler.py", "--serialized-file", serialized]
    command += ["--config-file", store / "model-config.yaml"]
    archiver(store, [*command, *(["--extra-files", ",".join(map(str, extra))] if extra else [])])


def archiver(store: Path, options: list) -> None:
    with tempfile.TemporaryDirectory() as scratch:  # it works in $TMPDIR/fastunet, which two at once would share
        subprocess.run(
            [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", "fastunet", "--version", "1.0"]
            + ["--model-file", ROOT / "deployment" / "model.py", "--export-path", store, "--force", *options],
            check=True,
            env=os.environ | {"TMPDIR": scratch},
            capture_output=True,
        )


# --- servers ---


@contextlib.contextmanager
def contender(name: str, folder: Path) -> Iterator[str]:
    """Start the contender `name` with what `prepare` wrote into `folder`; yields the URL of its predictions.

    Raises:
        RuntimeError: it ended or did not answer in time; the message holds its last lines.
    """
    if name in OURS:
        with torchserve(folder / name, timeout=300) as url:
            yield f"{url}/predictions/fastunet"
    elif name == "baseline":
        with baseline(folder / name) as url:
            yield url
    else:
        port = free_ports(1)[0]
        model = folder if name == "fastai" else folder / FASTEST
        argv = [str(PEERS_PYTHON), "-m", f"benchmark.peers.with_{name}", str(model), str(port)]
        with server(argv, port):
            yield f"http://127.0.0.1:{port}/predict"


@contextlib.contextmanager
def baseline(store: Path) -> Iterator[str]:
    """TorchServe as its own command starts it, with every setting at its default but the addresses."""
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
        with server(argv, port):
            yield f"http://127.0.0.1:{port}/predictions/fastunet"


@contextlib.contextmanager
def server(argv: list[str], port: int, timeout: float = 120) -> Iterator[None]:
    """The command `argv` as a server on `port`; it and all its processes end with the block, or with this process."""
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'notebook'}",
        "OMP_NUM_THREADS": str(cores()),
        "RAY_USAGE_STATS_ENABLED": "0",
        "BENTOML_DO_NOT_TRACK": "True",
    }
    if argv[0] != str(PEERS_PYTHON):
        env.pop("OMP_NUM_THREADS")  # the baseline leaves this to torch
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
            with urllib.request.urlopen(request, timeout=timeout) as answer:
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
