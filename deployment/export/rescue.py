"""Rescue a learner of fastai 2.0 to 2.7: it is opened here, and proven against what it answers under its own fastai.

What such a fastai pickled is read as today's (`earlier.py`). That this changes no answer is not taken for granted: uv
makes an environment with the fastai and the torch of that time, where `earlier_answers.py` opens the same file and
predicts the proof's images.
"""

import dataclasses
import functools
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from packaging.specifiers import SpecifierSet

from .earlier import Pair, likely_pairs
from .earlier_answers import own_types
from .learner import ExportError, open_learner
from .predict import Steps, predict_file
from .unpickle import Found, Missing

LEVELS = 1  # of 255, that a resized image may differ by: Pillow rounded otherwise before 13
# What another version of torch may make of the same numbers: a share of the largest of them, and of a mask's pixels.
BOUND, PIXELS = 1e-4, 1e-3
IMAGES = 100  # that are compared, at most
CPU_INDEX = "https://download.pytorch.org/whl/cpu/torch/"

Prove = Callable[[object, torch.nn.Module, list[Path], int], str]  # what `load_rescued` returns second


def load_rescued(path: Path | str) -> tuple[object, Prove | None]:
    """The learner in the file at `path`, and what proves it; that is None for a learner of today's fastai.

    Raises:
        ExportError: the file holds no learner, or one of fastai 1.
    """
    learner, found = open_learner(path)
    if not found.is_earlier():
        return learner, None
    leave_out_callbacks(learner)
    return learner, functools.partial(prove_earlier, Path(path), found)


def leave_out_callbacks(learner) -> None:
    """Take from `learner` the callbacks whose code is in its file and is another Python's.

    Under its own fastai it has them, and so the proof tells whether they change an answer.
    """
    for callback in list(learner.cbs):
        if isinstance(callback, Missing) and callback.python:
            print(f"the callback {callback.symbol} is code of Python {callback.python}: only the proof is with it")
            learner.cbs.remove(callback)


def prove_earlier(path: Path, found: Found, learner, model: torch.nn.Module, images: list[Path], skip: int) -> str:
    """Compare what `learner`, opened here with its network `model`, predicts with what its own fastai does.

    Args:
        path: the file of the learner.
        found: what opening it told.
        images: the proof's.
        skip: as for `predict_file`.

    Returns:
        What was proven, in one line, which is also printed.

    Raises:
        ExportError: no environment could be made, none opens the learner, or the answers differ.
    """
    images = images[:IMAGES]
    ours = [predict_file(learner, model, image, skip) for image in images]
    pair, answers = ask(path, found, images, ours, skip)
    differences = [
        compare(image.name, Steps(None, **answer), steps, pair)
        for image, answer, steps in zip(images, answers, ours, strict=True)
    ]
    levels, apart, pixels = (max(column) for column in zip(*differences, strict=True))
    text = f"proven on {len(images)} images against fastai {pair.fastai} with torch {pair.torch}: "
    if levels:
        resized = sum(difference[0] > 0 for difference in differences)
        text += (
            f"pixels within {levels:g} of 255 on {resized} images, as its Pillow rounds when it resizes; from there on "
        )
    if apart == 0:
        text += "the same answers, bit for bit"
    else:
        text += f"all values within {apart:.1g} of the largest one ({BOUND:g} is allowed), "
        text += f"{pixels:.2%} of a mask's pixels in another class" if pixels else "the same answers"
    print(text)
    return text


def compare(name: str, theirs: Steps, ours: Steps, pair: Pair) -> tuple[float, float, float]:
    """How far an image's pixels are apart, of 255; its values, of the largest one; and the share of other decisions.

    Raises:
        ExportError: more than other versions of torch explain.
    """
    where = f"{name}: under fastai {pair.fastai} with torch {pair.torch}"
    white = 255 if ours.item.dtype == torch.uint8 else None
    levels = 255 * distance(theirs.item, own_types(ours.item), scale=white)
    if not levels < LEVELS + 0.5:
        raise ExportError(
            f"{where} the pixels after the item transforms differ by {levels:.3g} of 255, {LEVELS} is allowed"
        )
    apart = 0.0
    for what, there, here in (
        ("the pixels after the batch transforms", theirs.x, ours.x),
        ("the network's values", theirs.logits, ours.logits),
        ("the values after the activation", theirs.values, ours.values),
    ):
        share = distance(there, here)
        if not share <= BOUND:  # NaN is not
            raise ExportError(f"{where} {what} differ by {share:.2g} of the largest one, {BOUND:g} is allowed")
        apart = max(apart, share)
    if ours.decided.is_floating_point():
        different = float(distance(theirs.decided, ours.decided) > BOUND)
    else:
        different = (theirs.decided != ours.decided).float().mean().item()
    allowed = PIXELS if ours.decided.ndim > 2 else 0.0
    names = own_types(ours.decoded)
    if different > allowed or (are_names(names) and names != theirs.decoded):
        raise ExportError(f"{where} the answer is another one, {str(theirs.decoded)[:60]}")
    return levels, apart, different


def are_names(decoded: object) -> bool:
    """Whether `decoded` is a class's name, or a list of such."""
    return isinstance(decoded, str) or (isinstance(decoded, list) and all(isinstance(one, str) for one in decoded))


def distance(theirs: torch.Tensor, ours: torch.Tensor, scale: float | None = None) -> float:
    """The largest difference of two tensors, as a share of `scale`, else of the largest value; inf for other shapes."""
    if theirs.shape != ours.shape:
        return float("inf")
    theirs, ours = theirs.float(), ours.float()
    largest = scale or ours.abs().max().clamp(min=torch.finfo(torch.float32).tiny).item()
    return (theirs - ours).abs().max().item() / largest


def ask(path: Path, found: Found, images: list[Path], ours: list[Steps], skip: int) -> tuple[Pair, list[dict]]:
    """What the learner in the file at `path` answers under the first of the likely pairs that opens it.

    After the item transforms it goes on with the items of `ours`, so that what follows is compared on the same pixels.
    """
    packages, reason = own_packages(found), ""
    for pair in likely_pairs(found.named):
        if found.python and SpecifierSet(pair.python).contains(found.python):  # it runs the code that is in the file
            pair = dataclasses.replace(pair, python=f"=={found.python}.*")
        with tempfile.TemporaryDirectory(prefix="rescue-") as folder:
            start = time.monotonic()
            python = make_environment(pair, Path(folder, "env"), packages)
            print(f"that took {time.monotonic() - start:.0f} s")
            listing, items, out = (Path(folder, name) for name in ("images.json", "items.npz", "answers.pt"))
            np.savez(items, *(own_types(steps.item).numpy() for steps in ours))
            listing.write_text(json.dumps([str(image.absolute()) for image in images]), encoding="utf-8")
            script = Path(__file__).with_name("earlier_answers.py")
            command = [python, script, path.absolute(), listing, items, str(skip), out]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return pair, torch.load(out, weights_only=True)
            reason = last_line(done.stderr)
            print(f"fastai {pair.fastai} with torch {pair.torch} does not answer: {reason}")
    raise ExportError(f"{path} opens here, but under no earlier fastai, so that nothing proves its answers: {reason}")


def own_packages(found: Found) -> list[str]:
    """The packages beside fastai's own that the learner's classes are from, as they are called where they are here."""
    brought = {"fastai", "fastcore", "fasttransform", "plum-dispatch", "torch", "torchvision", "numpy", "pillow"}
    tops = {module.partition(".")[0] for module, _ in found.named}
    distributions = importlib.metadata.packages_distributions()
    return sorted({name for top in tops for name in distributions.get(top, []) if name.lower() not in brought})


def make_environment(pair: Pair, folder: Path, packages: list[str]) -> Path:
    """Make an environment with `pair` and `packages` of its day in `folder`; return its Python.

    PyPI's build of PyTorch for Linux brings NVIDIA's libraries along: that for CPUs is taken where PyTorch's own index
    answers.

    Raises:
        ExportError: uv finds no Python, or cannot install them.
    """
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    for_cpu = sys.platform == "linux" and reachable(CPU_INDEX)
    size = f" (up to {pair.gigabytes:g} GB to download)" if sys.platform == "linux" and not for_cpu else ""
    print(f"making an environment with fastai {pair.fastai} and torch {pair.torch}{size}", flush=True)
    uv("venv", "--no-project", "--python", pair.python, folder, what=f"no Python {pair.python} is here or to be had")
    install = ["pip", "install", "--python", python]
    pins, what = [f"torch=={pair.torch}", f"torchvision=={pair.torchvision}"], f"fastai {pair.fastai} cannot be had"
    if for_cpu:  # that index tells no days
        uv(*install, "--no-deps", "--torch-backend", "cpu", *pins, what=what)
    uv(*install, "--exclude-newer", pair.day, *pins, f"fastai=={pair.fastai}", *packages, what=what)
    return python


def reachable(address: str) -> bool:
    """Whether the page at `address` comes within five seconds."""
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (urllib.error.URLError, TimeoutError):
        return False


def uv(*arguments: str | Path, what: str) -> None:
    """Run uv; raises ExportError with `what` and what uv says, in one line, where it fails."""
    done = subprocess.run([sys.executable, "-m", "uv", *arguments, "--quiet"], capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.removeprefix("error: ").split())
        raise ExportError(f"{what}: {reason[:300]}")


def last_line(text: str) -> str:
    """The last line of `text` that says something."""
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["no reason given"])[-1][:300]
