"""What the first cell of a notebook does on Colab and Kaggle, where each notebook starts on a new machine."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODEL_STORE = HERE.parent / "model_store"
OLDEST_TORCH = (2, 6)
# The machine's own are kept: its GPU's driver fits its torch, and its kernel may have numpy and pillow loaded already.
KEPT = ("torch", "torchvision", "numpy", "pillow")
PREPARED = "FASTUNET_HOSTED"  # set in the environment of a machine that is, and of the notebooks that run for that
LEFT_OUT = ("jupyter", "pyrefly", "ruff")  # the machine is a notebook server, and nobody checks the style there


def prepare(notebook: str, learner: str | None = None) -> None:
    """Install what the notebooks need, and run those that come before `notebook`, a number such as "02".

    Args:
        learner: a folder with a learner.pkl that takes the place of notebook 01's: on Colab one in your Drive,
            "drive/MyDrive/FOLDER", which is mounted then.

    Raises:
        FileNotFoundError: there is no learner.pkl in `learner`.
        RuntimeError: the installation or a notebook failed; what it printed says why.
    """
    if PREPARED in os.environ:
        return
    source = find(learner) if learner else None
    requirements = to_install((HERE.parent / "requirements.txt").read_text())
    run(sys.executable, "-m", "pip", "install", "--quiet", *requirements)
    before = [f"{n:02}" for n in range(1, int(notebook)) if notebook != "05"]  # 05 stands on none of them
    if source and before:
        shutil.copy(source, MODEL_STORE / "learner.pkl")
        before.remove("01")
    if before:
        run(sys.executable, "run.py", *before, "--into", str(MODEL_STORE))
    os.environ[PREPARED] = "1"  # the cell may be run again


def find(learner: str) -> Path:
    """The file learner.pkl in the folder `learner`; Drive is mounted for one that starts with `drive/`."""
    folder = Path(learner)
    if folder.parts[0] == "drive":
        from google.colab import drive

        drive.mount("/content/drive")
        folder = Path("/content", folder)
    file = folder / "learner.pkl"
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}: name the folder that holds the file of learn.export()")
    return file


def to_install(requirements: str) -> list[str]:
    """The lines of a requirements.txt to install here; what the machine has of `KEPT` is fixed to its version."""
    have = {name: found for name in KEPT if (found := installed(name))}
    torch = re.match(r"(\d+)\.(\d+)", have.get("torch", ""))
    if not torch or "torchvision" not in have or (int(torch[1]), int(torch[2])) < OLDEST_TORCH:
        have = {}  # torch, torchvision and what they compute with come from requirements.txt, all together
    lines = [line for line in requirements.splitlines() if line and line[0] not in "#-"]
    names = {line: re.split(r"[^\w-]", line)[0] for line in lines}
    chosen = [line for line, name in names.items() if name not in have and name not in LEFT_OUT]
    return [*chosen, *(f"{name}=={found}" for name, found in have.items())]


def installed(name: str) -> str | None:
    """The version of the package `name` here, if there is one."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def run(*command: str) -> None:
    """Run `command` in the folder of the notebooks, and print what it prints as it comes.

    Raises:
        RuntimeError: it failed.
    """
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=HERE, env=os.environ | {PREPARED: "1"}, **streams)
    assert process.stdout
    with process:
        for line in process.stdout:
            print(line, end="", flush=True)
    if process.returncode:
        raise RuntimeError(f"`{' '.join(command[1:5])} …` failed with status {process.returncode}; see above")
