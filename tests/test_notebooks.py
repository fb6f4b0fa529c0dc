"""The notebooks as they are committed: clean runs from top to bottom, small, and free of any machine's traces."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebook").glob("0*.ipynb"))


def read(path):
    import nbformat  # slow to import

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook, [c for c in notebook.cells if c.cell_type == "code"]


def test_all_five_are_there():
    assert [p.name[:2] for p in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_state_is_one_clean_run(path):
    notebook, cells = read(path)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1)), "run `make notebooks`"
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    assert path.stat().st_size < 1_000_000
    assert "assert" in cells[-1].source, "the last cell checks the result"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_trace_of_a_machine(path):
    text = path.read_text()
    assert not re.search(r"(?<![\w.~/-])/(home|root|work|Users|tmp|opt|mnt)/", text), "an output names a machine's path"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_to_files_of_the_repository_hold(path):
    notebook, _ = read(path)
    prose = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        assert (path.parent / target).exists(), f"{path.name} links to {target}, which does not exist"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_those_of_todays_code(path):
    source_hash = runpy.run_path(str(ROOT / "notebook" / "run.py"))["source_hash"]
    notebook, _ = read(path)
    assert notebook.metadata.get("sources") == source_hash(notebook), "run `make notebooks`"


def test_notebook_05_runs_from_top_to_bottom(tmp_path):
    command = [sys.executable, "notebook/run.py", "05", "--into", tmp_path, "-p", "SCENES", "60", "-p", "EPOCHS", "1"]
    environment = os.environ | {"TS_DEFAULT_WORKERS_PER_MODEL": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "answers over HTTP equal learn.predict's" in done.stdout
