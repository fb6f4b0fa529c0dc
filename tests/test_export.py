"""Export: what it reads off a learner, what it proves, and what it refuses."""

import base64
import importlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch
import torchvision
import yaml
from conftest import ROOT, draw_photo
from PIL import Image

from deployment.config import read_config
from deployment.export import ExportError, export_learner, load_learner
from deployment.export import __main__ as command_line
from deployment.export.describe import describe_learner
from deployment.export.learner import on_cpu
from deployment.export.transforms import read_pipeline
from deployment.handler import Handler
from deployment.photos import Preprocessor
from deployment.runtime import pytorch

CODES = ["sky", "road", "tree", "car"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of four photos with random masks."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(4):
        draw_photo(i, (120, 90)).save(folder / f"{i}.png")
        Image.fromarray(np.random.default_rng(i).integers(0, 4, (90, 120), np.uint8)).save(folder / f"{i}_mask.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    """Photos of many sizes and modes."""
    folder = tmp_path_factory.mktemp("photos")
    modes = {
        "wide.png": ((201, 77), "RGB"),
        "tall.jpg": ((66, 143), "RGB"),
        "tiny.png": ((31, 23), "RGB"),
        "gray.png": ((90, 60), "L"),
        "gray.jpg": ((61, 90), "L"),
        "alpha.png": ((100, 80), "RGBA"),
        "gray_alpha.png": ((80, 100), "LA"),
        "palette.png": ((70, 71), "P"),
        "bits.png": ((64, 64), "1"),
        "deep.png": ((73, 59), "I;16"),
        "print.jpg": ((95, 64), "CMYK"),
        "web.webp": ((150, 99), "RGB"),
    }
    for i, (name, (size, mode)) in enumerate(modes.items()):
        image = draw_photo(i, size)
        if mode == "I;16":
            image = Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257)
        (image if mode == "I;16" else image.convert(mode)).save(folder / name)
    rotated = draw_photo(99, (80, 50))
    exif = rotated.getexif()
    exif[0x0112] = 6
    rotated.save(folder / "exif.jpg", exif=exif)
    return sorted(folder.iterdir())


def mask_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}_mask.png")


def make(data: Path, item=None, batch=None, *, codes=CODES, img_cls=None, arch="resnet18", label=mask_of, **options):
    """A learner with random weights whose classes all appear. By default it ends after layer 1 of its resnet18."""
    from fastai.vision.all import PILImage, Resize, SegmentationDataLoaders, resnet18, set_seed, unet_learner

    set_seed(0)
    dls = SegmentationDataLoaders.from_label_func(
        data,
        sorted(data.glob("?.png")),
        label,
        codes=codes,
        item_tfms=Resize((48, 64), method="squish") if item is None else item,
        batch_tfms=batch,
        img_cls=img_cls or PILImage,
        bs=2,
        num_workers=0,
    )
    if arch == "resnet18":
        arch, options = resnet18, {"cut": 5} | options
    options = {"pretrained": False, "n_out": len(CODES)} | options
    learner = unet_learner(dls, arch, **options)
    with torch.no_grad():  # every norm does something, no class wins everywhere
        for name, p in learner.model.named_parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
            if name.endswith("gamma"):
                p.fill_(0.5)
    last = [module for module in learner.model.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    with last.register_forward_hook(lambda _, inputs, output: means.append(output.mean((0, 2, 3)))), torch.no_grad():
        means = []
        learner.model.eval()(dls.test_dl(sorted(data.glob("?.png"))[:1]).one_batch()[0])
        if last.bias is not None:
            last.bias -= means[0].as_subclass(torch.Tensor)
    return learner


def served_mask(store: Path, photo: Path) -> torch.Tensor:
    """The mask of `photo` from the exported files alone, by the functions that the handler calls."""
    config = read_config(store)
    (mask,) = pytorch.eager(config, store)([Preprocessor(config, store)(photo.read_bytes())])
    return torch.from_numpy(mask)


def predicted_mask(learner, photo: Path) -> torch.Tensor:
    with learner.no_bar(), learner.no_logging():
        return learner.predict(photo)[0].as_subclass(torch.Tensor).squeeze().to(torch.uint8)


def assert_same_masks(learner, store: Path, photos: list[Path]) -> None:
    seen = set()
    for photo in photos:
        mask = served_mask(store, photo)
        assert torch.equal(mask, predicted_mask(learner, photo)), photo.name
        seen |= set(mask.unique().tolist())
    assert len(seen) > 1  # masks of a single class would prove little


def variants() -> dict[str, dict]:
    """Learners that export must reproduce: arguments of `make`."""
    from fastai.vision.all import (
        BCEWithLogitsLossFlat,
        Brightness,
        CropPad,
        DiceLoss,
        Flip,
        FocalLossFlat,
        Normalize,
        NormType,
        PILImageBW,
        RandomCrop,
        RandomErasing,
        RandomResizedCrop,
        Resize,
        aug_transforms,
        imagenet_stats,
    )

    stats = Normalize.from_stats([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
    size = (48, 64)
    return {
        "squish": {},
        "squish nearest": {"item": Resize(size, method="squish", resamples=(Image.NEAREST, Image.NEAREST))},
        "crop": {"item": Resize(50)},
        "pad": {"item": Resize(size, method="pad")},
        "pad border": {"item": Resize((64, 48), method="pad", pad_mode="border")},
        "pad zeros": {"item": Resize(size, method="pad", pad_mode="zeros"), "batch": stats},
        "own size": {"item": [], "batch": Normalize.from_stats(*imagenet_stats)},
        "measured statistics": {"batch": Normalize()},
        "augmented": {"item": Resize(60), "batch": [*aug_transforms(size=48), stats]},
        "augmented, shrunk a lot": {"item": Resize(300), "batch": aug_transforms(size=(40, 56), pad_mode="zeros")},
        "augmented, same size": {"batch": [*aug_transforms(max_warp=0), Flip(), stats]},
        "lighting": {"batch": [Brightness(), RandomErasing(p=1.0)]},
        "random resized crop": {"item": RandomResizedCrop((48, 64), min_scale=0.5)},
        "random crop": {"item": [Resize(64), RandomCrop(48)]},
        "crop or pad": {"item": CropPad((70, 90), pad_mode="border")},
        "gray": {"img_cls": PILImageBW, "n_in": 1, "item": Resize(size, method="pad")},
        "no codes": {"codes": None},
        "focal": {"loss_func": FocalLossFlat(axis=1)},
        "dice": {"loss_func": DiceLoss()},
        "threshold": {"loss_func": BCEWithLogitsLossFlat(thresh=0.45), "n_out": 1, "y_range": (-2, 2)},
        "all options": {
            "cut": 7,
            "self_attention": True,
            "blur": True,
            "blur_final": False,
            "norm_type": NormType.Spectral,
            "act_cls": torch.nn.Mish,
            "y_range": (-3, 3),
        },
        "weight norm": {"norm_type": NormType.Weight, "last_cross": False, "item": Resize((45, 61))},
        "cut in features": {"arch": torchvision.models.mobilenet_v2, "cut": lambda m: m.features[:8]},
        "vgg": {"arch": torchvision.models.vgg11_bn, "cut": lambda m: m.features[:8]},
    }


@pytest.mark.parametrize("name", variants())
def test_exported_mask_is_learn_predicts(name, data, photos, tmp_path):
    learner = make(data, **variants()[name])
    store = export_learner(learner, tmp_path / "store")
    assert sorted(p.name for p in store.iterdir()) == ["MODEL_CARD.md", "fastunet.pth", "model-config.yaml"]
    assert_same_masks(learner, store, photos if name == "squish" else photos[::4])


# --- learners as fastai's lessons and documentation make them, from the export to every form of the answer ---


class CombinedLoss:
    """Focal and Dice together, from fastai's documentation of custom losses."""

    def __init__(self, axis=1, smooth=1.0, alpha=1.0):
        from fastai.vision.all import DiceLoss, FocalLossFlat

        self.axis, self.alpha = axis, alpha
        self.focal_loss, self.dice_loss = FocalLossFlat(axis=axis), DiceLoss(axis, smooth)

    def __call__(self, pred, targ):
        return self.focal_loss(pred, targ) + self.alpha * self.dice_loss(pred, targ)

    def decodes(self, x):
        return x.argmax(dim=self.axis)

    def activation(self, x):
        return x.softmax(dim=self.axis)


def lessons() -> dict[str, dict]:
    """Arguments of `make`."""
    from fastai.vision.all import (
        BCEWithLogitsLossFlat,
        DiceLoss,
        EarlyStoppingCallback,
        Mish,
        MixedPrecision,
        Normalize,
        PILImageBW,
        RandomResizedCropGPU,
        ReduceLROnPlateau,
        Resize,
        SaveModelCallback,
        aug_transforms,
        imagenet_stats,
    )

    stats = Normalize.from_stats(*imagenet_stats)
    trackers = {"SaveModel": SaveModelCallback, "EarlyStopping": EarlyStoppingCallback, "Plateau": ReduceLROnPlateau}
    return {
        "augmented to a size": {"item": Resize(100), "batch": [*aug_transforms(size=(48, 64)), stats]},
        "large, then augmented": {"item": Resize(460), "batch": [*aug_transforms(size=56), stats]},
        "own size, augmented to a size": {"item": [], "batch": [*aug_transforms(size=(45, 60)), stats]},
        "presized": {"item": Resize(90), "batch": [*aug_transforms(size=56, min_scale=0.75), stats]},
        "presized to a square": {"item": Resize((61, 90)), "batch": aug_transforms(size=(48, 56), min_scale=0.5)},
        "own size, to a square": {"item": [], "batch": [RandomResizedCropGPU((48, 64), valid_scale=0.8)]},
        "Mish and self-attention": {"cut": 6, "act_cls": Mish, "self_attention": True},
        "combined loss": {"loss_func": CombinedLoss()},
        "Dice loss": {"loss_func": DiceLoss()},
        "to_fp16": {"cbs": MixedPrecision()},
        **{name: {"cbs": tracker(monitor="valid_loss")} for name, tracker in trackers.items()},
        "all three trackers": {"cbs": [tracker() for tracker in trackers.values()]},
        "one channel": {"loss_func": BCEWithLogitsLossFlat(thresh=0.4), "n_out": 1, "codes": ["ground", "road"]},
        "gray": {"img_cls": PILImageBW, "n_in": 1, "batch": aug_transforms(size=(48, 64))},
    }


def ask(handler: Handler, photo: Path, format: str, size: str) -> bytes:
    job = handler.preprocess({"data": photo.read_bytes(), "format": format, "size": size})
    handler.inference(job.items)
    response = handler.postprocess(job)
    assert response.status == 200, response.body
    return response.body


@pytest.mark.parametrize("name", lessons())
def test_every_answer_is_learn_predicts(name, data, photos, tmp_path):
    learner = make(data, **lessons()[name])
    handler = Handler()
    handler.load(export_learner(learner, tmp_path / "store"))
    seen = set()
    for photo in photos[9::3]:
        mask = predicted_mask(learner, photo).numpy()
        seen |= set(np.unique(mask).tolist())
        with Image.open(photo) as image:
            original = handler.preprocessor.to_image_size(mask, image.size)
            assert original.shape == image.size[::-1]
        for size, expected in {"model": mask, "original": original}.items():
            answer = json.loads(ask(handler, photo, "json", size))
            assert answer["shape"] == list(expected.shape)
            assert base64.b64decode(answer["base64_prediction"]) == expected.tobytes()
            png = Image.open(io.BytesIO(ask(handler, photo, "png", size)))
            assert (png.format, png.mode) == ("PNG", "P") and np.array_equal(np.array(png), expected)
            overlay = Image.open(io.BytesIO(ask(handler, photo, "overlay", size)))
            assert (overlay.format, overlay.size) == ("JPEG", expected.shape[::-1])
    assert len(seen) > 1


def test_configuration_holds_what_serving_needs(data, tmp_path):
    from fastai.vision.all import Normalize, Resize

    batch = Normalize.from_stats([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
    learner = make(data, Resize((48, 64), method="pad"), batch, blur=True, cut=None)
    export_learner(learner, tmp_path)
    config = yaml.safe_load((tmp_path / "model-config.yaml").read_text())
    handler = config.pop("handler")
    assert set(config) == {"batchSize", "maxBatchDelay", "responseTimeout"}
    versions = handler.pop("exported_with")
    assert versions["torch"] == torch.__version__ and set(versions) == {"python", "torch", "fastai"}
    assert handler.pop("mean") == pytest.approx([0.4, 0.5, 0.6]) and handler.pop("std") == pytest.approx(
        [0.2, 0.3, 0.25]
    )
    assert handler == {
        "task": "segmentation",
        "decode": "exact",
        "arch": "resnet18",
        "n_classes": 4,
        "img_size": [48, 64],
        "options": {"blur": True},
        "channels": 3,
        "dtype": "uint8",
        "opener": False,
        "divisor": 255.0,
        "resize": {"size": [48, 64], "method": "pad", "pad_mode": "reflection", "resample": "bilinear"},
        "affine": [],
        "activation": "softmax",
        "classes": CODES,
        "runtime": "eager",
        "precision": "fp32",
    }
    state = torch.load(tmp_path / "fastunet.pth", weights_only=True)
    assert state.keys() == learner.model.state_dict().keys()


def test_reads_the_architecture_off_the_model_alone(data):
    learner = make(data, arch=torchvision.models.resnet34, cut=7, act_cls=torch.nn.SiLU)
    expected = {"cut": 7, "act_cls": "SiLU"}
    for name in ("arch", "n_out", "normalize", "pretrained", "cut", "act_cls"):
        delattr(learner, name)
    with on_cpu(learner) as model:
        config = describe_learner(learner, model, data / "0.png", read_pipeline(learner.dls, data / "0.png", False))
    assert (config.arch, config.options) == ("resnet34", expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_learner_is_as_it_was_after_its_proof(data, training):
    learner = make(data)
    learner.model.train(training)
    learner.model[0].eval()  # as frozen layers are
    before = [part.training for part in learner.model.modules()]
    with on_cpu(learner) as model:
        assert not any(part.training for part in model.modules())
    assert [part.training for part in learner.model.modules()] == before


# --- the command line ---


def run_main(monkeypatch, *arguments) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    try:
        command_line.main()
    except SystemExit as e:
        return e.code


def test_command_from_file_to_mask(data, photos, tmp_path):
    learner = make(data, label=lambda path: mask_of(path))
    learner.export(tmp_path / "a learner.pkl")
    command = [sys.executable, "-m", "deployment.export", tmp_path / "a learner.pkl", "--out", tmp_path / "store"]
    done = subprocess.run([*command, "--trust", "--check", data], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, proven, wrote = done.stdout.splitlines()
    assert proven.startswith("proven on ") and not done.stderr
    names = {Path(path).name for path in wrote.removeprefix("wrote ").split(", ")}
    assert (
        names
        == {path.name for path in (tmp_path / "store").iterdir()}
        == {"MODEL_CARD.md", "fastunet.pth", "model-config.yaml"}
    )
    assert_same_masks(learner, tmp_path / "store", photos[::4])


@pytest.fixture(scope="module")
def learner_file(data, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("learner") / "learner.pkl"
    make(data).export(path)
    return path


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")  # other than that of torch.save
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "cannot be loaded as a learner"),
        (b"hello, this is no pickle", "cannot be loaded as a learner"),
        (pickle.dumps({"not": "a learner"}), "cannot be loaded as a learner"),
        (b"\x80\x02cfastcore.dispatch\nTypeDispatch\n.", "from a fastai before 2.8, and cannot be opened"),
        (
            b"\x80\x02}X\x03\x00\x00\x00clscfastai.basic_train\nLearner\ns.",
            "is from fastai 1 (it names",
        ),
        ("truncated", "cannot be loaded as a learner"),
        ("state dict", "weights only"),
        ("module", "cannot be loaded as a learner"),
    ],
)
def test_refuses_files_that_hold_no_learner(content, message, learner_file, data, tmp_path, monkeypatch, capsys):
    path, out = tmp_path / "file.pkl", tmp_path / "out"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "truncated":
        path.write_bytes(learner_file.read_bytes()[:-5000])
    elif content == "state dict":
        torch.save({"weight": torch.ones(3)}, path)
    elif content == "module":
        torch.save(torch.nn.Linear(2, 2), path)
    assert run_main(monkeypatch, path, "--trust", "--out", out) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not out.exists()


WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = sys.modules["fastai"] = None  # cannot be imported
runpy.run_module("deployment.export", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["learnr.pkl", "--trust"], "no such file: learnr.pkl: did you mean learner.pkl?"),
        (["learner.pkl"], "loading a learner runs the code in it: add --trust if you know where learner.pkl is from"),
        (["notes.pkl", "--trust"], "notes.pkl cannot be loaded as a learner: it is nothing that learn.export() writes"),
        (["cut.pkl", "--trust"], "cut.pkl cannot be loaded as a learner: it is cut short"),
        (["learner.pkl", "--trust", "--check", "photo"], "there is no folder photo: did you mean photos?"),
        (["learner.pkl", "--trust", "--calibrate", "labels"], "there is no folder labels"),
        (["learner.pkl", "--trust", "--check", "photos", "--open", "my.py"], "no such file: my.py"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_files_tell_is_said_before_torch_is_imported(arguments, message, learner_file, tmp_path):
    shutil.copy(learner_file, tmp_path / "learner.pkl")
    (tmp_path / "cut.pkl").write_bytes(learner_file.read_bytes()[:-5000])
    (tmp_path / "notes.pkl").write_text("hello, this is no pickle")
    (tmp_path / "photos").mkdir()
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


def test_an_interrupt_is_quiet_and_leaves_nothing(learner_file, tmp_path):
    store = tmp_path / "store"
    command = [sys.executable, "-m", "deployment.export", learner_file, "--trust", "--out", store]
    export = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list(store.glob(".export-*/store/model-config.yaml")):  # the proof begins
            assert export.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        export.send_signal(signal.SIGINT)
        said, _ = export.communicate(timeout=60)
    finally:
        export.kill()
    assert (export.returncode, said) == (130, "") and not store.exists()


class Trap:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_s_code_does_not_run_without_trust(tmp_path, monkeypatch, capsys):
    sprung = tmp_path / "sprung"
    torch.save(Trap(sprung), tmp_path / "learner.pkl")
    assert run_main(monkeypatch, tmp_path / "learner.pkl", "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "runs the code" in err and "--trust" in err and err.count("\n") == 1
    assert not sprung.exists() and not (tmp_path / "out").exists()
    assert run_main(monkeypatch, tmp_path / "learner.pkl", "--out", tmp_path / "out", "--trust") == 2
    assert sprung.exists() and "cannot be loaded as a learner" in capsys.readouterr().err


def test_the_learner_of_this_checkout_needs_no_trust(learner_file, tmp_path, monkeypatch, capsys):
    assert command_line.OWN_LEARNER == ROOT / "model_store" / "learner.pkl"
    monkeypatch.setattr(command_line, "OWN_LEARNER", learner_file)
    monkeypatch.chdir(learner_file.parent)
    assert run_main(monkeypatch, "learner.pkl", "--out", tmp_path) is None
    assert (tmp_path / "fastunet.pth").exists()
    copy = tmp_path / "learner.pkl"
    copy.write_bytes(learner_file.read_bytes())
    assert run_main(monkeypatch, copy, "--out", tmp_path) == 2
    assert "--trust" in capsys.readouterr().err


def test_check_folder_without_photos(learner_file, tmp_path, monkeypatch, capsys):
    assert run_main(monkeypatch, learner_file, "--trust", "--out", tmp_path / "out", "--check", tmp_path) == 2
    assert "no images" in capsys.readouterr().err


# --- learners whose trainer's code is missing ---

TRAINER = """
import torch
from fastai.vision.all import *
def get_y(path): return path.with_name(f"{path.stem}_mask.png")
def accuracy(inp, targ): return (inp.argmax(1) == targ.squeeze(1)).float().mean()
class Loss(CrossEntropyLossFlat):
    def __init__(self): super().__init__(axis=1)
class Note(Callback): pass
class Swap(Transform):
    def encodes(self, x: TensorImage): return x.flip(1)
class Doing(nn.ReLU): pass
class Photo(PILImage): pass
def opened(path): return PILImage.create(path)
"""

# The trainer's functions by name alone. On Python 3.14 pickle cannot write fastai's annotations.
PICKLE = pickle if sys.version_info < (3, 14) else cloudpickle


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """A module of the trainer's own, and a function that forgets it: from then on it cannot be imported."""
    folder = tmp_path / "trainer"
    folder.mkdir()
    (folder / "their_code.py").write_text(TRAINER)
    monkeypatch.syspath_prepend(folder)
    module = importlib.import_module("their_code")

    def forget():
        sys.modules.pop("their_code")
        (folder / "their_code.py").unlink()
        importlib.invalidate_caches()

    yield module, forget
    sys.modules.pop("their_code", None)


def test_labelling_and_metrics_need_no_stubs(data, photos, trainer, tmp_path):
    module, forget = trainer
    learner = make(data, label=module.get_y, metrics=module.accuracy)
    learner.export(tmp_path / "learner.pkl", pickle_module=PICKLE)
    forget()
    with pytest.raises(ModuleNotFoundError):
        torch.load(tmp_path / "learner.pkl", weights_only=False)
    store = export_learner(load_learner(tmp_path / "learner.pkl"), tmp_path / "store")
    assert_same_masks(learner, store, photos[:4])


@pytest.mark.parametrize("part", ["loss", "callback", "batch transform", "item transform", "activation", "photos"])
def test_names_the_symbol_that_serving_needs(part, data, trainer, tmp_path):
    from fastai.vision.all import Resize

    module, forget = trainer
    options, name = {
        "loss": ({"loss_func": module.Loss()}, "Loss"),
        "callback": ({"cbs": module.Note()}, "Note"),
        "batch transform": ({"batch": module.Swap()}, "Swap"),
        "item transform": ({"item": [Resize(48), module.Swap()]}, "Swap"),
        "activation": ({"act_cls": module.Doing}, "Doing"),
        "photos": ({"img_cls": module.Photo}, "Photo"),
    }[part]
    make(data, **options).export(tmp_path / "learner.pkl", pickle_module=PICKLE)
    forget()
    with pytest.raises(ExportError, match=rf"their_code\.{name}.*PYTHONPATH.*export_learner"):
        export_learner(load_learner(tmp_path / "learner.pkl"), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_names_the_opener_that_cannot_be_imported(data, trainer, tmp_path):
    """Public case A 3."""
    from fastai.vision.all import CategoryBlock, DataBlock, IndexSplitter, Resize, TransformBlock, vision_learner
    from fastai.vision.models import resnet18

    module, forget = trainer
    block = DataBlock(
        (TransformBlock(type_tfms=module.opened), CategoryBlock),
        get_y=lambda path: path.stem,
        splitter=IndexSplitter([3]),
        item_tfms=Resize(48),
    )
    dls = block.dataloaders(sorted(data.glob("?.png")), bs=2, num_workers=0)
    learner = vision_learner(dls, resnet18, pretrained=False, n_out=3)
    learner.dls.valid_ds.tls[1].tfms.fs.clear()
    learner.export(tmp_path / "learner.pkl", pickle_module=PICKLE)
    forget()
    with pytest.raises(ExportError, match=r"opening of images.*their_code\.opened.*PYTHONPATH"):
        export_learner(load_learner(tmp_path / "learner.pkl"), tmp_path / "store")


def test_names_the_package_that_a_callback_lacks(data, tmp_path, monkeypatch):
    """Public case E 16: the module is here, in fastai, and what it imports is not."""
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Image=None, Table=None))
    callback = importlib.import_module("fastai.callback.wandb").WandbCallback
    learner = make(data)
    learner.cbs.append(callback.__new__(callback))
    learner.export(tmp_path / "learner.pkl", pickle_module=PICKLE)
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.delitem(sys.modules, "fastai.callback.wandb")
    with pytest.raises(ExportError, match="WandbCallback.*pip install wandb"):
        export_learner(load_learner(tmp_path / "learner.pkl"), tmp_path / "store")


class CodeOfAnotherPython:
    """Pickles like a function that cloudpickle took apart under another version of Python."""

    def __reduce__(self):
        return types.CodeType, (1, 2, 3)


def test_code_of_another_python_is_not_built_where_nothing_needs_it(data, tmp_path):
    learner = make(data)
    learner.their_function = CodeOfAnotherPython()
    learner.export(tmp_path / "learner.pkl")
    with pytest.raises(TypeError):
        torch.load(tmp_path / "learner.pkl", weights_only=False)
    assert export_learner(load_learner(tmp_path / "learner.pkl"), tmp_path / "store").is_dir()


# --- learners that cannot be reproduced ---


def refused() -> dict[str, tuple[dict, str]]:
    """Arguments of `make`, and what the refusal must name."""
    from fastai.vision.all import (
        BCEWithLogitsLossFlat,
        CropPad,
        LabelSmoothingCrossEntropyFlat,
        MSELossFlat,
        RandomResizedCropGPU,
        RatioResize,
        Resize,
        Transform,
        aug_transforms,
    )

    class Turned(Transform):
        def encodes(self, x: Image.Image):
            return x.transpose(Image.ROTATE_180)

    size = Resize(48)
    return {
        "item transform": ({"item": [size, Turned()]}, "Turned.*--open"),
        "two sizes": ({"batch": [*aug_transforms(size=40), RandomResizedCropGPU(32)]}, "a transform with a size"),
        "ratio resize": ({"item": RatioResize(60)}, "RatioResize"),
        "pad, then resize": ({"item": [CropPad(80), size]}, "Resize"),
        "numbers": ({"loss_func": MSELossFlat()}, "MSELoss"),
        "smoothed along the wrong axis": ({"loss_func": LabelSmoothingCrossEntropyFlat(axis=1)}, "LabelSmoothing"),
        "several labels a pixel": ({"loss_func": BCEWithLogitsLossFlat()}, "BCEWithLogitsLoss"),
        "no decodes": ({"loss_func": torch.nn.CrossEntropyLoss()}, "CrossEntropyLossFlat"),
        "too many classes": ({"n_out": 300}, "300 classes"),
    }


@pytest.mark.parametrize("name", refused())
def test_refuses_by_name(name, data, tmp_path):
    options, message = refused()[name]
    with pytest.raises(ExportError, match=message):
        export_learner(make(data, **options), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_what_the_plain_network_cannot_be_becomes_a_program(data, photos, tmp_path):
    """U-Nets on other encoders and with other layers: see also tests/test_tasks.py."""
    from fastai.vision.all import NormType

    class Layer(torch.nn.Conv2d):
        pass

    def own_body(model):
        return torch.nn.Sequential(Layer(3, 8, 3, 2), Layer(8, 16, 3, 2))

    for i, options in enumerate(({"cut": own_body}, {"bn_1st": False, "norm_type": NormType.Batch})):
        learner, store = make(data, **options), tmp_path / str(i)
        export_learner(learner, store)
        assert sorted(path.name for path in store.iterdir()) == ["MODEL_CARD.md", "fastunet.pt2", "model-config.yaml"]
        assert_same_masks(learner, store, photos[:4])


# --- the proof ---


@pytest.mark.parametrize(
    ("owner", "stage", "message"),
    [
        (Preprocessor, "open", "as opened"),
        (Preprocessor, "resize", "after the item transforms"),
        (pytorch.BatchTransforms, "forward", "after the batch transforms"),
        (pytorch, "load_network", "logits differ by"),
        (pytorch, "decode", "masks differ in"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_difference_refuses_and_says_where(owner, stage, message, data, tmp_path, monkeypatch, capsys):
    learner = make(data)
    real = getattr(owner, stage)

    def broken(*arguments, **options):
        out = real(*arguments, **options)
        if stage == "open":
            out.putpixel((3, 4), (1, 2, 3))
        elif stage == "resize":
            out = out.transpose(Image.FLIP_LEFT_RIGHT)
        elif stage == "forward":
            out[0, 0, 5, 6] += 1e-6
        elif stage == "load_network":
            with torch.no_grad():
                next(out.parameters()).add_(1e-3)
        elif stage == "decode":
            out[0, 7, 8] += 1
        return out

    before = {"fastunet.pth": b"what was there before", "fastunet.pt2": b"and of another export"}
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(owner, stage, broken)
    with pytest.raises(ExportError, match=rf"same\.png: .*{message}"):
        export_learner(learner, tmp_path)
    if stage == "load_network":  # neither way out came out equal
        assert "not written as a DynamicUnetDIY" in (said := capsys.readouterr().out) and "layer layers.0" in said
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_broken_check_image_is_named(data, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ExportError, match="broken.png"):
        export_learner(make(data), tmp_path / "store", check=tmp_path)


def test_says_what_it_proved_and_on_how_many_images(data, tmp_path, capsys):
    export_learner(make(data), tmp_path / "store", check=data)
    assert capsys.readouterr().out == (
        "proven on 8 images (0.png, 0_mask.png, 1.png, …): from file to answer as learn.predict, bit for bit\n"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_shows_which_image_it_proves_on_a_terminal(data, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    export_learner(make(data), tmp_path / "store", check=data)
    assert re.findall(r"proving image (\d) of 8: (\S+\.png)", terminal.getvalue())[-1] == ("8", "3_mask.png")


def test_nothing_of_an_earlier_export_stays_beside_a_new_one(data, tmp_path):
    earlier = ("fastunet.pt2", "fastunet.xml", "fastunet.bin", "fastunet.onnx")
    own = {"fastunet.mar", "learner.pkl", "open_image.py", "fastunet.txt"}
    for name in own.union(earlier):
        (tmp_path / name).write_text(name)
    export_learner(make(data), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == own | {"MODEL_CARD.md", "fastunet.pth", "model-config.yaml"}
    assert all((tmp_path / name).read_text() == name for name in own)
