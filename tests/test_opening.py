"""`--open`: the examples of deployment/README.md, each for a learner that opens images that way."""

import json
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, draw_photo
from fastai.vision import all as fastai
from PIL import Image, ImageOps
from test_cases import Small, answer, is_predicted, kind_of

from deployment.archive import make_archive
from deployment.export import ExportError, export_learner
from deployment.handler import Handler

EXAMPLES = re.findall(
    r"^```python\n(.*?)^```",
    (ROOT / "deployment/README.md").read_text().partition("### Own opening\n")[2].partition("\n## ")[0],
    re.M | re.S,
)


@dataclass
class Opening:
    """How a learner opens the files that `write` writes, the example that does the same, and what is said of others."""

    example: int
    opener: Callable
    write: Callable[[Path, int], None]
    suffix: str
    network: Callable = Small
    divisor: int | None = 255  # of the learner's IntToFloatTensor; None: it has none
    refused: bytes = b"no picture"


def upright(path):
    return fastai.PILImage.create(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))


def write_turned(path: Path, seed: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3 + 3 * (seed % 2)
    draw_photo(seed, (90, 60)).save(path, exif=exif)


def sixteen_bits(path):
    return fastai.TensorImageBW(torch.from_numpy(np.array(Image.open(path), np.float32) / 65535)[None])


def write_sixteen_bits(path: Path, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 65536, (48, 48)).astype(np.uint16)
    Image.fromarray(values).save(path)


def four_channels(path):
    return fastai.TensorImage(torch.from_numpy(np.array(Image.open(path)).transpose(2, 0, 1)))


def write_four_channels(path: Path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 48, 4), np.uint8), "RGBA").save(path)


def window(path):
    data = path.read_bytes()
    height, width = struct.unpack("<II", data[:8])
    values = np.frombuffer(data[8:], "<i2").reshape(height, width)
    return fastai.PILImageBW.create(((np.clip(values, -160, 240) + 160) / 400 * 255).astype(np.uint8))


def write_raw(path: Path, seed: int) -> None:
    height, width = 50 + seed, 60
    values = np.random.default_rng(seed).integers(-1000, 1000, (height, width)).astype("<i2")
    path.write_bytes(struct.pack("<II", height, width) + values.tobytes())


OPENINGS = {
    "upright by EXIF": Opening(0, upright, write_turned, ".jpg"),
    "16-bit gray": Opening(1, sixteen_bits, write_sixteen_bits, ".png", lambda: Small(1), None),
    "four channels": Opening(2, four_channels, write_four_channels, ".tif", lambda: Small(4)),
    "a window": Opening(3, window, write_raw, ".raw", lambda: Small(1)),
}


def make(opening: Opening, folder: Path):
    """A learner that opens the files in `folder` as `opening` says."""
    folder.mkdir()
    for i in range(4):
        opening.write(folder / f"{i}{opening.suffix}", i)
    scale = [fastai.IntToFloatTensor(div=opening.divisor)] if opening.divisor else []
    block = fastai.DataBlock(
        (fastai.TransformBlock(type_tfms=opening.opener, batch_tfms=scale), fastai.CategoryBlock()),
        get_y=kind_of,
        splitter=fastai.IndexSplitter([3]),
        item_tfms=fastai.Resize(48, "squish"),
    )
    dls = block.dataloaders(sorted(folder.iterdir()), bs=2, num_workers=0)
    return fastai.Learner(dls, opening.network(), loss_func=fastai.CrossEntropyLossFlat())


@pytest.mark.parametrize("name", OPENINGS)
def test_the_example_opens_as_the_learner_does(name, tmp_path):
    opening = OPENINGS[name]
    learner = make(opening, tmp_path / "files")
    with pytest.raises(ExportError, match=rf"{opening.opener.__name__}.*--open FILE\.py") as refusal:
        export_learner(learner, tmp_path / "store")
    assert "def open_image(data: bytes)" in refusal.value.hint and refusal.value.hint.count("\n") == 5
    (tmp_path / "my_open.py").write_text(EXAMPLES[opening.example])
    store = export_learner(learner, tmp_path / "store", open=tmp_path / "my_open.py", check=tmp_path / "files")
    handler = Handler()
    handler.load(store)
    answers = []
    for path in sorted((tmp_path / "files").iterdir()):
        answers.append(answer(handler, path))
        assert is_predicted(learner, path, answers[-1])
    assert len({json.dumps(one) for one in answers}) > 1
    (tmp_path / "other").write_bytes(opening.refused)
    assert answer(handler, tmp_path / "other") == {
        "code": 400, "type": "BadImage", "message": "open_image takes no such file"
    }  # fmt: skip


def test_the_opening_travels_in_the_archive(tmp_path):
    import zipfile

    opening = OPENINGS["a window"]
    learner = make(opening, tmp_path / "files")
    (tmp_path / "my_open.py").write_text(EXAMPLES[opening.example])
    store = export_learner(learner, tmp_path / "store", open=tmp_path / "my_open.py", check=tmp_path / "files")
    with zipfile.ZipFile(make_archive(store)) as archive:
        assert archive.read("open_image.py").decode() == EXAMPLES[opening.example]


def test_an_export_takes_the_place_of_an_earlier_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # as Python is by default: it would write __pycache__
    opening = OPENINGS["a window"]
    learner = make(opening, tmp_path / "files")
    for comment in ("# the first\n", "# the second\n"):
        (tmp_path / "my_open.py").write_text(EXAMPLES[opening.example] + comment)
        store = export_learner(learner, tmp_path / "store", open=tmp_path / "my_open.py", check=tmp_path / "files")
        assert (store / "open_image.py").read_text().endswith(comment)
        files = {"MODEL_CARD.md", "fastunet.pt2", "model-config.yaml", "open_image.py"}
        assert {path.name for path in store.iterdir()} == files


@pytest.mark.parametrize(
    ("code", "check", "message"),
    [
        (EXAMPLES[0], False, "--check DIR"),
        ("", True, "no function open_image"),
        ("import nowhere_at_all", True, "nowhere_at_all"),
        ("def open_image(data):\n    return 3", True, "open_image returned"),
    ],
)
def test_an_opening_that_cannot_be_used_is_refused(code, check, message, tmp_path):
    learner = make(OPENINGS["upright by EXIF"], tmp_path / "files")
    (tmp_path / "my_open.py").write_text(code)
    with pytest.raises(ExportError, match=message) as error:
        export_learner(
            learner, tmp_path / "store", open=tmp_path / "my_open.py", check=tmp_path / "files" if check else None
        )
    assert "\n" not in str(error.value) and not (tmp_path / "store").exists()
