"""Open a learner that fastai exported, also where the functions of its trainer are missing."""

from __future__ import annotations  # an earlier fastai's environment runs this too, see rescue.py

import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from . import earlier
from .unpickle import Found, Missing, lenient_pickle

FASTAI_1 = (
    "fastai.basic_train",
    "fastai.basic_data",
    "fastai.data_block",
    "fastai.vision.image",
)  # modules of it alone


class ExportError(Exception):
    """The learner cannot be exported; the message says why, in one line. `hint` has lines to start from, if any."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint


def load_learner(path: Path | str):
    """The learner that `learn.export()` wrote to `path`, also under another Python and without its trainer's functions.

    Labelling functions, metrics and the like play no part in serving: where one cannot be had, an inert stand-in takes
    its place. `describe_learner` refuses a learner in which a stand-in would matter. Loading runs the code that is
    pickled in the file: load only files you trust.

    Raises:
        ExportError: the file is missing, holds no learner, or one of fastai before 2.8: see `rescue.load_rescued`.
    """
    learner, found = open_learner(path)
    if found.is_earlier():
        raise ExportError(f"{path} {earlier.refusal(found.named)}")
    return learner


def open_learner(path: Path | str) -> tuple:
    """As `load_learner`, of fastai 2.0 to 2.7 too; returns the learner and what its file told, a `Found`."""
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
                learner = fastai_learner.load_learner(path, cpu=True, pickle_module=pickle_module)
            if not isinstance(learner, fastai_learner.Learner):
                raise TypeError(f"it holds a {type(learner).__name__}")
        except Exception as e:  # a broken pickle can raise anything
            raise ExportError(f"{path} {why_not(e, found)}") from e
        return learner, found

    learner, found = load(own_code=False)
    if found.missing and found.same_bytecode():  # the code of the trainer's functions is in the file, and runs here
        with contextlib.suppress(ExportError):  # where it does not, the learner with stand-ins may do
            learner, _ = load(own_code=True)
    return learner, found


def why_not(error: Exception, found: Found) -> str:
    """Why a file that raised `error` when it was loaded is no learner, and what to do, in one line."""
    import fastai

    here = f"Python {sys.version_info.major}.{sys.version_info.minor}, fastai {fastai.__version__}"
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if first := next((f"{module}.{name}" for module, name in sorted(found.named) if module in FASTAI_1), None):
        return (
            f"is from fastai 1 (it names {first}), whose learners no fastai from 2.0 on opens: make the same learner "
            "with today's, and train it or load the weights of the old network into it"
        )
    if found.is_earlier():
        return (
            f"is from a fastai before 2.8, and cannot be opened by {here} ({reason}): where `pip install 'fastai<2.8'` "
            "is, call load_learner(FILE).save('weights'); here, make the same learner, learn.load('weights'), "
            "learn.export()"
        )
    if found.python and found.python != f"{sys.version_info.major}.{sys.version_info.minor}":
        return f"was pickled under Python {found.python} and cannot be loaded by {here}: use that Python ({reason})"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"needs the package {error.name.partition('.')[0]}, which is not installed here: pip install it"
    return f"cannot be loaded as a learner: something else, cut short, or from versions far from {here} ({reason})"


def require(thing, what: str) -> None:
    """Raises ExportError when `thing`, which serving needs, is a stand-in for something that cannot be imported."""
    kind = thing if isinstance(thing, type) else type(thing)
    if issubclass(kind, Missing):
        module = kind.symbol.rpartition(".")[0]
        how = "call deployment.export.export_learner(learn, 'model_store') in the program that trained it"
        if kind.python not in ("", f"{sys.version_info.major}.{sys.version_info.minor}"):
            how = f"export with Python {kind.python}, which pickled its code, or {how}"
        elif package := missing_package(module):
            how = f"pip install {package}, or {how}"
        elif module != "__main__":
            how = f"make the module {module} importable (PYTHONPATH), or {how}"
        raise ExportError(f"{what} needs {kind.symbol}, which cannot be imported here: {how}")


def missing_package(module: str) -> str | None:
    """The package without which `module`, which is here, cannot be imported; None: `module` itself is missing."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        package = (error.name or module).partition(".")[0]
        return package if package != module.partition(".")[0] else None
    except Exception:  # of other people's code: any
        return None
    return None


def name_of(thing) -> str:
    """The class of `thing`, or its own name for a function, with the module that it is from."""
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """`model` out of DataParallel and torch.compile."""
    while True:
        if isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def require_network(model: torch.nn.Module) -> None:
    """Raises ExportError where a part of `model` cannot be imported here, or holds NaN."""
    require(model, "the model")
    parts = [model]
    for part in parts:
        for name, child in part._modules.items():
            if child is not None:
                require(child, f"the model's part {name}")
                parts.append(child)
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.isnan().any():
            raise ExportError(
                f"the network's weight {name} holds NaN: the training diverged, and nothing can be served"
            )


@contextlib.contextmanager
def on_cpu(learner) -> Iterator[torch.nn.Module]:
    """The network of `learner`, with which it predicts for the length of a `with` block on the CPU, in plain memory.

    That is: out of its wrappers, not compiled, and no channels-last layout. All is as it was after the block.

    Raises:
        ExportError: a part of it cannot be imported here, or holds NaN.
    """
    before, device, model = learner.model, learner.dls.device, unwrapped(learner.model)
    require_network(model)
    tensors = [*model.parameters(), *model.buffers()]
    data = [tensor.data for tensor in tensors]
    training = {part: part.training for part in model.modules()}
    compiled = {part: part._compiled_call_impl for part in model.modules() if part._compiled_call_impl is not None}
    try:
        learner.model = model.eval()
        for tensor in tensors:
            tensor.data = tensor.data.to("cpu", memory_format=torch.contiguous_format)
        for part in compiled:
            part._compiled_call_impl = None
        learner.dls.to("cpu")
        yield model
    finally:
        for tensor, value in zip(tensors, data, strict=True):
            tensor.data = value
        for part, call in compiled.items():
            part._compiled_call_impl = call
        for part, was_training in training.items():
            part.training = was_training
        learner.dls.to(device)
        learner.model = before
