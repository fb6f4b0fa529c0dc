"""The archive: what is in it, the command that makes it, and what is told when it cannot be made."""

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, SMALL

from deployment import archive
from deployment.archive import ArchiveError, check_digest, digest_file, find_archive, make_archive
from deployment.export import write_config

COMMON = {"handler.py", "answers.py", "config.py", "geometry.py", "memory.py", "photos.py", "protocol.py"}
COMMON |= {"structure.py", "runtime/__init__.py", "runtime/queue.py"}
CODE = COMMON | {"model.py", "runtime/cuda.py", "runtime/program.py", "runtime/pytorch.py"}
CONTENT = CODE | {"fastunet.pth", "model-config.yaml", "MAR-INF/MANIFEST.json"}


@pytest.fixture
def store(tmp_path) -> Path:
    """A folder as the export leaves it, but for the weights, which no test here loads."""
    folder = tmp_path / "a store"
    folder.mkdir()
    (folder / "fastunet.pth").write_bytes(b"weights")
    write_config(SMALL, folder)
    return folder


def content(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as file:
        return {name for name in file.namelist() if not name.endswith("/")}


def run_main(monkeypatch, *arguments) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["archive", *map(str, arguments)])
    try:
        archive.main()
    except SystemExit as e:
        return e.code


def test_holds_the_modules_that_the_handler_imports_and_the_model(model_store):
    made = model_store / "fastunet.mar"
    assert content(made) == CONTENT
    with zipfile.ZipFile(made) as file:
        for name in CODE:
            assert file.read(name) == (ROOT / "deployment" / name).read_bytes()
        for name in ("fastunet.pth", "model-config.yaml"):
            assert file.read(name) == (model_store / name).read_bytes()


@pytest.fixture
def openvino_store(store) -> Path:
    """As `store`, of a model for OpenVINO."""
    (store / "fastunet.xml").write_text("a model")
    (store / "fastunet.bin").write_text("its weights")
    write_config(dataclasses.replace(SMALL, runtime="openvino"), store)
    return store


def test_holds_openvino_s_model_and_neither_weights_nor_code_of_pytorch_where_that_serves(openvino_store):
    model = {"fastunet.bin", "fastunet.xml", "model-config.yaml", "MAR-INF/MANIFEST.json"}
    made = make_archive(openvino_store)
    assert content(made) == COMMON | {"runtime/openvino.py"} | model
    assert archive.runtime_of(made) == "openvino"


def test_holds_the_learner_s_own_opening(store):
    (store / "open_image.py").write_text("def open_image(data): ...")
    write_config(dataclasses.replace(SMALL, opener=True), store)
    assert content(make_archive(store)) == CONTENT | {"open_image.py"}
    (store / "open_image.py").unlink()
    with pytest.raises(ArchiveError, match=r"open_image\.py"):
        make_archive(store)


@pytest.mark.parametrize("runtime", archive.RUNTIME_CODE)
def test_the_handler_can_be_imported_out_of_the_archive(runtime, request, tmp_path):
    """As TorchServe does it: the file by itself. All that it imports of this project is in the archive."""
    made = make_archive(request.getfixturevalue("store" if runtime == "eager" else "openvino_store"))
    with zipfile.ZipFile(made) as file:
        file.extractall(tmp_path / "unpacked")
    modules = [name.removesuffix(".py").replace("/", ".") for name in archive.RUNTIME_CODE[runtime]]
    script = "import importlib, sys\nsys.modules['deployment'] = None\nimport handler\n"
    script += "assert handler.__package__ == 'served' and sys.modules['served.handler'] is handler\n"
    if runtime == "openvino":
        script += "sys.modules['torch'] = None\n"
    script += "".join(f"importlib.import_module('served.{name}')\n" for name in modules)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "unpacked", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_prints_a_command_that_makes_the_same_archive(store):
    """From the command line, in another working directory than the archive's; then the printed command by hand."""
    command = [sys.executable, "-m", "deployment.archive", store, "--name", "street", "--version", "2.5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code, printed = done.stdout.split("\n", 1)
    printed, last = printed.rsplit("\n", 2)[:2]
    made = store / "street.mar"
    assert last.startswith(f"wrote {made}")
    assert sorted(p.name for p in store.iterdir()) == [
        "fastunet.pth",
        "model-config.yaml",
        "street.mar",
        "street.mar.sha256",
    ]
    words = shlex.split(printed)
    assert words[0] == "torch-model-archiver" and words[words.index("--model-name") + 1] == "street"
    assert words[words.index("--version") + 1] == "2.5"
    assert "deployment/handler.py" in words  # short, as one would type it
    before = content(made)
    made.unlink()
    files, folder = code.removeprefix("CODE: ").rsplit(", of ", 1)
    for file in files.split(", "):
        (store / "CODE" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / folder / file, store / "CODE" / file)
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    printed = re.sub(r"\bCODE\b", shlex.quote(str(store / "CODE")), printed)
    by_hand = subprocess.run(printed, shell=True, cwd=ROOT, env={"PATH": path}, capture_output=True, text=True)
    assert by_hand.returncode == 0, by_hand.stderr
    assert content(made) == before == CONTENT


@pytest.mark.parametrize("missing", ["fastunet.pth", "model-config.yaml", "the folder"])
def test_a_missing_file_is_one_line_and_status_2(missing, store, monkeypatch, capsys):
    folder = store if missing != "the folder" else store / "elsewhere"
    if missing != "the folder":
        (store / missing).unlink()
    assert run_main(monkeypatch, folder) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "there is no folder" in err if missing == "the folder" else missing in err and "export" in err
    assert not list(store.rglob("*.mar"))


@pytest.mark.parametrize("settings", ["handler: {arch: [", "handler: {arch: a}", "handler: {codes: []}"])
def test_a_broken_configuration_is_one_line_and_status_2(settings, store, monkeypatch, capsys):
    (store / "model-config.yaml").write_text(settings)
    assert run_main(monkeypatch, store) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "model-config.yaml" in err


def test_a_runtime_that_there_is_not_is_one_line_and_status_2(store, monkeypatch, capsys):
    path = store / "model-config.yaml"
    path.write_text(path.read_text().replace("runtime: eager", "runtime: compile"))
    assert run_main(monkeypatch, store) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "compile" in err


def test_a_failed_run_leaves_the_archive_that_was_there(store, monkeypatch, capsys):
    (store / "fastunet.mar").write_text("the one before")
    gone = store / "gone.py"
    monkeypatch.setattr(archive, "model_files", lambda config, folder: [folder / "fastunet.pth", gone])
    monkeypatch.setattr(archive, "checked_config", archive.read_config)
    assert run_main(monkeypatch, store) == 2
    assert "gone.py" in capsys.readouterr().err
    assert (store / "fastunet.mar").read_text() == "the one before"
    assert sorted(p.name for p in store.iterdir()) == ["fastunet.mar", "fastunet.pth", "model-config.yaml"]


def test_a_comma_in_the_folder_s_path_is_refused_unless_the_path_is_short_without_it(store, monkeypatch):
    store = store.rename(store.parent / "a, b")
    with pytest.raises(ArchiveError, match=r"a, b: torch-model-archiver takes no path with a comma"):
        make_archive(store)
    monkeypatch.chdir(store)
    assert content(make_archive(".")) == CONTENT


def test_without_the_archiver_it_says_what_to_install(store, monkeypatch):
    monkeypatch.setattr(archive.shutil, "which", lambda *_, **__: None)
    with pytest.raises(ArchiveError, match="pip install torch-model-archiver"):
        make_archive(store)


# --- finding an archive to serve ---


@pytest.mark.parametrize(
    ("archives", "name", "found"),
    [
        (["fastunet"], None, ("fastunet", "fastunet")),
        (["street"], None, ("street", "street")),
        (["street"], "road", ("street", "road")),
        (["fastunet", "street"], None, ("fastunet", "fastunet")),
        (["fastunet", "street"], "street", ("street", "street")),
    ],
)
def test_finds_the_archive_to_serve(archives, name, found, tmp_path):
    for stem in archives:
        (tmp_path / f"{stem}.mar").touch()
    path, wanted = find_archive(tmp_path, name)
    assert (path.name, wanted) == (f"{found[0]}.mar", found[1])


@pytest.mark.parametrize(("archives", "message"), [([], "make demo"), (["a", "b"], r"there are a\.mar, b\.mar")])
def test_says_which_archives_there_are(archives, message, tmp_path):
    for stem in archives:
        (tmp_path / f"{stem}.mar").touch()
    with pytest.raises(FileNotFoundError, match=message):
        find_archive(tmp_path)


def test_the_digest_tells_an_archive_from_another(store, tmp_path):
    made = make_archive(store)
    check_digest(made)
    if program := shutil.which("sha256sum"):
        subprocess.run([program, "--check", "fastunet.mar.sha256"], cwd=store, check=True, capture_output=True)
    moved = Path(shutil.copytree(store, tmp_path / "elsewhere"), made.name)
    check_digest(moved)
    with moved.open("r+b") as file:
        file.truncate(moved.stat().st_size - 1)
    with pytest.raises(ValueError, match="is not the file that fastunet.mar.sha256 was made of: copy both again"):
        check_digest(moved)
    (store / "fastunet.pth").write_bytes(b"other weights")
    check_digest(make_archive(store))  # its own, not that of the one before
    digest_file(made).write_text("")
    with pytest.raises(ValueError, match="is not the file"):
        check_digest(made)
    digest_file(made).unlink()
    check_digest(made)  # of old, or copied alone


@pytest.mark.parametrize("server", ["torchserve", "uvicorn"])
def test_no_server_starts_with_another_archive(server, store):
    with make_archive(store).open("ab") as file:
        file.write(b"more")
    command = [sys.executable, "-m", "deployment.serve", "--server", server, "--model-store", store]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "fastunet.mar is not the file that" in done.stderr


def test_a_folder_or_a_name_that_is_mistyped_is_answered_with_the_one_that_is_meant(store, monkeypatch, capsys):
    monkeypatch.chdir(store.parent)
    assert run_main(monkeypatch, "a stor") == 2
    assert capsys.readouterr().err == "error: there is no folder a stor: did you mean a store?\n"
    with pytest.raises(FileNotFoundError, match="there is no folder a stor: did you mean a store"):
        find_archive("a stor")
    for name in ("street", "field"):
        (store / f"{name}.mar").touch()
    with pytest.raises(FileNotFoundError, match=r"no archive stret\.mar in .*: did you mean street\?"):
        find_archive(store, "stret")
