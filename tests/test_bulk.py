"""`python -m deployment.bulk`: every file gets a row, once, whatever happens, and the answers are the server's."""

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
from conftest import ROOT, draw_photo, encoded, uvicorn
from gcp_storage_emulator.server import create_server as create_storage_emulator
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from pyarrow import dataset, fs, parquet
from ray._private import ray_constants

from deployment import actors, answers, bulk, tables
from deployment.archive import make_archive
from deployment.config import Config
from deployment.export import write_config
from deployment.photos import Preprocessor
from deployment.protocol import Request
from deployment.server.processes import free_ports

# The command, which may be told to write a file whenever there are answers, and to read few images at a time: a run as
# short as the tests' would write one file, at its end.
COMMAND = """
import sys
from deployment import actors, bulk, tables
if sys.argv.pop(1) == "often":
    tables.FILE_SECONDS, actors.BLOCK_FILES = 0.5, 4
bulk.keep_terminal_clean()
bulk.main()
"""


@pytest.fixture(scope="module")
def archive(converted, tmp_path_factory) -> Path:
    """A model store with an archive for OpenVINO."""
    return archived(converted, tmp_path_factory.mktemp("archive"))


def archived(store: tuple, folder: Path, **settings) -> Path:
    config, source = store
    shutil.copytree(source, folder, dirs_exist_ok=True)
    write_config(dataclasses.replace(config, **settings), folder)
    make_archive(folder)
    return folder


def command(photos: Path | str, archive: Path, out: Path | str, *options: str, writes: str = "rarely") -> list[str]:
    argv = [sys.executable, "-c", COMMAND, writes, str(photos), f"--model-store={archive}", f"--out={out}"]
    return [*argv, *options]


def run(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments, **options), env=environment(), cwd=ROOT, capture_output=True, text=True)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def rows_in(out: Path) -> dict[str, dict]:
    """The rows in `out` by path, of which there is none twice."""
    rows = dataset.dataset([str(path) for path in files_in(out)]).to_table().to_pylist()
    paths = [row["path"] for row in rows]
    assert len(paths) == len(set(paths))
    return dict(zip(paths, rows, strict=True))


def files_in(out: Path) -> dict[Path, int]:
    """The files of answers in `out`, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in sorted(out.glob("[!.]*.parquet"))}


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def draw(folder: Path, good: int, broken: int, format: str = "PNG") -> Path:
    """`folder` with so many photos, of which several are the same, and so many files that are no images."""
    folder.mkdir(parents=True)
    photos = [encoded(draw_photo(seed), format) for seed in range(min(good, 20))]
    for i in range(good):
        (folder / f"{i:04}.{format.lower()}").write_bytes(photos[i % len(photos)])
    for i in range(broken):
        (folder / f"{(97 * i) % good:04}-broken.jpg").write_bytes(photos[0][: 50 * i])
    return folder


def ask(client: httpx.Client, data: bytes) -> httpx.Response:
    return client.post("/predictions/fastunet", content=data, headers={"Accept": "image/png"})


def test_every_file_gets_a_row_and_the_servers_mask(archive, tmp_path):
    photos = draw(tmp_path / "photos", 20, 2)
    (photos / "a folder").mkdir()
    for name in ("a folder/ünder 50%20 #1?.png", "no suffix"):
        shutil.copy(photos / "0001.png", photos / name)
    (photos / "request.json").write_text('{"instances": [{"b64": ""}, {"b64": ""}]}')  # an image is never taken for one
    (photos / ".hidden.png").touch()
    files = {str(path) for path in photos.rglob("*") if path.is_file() and not path.name.startswith(".")}
    out = photos / "answers"  # which are no images, when the command comes again
    done = run(photos, archive, out)
    assert done.returncode == 1, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == f"25 files, of which 0 are answered in {out}"
    assert re.fullmatch(r"25 of 25 images, [\d.]+ images/s, time left 0:00:00, 3 error\(s\)", lines[-2])
    assert lines[-1] == "3 of 25 images have an error"
    assert not done.stdout
    assert [line for line in lines if not re.match(r"\d+ (files|of \d+ images)", line)] == []  # nothing of Ray's
    rows = rows_in(out)
    assert rows.keys() == files
    errors = {Path(path).name: row["error"] for path, row in rows.items() if row["error"]}
    assert errors.keys() == {"0000-broken.jpg", "0017-broken.jpg", "request.json"}
    assert all(error["code"] == 400 and error["type"] == "BadImage" for error in errors.values())
    ports = dict(zip(("port", "metrics_port"), free_ports(2), strict=True))
    with uvicorn(archive, tmp_path, **ports) as url, httpx.Client(base_url=url) as client:
        for path, row in rows.items():
            answer = client.post(
                "/predictions/fastunet", content=Path(path).read_bytes(), headers={"Accept": "image/png"}
            )
            assert answer.content == row["png"] if answer.status_code == 200 else row["error"]
        path = photos / "0001.png"
        answer, row = client.post("/predictions/fastunet", content=path.read_bytes()).json(), rows[str(path)]
    assert {name: row[name] for name in ("shape", "names")} == {name: answer[name] for name in ("shape", "names")}
    assert dict(row["classes"]) == answer["classes"]

    before = files_in(out)
    again = run(photos, archive, out)
    assert again.returncode == 1 and files_in(out) == before
    assert again.stderr.splitlines() == [f"25 files, of which 25 are answered in {out}", lines[-1]]
    other = run(photos, archive, out, "--format=overlay")
    assert other.returncode == 2
    assert other.stderr == f"error: {out} has answers of another archive or other options: choose another --out\n"


def test_a_killed_run_goes_on_and_leaves_nothing_behind(archive, tmp_path):
    photos, out = draw(tmp_path / "photos", 150, 3), tmp_path / "out"
    process = start(photos, archive, out)
    wait_for(lambda: process.poll() is not None or files_in(out))
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) > 3 and not open_ports([psutil.Process(process.pid), *family])
    process.kill()
    process.wait()
    psutil.wait_procs(family, timeout=20)
    assert not [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]
    first, half = files_in(out), rows_in(out)
    assert 0 < len(half) < 153

    process = start(photos, archive, out)
    wait_for(lambda: process.poll() is not None or len(files_in(out)) > len(first))
    process.send_signal(signal.SIGINT)  # Ctrl-C
    _, log = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in log, log
    assert log.startswith(f"153 files, of which {len(half)} are answered in {out}\n")
    more = rows_in(out)
    assert len(half) < len(more) < 153 and half.items() <= more.items()

    done = run(photos, archive, out)
    assert done.returncode == 1 and done.stderr.endswith("\n3 of 153 images have an error\n")
    assert len(rows_in(out)) == 153 and first.items() <= files_in(out).items()  # what was there is as it was


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_text_is_a_row_with_an_error(archive, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    Path(os.fsdecode(bytes(photos) + b"/caf\xe9.png")).write_bytes(encoded(draw_photo(1)))
    done = run(photos, archive, out)
    assert done.returncode == 1 and done.stderr.endswith("\n1 of 1 images have an error\n"), done.stderr
    [(path, row)] = rows_in(out).items()
    assert path == f"{photos}/caf\\xe9.png" and row["error"] == bulk.UNREADABLE
    again = run(photos, archive, out)
    assert again.returncode == 1 and again.stderr.startswith("1 files, of which 1 are answered")


def start(*arguments, **options) -> subprocess.Popen:
    """The command under way, which writes a file twice a second."""
    argv = command(*arguments, **options, writes="often")
    return subprocess.Popen(argv, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)


def open_ports(family: list[psutil.Process]) -> list:
    """What of `family` can be reached from outside this machine."""
    pids = {process.pid for process in family}
    listening = [c for c in psutil.net_connections("tcp") if c.pid in pids and c.status == "LISTEN"]
    return [c for c in listening if not c.laddr.ip.removeprefix("::ffff:").startswith("127.")]


OPENER = """
import io, os, signal
from PIL import Image
def open_image(data):
    if data.startswith(b"kill"):
        os.kill(os.getpid(), signal.SIGKILL)  # as a decoder that crashes, or the system that lacks memory
    return Image.open(io.BytesIO(data)).convert("RGB")
"""


@pytest.mark.soak
def test_a_file_that_ends_the_process_or_is_gone_costs_no_other_its_answer(converted, tmp_path, monkeypatch):
    store = tmp_path / "store"
    store.mkdir()
    (store / "open_image.py").write_text(OPENER)
    archived(converted, store, opener=True)
    photos = draw(tmp_path / "photos", 40, 0)
    (photos / "0007.png").write_bytes(b"kill")
    listed = tables.sizes_in

    def with_one_more(files, folder):
        return listed(files, folder) | {f"{folder}/gone.png": 100}

    monkeypatch.setattr(tables, "sizes_in", with_one_more)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0")  # as the command sets them, for it alone
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
    with pytest.raises(SystemExit) as exit:
        bulk.main([str(photos), f"--model-store={store}", f"--out={tmp_path / 'out'}"])
    assert exit.value.code == 1
    errors = {Path(path).name: row["error"]["type"] for path, row in rows_in(tmp_path / "out").items() if row["error"]}
    assert errors == {"0007.png": "Unreadable", "gone.png": "Unreadable"}


@pytest.mark.soak
def test_two_thousand_photos(archive, tmp_path, record_property):
    """Killed at half and started again: all rows, each once, and the server's masks."""
    photos, out = draw(tmp_path / "photos", 1980, 20, "JPEG"), tmp_path / "out"
    process = start(photos, archive, out)
    wait_for(lambda: process.poll() is not None or len(files_in(out)) and len(rows_in(out)) > 900, 300)
    process.kill()
    process.wait()
    half, first = rows_in(out), files_in(out)
    done = run(photos, archive, out)
    print(f"\nkilled with {len(half)} rows; then:\n{done.stderr}")
    assert done.returncode == 1 and done.stderr.endswith("\n20 of 2000 images have an error\n")
    rows = rows_in(out)
    assert len(rows) == 2000 and half.items() <= rows.items() and first.items() <= files_in(out).items()
    ports = dict(zip(("port", "metrics_port"), free_ports(2), strict=True))
    with uvicorn(archive, tmp_path, **ports) as url, httpx.Client(base_url=url) as client:
        masks = {}  # by content
        for path, row in rows.items():
            data = Path(path).read_bytes()
            if data not in masks:
                answer = ask(client, data)
                masks[data] = answer.content if answer.status_code == 200 else None
            assert row["png"] == masks[data] and bool(row["error"]) == (masks[data] is None)


@pytest.fixture
def bucket(monkeypatch) -> Iterator[tuple]:
    """An empty bucket of an emulator of Cloud Storage, and what makes an address there of a folder's name."""
    [port] = free_ports(1)
    emulator = create_storage_emulator("127.0.0.1", port, in_memory=True, default_bucket="local-bucket")
    emulator.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    client = storage.Client(project="local-project", credentials=AnonymousCredentials())
    options = f"scheme=http&endpoint_override=127.0.0.1:{port}&retry_limit_seconds=30"
    yield client.bucket("local-bucket"), lambda folder: f"gs://anonymous@local-bucket/{folder}?{options}"
    emulator.stop()


def test_a_bucket_is_listed_and_written(bucket):
    bucket, at = bucket
    for name in ("photos/a.png", "photos/x/b 1.png", "photos/.hidden", "photos-old/c.png"):
        bucket.blob(name).upload_from_string(b"image")
    files, folder, prefix = tables.locate(at("photos/"))
    assert tables.sizes_in(files, folder) == {"local-bucket/photos/a.png": 5, "local-bucket/photos/x/b 1.png": 5}
    rows = pa.table({"path": [f"{prefix}local-bucket/photos/a.png"], "error": pa.array([None], tables.ERROR)})
    output = tables.Output(at("out"), "a model")
    output.start(2)
    output.add(rows)
    output.write()
    written = [blob.name for blob in bucket.list_blobs() if blob.name.startswith("out/")]
    assert len(written) == 1 and re.fullmatch(r"out/[\d-]+-\w{8}\.parquet", written[0])
    assert tables.Output(at("out"), "a model").paths == {"gs://local-bucket/photos/a.png"}
    with pytest.raises(ValueError, match="another archive or other options"):
        tables.Output(at("out"), "another model")


@pytest.mark.soak
def test_from_bucket_to_bucket(archive, tmp_path, bucket):
    bucket, at = bucket
    photos = draw(tmp_path / "photos", 40, 1)
    for path in photos.iterdir():
        bucket.blob(f"photos/{path.name}").upload_from_filename(path)
    done = run(at("photos"), archive, at("out"))
    assert done.returncode == 1 and done.stderr.endswith("\n1 of 41 images have an error\n"), done.stderr
    here = run(photos, archive, tmp_path / "out")
    assert here.returncode == 1
    files, folder, _ = tables.locate(at("out"))
    there = dataset.dataset(folder, filesystem=files).to_table().to_pylist()
    masks = {Path(path).name: row["png"] for path, row in rows_in(tmp_path / "out").items()}
    assert {row["path"].removeprefix("gs://local-bucket/photos/"): row["png"] for row in there} == masks


@contextlib.contextmanager
def two_nodes() -> Iterator:
    """A Ray cluster of two nodes, each with two cores, as this machine has."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        yield cluster, cluster.add_node(num_cpus=2)
    finally:
        cluster.shutdown()


@pytest.mark.soak
def test_a_node_that_is_lost_loses_and_doubles_nothing(archive, tmp_path):
    photos, out = draw(tmp_path / "photos", 1500, 5), tmp_path / "out"
    with two_nodes() as (cluster, second):
        argv = command(photos, archive, out, f"--address={cluster.address}", writes="often")
        process = subprocess.Popen(argv, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: process.poll() is not None or len(files_in(out)) > 1)
        assert process.poll() is None, process.communicate()
        wait_for(lambda: len(seconds_computed()) == 2 and min(seconds_computed().values()) > 5)
        print(f"\nseconds computed, by node: {seconds_computed()}; {len(rows_in(out))} rows; a node is killed")
        cluster.remove_node(second, allow_graceful=False)
        _, log = process.communicate(timeout=400)
        print(f"then:\n{log}")
    assert process.returncode == 1 and log.endswith("\n5 of 1505 images have an error\n")
    assert len(rows_in(out)) == 1505


def seconds_computed() -> dict[int, float]:
    """The seconds that actors of this process's cluster computed, by the process of their node."""
    seconds = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "MapWorker" in " ".join(process.cmdline()):
                seconds[process.ppid()] = process.cpu_times().user
    return seconds


# --- without Ray ---

OUTPUTS = {
    "classification": np.array([0.25, 0.75], np.float32),
    "multi-label": np.array([0.25, 0.75], np.float32),
    "regression": np.array([12.5, -1], np.float32),
    "points": np.array([0.5, -0.5, 0, 1], np.float32),
    "segmentation": np.array([[0, 1], [1, 1]], np.uint8),
}


@pytest.mark.parametrize("task", OUTPUTS)
def test_rows_hold_what_answers_hold(task, tmp_path):
    config = Config("", 2, [2, 2], task=task, classes=["cat", "dog"], threshold=0.5)
    format = "png" if task == "segmentation" else "json"
    answer = answers.make_answer(OUTPUTS[task], Preprocessor(config), Request([], format, top=1), (8, 8))
    schema = tables.schema_of(task, format if task == "segmentation" else "")
    output = tables.Output(str(tmp_path), "a model")
    output.start(1)
    output.add(pa.Table.from_pylist([{"path": "a.png"} | answer], schema))
    output.write()
    [row] = rows_in(tmp_path).values()
    maps = {name for name, value in answer.items() if isinstance(value, dict)}
    assert row == {"path": "a.png", "warning": None, "error": None} | answer | {
        name: list(answer[name].items()) for name in maps
    }


def test_a_folder_is_listed_without_what_links_lead_to(tmp_path):
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "1.png").write_bytes(b"image")
    (tmp_path / "photos" / "link.png").symlink_to("a/1.png")
    (tmp_path / "photos" / "nowhere.png").symlink_to("gone.png")
    (tmp_path / "photos" / "itself.png").symlink_to("itself.png")
    (tmp_path / "photos" / "loop").symlink_to(".")
    files, folder, _ = tables.locate(str(tmp_path / "photos"))
    assert tables.sizes_in(files, folder) == {f"{folder}/a/1.png": 5, f"{folder}/link.png": 5}
    with pytest.raises(FileNotFoundError, match="none"):
        tables.sizes_in(files, str(tmp_path / "none"))


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    rows = pa.table({"path": ["a.png"], "error": pa.array([None], tables.ERROR)})
    output = tables.Output(str(tmp_path), "a model")
    output.start(1)

    def half(table, path, filesystem):
        with filesystem.open_output_stream(path) as file:
            file.write(b"PAR1")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(parquet, "write_table", half)
        output.add(rows)
        with pytest.raises(OSError, match="no space left"):
            output.write()
    assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
    assert tables.Output(str(tmp_path), "a model").paths == set() and not [*tmp_path.iterdir()]


def test_wrong_use_gets_one_line(archive, tmp_path, capsys):
    photos, empty = draw(tmp_path / "photos", 1, 0), tmp_path / "empty"
    empty.mkdir()
    labels = tmp_path / "labels"
    labels.mkdir()
    shutil.copytree(archive, labels, dirs_exist_ok=True)
    config = dataclasses.replace(bulk.read_config(archive), task="classification")
    write_config(config, labels)
    make_archive(labels)
    for arguments, message in [
        ((empty / "none", archive), "none"),
        ((empty, archive), "no file in "),
        ((photos, empty), "no archive fastunet.mar in "),
        ((photos, labels, "--format=png"), "a model for classification gives no picture: leave out --format"),
        ((photos, archive, "--top=0"), "`top` must be a whole number above 0"),
        (("ftp://server/photos", archive), "ftp"),
    ]:
        with pytest.raises(SystemExit) as exit:
            bulk.main([str(arguments[0]), f"--model-store={arguments[1]}", "--out", str(empty / "o"), *arguments[2:]])
        said = capsys.readouterr().err
        assert exit.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and message in said
    assert not ray.is_initialized()


def test_one_of_several_archives_is_chosen_by_name(archive, tmp_path, capsys):
    for name in ("a", "b"):
        shutil.copy(archive / "fastunet.mar", tmp_path / f"{name}.mar")
    (tmp_path / "photos").mkdir()
    for options, message in (([], "choose with --name"), (["--name=b"], "no file in")):
        with pytest.raises(SystemExit):
            bulk.main([str(tmp_path / "photos"), f"--model-store={tmp_path}", f"--out={tmp_path / 'out'}", *options])
        assert message in capsys.readouterr().err


def test_an_error_without_words_is_named_by_its_class(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise TimeoutError

    monkeypatch.setattr(bulk, "find_archive", fail)
    with pytest.raises(SystemExit) as exit:
        bulk.main([str(tmp_path), "--out=out"])
    assert exit.value.code == 2 and capsys.readouterr().err == "error: TimeoutError\n"


def test_a_block_holds_as_many_files_as_it_may():
    sizes = {f"{i}": 1000 for i in range(40)} | {"big": 2**40, "a": 20 * 2**20, "b": 12 * 2**20, "c": 1}
    blocks = actors.blocks_of(sizes)
    assert [len(block) for block in blocks] == [32, 8, 1, 2, 1]
    assert [path for block in blocks for path in block] == list(sizes)


def test_addresses_of_buckets():
    files, path, prefix = tables.locate("s3://bucket/a/b/?region=eu-west-1")
    assert (type(files), path, prefix) == (fs.S3FileSystem, "bucket/a/b", "s3://")
    files, path, prefix = tables.locate("gs://anonymous@bucket/a/b")
    assert (type(files), path, prefix) == (fs.GcsFileSystem, "bucket/a/b", "gs://")


def test_pins_are_those_of_the_project():
    pins = (ROOT / "deployment/requirements-bulk.txt").read_text().splitlines()[2:]
    assert len(pins) == 3 and set(pins) <= set((ROOT / "requirements.txt").read_text().splitlines())
