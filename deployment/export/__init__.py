"""Export a fastai vision learner for serving: `python -m deployment.export LEARNER.pkl --out model_store`.

Everything that serving must know is read off the learner: the network, what happens to an image at validation time, how
logits become an answer, the class names. A U-Net on an encoder of torchvision becomes a `DynamicUnetDIY`, every other
network a program of `torch.export`. Then this copy is proven equal, from image files to answers; only then are network
and configuration written.

This package is the only place that knows fastai, ONNX, OpenVINO's converter and NNCF. Nothing of it runs on a server.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .write import ExportError, export_learner, for_runtime, load_learner, load_rescued, write_config

__all__ = ["ExportError", "export_learner", "for_runtime", "load_learner", "load_rescued", "write_config"]


def __getattr__(name: str):
    """What is in `__all__`, of write.py, imported when it is first asked for.

    torch takes seconds to import, and the command line says what is wrong with its arguments before that.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".write", __name__), name)
