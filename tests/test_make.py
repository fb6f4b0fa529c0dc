"""What the targets of the Makefile do to files."""

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
