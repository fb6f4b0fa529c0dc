"""The serving image, built and run for real: `pytest -m image -s tests/test_image.py`, as root, on Linux.

Where no container engine runs, buildah still builds a Dockerfile and runs its image in a chroot. This test does that on
a base image that debootstrap makes from Debian's packages, the same ones as in Docker's `debian:bookworm-slim`.
"""

import base64
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
import yaml
from conftest import draw_photo, encoded
from gcp_storage_emulator.server import create_server as create_storage_emulator
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from pyarrow import dataset

from deployment.archive import make_archive
from deployment.config import read_config
from deployment.export import write_config
from deployment.export.convert import convert
from deployment.handler import Handler
from deployment.server.processes import free_ports
from deployment.server.torchserve import is_ready
from tests.test_ai_platform import photos, reference  # noqa: F401

pytestmark = [pytest.mark.image, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[1]
BASE, IMAGE = "localhost/debian-bookworm", "localhost/fastunet-test"
BUILDAH = ["buildah", "--storage-driver=overlay"]
# Settings of this machine's network, by the names that pip, uv and OpenSSL read them: build secret, variable.
SECRETS = {"pip": "PIP_CONFIG_FILE", "uv": "UV_CONFIG_FILE", "ca": "SSL_CERT_FILE"}


def buildah(*arguments: str | Path, **options) -> str:
    return subprocess.run([*BUILDAH, *arguments], check=True, stdout=subprocess.PIPE, text=True, **options).stdout


@pytest.fixture(scope="module", params=["torchserve", "uvicorn", "openvino"])
def kind(request) -> str:
    """Which image: by the server in it, or the one that serves OpenVINO's models alone."""
    return request.param


@pytest.fixture(scope="module")
def stores(kind, model_store, next_version, camvid_folder, tmp_path_factory) -> dict[str, Path]:
    """The model stores of versions 1 and 2, as the image `kind` serves them."""
    versions = {"1": model_store, "2": next_version}
    if kind == "openvino":
        for version, store in versions.items():
            versions[version] = folder = tmp_path_factory.mktemp("openvino")
            shutil.copy(store / "fastunet.pth", folder)
            write_config(convert(read_config(store), folder, "int8", camvid_folder, max_drop=100), folder)
            make_archive(folder)
    return versions


@pytest.fixture(scope="module")
def expected(kind, stores, request):
    """A function from a version and a photo to its mask: `learn.predict`'s, or what OpenVINO gives in this process."""
    if kind != "openvino":
        return request.getfixturevalue("reference")
    handlers = {version: Handler() for version in stores}
    for version, handler in handlers.items():
        handler.load(stores[version])

    def mask_of(version: str, photo: bytes) -> np.ndarray:
        job = handlers[version].preprocess({"body": photo})
        handlers[version].inference(job.items)
        return job.items[0].output

    return mask_of


@pytest.fixture(scope="module")
def image(kind, stores, tmp_path_factory) -> dict:
    """The configuration of the image `kind`, once it is built with version 1 of the model in it."""
    size, config = build(
        tmp_path_factory.mktemp("context"),
        stores["1"] / "fastunet.mar",
        "RUNTIME=openvino" if kind == "openvino" else f"SERVER={kind}",
    )
    assert size < 500e6 or kind != "openvino"
    return config


def build(context: Path, archive: Path, *chosen: str) -> tuple[int, dict]:
    """Build the image with `archive` in it, of a copy of the repository in `context`; its size and configuration."""
    missing = [tool for tool in ("buildah", "debootstrap") if not shutil.which(tool)]
    if missing or os.geteuid() != 0:
        pytest.fail(
            "building the image without a container engine needs root and two tools of Debian: "
            "`sudo apt-get install --no-install-recommends buildah debootstrap`, then `sudo make image-test`"
        )
    if not buildah("images", "--quiet", "--filter", f"reference={BASE}"):
        make_base()
    for name in ("Dockerfile", ".dockerignore", "constraints.txt", "torch-builds.txt"):
        shutil.copy(ROOT / name, context)
    shutil.copytree(ROOT / "deployment", context / "deployment")
    shutil.copytree(ROOT / "notebook", context / "notebook")  # must not get in
    (context / "model_store").mkdir()
    shutil.copy(archive, context / "model_store")
    secrets = [f"--secret=id={id},src={os.environ[name]}" for id, name in SECRETS.items() if os.environ.get(name)]
    arguments = [f"--build-arg={argument}" for argument in (f"BASE={BASE}", *chosen)]
    start = time.monotonic()
    subprocess.run(
        [*BUILDAH, "bud", "--isolation=chroot", "--format=docker", "--layers", *arguments, *secrets, "--tag", IMAGE,
         context], check=True,
    )  # fmt: skip
    print(f"\n{' '.join(chosen)}: built in {time.monotonic() - start:.0f} s")
    size = print_layers()
    return size, json.loads(buildah("inspect", "--type=image", IMAGE))["Docker"]["config"]


def make_base() -> None:
    """Debian 12 from its own packages, as a local image, like `bookworm-slim` without manuals and translations."""
    with tempfile.TemporaryDirectory() as root:
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", root], check=True)
        subprocess.run(["chroot", root, "apt-get", "clean"], check=True)
        for folder in ("usr/share/doc", "usr/share/info", "usr/share/locale", "usr/share/man", "var/lib/apt/lists"):
            for path in (Path(root) / folder).iterdir():
                subprocess.run(["rm", "-r", path], check=True)
        container = buildah("from", "scratch").strip()
        mount = buildah("mount", container).strip()
        subprocess.run(["cp", "--archive", f"{root}/.", mount], check=True)
        buildah("umount", container)
        buildah("commit", "--rm", "--format=docker", container, BASE)


def print_layers() -> int:
    """Sizes of the image's layers beside the instructions that made them (what `docker history` shows); their sum."""
    info = json.loads(buildah("inspect", "--type=image", IMAGE))
    store = Path(json.loads(buildah("info"))["store"]["GraphRoot"])
    layers = json.loads((store / "overlay-layers" / "layers.json").read_text())
    sizes = {layer["diff-digest"]: layer["diff-size"] for layer in layers if "diff-digest" in layer}
    digests = iter(info["Docker"]["rootfs"]["diff_ids"])
    total = 0
    for step in info["History"]:
        if not step.get("empty_layer"):
            size = sizes[next(digests)]
            total += size
            print(f"{size / 1e6:9.1f} MB  {step['created_by'].removeprefix('/bin/sh -c ')[:90]}")
    print(f"{total / 1e6:9.1f} MB  in all")
    return total


@pytest.fixture
def container():
    """Runs the image's own command as its own user; yields a function of the management port and the environment."""
    running: list[tuple[str, subprocess.Popen]] = []

    def start(config: dict, management_port: int, **environment: str) -> subprocess.Popen:
        name = buildah("from", IMAGE).strip()
        settings = [f"--env={key}={value}" for key, value in environment.items()]
        [metrics_port] = free_ports(1)  # a chroot shares the host's ports: the usual ones may be taken
        ports = [f"--management-port={management_port}", f"--metrics-port={metrics_port}"]
        command = [*BUILDAH, "run", "--isolation=chroot", *settings, name, "--", *config["Entrypoint"], *ports]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running.append((name, process))
        return process

    yield start
    for name, process in running:
        for p in [psutil.Process(process.pid), *descendants(process)] if process.poll() is None else []:
            p.kill()
        process.wait()
        buildah("rm", name)


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def wait(process: subprocess.Popen, condition, timeout: float = 300) -> float:
    """Seconds until `condition()` is true for the first time."""
    start = time.monotonic()
    while not condition():
        if process.poll() is not None or time.monotonic() - start > timeout:
            process.kill()
            pytest.fail(f"the container ended or was not ready within {timeout} s:\n{process.stdout.read()}")
        time.sleep(0.1)
    return time.monotonic() - start


def is_healthy(url: str) -> bool:
    try:
        return requests.get(f"{url}/ping", timeout=10).status_code == 200
    except requests.ConnectionError:
        return False


def mask(url: str, photo: bytes) -> np.ndarray:
    """The mask of one photo, asked for as AI Platform asks."""
    body = {"instances": [{"b64": base64.b64encode(photo).decode()}]}
    answer = requests.post(f"{url}/predictions/fastunet", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    [prediction] = answer.json()["predictions"]
    return np.frombuffer(base64.b64decode(prediction["base64_prediction"]), np.uint8).reshape(prediction["shape"])


def test_serves_and_stops(image, kind, container, photos, expected):  # noqa: F811
    assert image["User"] == "serve" and image["Healthcheck"]["Test"] == [
        "CMD",
        "python",
        "-m",
        "deployment.serve",
        "--check",
    ]
    assert image["Labels"]["torch_backend"] == "cpu"
    port, management = free_ports(2)
    url = f"http://127.0.0.1:{port}"
    process = container(image, management, AIP_HTTP_PORT=str(port))
    started = wait(process, lambda: is_healthy(url))
    assert kind != "torchserve" or is_ready(management)
    print(f"\n{kind}: {started:.1f} s from the container's start to the first 200 of /ping")
    assert all(np.array_equal(mask(url, photo), expected("1", photo)) for photo in photos)

    # what the container's first process would be
    main = next(p for p in descendants(process) if p.cmdline()[1:3] == ["-m", "deployment.serve"])
    assert ("java" in {p.name() for p in descendants(process)}) == (kind == "torchserve")
    servers = [main, *main.children(recursive=True)]
    assert main.cmdline()[3] == f"--management-port={management}"
    assert len(servers) >= 3 if kind == "torchserve" else servers == [main]
    assert {p.uids().real for p in servers} == {1000}
    open_ports = {c.laddr for p in servers for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    outside = {address.port for address in open_ports if not address.ip.endswith("127.0.0.1")}
    assert outside == {port}  # everything but predictions and health stays inside

    main.send_signal(signal.SIGTERM)
    log, _ = process.communicate(timeout=90)
    assert process.returncode == 0, log
    assert not psutil.wait_procs(servers, timeout=10)[1]
    assert "Traceback" not in log and "Exception" not in log, log


def test_fetches_the_archive_at_start(image, container, stores, photos, expected, monkeypatch):  # noqa: F811
    port, management, storage_port = free_ports(3)
    url, emulator = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{storage_port}"
    with create_storage_emulator("127.0.0.1", storage_port, in_memory=True, default_bucket="bucket"):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator)
        client = storage.Client(project="local", credentials=AnonymousCredentials())
        client.bucket("bucket").blob("models/fastunet.mar").upload_from_filename(stores["2"] / "fastunet.mar")
        process = container(
            image,
            management,
            AIP_HTTP_PORT=str(port),
            AIP_STORAGE_URI="gs://bucket/models",
            STORAGE_EMULATOR_HOST=emulator,
        )
        wait(process, lambda: is_healthy(url))
        assert all(np.array_equal(mask(url, photo), expected("2", photo)) for photo in photos)


def test_holds_what_serving_needs_and_no_more(image, kind, container):
    name = buildah("from", IMAGE).strip()
    try:
        root = Path(buildah("mount", name).strip())
        files = {str(p.relative_to(root / "app")) for p in (root / "app").rglob("*") if p.is_file()}
        settings = {"config.properties", "log4j2.xml", "openapi.yaml", "try.html"}
        modules = {str(p.relative_to(ROOT)) for folder in (".", "runtime", "server")
                   for p in (ROOT / "deployment" / folder).glob("*.py")}  # fmt: skip
        others = {"model_store/fastunet.mar"}
        others |= {f"deployment/requirements{which}.txt" for which in ("", "-openvino", "-bulk")}
        assert files == modules | {f"deployment/server/{name}" for name in settings} | others
        packages = {p.name.split("-")[0] for p in (root / "opt/venv").rglob("*.dist-info")}
        assert {"openvino", "starlette", "uvicorn"} <= packages
        assert (packages & {"torch", "torchvision"} == set()) == (kind == "openvino")
        [libraries] = root.glob("opt/venv/lib/*/site-packages/openvino/libs")
        plugins = {p.name for pattern in ("*_intel_*_plugin.so", "*_frontend.so.*") for p in libraries.glob(pattern)}
        assert {name.split(".")[0] for name in plugins} == {"libopenvino_intel_cpu_plugin", "libopenvino_ir_frontend"}
        assert ("torchserve" in packages) == (kind == "torchserve")
        assert not packages & {"fastai", "jupyter", "notebook", "triton", "pip", "uv"}
        programs = {p.name for p in (root / "usr/bin").iterdir()}
        assert ("java" in programs) == (kind == "torchserve")
        assert not programs & {"gcc", "cc", "g++", "clang", "make", "nvcc"}
    finally:
        buildah("rm", name)


# What KubeRay does with deployment/kuberay.yaml, on one machine: a token, a head that computes nothing, a worker, and
# the job, which it submits through the dashboard once both are well. The ports: of the cluster, of the dashboard, of
# two agents.
CLUSTER = """
trap 'kill $worker $head; wait' EXIT
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN={token}
well() {{
    until wget -q -T 10 -O - http://127.0.0.1:$1/api/local_raylet_healthz; do kill -0 $2 || exit 9; sleep 1; done
}}
ray start --block --head --node-ip-address=127.0.0.1 --port={0} --num-cpus=0 --disable-usage-stats \\
    --dashboard-port={1} --dashboard-agent-listen-port={2} &
head=$!
well {2} $head
ray start --block --address=127.0.0.1:{0} --node-ip-address=127.0.0.1 --num-cpus=2 --disable-usage-stats \\
    --dashboard-agent-listen-port={3} &
worker=$!
well {3} $worker
ray job submit --address=http://127.0.0.1:{1} -- {command}
"""


def test_the_image_of_bulk_is_a_node_of_ray(converted, tmp_path):
    """`make image RUNTIME=openvino BULK=1`: the command on one machine, and the job of kuberay.yaml on a cluster."""
    config, store = converted
    write_config(config, store)
    make_archive(store)
    (tmp_path / "context").mkdir()
    build(tmp_path / "context", store / "fastunet.mar", "RUNTIME=openvino", "BULK=1")
    pictures, out = tmp_path / "photos", tmp_path / "out"
    for folder in (pictures, out):
        folder.mkdir()
    for i in range(12):
        (pictures / f"{i}.png").write_bytes(encoded(draw_photo(i)) if i else b"broken")
    tmp_path.chmod(0o755)
    out.chmod(0o777)  # the container's user is not this one
    entrypoint = yaml.safe_load((ROOT / "deployment/kuberay.yaml").read_text())["spec"]["entrypoint"]
    entrypoint = entrypoint.replace("gs://BUCKET/photos", "/photos").replace("gs://BUCKET/answers", "/out/cluster")
    cluster = CLUSTER.format(*free_ports(4), token=secrets.token_hex(32), command=entrypoint)
    name = buildah("from", IMAGE).strip()
    try:
        for command in (["sh", "-c", cluster], ["python", "-m", "deployment.bulk", "/photos", "--out=/out/alone"]):
            volumes = [f"--volume={pictures}:/photos:ro", f"--volume={out}:/out"]
            done = subprocess.run(
                [*BUILDAH, "run", "--isolation=chroot", *volumes, name, "--", *command],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            print(done.stdout)
            assert done.returncode == 1 and "1 of 12 images have an error\n" in done.stdout
    finally:
        buildah("rm", name)
    alone, together = (dataset.dataset(out / which).to_table().sort_by("path") for which in ("alone", "cluster"))
    assert len(alone) == 12 and alone.equals(together)
    masks = [mask for mask in alone["png"].to_pylist() if mask]
    assert len(set(masks)) == 11
