"""What a learner answers under its own fastai; `rescue.py` runs this file with the Python of that, 3.8 or newer.

`python earlier_answers.py LEARNER.pkl IMAGES.json ITEMS.npz SKIP OUT.pt` writes, with `torch.save`, what `predict_file`
has for each image, in torch's and Python's own types alone: the item as this fastai makes it, and what
follows from the one in ITEMS.npz. What keeps the learner from answering is the last line on stderr.
"""

from __future__ import annotations

import json
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import torch


def make_package() -> None:
    """Let the modules beside this one be imported without their package's `__init__`, which needs today's torch."""
    package = types.ModuleType("earlier_export")
    package.__path__ = [str(Path(__file__).parent)]
    sys.modules[package.__name__] = package
    sys.path[0] = ""  # in place of this folder: a learner's own modules are where it is exported


def own_types(value):
    """`value`, a tensor, a number, a name or a list of such, without fastai's classes."""
    if isinstance(value, torch.Tensor):
        return value.detach().as_subclass(torch.Tensor).clone()
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, str):
        return str(value)
    return [own_types(one) for one in value]


def accept_pickle_module() -> None:
    """Let fastai's `load_learner` take a module in place of `pickle`: before 2.1 it does not.

    The functions that take the places of others have the arguments that are used here, and no more.
    """
    from fastai import learner

    def load_learner(path, cpu: bool, pickle_module):
        torch_load = torch.load
        torch.load = lambda file, **options: torch_load(file, **{**options, "pickle_module": pickle_module})  # pyrefly: ignore[bad-assignment]
        try:
            return fastai_load(path, cpu=cpu)
        finally:
            torch.load = torch_load

    fastai_load, learner.load_learner = learner.load_learner, load_learner  # pyrefly: ignore[bad-assignment]


def main(path: str, images: str, items: str, skip: str, out: str) -> None:
    """The command; its arguments are those of the module's docstring."""
    make_package()
    accept_pickle_module()
    from earlier_export.learner import open_learner
    from earlier_export.predict import predict_file

    learner, _ = open_learner(path)
    answers = []
    photos = json.loads(Path(images).read_text(encoding="utf-8"))
    with np.load(items) as arrays:
        made = [torch.from_numpy(arrays[name]) for name in arrays.files]
    for photo, item in zip(photos, made):  # noqa: B905  # Python 3.8 has no `strict`
        steps = predict_file(learner, learner.model, Path(photo), int(skip), go_on=item)
        answers.append({name: own_types(value) for name, value in vars(steps).items() if name != "opened"})
    torch.save(answers, out)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    try:
        main(*sys.argv[1:])
    except Exception as error:  # of a learner under other versions: any
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))
