"""The runtimes beside plain PyTorch: same masks, refusal where accuracy is lost, clear words where a package lacks."""

import fcntl
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from deployment import runtime
from deployment.handler import Photo, UnetHandler
from deployment.model import DynamicUnetDIY

CODES = ["Sky", "Road", "Tree", "Void"]
CONFIG = {
    "arch": "resnet18",
    "n_classes": len(CODES),
    "img_size": [64, 64],
    "options": {},
    "resize": {"size": [64, 64], "method": "squish", "pad_mode": "reflection", "resample": "bilinear"},
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.25],
    "affine": [],
    "decode": {"activation": "softmax", "threshold": None},
    "codes": CODES,
    "runtime": "eager",
    "precision": "fp32",
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = DynamicUnetDIY(CONFIG["arch"], CONFIG["n_classes"], CONFIG["img_size"])
    with torch.no_grad():  # statistics that are not trivial, and logits in which every class wins somewhere
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        head = list(model.layers)[-1][0]
        head.weight.mul_(20)
    path = tmp_path_factory.mktemp("weights") / "fastunet.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def converted(weights, tmp_path_factory) -> tuple[dict, Path]:
    """The float32 model on OpenVINO: its configuration, and the folder it is in."""
    folder = tmp_path_factory.mktemp("openvino")
    return runtime.convert(CONFIG, weights, folder), folder


@pytest.fixture(scope="module")
def data(weights, tmp_path_factory) -> Path:
    """Ten photos in CamVid's layout; their labels are what the original model says, so that it is right everywhere."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    model = runtime.Segmenter(CONFIG, weights)
    for i in range(10):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
        coarse.save(folder / "images" / f"{i}.png")
        with torch.inference_mode():
            mask = model(runtime.read(folder / "images" / f"{i}.png", CONFIG))[0].numpy()
        Image.fromarray(mask).save(folder / "labels" / f"{i}_P.png")
    (folder / "valid.txt").write_text("0.png\n1.png\n2.png\n")
    return folder


def masks(weights: Path, batch: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return runtime.Segmenter(CONFIG, weights)(batch)


def photos(n: int, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(n))


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.dtype == b.dtype == torch.uint8 and a.shape == b.shape
    return (a == b).float().mean().item()


@pytest.mark.parametrize("n", [1, 3])
def test_openvino_in_float32_gives_the_masks_of_pytorch(weights, converted, n):
    config, folder = converted
    predict = runtime.load(config, folder, CPU)
    expected = masks(weights, photos(n))
    assert len(expected.unique()) > 1
    assert agreement(predict(photos(n)), expected) >= runtime.SAME


def test_conversion_writes_two_files_and_says_so_in_the_configuration(converted):
    config, folder = converted
    assert sorted(path.name for path in folder.iterdir()) == ["fastunet.bin", "fastunet.xml"]
    assert (config["runtime"], config["precision"]) == ("openvino", "fp32")
    assert config["accuracy"]["mask_agreement"] >= runtime.SAME
    assert yaml.safe_load(yaml.safe_dump(config)) == config


def test_openvino_takes_photos_of_any_size_where_nothing_resizes_them(weights, tmp_path):
    config = runtime.convert(CONFIG | {"resize": None}, weights, tmp_path)
    predict = runtime.load(config, tmp_path, CPU)
    for height, width in ((64, 64), (75, 101), (96, 130)):
        x = photos(2, height, width)
        assert agreement(predict(x), masks(weights, x)) >= runtime.SAME


def test_handler_serves_a_converted_model(weights, converted):
    config, folder = converted
    handler = UnetHandler()
    handler.initialize(
        SimpleNamespace(
            system_properties={"model_dir": str(folder), "gpu_id": None, "batch_size": 4},
            model_yaml_config={"handler": config},
            manifest={"model": {"serializedFile": "fastunet.bin"}},
        )
    )
    batch = [Photo(x=x) for x in photos(6)]
    handler.inference(batch)
    assert agreement(torch.from_numpy(np.stack([photo.mask for photo in batch])), masks(weights, photos(6))) > 0.999


@pytest.fixture(scope="module")
def int8(weights, data, tmp_path_factory) -> tuple[dict, Path]:
    """The int8 model on OpenVINO: its configuration, and the folder it is in."""
    folder = tmp_path_factory.mktemp("int8")
    return runtime.convert(CONFIG, weights, folder, "int8", data, max_drop=100), folder


def test_int8_reports_accuracy_and_agreement(weights, data, int8):
    config, folder = int8
    report = config["accuracy"]
    assert report["photos"] == 3 and report["pixel_accuracy"]["original"] == 1
    # the original is right everywhere here, so that accuracy and agreement are the same thing, void aside
    assert 0.3 < report["pixel_accuracy"]["converted"] < 1
    assert report["drop"] >= 100 * (1 - report["pixel_accuracy"]["converted"]) - 0.01
    assert (folder / "fastunet.bin").stat().st_size < 0.3 * weights.stat().st_size
    predict = runtime.load(config, folder, CPU)
    x = torch.cat([runtime.read(data / "images" / f"{i}.png", CONFIG) for i in range(3)])
    assert agreement(predict(x), masks(weights, x)) == pytest.approx(report["mask_agreement"], abs=1e-6)


def test_openvino_masks_do_not_depend_on_the_batch(int8):
    config, folder = int8
    predict = runtime.load(config, folder, CPU)
    together, alone = predict(photos(5)), torch.cat([predict(x[None]) for x in photos(5)])
    assert torch.equal(together, alone)


def test_openvino_takes_more_threads_only_while_no_other_worker_computes(int8, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    used, model = [], runtime.openvino_model

    def watched(path, threads):
        predict = model(path, threads)
        return lambda x: (used.append(threads), predict(x))[1]

    monkeypatch.setattr(runtime, "openvino_model", watched)
    path = int8[1] / "fastunet.xml"
    predict = runtime.openvino_models(path, 1)
    os.utime(path, (0, 0))
    alone = predict(photos(2))
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # another worker computes
        together = predict(photos(2))
    just_after = predict(photos(2))
    os.utime(path, (0, 0))
    later = predict(photos(2))
    assert used == [2, 2, 1, 1, 1, 1, 2, 2]
    assert all(torch.equal(alone, masks) for masks in (together, just_after, later))


def test_refuses_int8_that_loses_accuracy_and_keeps_what_was_there(weights, data, int8, tmp_path, monkeypatch):
    lossy = int8[1] / "fastunet.xml"  # all that the tries have to offer this time, to spare the time of three
    monkeypatch.setattr(runtime, "quantized", lambda *_: iter([lossy, lossy]))
    (tmp_path / "fastunet.bin").write_text("the one before")
    with pytest.raises(runtime.ConversionError, match="points, more than --max-drop 0.001"):
        runtime.convert(CONFIG, weights, tmp_path, "int8", data, max_drop=0.001)
    assert [path.name for path in tmp_path.iterdir()] == ["fastunet.bin"]
    assert (tmp_path / "fastunet.bin").read_text() == "the one before"


def test_without_labels_agreement_alone_is_reported():
    a, b = torch.zeros(1, 4, 4, dtype=torch.uint8), torch.zeros(1, 4, 4, dtype=torch.uint8)
    b[0, 0, 0] = 1
    assert runtime.compare([a, a], [a, b], None, CODES) == {"photos": 2, "mask_agreement": 31 / 32}


def test_more_careful_int8_keeps_the_last_layers_in_float(weights, data, converted):
    import openvino

    base = openvino.Core().read_model(converted[1] / "fastunet.xml")
    train, _ = runtime.photos(data)
    tries = runtime.quantized(base, CONFIG, train, [], [], [], 0.5)
    plain, careful = ([op.get_friendly_name() for op in model.get_ops()] for model in (next(tries), next(tries)))
    for name in runtime.last_layers(base):
        assert any(op.startswith(name) and "fq_weights" in op for op in plain)
        assert not any(op.startswith(name) and "fq_weights" in op for op in careful)


@pytest.mark.parametrize(
    ("precision", "calibrate", "message"),
    [("int8", None, "--calibrate"), ("int8", "empty", "no photos"), ("int8", "unlabelled", "no label")],
)
def test_says_what_is_wrong_with_the_photos(weights, data, tmp_path, precision, calibrate, message):
    if calibrate:
        folder = tmp_path / calibrate / "images"
        folder.mkdir(parents=True)
        if calibrate == "unlabelled":
            (tmp_path / calibrate / "labels").mkdir()
            for i in range(6):
                (folder / f"{i}.png").write_bytes((data / "images" / f"{i}.png").read_bytes())
            (tmp_path / calibrate / "labels" / "0_P.png").write_bytes((data / "labels" / "0_P.png").read_bytes())
        calibrate = tmp_path / calibrate
    with pytest.raises(runtime.ConversionError, match=message):
        runtime.convert(CONFIG, weights, tmp_path / "out", precision, calibrate)
    assert not (tmp_path / "out").exists()


def test_refuses_labels_of_other_classes(data, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    Image.new("L", (64, 64), 7).save(tmp_path / "labels" / "a_P.png")
    with pytest.raises(runtime.ConversionError, match="class 7, but the model knows 4"):
        runtime.read_label(tmp_path / "images" / "a.png", CONFIG)


@pytest.mark.parametrize(("package", "precision"), [("openvino", "fp32"), ("nncf", "int8")])
def test_a_missing_package_is_named_in_one_line(weights, data, tmp_path, monkeypatch, package, precision):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(runtime.RuntimeUnavailable, match=f"pip install {package}") as error:
        runtime.convert(CONFIG, weights, tmp_path, precision, data)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "choice", [("openvino", "fp16"), ("compile", "int8"), ("compile", "fp16"), ("tensorrt", "fp32")]
)
def test_refuses_a_runtime_that_there_is_not(weights, choice):
    with pytest.raises(runtime.RuntimeUnavailable, match="choose of|needs a GPU"):
        runtime.load(CONFIG | dict(zip(("runtime", "precision"), choice, strict=True)), weights.parent, CPU)


def test_scores_leave_out_void_by_its_name():
    label = torch.tensor([[[0, 0, 1, 1], [1, 1, 3, 3]]], dtype=torch.uint8)
    mask = torch.tensor([[[0, 1, 1, 1], [1, 2, 0, 3]]], dtype=torch.uint8)
    scores = runtime.scores([mask], [label], CODES)
    assert scores["pixel_accuracy"] == pytest.approx(4 / 6)
    assert scores["mean_iou"] == pytest.approx((1 / 2 + 3 / 5) / 2)
    assert runtime.scores([mask], [label], ["a", "b", "c", "d"])["pixel_accuracy"] == pytest.approx(5 / 8)


def test_calibration_photos_are_not_the_ones_that_measure(data, tmp_path):
    train, valid = runtime.photos(data)
    assert [path.name for path in valid] == ["0.png", "1.png", "2.png"] and not {*train} & {*valid}
    train, valid = runtime.photos(data / "images", at_most=4)
    assert len(train) == 4 and len(valid) == 2 and not {*train} & {*valid}


@pytest.mark.parametrize("sizes", [[1], [1, 2, 4]])
def test_compiled_batches_of_any_length_are_answered_in_order(sizes):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 5, 1)).eval()

    class Small(torch.nn.Module):
        def forward(self, x):
            return network(x).argmax(dim=1).to(torch.uint8)

    predict = runtime.compiled_model(Small(), "fp32", CPU, sizes)
    for n in (1, 3, 4, 7):
        with torch.inference_mode():
            expected = Small()(photos(n, 16, 16))
        assert agreement(predict(photos(n, 16, 16)), expected) >= runtime.SAME


@pytest.mark.bench
def test_compile_gives_the_masks_of_pytorch(weights):
    predict = runtime.load(CONFIG | {"runtime": "compile"}, weights.parent, CPU)
    assert agreement(predict(photos(3)), masks(weights, photos(3))) >= runtime.SAME
