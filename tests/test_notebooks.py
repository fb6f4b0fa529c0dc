"""The notebooks as they are committed: clean runs from top to bottom, small, and free of any machine's traces."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import camvid
from deployment.config import read_config
from deployment.export.dataset import label_of, list_photos

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebook").glob("0*.ipynb"))


def read(path):
    import nbformat  # slow to import

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook, [c for c in notebook.cells if c.cell_type == "code"]


def test_all_five_are_there():
    assert [p.name[:2] for p in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_state_is_one_clean_run(path):
    notebook, cells = read(path)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1)), "run `make notebooks`"
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    assert path.stat().st_size < 1_000_000
    assert "assert" in cells[-1].source, "the last cell checks the result"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_trace_of_a_machine(path):
    text = path.read_text()
    assert not re.search(r"(?<![\w.~/-])/(home|root|work|Users|tmp|opt|mnt)/", text), "an output names a machine's path"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_to_files_of_the_repository_hold(path):
    notebook, _ = read(path)
    prose = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        assert (path.parent / target).exists(), f"{path.name} links to {target}, which does not exist"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_those_of_todays_code(path):
    source_hash = runpy.run_path(str(ROOT / "notebook" / "run.py"))["source_hash"]
    notebook, _ = read(path)
    assert notebook.metadata.get("sources") == source_hash(notebook), "run `make notebooks`"


def run_notebooks(*numbers, into, **parameters):
    """What `run.py` prints of the notebooks, run head to foot; the test fails where one does."""
    given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "notebook/run.py", *numbers, "--into", into, *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def export_unet(folder, n_classes, batch_tfms=None, item_tfms=None):
    """A U-Net of `n_classes`, trained on a few scenes in `folder`/scenes and exported to `folder`/learner.pkl."""
    from fastai.vision.all import SegmentationDataLoaders, resnet18, set_seed, unet_learner

    def mask_of(photo):
        return np.array(Image.open(label_of(photo))) % n_classes

    camvid.draw_scenes(folder / "scenes", n_train=8, n_valid=2)
    set_seed(0)
    dls = SegmentationDataLoaders.from_label_func(
        folder,
        list_photos(folder / "scenes"),
        mask_of,
        codes=[f"part {i}" for i in range(n_classes)],
        item_tfms=item_tfms,
        batch_tfms=batch_tfms,
        bs=4,
        num_workers=0,
    )
    learn = unet_learner(dls, resnet18, pretrained=False, n_out=n_classes, path=folder)
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(1, 1e-2)
    learn.export("learner.pkl")


def check_02_and_03(folder):
    """Run 02 and 03 with `folder`/learner.pkl; returns the server's answer to the sample."""
    printed = run_notebooks("02", "03", into=folder, STORE=folder, RESULTS=folder, DATA=folder / "scenes")
    assert "masks equal: 3 of 3 images" in printed
    assert "the served mask equals learn.predict's, pixel for pixel" in printed
    return json.loads((folder / "sample_output.txt").read_text())


def test_notebooks_02_and_03_take_four_classes_and_normalization(tmp_path):
    """As a learner that `fine_tune` makes from ImageNet weights, at another size than the tutorial's."""
    from fastai.vision.all import Normalize, Resize, imagenet_stats

    export_unet(tmp_path, 4, Normalize.from_stats(*imagenet_stats), Resize((72, 88), method="squish"))
    answer = check_02_and_03(tmp_path)
    assert read_config(tmp_path).mean and read_config(tmp_path).std
    assert answer["names"] == ["part 0", "part 1", "part 2", "part 3"] and answer["shape"] == [72, 88]


@pytest.mark.soak
def test_notebooks_02_and_03_take_a_learner_without_a_resize(tmp_path):
    """As in the first chapter of fastai's book; its mask has the sample's own size."""
    export_unet(tmp_path, 12)
    assert check_02_and_03(tmp_path)["shape"] == [480, 640]


def test_notebook_02_sends_a_classifier_to_05_which_takes_a_file(tmp_path, monkeypatch):
    """Its first section serves the file; what follows makes three learners of its own."""
    from fastai.vision.all import ImageDataLoaders, Resize, resnet18, vision_learner

    camvid.draw_scenes(tmp_path / "scenes", n_train=8, n_valid=2)
    photos = list_photos(tmp_path / "scenes")
    labels = ["day", "night"] * 5
    dls = ImageDataLoaders.from_lists(tmp_path, photos, labels, item_tfms=Resize(64), bs=4, num_workers=0)
    vision_learner(dls, resnet18, pretrained=False, path=tmp_path).export("learner.pkl")

    command = [sys.executable, "notebook/run.py", "02", "--into", tmp_path, "-p", "STORE", tmp_path]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and "take this learner to notebook 05" in refused.stderr

    monkeypatch.setenv("TS_DEFAULT_WORKERS_PER_MODEL", "1")
    printed = run_notebooks("05", into=tmp_path, LEARNER=tmp_path / "learner.pkl", SCENES=60, EPOCHS=1)
    predicted, label = re.search(r"learn.predict: (\w+)\nover HTTP: {\"label\": \"(\w+)\"", printed).groups()
    assert predicted == label in labels
    assert "answers over HTTP equal learn.predict's" in printed
