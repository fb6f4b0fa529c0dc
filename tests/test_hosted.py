"""The notebooks' first cell on Colab and Kaggle: what it installs, fetches and runs, with stand-ins for the machine."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "notebook"))

import hosted  # noqa: E402

REQUIREMENTS = (ROOT / "requirements.txt").read_text()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A hosted machine that has a torch of its own; gives the commands that are run there."""
    commands = []
    monkeypatch.setenv("FASTUNET_HOSTED", "")  # what prepare sets is undone after the test
    monkeypatch.delenv("FASTUNET_HOSTED")
    monkeypatch.setattr(hosted, "run", lambda *command: commands.append(list(command[1:])))
    monkeypatch.setattr(hosted, "MODEL_STORE", tmp_path)
    return commands


def test_the_machines_own_torch_is_kept(monkeypatch):
    have = {"torch": "2.9.0+cu126", "torchvision": "0.24.0+cu126", "numpy": "2.0.2"}
    monkeypatch.setattr(hosted, "installed", have.get)
    lines = hosted.to_install(REQUIREMENTS)
    assert {f"{name}=={version}" for name, version in have.items()} <= set(lines)
    assert [line for line in lines if line.startswith("torch=")] == ["torch==2.9.0+cu126"]
    assert any(line.startswith("pillow==13") for line in lines) and any(line.startswith("fastai==") for line in lines)


@pytest.mark.parametrize("torch", ["2.5.1", None])
def test_a_torch_that_is_too_old_or_missing_is_installed(torch, monkeypatch):
    monkeypatch.setattr(hosted, "installed", {"torch": torch, "torchvision": "0.20.1", "numpy": "2.0.2"}.get)
    lines = hosted.to_install(REQUIREMENTS)
    pinned = [line for line in REQUIREMENTS.splitlines() if line.startswith(("torch==", "torchvision==", "numpy=="))]
    assert set(pinned) <= set(lines) and "numpy==2.0.2" not in lines


def test_what_a_notebook_stands_on_is_run(machine, tmp_path):
    hosted.prepare("03")
    assert machine[0][:3] == ["-m", "pip", "install"]
    assert machine[1:] == [["run.py", "01", "02", "--into", str(tmp_path)]]
    hosted.prepare("02")  # the cell once more
    assert len(machine) == 2


def test_a_notebook_that_another_runs_prepares_nothing(machine, monkeypatch):
    monkeypatch.setenv("FASTUNET_HOSTED", "1")
    hosted.prepare("02")
    assert not machine


def test_after_a_failure_the_first_cell_can_be_run_again(machine, monkeypatch):
    take_down = hosted.run

    def fail(*command: str) -> None:
        take_down(*command)
        raise RuntimeError("no disk space")

    monkeypatch.setattr(hosted, "run", lambda *command: fail(*command) if "run.py" in command else take_down(*command))
    with pytest.raises(RuntimeError):
        hosted.prepare("03")
    monkeypatch.setattr(hosted, "run", take_down)
    hosted.prepare("03")
    assert [command[0] for command in machine] == ["-m", "run.py", "-m", "run.py"]


def test_a_learner_of_drive_takes_the_place_of_notebook_01(machine, tmp_path, monkeypatch):
    mounted = []
    colab = types.ModuleType("google.colab")
    colab.drive = types.SimpleNamespace(mount=mounted.append)
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    with pytest.raises(FileNotFoundError, match="/content/drive/MyDrive/no/learner.pkl"):
        hosted.prepare("02", learner="drive/MyDrive/no")
    assert mounted == ["/content/drive"] and not machine
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "learner.pkl").write_bytes(b"mine")
    hosted.prepare("03", learner=str(tmp_path / "mine"))
    assert (tmp_path / "learner.pkl").read_bytes() == b"mine"
    assert machine[-1] == ["run.py", "02", "--into", str(tmp_path)]


def test_the_notebooks_that_run_know_that_another_runs_them(capsys):
    hosted.run(sys.executable, "-c", "import os; print(os.environ['FASTUNET_HOSTED'])")
    assert capsys.readouterr().out == "1\n"


def test_a_command_that_fails_is_an_error_after_its_output(capsys):
    with pytest.raises(RuntimeError, match="status 3"):
        hosted.run(sys.executable, "-c", "print('why'); raise SystemExit(3)")
    assert capsys.readouterr().out == "why\n"


@pytest.mark.parametrize("path", sorted((ROOT / "notebook").glob("0*.ipynb")), ids=lambda path: path.stem)
def test_the_first_cell_clones_and_prepares(path, tmp_path):
    """The cell runs in IPython as it is but for the address, a local clone with a `hosted` that says what it got."""
    origin = tmp_path / "origin"
    (origin / "notebook").mkdir(parents=True)
    (origin / "notebook" / "hosted.py").write_text("def prepare(*args, **kwargs): print('prepare', args[0])\n")
    git = ["git", "-C", str(origin), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    cells = json.loads(path.read_text())["cells"]
    source = "".join(next(cell for cell in cells if cell["cell_type"] == "code")["source"])
    address = "https://github.com/artefactory/deploy-fastai-torchserve-aiplatform"
    assert address in source
    (tmp_path / "cell.ipy").write_text(source.replace(address, origin.as_uri()))
    command = [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", str(tmp_path / "cell.ipy")]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "KAGGLE_KERNEL_RUN_TYPE": "Interactive"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert f"prepare {path.name[:2]}" in done.stdout, done.stdout + done.stderr
