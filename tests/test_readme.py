"""The README, done as it says: local commands in a copy of the repository, then the five steps with another learner.

Blocks marked `bash` are run here, in order; blocks marked `shell` run long, or need a cloud project.
Code that is shown is the repository's: `python tests/test_readme.py` writes it into the README anew.
"""

import base64
import contextlib
import importlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

import camvid
from deployment.server.processes import free_ports

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DEPLOYMENT = (ROOT / "deployment/README.md").read_text()


def section(title: str, page: str = README) -> str:
    """The text below the heading `title`, up to the next heading of its level or above."""
    level, rest = re.search(rf"^(#+) {re.escape(title)}\n(.*)", page, re.M | re.S).groups()
    return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.M)[0]


def commands(text: str) -> list[str]:
    """The commands of the `bash` blocks in `text`, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the files under version control, in a folder with a space in its name, with this environment."""
    folder = tmp_path_factory.mktemp("clone") / "my clone"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in files.rstrip("\0").split("\0"):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    (folder / ".venv" / "installed").touch()
    return folder


def run(command: str, folder: Path) -> str:
    """What `command` prints; the test fails with it when the command does."""
    path = f"{Path(sys.prefix, 'bin')}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def make_serve(folder: Path):
    """`make serve` on free ports; yields the port. Ctrl-C ends it."""
    port, management, metrics = free_ports(3)
    server = subprocess.Popen(
        ["make", "serve", f"PORT={port}", f"MANAGEMENT_PORT={management}", f"METRICS_PORT={metrics}"],
        cwd=folder,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    try:
        check = [sys.executable, "-m", "deployment.serve", "--check", f"--port={port}"]
        check.append(f"--management-port={management}")
        deadline = time.monotonic() + 120
        while subprocess.run(check, cwd=folder).returncode:
            assert server.poll() is None and time.monotonic() < deadline, "make serve did not come up"
            time.sleep(0.5)
        yield port
    finally:
        os.killpg(server.pid, signal.SIGINT)
        server.wait(timeout=60)


def served_mask(port: int, photo: Path) -> np.ndarray:
    answer = httpx.post(f"http://127.0.0.1:{port}/predictions/fastunet", content=photo.read_bytes(), timeout=60).json()
    return np.frombuffer(base64.b64decode(answer["base64_prediction"]), np.uint8).reshape(answer["shape"])


def test_the_tutorial_from_top_to_bottom(clone, tmp_path):
    demo, test = [line.split("#")[0].strip() for line in commands(README)[:2]]
    assert (demo, test) == ("make demo", "make test")
    camvid.draw_scenes(tmp_path / "a few scenes", n_train=16, n_valid=4)
    committed = {
        path: path.read_bytes() for path in clone.glob("*/*") if path.suffix in (".png", ".jpg", ".txt", ".ipynb")
    }
    printed = run(f'{demo} DATA="{tmp_path}/a few scenes" ARCH=resnet18 EPOCHS=1', clone)
    assert re.search(r"^pixel accuracy 0\.\d+, mean IoU 0\.\d+$", printed, re.M) and re.search(
        r"^Pedestrian ", printed, re.M
    )
    equal, total = re.search(r"masks equal: (\d+) of (\d+) images", printed).groups()
    assert equal == total and int(total) > 1
    assert re.search(r"^200 in \d+ ms$", printed, re.M)
    assert all(path.read_bytes() == content for path, content in committed.items())
    expected = np.array(Image.open(clone / "model_store/sample_pred_mask.png"))

    runtimes = section("Other runtimes", DEPLOYMENT)
    for part in (section("Export"), section("Archive"), runtimes):
        for command in commands(part):
            run(command, clone)
    [snippet] = re.findall(r"^```python\n(.*?)^```", runtimes, re.M | re.S)
    (clone / "onnx.py").write_text(f"{snippet}\nnp.save('onnx.npy', answer)\n")
    run("python onnx.py", clone)
    assert np.mean(np.load(clone / "onnx.npy") == expected) > 0.999
    with make_serve(clone) as port:
        for command in commands(section("Call")):
            if command.startswith("curl") and not shutil.which("curl"):
                continue  # a minimal system lacks it
            answer = run(re.sub(r"(?<=:)8080", str(port), command), clone)
            if answer:
                pixels = base64.b64decode(json.loads(answer)["base64_prediction"])
                assert pixels == expected.tobytes()
    if shutil.which("curl"):
        assert np.array_equal(np.array(Image.open(clone / "mask.png")), expected)
        photo = Image.open(clone / "sample/street_view_of_a_small_neighborhood.png")
        assert Image.open(clone / "overlay.jpg").size == photo.size


def with_todays_code(readme: str) -> str:
    """`readme` with the methods that it shows as they are today, in the blocks that begin with a file and a class."""

    def block(match: re.Match) -> str:
        head, file, name, shown = match.groups()
        cls = getattr(importlib.import_module(file.replace("/", ".")), name)
        methods = [getattr(cls, method) for method in re.findall(r"^def (\w+)", shown, re.M)]
        return head + "\n\n".join(textwrap.dedent(inspect.getsource(method)) for method in methods) + "```"

    return re.sub(r"(```python\n# ([\w/]+)\.py, class (\w+)\n)(.*?)```", block, readme, flags=re.S)


def test_the_code_shown_is_the_code():
    shown = re.findall(r"^# [\w/]+\.py, class \w+\ndef (\w+)", README, re.M)
    assert {"initialize", "preprocess", "inference", "postprocess"} <= set(shown)
    assert with_todays_code(README) == README, "run `python tests/test_readme.py`"


def test_five_commands_with_a_learner_of_somebody_else(clone, tmp_path):
    run(f'"{sys.executable}" tests/stranger.py "{tmp_path}/farm"', clone)
    shutil.copy(tmp_path / "farm/theirs.pkl", clone)
    *before, serve, call = commands(section("I have a `.pkl`"))
    assert len(before) == 3 and serve == "make serve" and call.endswith("/predictions/fastunet")
    for command in before:
        run(command, clone)
    with make_serve(clone) as port:
        for i in range(3):
            expected = np.array(Image.open(tmp_path / f"farm/expected_{i}.png"))
            mask = served_mask(port, tmp_path / f"farm/photos/{i}.png")
            assert mask.shape == (72, 88) and np.array_equal(mask, expected)


def pages() -> list[Path]:
    """The documents under version control."""
    names = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in names.splitlines()]


def anchors(page: Path) -> set[str]:
    """What a link may name of `page`: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_to_exists(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}: there is no such heading"


def test_places_to_change_exist():
    places = re.findall(r"\[`([\w./-]+)`\]\(([\w./-]+)\): `(\w+)`", section("What people change", DEPLOYMENT))
    assert places
    for _, path, name in places:
        assert re.search(rf"\b{name}\b", (ROOT / "deployment" / path).read_text()), f"{path} has no {name}"


def test_it_is_read_in_one_sitting():
    text = re.sub(r"```.*?```", "", README, flags=re.S)
    words = [word for line in text.splitlines() if not line.startswith("|") for word in line.split()]
    assert len(words) <= 1800


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    (ROOT / "README.md").write_text(with_todays_code(README))
