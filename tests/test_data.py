"""The data: the scenes and their masks, the checks before training, the split, the metric."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import camvid
from camvid import DataError, get_data, split_files
from deployment.answers import palette
from deployment.export.dataset import label_of, list_photos
from scenes import CODES, draw_scene


@pytest.fixture(scope="module")
def modeling() -> ModuleType:
    """Batches and metric as notebook 01 defines them; a module of its cells makes them importable."""
    module = sys.modules["modeling"] = ModuleType("modeling")
    for cell in json.loads(Path(camvid.__file__).with_name("01_U-net_Modelling.ipynb").read_text())["cells"]:
        if "definition" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), module.__dict__)
    return module


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory):
    """24 scenes in the folder layout: 18 to train on, 6 to validate on."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    camvid.draw_scenes(folder, n_train=18, n_valid=6)
    return folder


@pytest.fixture
def folder(tmp_path):
    """A small data set in CamVid's layout, whole and sound: ten photos, three classes, no valid.txt."""
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).save(tmp_path / "images" / f"{i:02}.jpg")
        Image.fromarray(rng.integers(0, 3, (24, 32), np.uint8)).save(tmp_path / "labels" / f"{i:02}_P.png")
    (tmp_path / "codes.txt").write_text("Sky\nVOID\nRoad\n")
    return tmp_path


def arrays(folder, photos):
    """Photos uint8 (N, H, W, 3) and masks uint8 (N, H, W)."""
    return (
        np.stack([np.array(Image.open(p)) for p in photos]),
        np.stack([np.array(Image.open(label_of(p))) for p in photos]),
    )


# --- the scenes ---


def test_a_seed_gives_the_same_pixels_in_every_process():
    code = (
        "import sys, hashlib; sys.path.insert(0, sys.argv[1]); from scenes import draw_scene; "
        "print(hashlib.sha256(b''.join(p.tobytes() for p in draw_scene(7))).hexdigest())"
    )
    command = [sys.executable, "-c", code, str(Path(camvid.__file__).parent)]
    digests = {
        subprocess.run(
            command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": s}
        ).stdout
        for s in ("1", "2")
    }
    assert len(digests) == 1
    assert draw_scene(7)[0].tobytes() != draw_scene(8)[0].tobytes()


def test_layout_is_fastais(scenes_folder):
    photos = sorted(p.name for p in (scenes_folder / "images").iterdir())
    masks = sorted(p.name for p in (scenes_folder / "labels").iterdir())
    assert len(photos) == 24 and masks == [p.replace(".png", "_P.png") for p in photos]
    assert (scenes_folder / "codes.txt").read_text().split() == list(CODES)
    train, valid = split_files(scenes_folder)
    assert (len(train), len(valid)) == (18, 6)
    assert [p.name for p in valid] == (scenes_folder / "valid.txt").read_text().split()
    camvid.check_data(scenes_folder)


def test_every_class_appears_and_masks_hold_class_indices_only(scenes_folder):
    photos, masks = arrays(scenes_folder, list_photos(scenes_folder))
    assert photos.shape == (24, 96, 128, 3) and masks.shape == (24, 96, 128)
    assert set(np.unique(masks)) == set(range(len(CODES)))
    share = np.bincount(masks.ravel()) / masks.size
    assert share.max() < 0.5, f"{CODES[share.argmax()]} covers {share.max():.0%}"


def test_color_alone_is_not_enough(scenes_folder):
    """The best guess from a pixel's color, learned on other scenes, stays well below the 0.85 of the U-Net."""
    (x, y), (x_valid, y_valid) = (arrays(scenes_folder, photos) for photos in split_files(scenes_folder))
    void = CODES.index("Void")

    def bins(photos):
        return (photos.reshape(-1, 3) // 16 @ np.array([256, 16, 1])).astype(int)

    counts = np.bincount(bins(x) * len(CODES) + y.ravel(), minlength=4096 * len(CODES)).reshape(4096, -1)
    counts[:, void] = 0
    counted = y_valid.ravel() != void
    by_color = (counts.argmax(1)[bins(x_valid)] == y_valid.ravel())[counted].mean()
    means = np.stack([x[y == k].mean(0) for k in range(len(CODES)) if k != void])
    distance = ((x_valid.reshape(-1, 1, 3).astype(np.float32) - means) ** 2).sum(2)
    by_nearest_mean = (distance.argmin(1) == y_valid.ravel())[counted].mean()
    assert 0.3 < by_color < 0.75, by_color
    assert by_nearest_mean < 0.6, by_nearest_mean


def test_a_larger_scene_shows_the_same_kind_of_street():
    photo, mask = draw_scene(3, (480, 640))
    assert (photo.mode, mask.mode) == ("RGB", "L") and photo.size == mask.size == (640, 480)
    assert set(np.unique(mask)) <= set(range(len(CODES)))  # a class index between two others would be a blend of them


def test_scenes_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    drawn = []

    def stop_after_three(seed, size):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(seed)
        return draw_scene(seed, size)

    monkeypatch.setattr(camvid.scenes, "draw_scene", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        camvid.draw_scenes(tmp_path / "scenes", 5, 2)
    assert list(tmp_path.iterdir()) == []


def test_drawing_what_another_process_has_just_drawn_keeps_it(tmp_path):
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "codes.txt").write_text("Sky\n")
    camvid.draw_scenes(tmp_path / "scenes", 1, 1)
    assert [p.name for p in tmp_path.rglob("*")] == ["scenes", "codes.txt"]


def test_scenes_are_drawn_once(tmp_path, monkeypatch):
    monkeypatch.setattr(camvid, "SCENES", tmp_path / "data" / "scenes")
    monkeypatch.setattr(camvid.draw_scenes, "__defaults__", (3, 2))
    path = get_data("scenes")
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    assert get_data("scenes") == path and len(list_photos(path)) == 5
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before


def test_the_sample_is_the_one_that_is_committed_and_in_no_data_set(tmp_path):
    photo = camvid.draw_sample(tmp_path)
    assert photo.stat().st_size < 600_000
    assert not list(tmp_path.glob("*.part"))
    mask = Image.open(tmp_path / "street_view_of_a_small_neighborhood_P.png")
    assert Image.open(photo).size == mask.size == (640, 480)
    assert camvid.SAMPLE_SEED not in (*range(camvid.N_TRAIN), *range(100_000, 100_000 + camvid.N_VALID))
    committed = camvid.ROOT / "sample" / photo.name
    np.testing.assert_array_equal(np.array(Image.open(photo)), np.array(Image.open(committed)))


# --- the checks ---


def spoil_mask(folder, array, name="03"):
    Image.fromarray(array).save(folder / "labels" / f"{name}_P.png")


def test_the_samples_truth_goes_by_names():
    truth = camvid.sample_truth(CODES)["truth"]
    assert truth.shape == (480, 640) and set(np.unique(truth)) <= set(range(len(CODES)))
    colors = camvid.sample_truth(["Animal", "Sky", "Wall"])["truth"]
    assert np.array_equal(colors, palette(list(CODES))[truth])
    assert camvid.sample_truth(["meadow", "pond"]) == {}


def test_a_sound_folder_passes(folder):
    assert get_data(folder) == folder
    assert get_data(str(folder)) == folder


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "labels" / "03_P.png").unlink(), r"the photo 03\.jpg has no mask: labels/03_P\.png is missing"),
        (
            lambda f: spoil_mask(f, np.full((24, 32), 3, np.uint8)),
            r"03_P\.png holds class 3, .* names 3 classes, 0 to 2",
        ),
        (lambda f: spoil_mask(f, np.zeros((24, 32, 3), np.uint8)), r"03_P\.png is a picture of mode RGB"),
        (lambda f: spoil_mask(f, np.zeros((12, 32), np.uint8)), r"32 × 24 pixels, its mask 32 × 12"),
        (lambda f: (f / "labels" / "03_P.png").write_bytes(b"no picture"), r"03_P\.png cannot be read"),
        (
            lambda f: (f / "images" / "03.jpg").write_bytes((f / "images" / "03.jpg").read_bytes()[:300]),
            "03.jpg .*cannot",
        ),
        (lambda f: (f / "codes.txt").unlink(), r"codes\.txt cannot be read"),
        (lambda f: (f / "codes.txt").write_text("\n \n"), r"codes\.txt is empty"),
        (lambda f: [p.unlink() for p in (f / "images").iterdir()], "no photos in .*/images"),
        (lambda f: (f / "valid.txt").write_text("nobody.png\n"), "10 are left to train on and 0 to validate on"),
        (lambda f: (f / "valid.txt").write_text("\n".join(f"{i:02}.jpg" for i in range(10))), "0 are left to train on"),
    ],
)
def test_what_is_wrong_is_said_before_any_training(folder, spoil, message):
    spoil(folder)
    with pytest.raises(DataError, match=message):
        get_data(folder)


def test_a_palette_mask_that_fastai_would_misread_is_refused(folder):
    """fastai opens masks as gray, which turns a palette's entry into the gray of its color: silently other classes."""
    mask = Image.fromarray(np.ones((24, 32), np.uint8))
    mask.putpalette([9, 9, 9, 2, 2, 2, 1, 1, 1])
    mask.save(folder / "labels" / "03_P.png")
    with pytest.raises(DataError, match="mode P"):
        get_data(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="there is no folder .*nowhere"):
        get_data(tmp_path / "nowhere")


def test_no_network_for_the_download(monkeypatch):
    def offline(url):
        raise OSError("Name or service not known")

    monkeypatch.setattr("fastai.vision.all.untar_data", offline)
    with pytest.raises(DataError, match='could not be downloaded from https://.*DATA="scenes"'):
        get_data("camvid_tiny")


def test_a_notebook_shows_the_message_alone():
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    seen = []
    shell._showtraceback = lambda etype, value, lines: seen.extend(lines)
    shell.run_cell("from camvid import get_data; get_data('nowhere')")
    assert len(seen) == 1 and seen[0].startswith("DataError: there is no folder nowhere")


def test_thin_things_are_rare_but_can_be_learned(scenes_folder):
    """Each covers enough pixels to be learned in minutes, and all of them together no more than a fifth."""
    masks = np.stack([np.array(Image.open(path)) for path in (scenes_folder / "labels").iterdir()])
    thin = [CODES.index(name) for name in ("Pole", "SignSymbol", "Fence", "Pedestrian", "Bicyclist")]
    shares = [(masks == index).mean() for index in thin]
    assert min(shares) > 0.012 and sum(shares) < 0.2, shares


# --- the split, the batches, the metric ---


def test_the_split_comes_from_valid_txt(folder, modeling):
    (folder / "valid.txt").write_text("03.jpg\r\n07\r\n")  # with the ending or without, from any system
    train, valid = split_files(folder)
    assert [p.stem for p in valid] == ["03", "07"] and len(train) == 8
    dls = modeling.dataloaders(folder, bs=2)
    assert [p.stem for p in dls.valid_ds.items] == ["03", "07"]
    assert not set(dls.train_ds.items) & set(dls.valid_ds.items)


def test_without_valid_txt_the_split_is_random_but_fixed(folder):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    train, valid = split_files(folder)
    assert (len(train), len(valid)) == (8, 2) and split_files(folder) == (train, valid)
    assert torch.equal(torch.get_rng_state(), state), "the split must not reseed torch"


def test_batches(folder, modeling):
    photos, masks = modeling.dataloaders(folder, bs=4).one_batch()
    assert photos.shape == (4, 3, 96, 128) and masks.shape == (4, 96, 128)
    assert 0 <= photos.min() and photos.max() <= 1 and set(masks.unique().tolist()) <= {0, 1, 2}
    photos, masks = modeling.dataloaders(folder, bs=4, size=(48, 64)).one_batch()
    assert photos.shape == (4, 3, 48, 64) and masks.shape == (4, 48, 64)


def test_class_names_are_read_as_editors_write_them(folder):
    (folder / "codes.txt").write_text("Sky\r\nVOID\r\nRoad\r\n", encoding="utf-8-sig", newline="")
    assert camvid.read_codes(folder) == ["Sky", "VOID", "Road"]


@pytest.mark.parametrize(
    "codes, index", [(CODES, 11), (["void", "Road"], 0), (["Animal", "Road", "VOID"], 2), (["Avoid", "Road"], None)]
)
def test_void_is_found_by_its_name(codes, index, modeling):
    assert modeling.void_index(codes) == index


def score(metric, batches):
    metric.reset()
    for pred, target in batches:
        logits = torch.nn.functional.one_hot(torch.tensor(pred), 3).movedim(-1, 1).float()
        metric.accumulate(SimpleNamespace(pred=logits, y=torch.tensor(target)))
    return metric.value


def test_accuracy_leaves_void_out_and_weighs_every_pixel_alike(modeling):
    batches = [([[[0, 0]]], [[[0, 1]]]), ([[[2, 2], [0, 1]]], [[[2, 0], [1, 1]]])]
    assert score(modeling.PixelAccuracy(["Sky", "Void", "Road"]), batches) == pytest.approx(2 / 3)
    assert score(modeling.PixelAccuracy(["Sky", "Tree", "Road"]), batches) == pytest.approx(3 / 6)
    assert score(modeling.PixelAccuracy(["Void", "Tree", "Road"]), [([[[0, 0]]], [[[0, 0]]])]) is None


def test_void_does_not_count_in_the_loss_and_rare_classes_count_more(folder, modeling):
    """The folder's classes are Sky, VOID and Road; here three quarters of what is not void is sky."""
    photos = list_photos(folder)
    for photo in photos:
        mask = np.zeros((24, 32), np.uint8)
        mask[:8], mask[8:12] = 1, 2
        Image.fromarray(mask).save(label_of(photo))
    loss = modeling.weighted_loss(photos, ["Sky", "VOID", "Road"])
    sky, _, road = loss.func.weight.tolist()
    assert (sky, road) == pytest.approx((0.75**-0.5, 0.25**-0.5))
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss(logits, torch.tensor([[[0, 1], [2, 1]]])).backward()
    assert not logits.grad[..., 1].any() and logits.grad[..., 0].all()


def test_metric_and_label_function_travel_by_reference(modeling):
    metric = pickle.loads(pickle.dumps(modeling.PixelAccuracy(CODES)))
    assert metric.void == 11 and metric.name == "pixel_accuracy"
    assert pickle.loads(pickle.dumps(label_of)) is label_of


def test_a_model_that_knows_the_answer_scores_one(folder, modeling):
    """The metric inside a real validation: logits made from the masks themselves."""
    from fastai.vision.all import Learner

    dls = modeling.dataloaders(folder, bs=2)

    class Oracle(torch.nn.Linear):
        def forward(self, x):
            return torch.nn.functional.one_hot(learn.y.as_subclass(torch.Tensor), 3).movedim(-1, 1).float()

    learn = Learner(
        dls, Oracle(1, 1), loss_func=lambda p, t: p.float().mean(), metrics=modeling.PixelAccuracy(["a", "Void", "c"])
    )
    with learn.no_bar(), learn.no_logging():
        assert learn.validate()[1] == 1.0


# --- the pictures ---


def test_pictures_have_titles_and_the_names_of_the_colors(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: None)
    photo, mask = draw_scene(3, (48, 64))
    file = tmp_path / "figure.png"
    camvid.show_segmentation(photo, {"mask": np.array(mask)}, CODES, file)
    figure = plt.gcf()
    assert [axes.get_title() for axes in figure.axes] == ["photo", "mask"]
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    assert names == {CODES[i] for i in np.unique(np.array(mask))}
    plt.close(figure)
    assert Image.open(file).size[0] > 500 and list(tmp_path.iterdir()) == [file]
