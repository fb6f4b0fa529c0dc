"""What `make demo` says: choices that cannot work are refused at once, and a training shows how far it is."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import CompletedProcess

import psutil
import pytest

ROOT = Path(__file__).parents[1]


def test_a_data_set_that_is_not_there_is_answered_with_the_one_that_is_meant(tmp_path):
    (tmp_path / "street photos").mkdir()
    for given, meant in ("camvid_tin", "camvid_tiny"), (f"{tmp_path}/street foto", "street photos"):
        command = [sys.executable, "notebook/run.py", "01", "--into", tmp_path, "-p", "DATA", given]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr == f"error: DATA={given}: there is no such folder: did you mean {meant}?\n"


TRAINING = """
from fastai.callback.core import Callback
from fastai.test_utils import synth_learner

learn = synth_learner()
learn.fit(EPOCHS)
kinds = [type(callback).__name__ for callback in learn.cbs]
assert "Report" not in kinds, "an exported learner would hold it"
"""


@pytest.mark.parametrize("choice", ["ARCH=foo", "ARCH=vit_b_16", "EPOCHS=abc", "EPOCHS=0"])
def test_refused_in_one_line_before_anything_runs(choice, tmp_path):
    command = [sys.executable, "notebook/run.py", "01", "--into", tmp_path, "-p", *choice.split("=")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch(f"error: {choice}: .+\n", done.stderr)
    assert not done.stdout and not list(tmp_path.iterdir())


def test_a_notebook_that_is_not_there_is_refused_before_any_runs(tmp_path):
    command = [sys.executable, "notebook/run.py", "01", "6", "--into", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "") and not list(tmp_path.iterdir())
    assert done.stderr == "error: there is no notebook 6: there are 01, 02, 03, 04, 05\n"


def write_notebook(path: Path, cells: list[str]) -> None:
    """A notebook of code `cells`, the first of which are its parameters."""
    import nbformat  # slow to import

    first, *others = map(nbformat.v4.new_code_cell, cells)
    first.metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=[first, *others], metadata={"kernelspec": kernel}), path)


def run_cells(folder: Path, cells: list[str], parameters: dict[str, int], before: str = "") -> CompletedProcess:
    """What run.py's `run` does with a notebook of `cells`, the first of which are its parameters, in a process of its
    own, which executes `before` first.
    """
    write_notebook(folder / "cells.ipynb", cells)
    run = "import sys; from pathlib import Path; sys.path.insert(0, 'notebook'); import run\n"
    run += f"run.run(Path({str(folder / 'cells.ipynb')!r}), Path({str(folder / 'done.ipynb')!r}), {parameters})"
    command = [sys.executable, "-c", f"{before}\n{run}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_epochs_appear_as_they_end(tmp_path):
    done = run_cells(tmp_path, ["EPOCHS = 1", TRAINING], {"EPOCHS": 2})
    assert done.returncode == 0, done.stderr
    epochs = re.findall(r"epoch (\d/\d): train loss [\d.]+, valid loss [\d.]+, \d+:\d+", done.stdout)
    assert epochs == ["1/2", "2/2"], done.stdout + done.stderr


def test_an_interrupt_is_quiet_and_ends_the_kernel(tmp_path):
    """Ctrl-C reaches the processes of the terminal; the kernel has a session of its own."""
    for file in ("run.py", "progress.py"):
        shutil.copy(ROOT / "notebook" / file, tmp_path)
    pid = tmp_path / "pid"
    wait = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(100)"
    write_notebook(tmp_path / "01_wait.ipynb", ["n = 1", wait])
    command = [sys.executable, "run.py", "01", "--into", tmp_path / "done"]
    (tmp_path / "done").mkdir()
    running = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()):
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(running.pid, signal.SIGINT)
        said, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130 and "Traceback" not in said and "rror" not in said, said
    assert not psutil.pid_exists(int(pid.read_text())), "a kernel is left"


@pytest.mark.parametrize("channel", ["HBChannel", "ZMQSocketChannel"])
def test_a_channel_that_never_closes_holds_up_no_run(channel, tmp_path):
    """As jupyter_client's heartbeat channel does at times, which waits for its thread."""
    before = f"import jupyter_client.channels as c, time; c.{channel}.stop = lambda self: time.sleep(1000)"
    pid = tmp_path / "pid"
    cells = ["n = 1", f"import os; from pathlib import Path; Path({str(pid)!r}).write_text(str(os.getpid()))"]
    done = run_cells(tmp_path, cells, {"n": 2}, before)
    ended = time.time()
    assert done.returncode == 0, done.stderr
    assert ended - pid.stat().st_mtime < 30
    assert not psutil.pid_exists(int(pid.read_text())), "a kernel is left"
    executed = json.loads((tmp_path / "done.ipynb").read_text())
    assert [cell["metadata"]["papermill"]["status"] for cell in executed["cells"]] == ["completed"] * 3
