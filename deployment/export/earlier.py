"""What a fastai of 2.0 to 2.7 pickled, as today's has it: names that moved, and how transforms dispatch by type."""

from __future__ import annotations

import importlib

PACKAGES = ("fastai", "fastcore")  # whose names move from module to module


class Holder:
    """Takes the attributes of an object whose class is gone."""


class TypeDispatch(Holder):
    """fastcore's dispatch by the types of two arguments, until 1.7: `funcs` has functions by the one, then the other."""

    def functions(self) -> list:
        return [function for second in self.funcs.d.values() for function in second.d.values()]


GONE = {"TypeDispatch": TypeDispatch, "_TypeDict": Holder}


def moved(module: str, name: str):
    """What is called `name` today that a module of an earlier fastai or fastcore had.

    Raises:
        AttributeError: nothing is.
    """
    if module == "fastcore.dispatch" and name in GONE:
        return GONE[name]
    for place in ("fasttransform", "fastai.vision.all", "fastcore.all"):
        if hasattr(found := importlib.import_module(place), name):
            return getattr(found, name)
    raise AttributeError(f"module {module} of an earlier fastai had {name}, which today's has not")


def set_dispatch(transform) -> None:
    """Make what `transform` does to items, in its own attributes, plum's functions: today's dispatch by type."""
    from fasttransform import Transform

    for name in ("encodes", "decodes", "setups"):
        if isinstance(vars(transform).get(name), TypeDispatch):
            functions = vars(transform).pop(name).functions()
            if functions:
                setattr(transform, name, Transform(functions).encodes)
