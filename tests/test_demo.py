"""What `make demo` says: choices that cannot work are refused at once, and a training shows how far it is."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]

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


def test_epochs_appear_as_they_end(tmp_path):
    code = nbformat.v4.new_code_cell
    cells = [code("EPOCHS = 1", metadata={"tags": ["parameters"]}), code(TRAINING)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, tmp_path / "train.ipynb")
    run = "import sys; from pathlib import Path; sys.path.insert(0, 'notebook'); import run; "
    run += f"run.run(Path({str(tmp_path / 'train.ipynb')!r}), Path({str(tmp_path / 'done.ipynb')!r}), {{'EPOCHS': 2}})"
    done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    epochs = re.findall(r"epoch (\d/\d): train loss [\d.]+, valid loss [\d.]+, \d+:\d+", done.stdout)
    assert epochs == ["1/2", "2/2"], done.stdout + done.stderr
