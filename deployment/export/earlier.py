"""Learners of fastai 2.0 to 2.7: what such a fastai pickled, as today's has it, and which of them opens a learner.

Two things keep today's fastai from opening them: names have moved, and a transform holds what it does as fastcore's
dispatch by type, in place of plum's.
"""

from __future__ import annotations  # an earlier fastai's environment runs this too, see rescue.py

import dataclasses
import importlib
from typing import Any

PACKAGES = ("fastai", "fastcore")  # whose names have moved from module to module
GONE = ("fastcore.transform", "fastcore.dispatch")  # modules of fastcore until 1.7


@dataclasses.dataclass(frozen=True)
class Pair:
    """A fastai and the torch that it goes with, as they would have been installed from PyPI on a day."""

    fastai: str
    torch: str
    torchvision: str
    python: str  # versions that there are wheels for
    day: str  # what was uploaded later is not installed
    gigabytes: float  # to download from PyPI on Linux, whose PyTorch is built for CUDA


PAIRS = [
    Pair("2.7.19", "2.6.0", "0.21.0", ">=3.9,<3.13", "2025-03-20", 3.2),
    Pair("2.6.3", "1.11.0", "0.12.0", ">=3.8,<3.11", "2022-06-01", 0.9),
]


def likely_pairs(named: set) -> list[Pair]:
    """`PAIRS`, first the one that opens what names these (module, name)."""
    newest = ("fastai.learner", "CastToTensor") in named  # a callback that every learner of 2.7 has, and none before it
    return PAIRS if newest else PAIRS[::-1]


def refusal(named: set) -> str:
    """What is said of a learner that names these (module, name), where nobody asked for its rescue."""
    pair = likely_pairs(named)[0]
    return (
        "is from a fastai before 2.8: add --rescue, which opens it here and proves it against fastai "
        f"{pair.fastai} with torch {pair.torch}, for which uv makes an environment (on Linux up to {pair.gigabytes:g} "
        "GB to download, far less where PyTorch's index of builds for CPUs answers, and on macOS and Windows)"
    )


class Holder:
    """Takes the attributes of an object whose class is gone."""


class TypeDispatch(Holder):
    """fastcore's dispatch by the types of two arguments: `funcs` has functions by the first, then by the second."""

    funcs: Any

    def functions(self) -> list:
        return [function for second in self.funcs.d.values() for function in second.d.values()]


HOLDERS = {"TypeDispatch": TypeDispatch, "_TypeDict": Holder}


def moved(module: str, name: str):
    """What is called `name` today that a module of an earlier fastai or fastcore had.

    Raises:
        AttributeError: nothing is.
    """
    if module == "fastcore.dispatch" and name in HOLDERS:
        return HOLDERS[name]
    for place in ("fasttransform", "fastai.vision.all", "fastcore.all"):
        if hasattr(found := importlib.import_module(place), name):
            return getattr(found, name)
    raise AttributeError(f"an earlier fastai had {module}.{name}, which today's has not")


def set_dispatch(transform) -> None:
    """Make what `transform` does to items, as its own attributes say, plum's functions."""
    from fasttransform import Transform

    for name in ("encodes", "decodes", "setups"):
        if isinstance(vars(transform).get(name), TypeDispatch):
            functions = vars(transform).pop(name).functions()
            if functions:
                setattr(transform, name, Transform(functions).encodes)
