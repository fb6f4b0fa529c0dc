"""Open a learner that fastai exported, also where the functions of its trainer are missing."""

import pickle
import sys
import types
import warnings
from pathlib import Path

import torch


class ExportError(Exception):
    """The learner cannot be exported; the message says why, in one line."""


class MissingType(type):
    """Gives a stand-in the attributes, such as class methods, that a pickle asks it for."""

    def __getattr__(cls, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return stand_in(f"{cls.symbol}.{name}")


class Missing(metaclass=MissingType):
    """Stands for a class or function that a learner's pickle names and that cannot be imported here."""

    symbol = ""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def stand_in(symbol: str) -> type:
    """A new `Missing` for `symbol`."""
    return type(symbol.rpartition(".")[2], (Missing,), {"symbol": symbol})


def load_learner(path: Path | str, *, device: str = "cpu"):
    """The learner that `learn.export()` wrote to `path`, also where the functions of its trainer are missing.

    Labelling functions, metrics and the like play no part in serving: where one cannot be imported, an inert stand-in
    takes its place. `describe_learner` refuses a learner in which a stand-in would matter. Loading runs the code that
    is pickled in the file: load only files you trust.

    Raises:
        ExportError: the file is missing or holds no learner.
    """
    import fastai
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fastai's warning that a pickle runs code; the command line has said so
            learner = fastai_learner.load_learner(path, cpu=device == "cpu", pickle_module=lenient_pickle())
        if not isinstance(learner, fastai_learner.Learner):
            raise TypeError(f"it holds a {type(learner).__name__}")
    except Exception as e:  # a broken pickle can raise anything
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        versions = f"Python {sys.version_info.major}.{sys.version_info.minor}, fastai {fastai.__version__}"
        raise ExportError(
            f"{path} is no learner that can be loaded: it is something else, cut short, or from versions far from "
            f"{versions} ({reason})"
        ) from e
    return learner


def lenient_pickle() -> types.SimpleNamespace:
    """A stand-in for the module `pickle` that unpickles what cannot be imported as `Missing`."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            try:
                if not module == __name__ == "__main__":  # the trainer's __main__ was another program
                    return super().find_class(module, name)
            except (ImportError, AttributeError):
                if module.startswith("fastcore."):  # of a learner older than fastai 2.8: load_learner says what to do
                    raise
            return stand_in(f"{module}.{name}")

    def load(file, **options):
        return Unpickler(file, **options).load()

    return types.SimpleNamespace(__name__="pickle", Unpickler=Unpickler, load=load)


def require(thing, what: str) -> None:
    """Raises ExportError when `thing`, which serving needs, is a stand-in for something that cannot be imported."""
    kind = thing if isinstance(thing, type) else type(thing)
    if issubclass(kind, Missing):
        module = kind.symbol.rpartition(".")[0]
        how = "call deployment.export.export_learner(learn, 'model_store') in the program that trained it"
        if module != "__main__":
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
