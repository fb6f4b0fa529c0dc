"""Prove the copy of a learner, then write it: the network, and all that serving must know, into one folder."""

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from PIL import Image

from ..archive import BATCH_SIZES
from ..config import Config, read_config
from ..photos import load_opener, size_of
from ..runtime import PRECISIONS, RuntimeUnavailable, check_runtime
from .card import write_card
from .convert import convert
from .describe import as_program, describe_learner
from .half import half_precision
from .learner import ExportError, load_learner, on_cpu
from .onnx_file import write_onnx
from .program import capture_network, free_sides
from .prove import NetworkDiffers, find_images, prove, sample_images
from .rescue import Prove, load_rescued
from .transforms import ImagePipeline, read_pipeline

__all__ = ["ExportError", "export_learner", "load_learner", "load_rescued"]

# The files of a network, which a later export takes away where it does not write them anew. open_image.py is not among
# them: it may be the reader's only copy.
EXPORTED = ("fastunet.pth", "fastunet.pt2", "fastunet.xml", "fastunet.bin", "fastunet.onnx")

DEFAULT_SIZE = [96, 128]  # (height, width) of generated images for a learner that takes any size

CONFIG_HEAD = """\
# TorchServe's configuration of this model, for `torch-model-archiver --config-file`.
# How many workers run is not said here: deployment/server/torchserve.py decides it by the runtime and the machine.
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
    open: Path | str | None = None,
    runtime: str = "eager",
    precision: str | None = None,
    calibrate: Path | str | None = None,
    max_drop: float = 0.5,
    decode: str = "exact",
    onnx: bool = False,
    earlier: Prove | None = None,
) -> Path:
    """Write the network, `model-config.yaml` and `MODEL_CARD.md` of `learner` into `out_dir`, once they are proven.

    The network is `fastunet.pth`, the weights of a `DynamicUnetDIY`, or `fastunet.pt2`, a program. For the runtime
    `openvino` the converted model, `fastunet.xml` and `fastunet.bin`, is written too. The proof runs on the CPU,
    whatever device the learner is on.

    Args:
        learner: a `fastai.learner.Learner` for one image in and a mask, a class, classes, values or points out.
        out_dir: folder to write into. The files of an earlier export are replaced whole, and those that this one does
            not write are removed; where it fails, all are left as they are.
        check: folder of images to prove the copy on; default: generated images of several sizes and modes.
        open: a Python file with `open_image(data: bytes)`, for a learner that opens images itself or whose item
            transforms are its own; it goes with `check`. See "Own opening" in deployment/README.md.
        runtime, precision: what serves the model, see `deployment.runtime.PRECISIONS`, whose first is the default.
        calibrate, max_drop: as in `deployment.export.convert.convert`; fp16 and bf16 for a GPU need them too.
        decode: fast: decode large JPEGs at a fraction of their size, for the runtime `openvino`; see `convert`.
        onnx: write `fastunet.onnx` as well, see `deployment.export.onnx_file`.
        earlier: for a learner of fastai before 2.8: the proof that `deployment.export.rescue.load_rescued` returned.

    Returns:
        `out_dir`.

    Raises:
        ExportError: the learner holds something that cannot be reproduced, the copy's answer differs, the runtime
            cannot be had, or the converted model is not good enough.
    """
    images = find_images(check, any_file=open is not None) if check else None
    with made(Path(out_dir)) as out_dir, tempfile.TemporaryDirectory(dir=out_dir, prefix=".export-") as scratch:
        folder = Path(scratch, "store")  # takes its place in `out_dir` once all is well
        folder.mkdir()
        with on_cpu(learner) as model:
            config, images, proof = write_proven(learner, model, folder, images, open, earlier)
        try:
            if onnx:
                write_onnx(config, folder, images)
            config = for_runtime(config, folder, runtime, precision, calibrate, max_drop, decode)
            write_config(config, folder)
            write_card(learner, config, folder, proof)
        except RuntimeUnavailable as error:
            raise ExportError(str(error)) from error
        put_in_place(folder, out_dir)
    return out_dir


@contextlib.contextmanager
def made(folder: Path) -> Iterator[Path]:
    """`folder`, which is made where it is not there, and goes again where the block fails."""
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except BaseException:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def put_in_place(folder: Path, out_dir: Path) -> None:
    """Move what is in `folder` into `out_dir`, the configuration last, and remove what an earlier export left."""
    written = {path.name for path in folder.iterdir()}
    for name in sorted(written, key=lambda name: (name == "model-config.yaml", name)):
        os.replace(folder / name, out_dir / name)
    for name in EXPORTED:
        if name not in written:
            (out_dir / name).unlink(missing_ok=True)


def for_runtime(
    config: Config,
    folder: Path,
    runtime: str,
    precision: str | None,
    calibrate: Path | str | None,
    max_drop: float,
    decode: str,
) -> Config:
    """`config` with that runtime and precision, for which what it needs lies in `folder`; see `export_learner`."""
    precision = precision or PRECISIONS.get(runtime, ("",))[0]
    check_runtime(runtime, precision)
    if runtime == "openvino":
        return convert(config, folder, precision, calibrate, max_drop, decode)
    if decode != "exact":
        raise ExportError("--decode fast is for --runtime openvino: PyTorch's answers stay exact")
    return half_precision(config, folder, precision, calibrate, max_drop)


def write_proven(
    learner,
    model: torch.nn.Module,
    folder: Path,
    images: list[Path] | None,
    opener: Path | str | None,
    earlier: Prove | None,
) -> tuple[Config, list[Path], list[str]]:
    """Write network, configuration and opener of `learner` into `folder`, and prove them.

    Returns the configuration, the images of the proof, and what was proven, in lines. Where a `DynamicUnetDIY` does not
    come out equal, a program takes its place.
    """
    open_image = None
    if opener:
        if not images:
            raise ExportError("--open needs images to prove it on, as the learner gets them: --check DIR")
        try:
            open_image = load_opener(Path(opener))
        except (OSError, ValueError) as error:
            raise ExportError(str(error)) from error
        shutil.copy(opener, folder / "open_image.py")
    pipeline = read_pipeline(learner.dls, sample_file(folder.parent), open_image is not None)
    if not images:
        images = sample_images(folder.parent, image_size(learner, pipeline), large=pipeline.size is not None)
    config = describe_learner(learner, model, images[0], pipeline, open_image)
    if config.arch:
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        torch.save(state, folder / config.model_file)
        write_config(config, folder)
        try:
            return config, images, proofs(learner, model, config, folder, images, pipeline, earlier)
        except NetworkDiffers as error:
            print(f"not written as a DynamicUnetDIY, but as a program of torch.export: {error}")
            (folder / config.model_file).unlink()
            config = as_program(config, config.options.get("n_in", 3))
    config, images = write_program(model, config, folder, images, pipeline)
    write_config(config, folder)
    return config, images, proofs(learner, model, read_config(folder), folder, images, pipeline, earlier)


def proofs(
    learner,
    model: torch.nn.Module,
    config: Config,
    folder: Path,
    images: list[Path],
    pipeline: ImagePipeline,
    earlier: Prove | None,
) -> list[str]:
    """Prove what lies in `folder` against `learner`, and it against its `earlier` fastai: what was proven, in lines."""
    lines = [prove(learner, model, config, folder, images, pipeline)]
    if earlier:
        lines.append(earlier(learner, model, images, pipeline.skip))
    return lines


def sample_file(folder: Path) -> Path:
    """A small image file in `folder`."""
    path = folder / "sample.png"
    Image.new("RGB", (64, 48), (120, 90, 60)).save(path)
    return path


def image_size(learner, pipeline: ImagePipeline) -> list[int]:
    """(height, width) of images to generate: what the network sees, else as the learner's own data have it."""
    if pipeline.size:
        return pipeline.size
    try:
        width, height = size_of(learner.dls.valid_ds[0][0])
    except Exception:  # an exported learner has no data
        return DEFAULT_SIZE
    return [height, width]


def write_program(
    model: torch.nn.Module, config: Config, folder: Path, images: list[Path], pipeline: ImagePipeline
) -> tuple[Config, list[Path]]:
    """Write `model` as a program into `folder`; return `config`, and those of `images` that the program holds for.

    Where images keep their own size, it takes every size if torch.export can leave it free, else that of the first
    image alone; where the network branches on the size, those on its side of the branch. What it takes is printed.
    """
    h, w = config.img_size
    shape = (config.options.get("n_in", 3), h, w)
    program = capture_network(model, pipeline.own, shape, config.keeps_image_size)
    sides = free_sides(program) if config.keeps_image_size else None
    if not dataclasses.replace(config, sides=sides).takes_size((w, h)):  # it branches between them and `odd` ones
        program = capture_network(model, pipeline.own, shape, free_size=False)
        sides = None
    torch.export.save(program, folder / config.model_file)
    if not config.keeps_image_size:
        return config, images
    if sides is None:
        print(f"torch.export cannot leave the size of images free for this network: it takes {w} × {h} pixels alone")
        sides = [[h, h], [w, w]]
    elif any(limit is not None for side in sides for limit in side):
        print(f"the network branches on the size of images: what is exported takes {sides_text(sides)}")
    config = dataclasses.replace(config, sides=sides)
    return config, [path for path in images if holds_for(config, path)]


def sides_text(sides: list[list[int | None]]) -> str:
    """`sides`, the limits of height and width, in words."""
    words = []
    for name, (low, high) in zip(("heights", "widths"), sides, strict=True):
        words.append(f"{name} from {low or 1} to {high}" if high else f"{name} from {low or 1} on")
    return " and ".join(words)


def holds_for(config: Config, path: Path) -> bool:
    """Whether the program takes the image at `path`, as far as its header tells."""
    try:
        with Image.open(path) as image:
            return config.takes_size(image.size)
    except OSError:  # only the reader's own opener knows
        return True


def write_config(config: Config, folder: Path | str) -> None:
    """Write `folder`/model-config.yaml: TorchServe's settings, and `config` as its section `handler`."""
    values = dataclasses.asdict(config)
    for f in dataclasses.fields(config):
        if f.default is None and values[f.name] is None:
            del values[f.name]
    section = yaml.safe_dump({"handler": values}, sort_keys=False, default_flow_style=None, width=100)
    text = CONFIG_HEAD.format(BATCH_SIZES[config.runtime]) + section
    Path(folder, "model-config.yaml").write_text(text, encoding="utf-8")
