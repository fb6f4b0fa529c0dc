"""Learners from elsewhere: pickled by another Python, by another program. See test_rescue.py for an older fastai."""

import gzip
import io
import opcode
import pathlib
import pickle
import subprocess
import sys
import types
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch
from PIL import Image

from deployment.config import read_config
from deployment.export import ExportError, export_learner, load_learner
from deployment.export.learner import require
from deployment.export.unpickle import Found, Missing, lenient_pickle
from deployment.photos import Preprocessor
from deployment.runtime import load

ROOT = Path(__file__).parents[1]
LEARNERS = Path(__file__).parent / "learners"
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def unpacked(file: Path, folder: Path) -> Path:
    """The learner in the .gz `file`, written into `folder`."""
    path = folder / "learner.pkl"
    path.write_bytes(gzip.decompress(file.read_bytes()))
    return path


@pytest.mark.parametrize(
    "file", sorted(LEARNERS.glob("python*.gz")), ids=lambda file: file.name.removesuffix(".pkl.gz")
)
def test_learner_of_another_python_is_exported(file, tmp_path):
    learner = load_learner(unpacked(file, tmp_path))
    store = export_learner(learner, tmp_path / "store")
    config = read_config(store)
    assert config.classes == ["sky", "road", "tree"]
    (mask,) = load(config, store)([Preprocessor(config)((LEARNERS / "photo.png").read_bytes())])
    there = np.array(Image.open(LEARNERS / "mask.png"))
    assert (mask == there).mean() > 0.999, "another machine may round a pixel, no more"
    metric = learner.metrics[0].func
    if HERE not in file.name:
        assert issubclass(metric, Missing) and metric.symbol == "__main__.share_of_road"
    else:  # its own Python runs the code that is in the file
        assert isinstance(metric, types.FunctionType)
    learner.metrics = []
    with learner.no_bar(), learner.no_logging():
        assert np.array_equal(learner.predict(LEARNERS / "photo.png")[1].numpy(), mask)


def cloudpickled(thing, own_code: bool = False, protocol: int = 2):
    """`thing` after cloudpickle and the lenient unpickler, and what that found."""
    found = Found()
    data = cloudpickle.dumps(thing, protocol=protocol)
    return lenient_pickle(found, own_code).load(io.BytesIO(data)), found


def test_foreign_bytecode_is_not_even_built():
    scope = {"__name__": "__main__"}
    exec("def loss(x): return x + 1\nclass Loss:\n    def decodes(self, x): return x", scope)
    foreign = bytes([opcode.opmap["NOP"], 0]) * 200  # falls off its end, where Python crashes
    scope["loss"].__code__ = scope["loss"].__code__.replace(co_code=foreign, co_filename="/x/python3.99/y.py")
    function, found = cloudpickled(scope["loss"])
    kind, _ = cloudpickled(scope["Loss"])
    instance, _ = cloudpickled(scope["Loss"]())
    assert issubclass(function, Missing) and issubclass(kind, Missing) and isinstance(instance, Missing)
    assert found.missing and found.python == "3.99" and not found.same_bytecode()
    with pytest.raises(ExportError, match="the loss needs __main__.loss.*: export with Python 3.99"):
        require(function, "the loss")


def test_functions_of_installed_modules_are_those_of_the_module():
    from fastai.vision.core import PILBase, PILImage

    loaded, found = cloudpickled(PILImage.create)
    assert loaded.__func__ is PILBase.create.__func__ and loaded.__self__ is PILImage
    found.installed = []
    copy = types.FunctionType(PILBase.create.__func__.__code__, {"__name__": "fastai.vision.core"}, "create")
    copy.__qualname__ = "create"  # cloudpickle takes it for a function of its own
    loaded, found = cloudpickled(copy)
    assert loaded is PILBase.create.__func__ and found.same_bytecode() and not found.missing


def test_what_only_one_python_or_system_has():
    unpickle = lenient_pickle(Found(), False).Unpickler(io.BytesIO())
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "WindowsPath"):
            assert isinstance(unpickle.find_class(module, name)("a", "b"), pathlib.Path)
    union = unpickle.find_class("cloudpickle.cloudpickle", "_builtin_type")("UnionType")
    assert union[int, str] == int | str
    assert issubclass(unpickle.find_class("__builtin__", "getattr")(len, "__annotate__x"), Missing)
    assert issubclass(unpickle.find_class("cloudpickle.cloudpickle", "subimport")("no_such_module"), Missing)
    assert issubclass(unpickle.find_class("pathlib._local", "_NoSuchFlavour"), Missing)


def run_export(path: Path, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "deployment.export", path, "--trust", "--out", out]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_older_fastai_that_cannot_be_opened_is_one_line_with_the_remedy(tmp_path):
    torch.save({"dls": 1}, tmp_path / "old.pkl", pickle_module=old_fastai())
    done = run_export(tmp_path / "old.pkl", tmp_path / "store")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "fastai<2.8" in done.stderr
    assert not (tmp_path / "store").exists()


def old_fastai() -> types.SimpleNamespace:
    """A pickle module that writes a reference to a class that fastcore once had, whatever it is given."""

    class Pickler(pickle.Pickler):
        def __init__(self, file, protocol):
            super().__init__(file, protocol)
            self.file = file

        def dump(self, _):
            self.file.write(b"\x80\x02cfastcore.transform\nPipeline\n.")

    return types.SimpleNamespace(__name__="pickle", Pickler=Pickler)
