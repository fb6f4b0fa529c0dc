"""Export a fastai vision learner for serving: `python -m deployment.export LEARNER.pkl --out model_store`.

Everything that serving must know is read off the learner: the network, what happens to a photo at validation time, how
logits become an answer, the class names. A U-Net on an encoder of torchvision becomes a `DynamicUnetDIY`, every other
network a program of `torch.export`. Then this copy is proven equal, on photos, through the complete pipeline of either
side; only then are network and configuration written.

This package is the only place that knows fastai, ONNX, OpenVINO's converter and NNCF. Nothing of it runs on a server.
"""

import dataclasses
import os
import tempfile
from pathlib import Path

import torch
import yaml

from ..archive import BATCH_SIZES
from ..config import Config, read_config
from ..runtime import PRECISIONS, RuntimeUnavailable, check_runtime
from .convert import convert
from .describe import describe_learner
from .half import half_precision
from .learner import ExportError, load_learner, network
from .onnx_file import write_onnx
from .program import capture, capture_widest, has_free_size
from .prove import find_photos, prove, sample_photos, size_of

__all__ = ["ExportError", "export_learner", "load_learner"]

CONFIG_HEAD = """\
# TorchServe's configuration of this model, for `torch-model-archiver --config-file`.
# How many workers run is not said here: deployment/serve.py decides it by the runtime and the machine.
batchSize: {:<9} # requests handed to a worker together, at most; `deployment.archive --device cuda` makes it 32
maxBatchDelay: 1     # ms that the first of them waits for others (0 would mean 100); those that come while the workers
                     # compute gather anyway, and are handed over with one message in place of several
responseTimeout: 120 # s until a worker that does not answer is restarted

# What deployment/handler.py must know of the learner, read off it by deployment/export: see deployment/config.py.
"""


def export_learner(
    learner,
    out_dir: Path | str,
    *,
    check: Path | str | None = None,
    tolerance: float = 0.0,
    runtime: str = "eager",
    precision: str | None = None,
    calibrate: Path | str | None = None,
    max_drop: float = 0.5,
    onnx: bool = False,
) -> Path:
    """Write the network and `model-config.yaml` of `learner` into `out_dir`, once they are proven; return `out_dir`.

    The network is `fastunet.pth`, the weights of a `DynamicUnetDIY`, or `fastunet.pt2`, a program. For the runtime
    `openvino` the converted model, `fastunet.xml` and `fastunet.bin`, is written too.

    Args:
        learner: a `fastai.learner.Learner` for one photo in and a mask, a class, classes, values or points out.
        out_dir: folder to write into; files already there are replaced whole, or left as they are.
        check: folder of photos to prove the copy on; default: generated photos of several sizes and modes.
        tolerance: greatest difference of a logit that is accepted, on a GPU only; on a CPU there is none.
        runtime, precision: what serves the model, see `deployment.runtime.PRECISIONS`, whose first is the default.
        calibrate, max_drop: as in `deployment.export.convert.convert`; also for fp16 and bf16 on a GPU.
        onnx: write `fastunet.onnx` as well, see `deployment.export.onnx_file`.

    Raises:
        ExportError: the learner holds something that cannot be reproduced, the copy's output differs, the runtime
            cannot be had, or the converted model is not good enough.
    """
    config = describe_learner(learner)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir, prefix=".export-") as scratch:
        folder = Path(scratch, "store")  # takes its place in `out_dir` once all is well
        folder.mkdir()
        photos = find_photos(check) if check else sample_photos(scratch, config.img_size)
        config, photos = write_network(network(learner), config, folder, photos)
        write_config(config, folder)
        prove(learner, read_config(folder), folder, photos, tolerance)
        try:
            precision = precision or PRECISIONS.get(runtime, (None,))[0]
            check_runtime(runtime, precision)
            if onnx:
                write_onnx(config, folder, photos)
            if runtime == "openvino":
                config = convert(config, folder, precision, calibrate, max_drop)
            else:
                config = half_precision(config, folder, precision, calibrate, max_drop)
            write_config(config, folder)
        except RuntimeUnavailable as error:
            raise ExportError(str(error)) from error
        for path in folder.iterdir():
            os.replace(path, out_dir / path.name)
    return out_dir


def write_network(
    model: torch.nn.Module, config: Config, folder: Path, photos: list[Path]
) -> tuple[Config, list[Path]]:
    """Write `model` into `folder`, in the form that `config` says; return `config`, and those of `photos` it can take.

    Where photos keep their own size, a program takes every size if torch.export can leave it free, and else that of the
    first photo alone.
    """
    if config.arch:
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        torch.save(state, folder / config.model_file)
        return config, photos
    program = capture_widest(model, config)
    if config.keeps_photo_size and not has_free_size(program):
        config = dataclasses.replace(config, img_size=size_of(photos[0]))
        photos = [path for path in photos if size_of(path) == config.img_size]
        program = capture(model, config.n_in, config.img_size)
        h, w = config.img_size
        print(f"torch.export cannot leave the size of photos free for this network: it takes {w} × {h} pixels alone")
    torch.export.save(program, folder / config.model_file)
    return config, photos


def write_config(config: Config, folder: Path | str) -> None:
    """Write `folder`/model-config.yaml: TorchServe's settings, and `config` as its section `handler`."""
    values = dataclasses.asdict(config)
    for f in dataclasses.fields(config):
        if f.default is None and values[f.name] is None:
            del values[f.name]
    section = yaml.safe_dump({"handler": values}, sort_keys=False, default_flow_style=None, width=100)
    Path(folder, "model-config.yaml").write_text(CONFIG_HEAD.format(BATCH_SIZES[config.runtime]) + section)
