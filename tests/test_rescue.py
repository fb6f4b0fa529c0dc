"""Learners of fastai 2.0 to 2.7: opened here, and proven against the fastai that made them.

`make soak` makes environments with such a fastai, trains in them, and rescues what they export.
"""

import dataclasses
import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deployment.config import read_config
from deployment.export import ExportError, export_learner, load_learner, load_rescued, rescue
from deployment.export.earlier import PAIRS, Pair, likely_pairs, moved
from deployment.export.learner import on_cpu, open_learner
from deployment.export.predict import Steps
from deployment.export.rescue import BOUND, compare, last_line, make_environment, own_packages
from deployment.export.unpickle import Found, Missing
from deployment.photos import Preprocessor
from deployment.runtime import load

ROOT = Path(__file__).parents[1]
LEARNERS = Path(__file__).parent / "learners"
PHOTO = LEARNERS / "photo.png"
SMALL = sorted(LEARNERS.glob("fastai*.pkl.gz"))


@pytest.fixture(params=SMALL, ids=lambda file: file.name.removesuffix(".pkl.gz"))
def small(request, tmp_path) -> Path:
    path = tmp_path / "learner.pkl"
    path.write_bytes(gzip.decompress(request.param.read_bytes()))
    return path


def answer(store: Path) -> np.ndarray:
    """What is served for PHOTO."""
    config = read_config(store)
    (values,) = load(config, store)([Preprocessor(config)(PHOTO.read_bytes())])
    return values


def test_learner_is_opened_and_answers_as_it_did(small, tmp_path):
    learner, prove = load_rescued(small)
    assert prove is not None
    store = export_learner(learner, tmp_path / "store")
    assert np.array_equal(answer(store), np.load(LEARNERS / "tiny.npy")), "what its own fastai predicted"
    assert read_config(store).classes == ["sky", "road", "tree"]


def test_without_the_flag_it_is_one_line_with_flag_and_size(small):
    with pytest.raises(ExportError, match="before 2.8: add --rescue.*fastai 2.* with torch .* GB to download") as error:
        load_learner(small)
    assert "\n" not in str(error.value)


def test_learner_of_today_needs_no_rescue(tmp_path):
    path = tmp_path / "learner.pkl"
    path.write_bytes(gzip.decompress((LEARNERS / "python3.11.pkl.gz").read_bytes()))
    _, prove = load_rescued(path)
    assert prove is None


def test_what_a_learner_names_tells_which_fastai_opens_it():
    assert likely_pairs({("fastai.learner", "CastToTensor")})[0].fastai == "2.7.19"
    assert [pair.fastai for pair in likely_pairs(set())] == ["2.6.3", "2.7.19"]
    files = {file.name.removesuffix(".pkl.gz"): gzip.decompress(file.read_bytes()) for file in SMALL}
    assert {name: b"CastToTensor" in content for name, content in files.items()} == {
        "fastai2.0": False,
        "fastai2.5": False,
        "fastai2.7": True,
        "fastai2.7-dilled": True,
    }


def test_names_that_moved():
    from fastai.losses import CrossEntropyLossFlat
    from fasttransform import Pipeline

    assert moved("fastai.layers", "CrossEntropyLossFlat") is CrossEntropyLossFlat
    assert moved("fastcore.transform", "Pipeline") is Pipeline
    with pytest.raises(AttributeError, match="an earlier fastai had fastai.layers.NoSuchThing"):
        moved("fastai.layers", "NoSuchThing")


@pytest.mark.skipif(sys.version_info[:2] == (3, 10), reason="the Python that pickled it runs its callback")
def test_code_of_another_python_does_not_run(tmp_path, capsys):
    path = tmp_path / "learner.pkl"
    path.write_bytes(gzip.decompress((LEARNERS / "fastai2.7-dilled.pkl.gz").read_bytes()))
    learner, found = open_learner(path)
    [counts] = [callback for callback in learner.cbs if isinstance(callback, Missing)]
    assert counts.symbol == "__main__.Counts" and found.python == counts.python == "3.10"
    assert "Counts" not in str(load_rescued(path)[0].cbs)
    assert "callback __main__.Counts is code of Python 3.10" in capsys.readouterr().out


def test_packages_of_the_learner_go_along():
    named = {
        ("timm.models.resnet", "ResNet"),
        ("dill._dill", "_create_function"),
        ("torch.nn", "Linear"),
        ("mine", "f"),
    }
    assert own_packages(Found(named=named)) == ["dill", "timm"]


def steps(logits, **changes) -> Steps:
    """What a learner made of an image, with these logits of two classes."""
    logits = torch.tensor([logits])
    item, x = torch.zeros(3, 2, 2, dtype=torch.uint8), torch.zeros(1, 3, 2, 2)
    values = Steps(None, item, x, x, logits, logits.softmax(1), logits.argmax(1), "cat")
    return dataclasses.replace(values, **changes)


def test_answers_are_compared_within_the_bound():
    ours = steps([1.0, -2.0])
    assert compare("a.png", steps([1.0, -2.0]), ours, PAIRS[0]) == (0, 0, 0)
    pixels, apart, different = compare("a.png", steps([1.0, -2.0 * (1 + BOUND / 2)]), ours, PAIRS[0])
    assert pixels == 0 < apart < BOUND and different == 0
    one = torch.ones(3, 2, 2, dtype=torch.uint8)
    assert compare("a.png", steps([1.0, -2.0], item=one), ours, PAIRS[0]) == (1, 0, 0)
    for theirs, message in (
        (steps([1.0, -2.0 * (1 + BOUND * 2)]), r"a.png: under fastai 2.7.19 with torch 2.6.0 the network's values"),
        (steps([float("nan"), -2.0]), "the network's values"),
        (steps([1.0, -2.0], item=2 * one), "the pixels after the item transforms differ by 2 of 255, 1 is allowed"),
        (steps([1.0, -2.0], item=one[:, :1]), "after the item transforms differ by inf"),
        (steps([1.0, -2.0], x=torch.ones(1, 3, 2, 2)), "after the batch transforms"),
        (steps([1.0, -2.0], x=torch.zeros(1, 3, 4, 4)), "after the batch transforms"),
        (steps([1.0, -2.0], decided=torch.tensor([1])), "the answer is another one"),
        (steps([1.0, -2.0], decoded="dog"), "the answer is another one, dog"),
    ):
        with pytest.raises(ExportError, match=message):
            compare("a.png", theirs, ours, PAIRS[0])


def test_what_an_environment_answers_is_compared(tmp_path, monkeypatch, capsys):
    """With this Python in place of an environment's, which must answer with the same bits."""
    path = tmp_path / "learner.pkl"
    path.write_bytes(gzip.decompress((LEARNERS / "python3.11.pkl.gz").read_bytes()))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in this process
    monkeypatch.setattr(rescue, "make_environment", lambda pair, folder, packages: sys.executable)
    learner, found = open_learner(path)
    with on_cpu(learner) as model:
        line = rescue.prove_earlier(path, found, learner, model, [PHOTO], 0)
    assert line in capsys.readouterr().out
    assert line.startswith("proven on 1 images against fastai") and line.endswith("the same answers, bit for bit")


def test_python_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS", "never")
    with pytest.raises(ExportError, match="^no Python ==3.2.* is here or to be had: ") as error:
        make_environment(Pair("2.0.0", "1.6.0", "0.7.0", "==3.2.*", "2020-09-01", 1), tmp_path / "env", [])
    assert "\n" not in str(error.value)


def test_last_line():
    assert last_line("one\n two \n\n") == "two" and last_line("") == "no reason given"


@pytest.fixture(scope="module", params=[PAIRS[0], PAIRS[1]], ids=lambda pair: f"fastai-{pair.fastai}")
def earlier(request, tmp_path_factory) -> tuple[Pair, Path]:
    """A pair, and a folder of learners that it made."""
    folder = tmp_path_factory.mktemp("earlier")
    try:
        python = make_environment(request.param, folder / "env", ["dill"])
    except ExportError as error:
        if "to be had" not in str(error):
            raise
        pytest.skip(str(error))
    subprocess.run([python, "-W", "ignore", LEARNERS / "earlier.py", folder / "learners"], check=True, timeout=900)
    return request.param, folder / "learners"


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["tiny", "tiny_dilled", "unet", "classifier", "multilabel", "dilled"])
def test_learner_is_rescued(kind, earlier, tmp_path):
    pair, folder = earlier
    command = [sys.executable, "-m", "deployment.export", folder / f"{kind}.pkl", "--trust", "--rescue"]
    done = subprocess.run([*command, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    line = next(line for line in done.stdout.splitlines() if "images against" in line)
    assert f"against fastai {pair.fastai} with torch {pair.torch}" in line
    assert line in (tmp_path / "MODEL_CARD.md").read_text(encoding="utf-8")
    there, ours = np.load(folder / f"{kind}.npy"), answer(tmp_path)
    if there.dtype == np.uint8:
        assert (there == ours).mean() > 0.999
    else:
        assert np.abs(there - ours).max() < 1e-4


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_other_weights_are_found_out(earlier, tmp_path):
    _, folder = earlier
    learner, prove = load_rescued(folder / "tiny.pkl")
    with torch.no_grad(), on_cpu(learner) as model:
        model[0].weight[0, 0, 0, 0] += 0.01
    with pytest.raises(ExportError, match="the network's values differ by"):
        export_learner(learner, tmp_path / "store", earlier=prove)
    assert not (tmp_path / "store").exists()
