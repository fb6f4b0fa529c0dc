"""What the targets of the Makefile do to files."""

import os
import shutil
import subprocess
from pathlib import Path

from camvid import SCENES

MAKEFILE = Path(__file__).parents[1] / "Makefile"
WRITTEN = [
    f"data/{SCENES.name}/images/000000.png",
    f"data/.{SCENES.name}-x1y2/images/000000.png",  # a drawing that was broken off
    "model_store/learner.pkl",
    *(f"model_store/fastunet.{kind}" for kind in ("pth", "pt2", "xml", "bin", "onnx", "mar", "mar.sha256", "part.xml")),
    "model_store/model-config.yaml",
    "model_store/MODEL_CARD.md",
    "model_store/expected_mask.png",
    "model_store/first/first.mar",
    "model_store/03_TorchServe.ipynb",
    *(f"model_store/sample_{name}" for name in ("output.txt", "overlay.jpg", "pred_mask.png", "figure.png")),
]
OWN = [
    "data/street/images/1.png",
    "data/scenes/codes.txt",
    "data/scenes-training/codes.txt",
    "model_store/.gitkeep",
    "model_store/theirs.pkl",
    "model_store/sample_of_mine.png",
    "model_store/street.mar",
    "model_store/notes/first.txt",
    "logs/diary.txt",
]


def test_clean_removes_what_the_pipeline_wrote_and_nothing_of_the_reader(tmp_path):
    for file in WRITTEN + OWN:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    subprocess.run(["make", "-f", MAKEFILE, "clean"], cwd=tmp_path, check=True)
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == sorted(OWN)


def test_an_environment_whose_python_is_gone_is_made_anew(tmp_path):
    shutil.copy(MAKEFILE.with_name("install.sh"), tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    for name in ("python", "python3"):
        python.with_name(name).symlink_to("/not/there/python3")
    env = os.environ | {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}  # nothing is installed into it
    done = subprocess.run(["sh", "install.sh"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stderr.endswith("error: PyPI cannot be reached: uv is not installed\n")
    subprocess.run([python, "-c", ""], check=True)
