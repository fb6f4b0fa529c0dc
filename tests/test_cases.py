"""Public cases: what people met, by number of the case. Each is refused by name, or served as `learn.predict` answers.

`PYTHONPATH=. python tests/test_cases.py` prints the table of what becomes of each.
"""

import base64
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_photo
from fastai.vision import all as fastai
from PIL import Image, ImageOps
from torch import nn

from deployment.export import ExportError, export_learner, load_learner
from deployment.export.learner import on_cpu
from deployment.export.program import capture_network
from deployment.handler import Handler
from deployment.runtime.program import load_program

KINDS = ["bus", "car", "tram"]
EQUAL = "served equal"  # to `learn.predict(FILE)`


@dataclass
class Case:
    """A learner, and what is to become of it: `EQUAL`, or words of the refusal."""

    learner: Callable[[Path], object]
    outcome: str
    images: Callable[[Path], None] | None = None  # writes what is asked, and what `--check` gets with `check`
    check: bool = False
    open: str = ""  # the file of `--open`
    said: str = field(default="")  # by the export, on its way


# --- learners ---


class Small(nn.Sequential):
    """A network whose answer depends on each pixel: (N, channels, H, W) to (N, 3)."""

    def __init__(self, channels: int = 3):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 3),
        )  # fmt: skip
        with torch.no_grad():
            self[-1].weight *= 30


def photos(folder: Path, size: tuple[int, int] = (120, 90)) -> list[Path]:
    """Four photos in `folder`, and their masks."""
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    for i in range(4):
        draw_photo(i, size).save(folder / f"{i}.png")
        mask = np.random.default_rng(i).integers(0, 3, size[::-1], np.uint8)
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    return sorted(folder.glob("?.png"))


def kind_of(path) -> str:
    return KINDS[int(Path(path).stem) % 3]


def classifier(image=fastai.ImageBlock, network=None, loss=None, size=(120, 90), target=None, **options):
    """A function from a folder to a learner of three kinds; `options` are those of a DataBlock."""

    def make(folder: Path):
        files = photos(folder, size)
        options.setdefault("item_tfms", fastai.Resize(48, "squish"))
        block = fastai.DataBlock(
            (image if isinstance(image, fastai.TransformBlock) else image(), target or fastai.CategoryBlock()),
            get_y=options.pop("get_y", kind_of),
            splitter=fastai.IndexSplitter([3]),
            **options,
        )
        dls = block.dataloaders(files, bs=2, num_workers=0)
        return fastai.Learner(dls, network() if network else Small(), loss_func=loss or fastai.CrossEntropyLossFlat())

    return make


def looking_up(folder: Path):
    """A learner whose items are names, which a table knows; `learn.predict(FILE)` needs the opened image."""
    table = {path: path for path in photos(folder)}
    return classifier(get_x=lambda path: table[path])(folder)


def unet(change: Callable | None = None, **options):
    """A function from a folder to a U-Net, to which `change` is done."""

    def make(folder: Path):
        dls = fastai.SegmentationDataLoaders.from_label_func(
            folder,
            photos(folder),
            lambda path: path.parent / "masks" / path.name,
            codes=KINDS,
            item_tfms=fastai.Resize((48, 64), method="squish"),
            bs=2,
            num_workers=0,
        )
        fastai.set_seed(0)
        learner = fastai.unet_learner(dls, fastai.resnet18, pretrained=False, n_out=3, cut=5, **options)
        if change:
            learner = change(learner) or learner
        return learner

    return make


# --- openers and transforms of readers ---


def one_channel(path):
    """Keeps one channel and stacks it."""
    return fastai.PILImage.create(np.stack([np.array(fastai.PILImage.create(path))[..., 0]] * 3, axis=-1))


def upright(path):
    return fastai.PILImage.create(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))


def negative(path):
    return fastai.PILImage.create(255 - np.array(fastai.PILImage.create(path)))


def gray(image):
    return fastai.PILImage.create(image.convert("L").convert("RGB"))


class Dim(fastai.Transform):
    """Acts on dark images only."""

    def encodes(self, x: fastai.PILImage):
        pixels = np.array(x)
        return fastai.PILImage.create(pixels // 2) if pixels.mean() < 40 else x


class ShrinkLarge(fastai.Transform):
    """Acts above 1000 pixels only."""

    def encodes(self, x: fastai.PILImage):
        return fastai.PILImage.create(x.resize((500, 400))) if max(x.size) > 1000 else x


class LogT(fastai.Transform):
    def encodes(self, x: torch.Tensor):
        return torch.log1p(x)

    def decodes(self, x: torch.Tensor):
        return torch.expm1(x)


class Gamma(fastai.Transform):
    """A deterministic batch transform of the reader's own."""

    order = 50

    def encodes(self, x: fastai.TensorImage):
        return x**0.8


class PerImage(fastai.Transform):
    """Normalizes each image by itself."""

    order = 50

    def encodes(self, x: fastai.TensorImage):
        return (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)


class Noise(fastai.Transform):
    order = 50

    def encodes(self, x: fastai.TensorImage):
        return x + 0.1 * torch.randn_like(x)


class Seldom(fastai.Transform):
    """Draws a number from NumPy, which rarely changes anything."""

    order = 50

    def encodes(self, x: fastai.TensorImage):
        return x.flip(-1) if np.random.rand() < 1e-6 else x


class Swap(fastai.Callback):
    """Changes the batch on its way to the network."""

    def before_batch(self):
        self.learn.xb = (self.xb[0].flip(-1) * 0.5,)


class Both(fastai.ItemTransform):
    """An ItemTransform without split_idx: it gets the image alone when there is no label."""

    def encodes(self, x):
        return len(x) and x


class Twofold(nn.Module):
    """Branches on the size of the image."""

    def __init__(self):
        super().__init__()
        self.small, self.large = Small(), Small()
        with torch.no_grad():
            self.large[0].weight.neg_()

    def forward(self, x):
        return self.large(x) if x.shape[-1] > 200 else self.small(x)


def mnist() -> nn.Module:
    """fastbook's: no convolution, no resize."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 30), nn.ReLU(), nn.Linear(30, 3))


def vit() -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=16, depth=2, num_classes=3, pretrained=False
    )


def leaky(learner) -> None:
    for parent in learner.model.layers[0].modules():
        if isinstance(getattr(parent, "relu", None), nn.ReLU):
            parent.relu = nn.LeakyReLU(0.2)


def compiled_in_place() -> nn.Module:
    network = Small()
    network.compile(backend="eager")
    return network


def parallel(learner):
    learner.model = nn.DataParallel(learner.model)


def with_nan(learner):
    with torch.no_grad():
        learner.model.layers[-2][0].weight[0, 0] = float("nan")


def channels_last(learner):
    learner.to_channelslast(use_amp=False)
    learner.model.to(memory_format=torch.channels_last)


def in_file(**options):
    """The learner of `make` written by `learn.export` and loaded again."""

    def change(learner):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "learner.pkl")
            learner.export(path, **options)
            return load_learner(path)

    return change


def exported_with_dill(learner):
    import dill

    return in_file(pickle_module=dill)(learner)


# --- files that are asked ---


def turned(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    draw_photo(7, (120, 80)).save(folder / "turned.jpg", exif=exif)


def usual(folder: Path) -> None:
    draw_photo(7, (120, 80)).save(folder / "a.png")
    draw_photo(8, (70, 90)).save(folder / "b.jpg")


def of_28(folder: Path) -> None:
    for i in range(3):
        draw_photo(i, (28, 28)).save(folder / f"{i}.png")


def of_64(folder: Path) -> None:
    for i in range(3):
        draw_photo(i, (64, 64)).save(folder / f"{i}.png")


def of_200(folder: Path) -> None:
    for i in range(3):
        draw_photo(i, (200, 120)).save(folder / f"{i}.png")


def narrow_and_wide(folder: Path) -> None:
    draw_photo(1, (160, 120)).save(folder / "narrow.png")
    draw_photo(2, (260, 120)).save(folder / "wide.png")


def unreadable(folder: Path) -> None:
    draw_photo(7, (120, 80)).save(folder / "a.png")
    (folder / "b.jp2").write_bytes(b"no picture")


def tga(folder: Path) -> None:
    draw_photo(7, (120, 80)).save(folder / "b.tga")


def own(function) -> fastai.TransformBlock:
    return fastai.TransformBlock(type_tfms=function, batch_tfms=fastai.IntToFloatTensor)


OPEN = "import io\nimport numpy as np\nfrom PIL import Image, ImageOps\n\n\ndef open_image(data):\n"

CASES = {
    # A. the opening
    "A1 one channel, stacked": Case(classifier(own(one_channel)), "one_channel.*--open"),
    "A1 … given with --open": Case(
        classifier(own(one_channel)), EQUAL, usual, True,
        OPEN + "    pixels = np.array(Image.open(io.BytesIO(data)).convert('RGB'))[..., 0]\n"
        "    return Image.fromarray(np.stack([pixels] * 3, axis=-1))\n",
    ),
    "A2 turned by EXIF": Case(classifier(own(upright)), "upright.*--open", turned, True),
    "A2 … given with --open": Case(
        classifier(own(upright)), EQUAL, turned, True,
        OPEN + "    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert('RGB')\n",
    ),
    "A4 a negative": Case(classifier(own(lambda f: negative(f))), "<lambda>.*--open"),
    "A4 get_x opens": Case(classifier(get_x=negative), "negative.*--open"),
    "A4 opened, then changed": Case(classifier(own([fastai.PILImage.create, gray])), "gray.*--open"),
    "A … --open that opens otherwise": Case(
        classifier(own(negative)), "after the item transforms", usual, True,
        OPEN + "    return Image.open(io.BytesIO(data)).convert('RGB')\n",
    ),
    "A … get_x that looks up a file": Case(looking_up, EQUAL),
    # B. judged by one picture
    "B5 acts on large images": Case(classifier(item_tfms=[ShrinkLarge(), fastai.Resize(48)]), "ShrinkLarge.*--open"),
    "B5 acts on dark images": Case(classifier(item_tfms=[Dim(), fastai.Resize(48)]), "Dim.*--open"),
    "B5 … given with --open": Case(
        classifier(item_tfms=[Dim(), fastai.Resize(48)]), EQUAL, usual, True,
        OPEN + "    image = Image.open(io.BytesIO(data)).convert('RGB')\n    pixels = np.array(image)\n"
        "    return Image.fromarray(pixels // 2) if pixels.mean() < 40 else image\n",
    ),
    "B6 labels decoded otherwise": Case(
        classifier(
            target=fastai.TransformBlock(type_tfms=[fastai.RegressionSetup(c=3), LogT()]),
            get_y=lambda path: [float(Path(path).stem)] * 3, loss=fastai.MSELossFlat(),
        ),
        "LogT decodes",
    ),
    "B own batch transform": Case(classifier(batch_tfms=[Gamma()]), EQUAL),
    "B … and Normalize behind it": Case(
        classifier(batch_tfms=[PerImage(), fastai.Normalize.from_stats([0.1] * 3, [0.9] * 3)]), EQUAL
    ),
    "B … of a U-Net": Case(
        unet(lambda learner: learner.dls.valid.after_batch.add(Gamma()) or learner.dls.train.after_batch.add(Gamma())),
        EQUAL,
    ),
    "B random batch transform": Case(classifier(batch_tfms=[Noise()]), "Noise is random"),
    "B seldom random batch transform": Case(classifier(batch_tfms=[Seldom()]), "Seldom is random"),
    # C. size and channels
    "C7 gray, three statistics": Case(
        classifier(
            lambda: fastai.ImageBlock(cls=fastai.PILImageBW),
            batch_tfms=fastai.Normalize.from_stats(*fastai.imagenet_stats),
        ),
        EQUAL,
    ),
    "C8 28 × 28, no resize": Case(
        classifier(lambda: fastai.ImageBlock(cls=fastai.PILImageBW), mnist, size=(28, 28), item_tfms=[]), EQUAL,
        of_28, said="28 × 28 pixels alone",
    ),
    "C8 … of an exported learner": Case(
        lambda folder: in_file()(
            classifier(lambda: fastai.ImageBlock(cls=fastai.PILImageBW), mnist, size=(28, 28), item_tfms=[])(folder)
        ),
        "--check",
    ),
    "C8 … with --check": Case(
        lambda folder: in_file()(
            classifier(lambda: fastai.ImageBlock(cls=fastai.PILImageBW), mnist, size=(28, 28), item_tfms=[])(folder)
        ),
        EQUAL, of_28, True,
    ),
    "C8 a small ViT": Case(classifier(network=vit, size=(64, 64), item_tfms=[]), EQUAL, of_64),
    "C a branch on the size": Case(
        classifier(network=Twofold, size=(160, 120), item_tfms=[]), EQUAL, narrow_and_wide, said="widths from 1 to 200"
    ),
    "C … between the photos' size and the next that is odd": Case(
        classifier(network=Twofold, size=(200, 120), item_tfms=[]), EQUAL, of_200, said="200 × 120 pixels alone"
    ),
    # D. wrappers and memory layouts
    "D9 torch.compile": Case(classifier(network=lambda: torch.compile(Small(), backend="eager")), EQUAL),
    "D9 compiled in place": Case(classifier(network=compiled_in_place), EQUAL),
    "D9 DataParallel": Case(unet(parallel), EQUAL),
    "D10 channels-last": Case(unet(channels_last), EQUAL),
    "D11 dill": Case(unet(exported_with_dill), EQUAL),
    "D12 LeakyReLU in the encoder": Case(unet(leaky), EQUAL, said="not written as a DynamicUnetDIY"),
    # E. messages
    "E13 scaled item by item": Case(
        classifier(
            fastai.TransformBlock(type_tfms=fastai.PILImage.create),
            item_tfms=[fastai.Resize(48), fastai.ToTensor(), fastai.IntToFloatTensor()],
        ),
        EQUAL,
    ),
    "E14 NaN weights": Case(unet(with_nan), "weight layers.*holds NaN"),
    "E15 an unreadable file": Case(unet(), r"b\.jp2: the learner cannot open it", unreadable, True),
    "E15 a file that the server refuses": Case(unet(), r"b\.tga: the server refuses it", tga, True),
    "E17 ItemTransform": Case(classifier(item_tfms=[Both(), fastai.Resize(48)]), "Both.*--open"),
    "E a callback that changes the batch": Case(
        unet(lambda learner: learner.add_cb(Swap())), "callback .*Swap changes the batch"
    ),
}  # fmt: skip


def answer(handler: Handler, path: Path) -> dict:
    job = handler.preprocess({"body": path.read_bytes()})
    handler.inference([item for item in job.items if not item.error])
    return json.loads(handler.postprocess(job).body)


def is_predicted(learner, path: Path, served: dict) -> bool:
    """Whether `served` is what `learn.predict(FILE)` says."""
    with on_cpu(learner), learner.no_bar(), learner.no_logging():
        try:
            decoded, _, values = learner.predict(path)
        except KeyError:  # it looks up files by what is none
            decoded, _, values = learner.predict(fastai.PILImage.create(path))
    if "base64_prediction" in served:
        mask = np.frombuffer(base64.b64decode(served["base64_prediction"]), np.uint8).reshape(served["shape"])
        return np.array_equal(mask, np.asarray(decoded)) and len(np.unique(mask)) > 1
    values = dict(zip(learner.dls.vocab, values.numpy(), strict=True))
    return served["label"] == decoded and {k: np.float32(v) for k, v in served["probabilities"].items()} == values


def outcome(case: Case, folder: Path) -> str:
    """What becomes of `case`: `EQUAL`, the refusal, or what is wrong."""
    asked = folder / "asked"
    asked.mkdir()
    (case.images or usual)(asked)
    (folder / "open_it.py").write_text(case.open)
    learner = case.learner(folder / "photos")
    options = {"check": asked if case.check else None, "open": folder / "open_it.py" if case.open else None}
    try:
        store = export_learner(learner, folder / "store", **options)
    except ExportError as error:
        assert "\n" not in str(error) and not (folder / "store").exists()
        return str(error)
    handler = Handler()
    handler.load(store)
    for path in sorted(asked.iterdir()):
        served = answer(handler, path)
        if handler.config.sides and "message" in served:
            assert served["message"] == "the model takes no photo of this size"
        elif not is_predicted(learner, path, served):
            return f"answers otherwise for {path.name}: {str(served)[:100]}"
    return EQUAL


@pytest.mark.parametrize("name", CASES)
def test_case(name, tmp_path, capsys):
    case = CASES[name]
    assert re.search(case.outcome, outcome(case, tmp_path), re.S)
    assert case.said in capsys.readouterr().out


def test_a_program_moves_to_another_device_whole(tmp_path):
    """Case I 38: edgenext makes tensors on its way; a device without memory stands for a GPU."""
    import timm

    network = timm.create_model("edgenext_xx_small", pretrained=False, num_classes=3).eval()
    torch.export.save(capture_network(network, [], (3, 64, 64), free_size=False), tmp_path / "fastunet.pt2")
    image = torch.zeros(1, 3, 64, 64, device="meta")
    assert load_program(tmp_path / "fastunet.pt2", "meta")(image).device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):  # as before
        load_program(tmp_path / "fastunet.pt2").to("meta")(image)


def main() -> None:
    print("| case | what becomes of it |\n|---|---|")
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {name} | {outcome(case, Path(folder))} |", flush=True)


if __name__ == "__main__":
    main()
