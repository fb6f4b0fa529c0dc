"""The package as a whole: who imports whom, how long things are, and that the folder works where it is copied to."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from conftest import ROOT

from deployment import archive
from deployment.config import read_config
from deployment.handler import Handler

DEPLOYMENT = ROOT / "deployment"
FILES = {path.relative_to(DEPLOYMENT).as_posix(): path.read_text() for path in sorted(DEPLOYMENT.rglob("*.py"))}
WITHOUT_TORCH = ["handler.py", "photos.py", "answers.py", "protocol.py", "config.py", "memory.py", "structure.py"]
WITHOUT_TORCH += [f"runtime/{name}.py" for name in ("__init__", "queue", "openvino")]
MAY_IMPORT_HANDLER = ("export/", "server/", "actors.py", "serve.py")  # the export proves by it
MAX_LINES = {"a file": 360, "a function": 60}


def imports(file: str, everywhere: bool = True) -> Iterator[str]:
    """The dotted names that a file of `deployment/` imports; `from a import b` counts as `a.b`.

    With `everywhere` those in functions count too, else only what the import of the file imports.
    """
    package = ["deployment", *Path(file).parent.parts]
    tree = ast.parse(FILES[file])
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def tops(file: str, everywhere: bool = True) -> set[str]:
    """The packages that a file imports."""
    return {name.split(".")[0] for name in imports(file, everywhere)}


def test_the_imports_of_a_file_are_found():
    assert {"deployment.runtime", "deployment.config.read_config", "importlib.util"} <= {*imports("handler.py")}
    assert "ts" in tops("handler.py") and "ts" not in tops("handler.py", everywhere=False)  # within a function
    assert {"torch", "fastai"} <= set().union(*(tops(file) for file in FILES if file.startswith("export/")))


def test_dependencies_point_one_way():
    wrong = []
    for file in FILES:
        names = set(imports(file))
        if not file.startswith("export/"):
            wrong += [(file, top) for top in tops(file) & {"fastai", "fastcore", "nncf", "onnx"}]
            wrong += [(file, name) for name in names if name.startswith("deployment.export")]
        if not file.startswith(MAY_IMPORT_HANDLER):
            wrong += [(file, name) for name in names if name.startswith("deployment.handler")]
        if file in WITHOUT_TORCH:
            wrong += [(file, top) for top in tops(file, everywhere=False) & {"torch", "torchvision"}]
    assert not wrong


def test_code_can_be_read_in_one_go():
    long = {}
    for file, text in FILES.items():
        lines = {file: ("a file", text.count("\n"))}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines[f"{file}: {node.name}"] = ("a function", node.end_lineno - node.lineno + 1)
        long |= {name: n for name, (kind, n) in lines.items() if n > MAX_LINES[kind]}
    assert not long


def test_only_the_handler_knows_that_it_may_be_imported_by_itself():
    assert [file for file, text in FILES.items() if re.search(r"\bif (not )?__package__", text)] == ["handler.py"]


def test_the_handler_needs_no_torch():
    script = "import sys; sys.modules['torch'] = sys.modules['torchvision'] = None\n"
    script += "import deployment.handler; from deployment.answers import palette; palette(['Sky'])"  # as the page does
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_space_pins_what_the_project_pins():
    def pins(file: str) -> dict[str, str]:
        lines = (ROOT / file).read_text().replace(" ", "").splitlines()
        lines = [line.split(";")[0] for line in lines if "==" in line and 'python_version<"3.11"' not in line]
        return dict(line.split("==") for line in lines)

    space, page, serving = map(
        pins, ("space/requirements.txt", "space/page-requirements.txt", "deployment/requirements-openvino.txt")
    )
    serving |= pins("deployment/requirements.txt")
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
handler.inference(job.items)
response = handler.postprocess(job)
assert response.status == 200 and not any(name.split(".")[0] == "deployment" for name in sys.modules)
sys.stdout.buffer.write(response.body)
"""


def answer_there(folder: Path, module: str, store: Path, photo: Path) -> bytes:
    """The answer of the handler in `module`, which lies in `folder`, with the model in `store`."""
    script = ANSWER.format(module=module, store=str(store), photo=str(photo))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def answer_here(store: Path, photo: Path) -> bytes:
    torch.set_num_threads(1)
    handler = Handler()
    handler.load(store)
    job = handler.preprocess({"body": photo.read_bytes()})
    handler.inference(job.items)
    return handler.postprocess(job).body


def test_answers_without_fastai_where_it_is_copied_to(small_store, photo, tmp_path):
    """`deployment/` as `serving/`, then its files in one folder with the model, as they lie in the archive."""
    file = tmp_path / "photo.png"
    file.write_bytes(photo)
    here = answer_here(small_store, file)

    shutil.copytree(DEPLOYMENT, tmp_path / "serving", ignore=shutil.ignore_patterns("__pycache__"))
    assert answer_there(tmp_path, "serving.handler", small_store, file) == here

    unpacked = tmp_path / "unpacked"
    shutil.copytree(small_store, unpacked)
    for name in ("handler.py", *archive.code_files(read_config(small_store))):
        (unpacked / name).parent.mkdir(exist_ok=True)
        shutil.copy(DEPLOYMENT / name, unpacked / name)
    assert answer_there(unpacked, "handler", unpacked, file) == here
