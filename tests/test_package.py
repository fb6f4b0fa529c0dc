"""The package as a whole: who imports whom, how long a file is, and that the folder works where it is copied to."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from deployment import archive
from deployment.handler import Handler

DEPLOYMENT = ROOT / "deployment"
FILES = sorted(path.relative_to(DEPLOYMENT).as_posix() for path in DEPLOYMENT.rglob("*.py"))
SERVERS = {"server/app.py"}
LIMITS = {"handler.py": 200, "model.py": 330}  # lines


def imports(file: str) -> set[str]:
    """The dotted names that a file of `deployment/` imports, wherever in it; `from a import b` counts as `a.b`."""
    package = ["deployment", *Path(file).parent.parts]
    names = set()
    for node in ast.walk(ast.parse((DEPLOYMENT / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_the_imports_of_a_file_are_found():
    assert {"torch.Tensor", "deployment.config.Config", "config.Config", "importlib"} <= imports("runtime.py")
    assert {"deployment.protocol", "protocol", "deployment.reports.observe"} <= imports("handler.py")
    assert "ts.metrics.dimension.Dimension" in imports("reports.py")  # within a function
    assert {"deployment.config.Config", "deployment.export.learner.network", "fastai"} <= imports("export/describe.py")


@pytest.mark.parametrize("file", FILES)
def test_only_servers_import_the_handler(file):
    if file not in SERVERS:
        assert not [name for name in imports(file) if "handler" in name.split(".")]


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("export/")])
def test_only_the_export_knows_fastai(file):
    tops = {name.split(".")[0] for name in imports(file)}
    assert not tops & {"fastai", "fastcore", "nncf", "onnx"}
    assert not [name for name in imports(file) if name.startswith("deployment.export")]


@pytest.mark.parametrize("file", FILES)
def test_a_file_can_be_read_in_one_go(file):
    lines = (DEPLOYMENT / file).read_text().count("\n")
    assert lines <= LIMITS.get(file, 350)


# --- the page, which lives outside ---


def test_a_page_can_color_masks_without_torch():
    script = "import sys; sys.modules['torch'] = None; from deployment.answers import palette; palette(['Sky'])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_space_pins_what_the_project_pins():
    def pins(file: str) -> dict[str, str]:
        lines = (ROOT / file).read_text().replace(" ", "").splitlines()
        lines = [line.split(";")[0] for line in lines if "==" in line and 'python_version<"3.11"' not in line]
        return dict(line.split("==") for line in lines)

    space, page, serving = map(
        pins, ("space/requirements.txt", "space/page-requirements.txt", "deployment/requirements.txt")
    )
    for package in space.keys() & page.keys():
        assert space[package] == page[package]
    for package in (space.keys() & serving.keys()) - {"pillow"}:
        assert space[package] == serving[package]
    assert f"sdk_version: {page['gradio']}\n" in (ROOT / "space/README.md").read_text()


# --- copied elsewhere ---

ANSWER = """
import sys
sys.modules["fastai"] = sys.modules["fastcore"] = None  # cannot be imported
import torch
torch.set_num_threads(1)
from {module} import Handler
handler = Handler()
handler.load({store!r})
job = handler.preprocess({{"body": open({photo!r}, "rb").read()}})
handler.inference(job.photos)
response = handler.postprocess(job)
assert response.status == 200 and not any(name.split(".")[0] == "deployment" for name in sys.modules)
sys.stdout.buffer.write(response.body)
"""


@pytest.mark.parametrize("how", ["under another name", "side by side"])
def test_answers_without_fastai_where_it_is_copied_to(how, small_store, photo, tmp_path):
    """`deployment/` as `serving/`, then its modules flat in one folder with the model, as they lie in the archive."""
    if how == "side by side":
        for name in ("handler.py", "model.py", *archive.MODULES):
            shutil.copy(DEPLOYMENT / name, tmp_path)
        for path in small_store.iterdir():
            shutil.copy(path, tmp_path)
        store, module = tmp_path, "handler"
    else:
        shutil.copytree(DEPLOYMENT, tmp_path / "serving", ignore=shutil.ignore_patterns("__pycache__"))
        store, module = small_store, "serving.handler"
    (tmp_path / "photo.png").write_bytes(photo)
    script = ANSWER.format(module=module, store=str(store), photo=str(tmp_path / "photo.png"))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == answer_here(small_store, photo)


def answer_here(store: Path, photo: bytes) -> bytes:
    torch.set_num_threads(1)
    handler = Handler()
    handler.load(store)
    job = handler.preprocess({"body": photo})
    handler.inference(job.photos)
    return handler.postprocess(job).body
