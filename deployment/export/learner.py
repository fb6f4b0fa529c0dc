"""Open a learner that fastai exported, also where the functions of its trainer are missing."""

import sys
import warnings
from pathlib import Path

import torch

from .unpickle import Found, Missing, lenient_pickle


class ExportError(Exception):
    """The learner cannot be exported; the message says why, in one line."""


def load_learner(path: Path | str, *, device: str = "cpu"):
    """The learner that `learn.export()` wrote to `path`, also under another Python and without its trainer's functions.

    Labelling functions, metrics and the like play no part in serving: where one cannot be had, an inert stand-in takes
    its place. `describe_learner` refuses a learner in which a stand-in would matter. Loading runs the code that is
    pickled in the file: load only files you trust.

    Raises:
        ExportError: the file is missing or holds no learner.
    """
    from fastai import learner as fastai_learner

    path = Path(path)
    if not path.is_file():
        raise ExportError(f"no such file: {path}")
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # it holds more than tensors, as it should
        pass
    else:
        raise ExportError(f"{path} holds weights only, as learn.save() writes them: give the file of learn.export()")

    def load(own_code: bool):
        found = Found()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # fastai's, that a pickle runs code; the command line has said so
                pickle_module = lenient_pickle(found, own_code)
                learner = fastai_learner.load_learner(path, cpu=device == "cpu", pickle_module=pickle_module)
            if not isinstance(learner, fastai_learner.Learner):
                raise TypeError(f"it holds a {type(learner).__name__}")
        except Exception as e:  # a broken pickle can raise anything
            raise ExportError(f"{path} {why_not(e, found)}") from e
        return learner, found

    learner, found = load(own_code=False)
    if found.missing and found.same_bytecode():  # the code of the trainer's functions is in the file, and runs here
        learner, _ = load(own_code=True)
    return learner


def why_not(error: Exception, found: Found) -> str:
    """Why a file that raised `error` when it was loaded is no learner, and what to do, in one line."""
    import fastai

    here = f"Python {sys.version_info.major}.{sys.version_info.minor}, fastai {fastai.__version__}"
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if "fastcore.transform" in reason or "fastcore.dispatch" in reason:
        return (
            "is from a fastai older than 2.8, which this one cannot open: where `pip install 'fastai<2.8'` is, call "
            "load_learner(FILE).save('weights'); here, make the same learner, learn.load('weights'), learn.export()"
        )
    if found.python and found.python != f"{sys.version_info.major}.{sys.version_info.minor}":
        return f"was pickled under Python {found.python} and cannot be loaded by {here}: use that Python ({reason})"
    return f"is no learner that can be loaded: something else, cut short, or from versions far from {here} ({reason})"


def require(thing, what: str) -> None:
    """Raises ExportError when `thing`, which serving needs, is a stand-in for something that cannot be imported."""
    kind = thing if isinstance(thing, type) else type(thing)
    if issubclass(kind, Missing):
        module = kind.symbol.rpartition(".")[0]
        how = "call deployment.export.export_learner(learn, 'model_store') in the program that trained it"
        if kind.python:
            how = f"export with Python {kind.python}, which pickled its code, or {how}"
        elif module != "__main__":
            how = f"make the module {module} importable (PYTHONPATH), or {how}"
        raise ExportError(f"{what} needs {kind.symbol}, which cannot be imported here: {how}")


def name_of(thing) -> str:
    """The class of `thing`, or its own name for a function, with the module that it is from."""
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def network(learner) -> torch.nn.Module:
    """The learner's network, out of DataParallel.

    Raises:
        ExportError: a part of it cannot be imported here.
    """
    wrapped = isinstance(learner.model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel)
    model = learner.model.module if wrapped else learner.model
    require(model, "the model")
    parts = [model]
    for part in parts:
        for name, child in part._modules.items():
            if child is not None:
                require(child, f"the model's part {name}")
                parts.append(child)
    return model


def photo_class(dls) -> type:
    """The class as which `dls` opens a photo.

    Raises:
        ExportError: it opens none.
    """
    from fastai.vision.core import PILBase

    kinds = [k for kind in dls.valid_ds.tls[0].types for k in (kind if isinstance(kind, list | tuple) else [kind])]
    for kind in reversed(kinds):
        require(kind, "the opening of photos")
        if issubclass(kind, PILBase):
            return kind
    what = "text" if any("text" in kind.__module__ for kind in kinds) else name_of(kinds[-1])
    raise ExportError(f"the learner's input is no photo: {what} is not supported")
