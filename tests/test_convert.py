"""Conversion for OpenVINO: same masks, refusal where accuracy is lost, clear words where something lacks."""

import dataclasses
import shutil
import sys

import pytest
import yaml
from conftest import SMALL, agreement, convert_copy, draw_photo, image_batch, outputs_of

from deployment import runtime
from deployment.config import read_config
from deployment.export import ExportError, for_runtime, write_config
from deployment.export.convert import MIN_AGREEMENT, calibration_images, convert, convolutions, quantized, to_openvino
from deployment.photos import Preprocessor
from deployment.runtime import RuntimeUnavailable
from deployment.runtime import openvino as openvino_runtime
from deployment.runtime.openvino import has_bf16

CONVERT = sys.modules["deployment.export.convert"]  # the module, which the function of its name hides


def test_writes_two_files_and_says_so_in_the_configuration(converted, tmp_path):
    config, folder = converted
    assert {"fastunet.bin", "fastunet.pth", "fastunet.xml"} == {path.name for path in folder.iterdir()} - {
        "model-config.yaml"
    }
    assert (config.runtime, config.precision) == ("openvino", "fp32")
    assert config.accuracy["agreement"] >= MIN_AGREEMENT["fp32"]
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config
    assert yaml.safe_load((tmp_path / "model-config.yaml").read_text())["handler"]["accuracy"] == config.accuracy


def test_takes_photos_of_any_size_where_nothing_resizes_them(small_store, small_masks, tmp_path):
    shutil.copy(small_store / "fastunet.pth", tmp_path)
    config = convert(dataclasses.replace(SMALL, resize=None), tmp_path)
    model = runtime.load(config, tmp_path)
    for height, width in ((64, 64), (75, 101), (96, 130)):
        images = image_batch(2, height, width)
        assert agreement(outputs_of(model, images), small_masks(images)) >= MIN_AGREEMENT["fp32"]


def test_the_shape_is_fixed_where_images_are_resized_and_only_the_sides_are_free_elsewhere(small_store, converted):
    """A fixed shape is faster."""
    import openvino

    fixed = openvino.Core().read_model(converted[1] / "fastunet.xml")
    assert fixed.inputs[0].partial_shape.to_string() == "[1,64,64,3]"
    free = to_openvino(dataclasses.replace(SMALL, resize=None), small_store)
    assert free.inputs[0].partial_shape.to_string() == "[1,?,?,3]"


def test_int8_reports_accuracy_and_agreement(small_masks, camvid_folder, int8):
    config, folder = int8
    report = config.accuracy
    assert report["photos"] == 3 and report["pixel_accuracy"]["original"] == 1
    # the original is right everywhere here, so that accuracy and agreement are the same thing, void aside
    assert 0.3 < report["pixel_accuracy"]["converted"] < 1
    assert report["drop"] >= 100 * (1 - report["pixel_accuracy"]["converted"]) - 0.01
    assert (folder / "fastunet.bin").stat().st_size < 0.3 * (folder / "fastunet.pth").stat().st_size
    model = runtime.load(config, folder)
    images = [Preprocessor(SMALL)((camvid_folder / "images" / f"{i}.png").read_bytes()) for i in range(3)]
    assert agreement(outputs_of(model, images), small_masks(images)) == pytest.approx(report["agreement"], abs=1e-6)


def test_refuses_int8_that_loses_accuracy_and_keeps_what_was_there(
    small_store, camvid_folder, int8, tmp_path, monkeypatch
):
    lossy = int8[1] / "fastunet.xml"  # all that the tries have to offer this time, to spare the time of three
    monkeypatch.setattr(CONVERT, "quantized", lambda *_: iter([lossy, lossy]))
    (tmp_path / "fastunet.bin").write_text("the one before")
    with pytest.raises(ExportError, match="points, more than --max-drop 0.001"):
        convert_copy(small_store, tmp_path, "int8", camvid_folder, max_drop=0.001)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fastunet.bin", "fastunet.pth"]
    assert (tmp_path / "fastunet.bin").read_text() == "the one before"


def test_int8_keeps_the_first_convolution_in_float_and_then_the_last_ones(camvid_folder, converted):
    import openvino

    base = openvino.Core().read_model(converted[1] / "fastunet.xml")
    train, _ = calibration_images(camvid_folder)
    samples = [Preprocessor(SMALL)(path.read_bytes())[None] for path in train]
    tries = quantized(base, samples, [], [], [], SMALL, 0.5)
    for in_float in ({0}, {0, -3, -2, -1}):
        names = [op.get_friendly_name() for op in next(tries).get_ops()]
        int8 = [any(op.startswith(f"{name}/") and "fq_weights" in op for op in names) for name in convolutions(base)]
        assert int8 == [i not in {n % len(int8) for n in in_float} for i in range(len(int8))]


def test_int8_without_labels_must_agree(small_store, camvid_folder, int8, tmp_path, monkeypatch):
    import openvino

    unlabeled = tmp_path / "photos"
    shutil.copytree(camvid_folder / "images", unlabeled)
    made = openvino.Core().read_model(int8[1] / "fastunet.xml")
    monkeypatch.setattr(CONVERT, "quantized", lambda *_: iter([made]))
    (tmp_path / "store").mkdir()
    monkeypatch.setitem(MIN_AGREEMENT, "int8", 1.0)
    with pytest.raises(ExportError, match="% of the answers are as PyTorch has them"):
        convert_copy(small_store, tmp_path / "store", "int8", unlabeled)
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["fastunet.pth"]
    monkeypatch.setitem(MIN_AGREEMENT, "int8", 0.1)
    config, _ = convert_copy(small_store, tmp_path / "store", "int8", unlabeled)
    assert "drop" not in config.accuracy


def test_bf16_needs_no_calibration(small_store, small_masks, tmp_path, capsys, caplog):
    config, folder = convert_copy(small_store, tmp_path, "bf16")
    said = "no bf16" in capsys.readouterr().out
    model = runtime.load(config, folder)
    assert said == ("no bf16" in caplog.text) == (not has_bf16())
    assert agreement(outputs_of(model, image_batch(3)), small_masks(image_batch(3))) >= MIN_AGREEMENT["bf16"]


def test_without_bf16_the_model_is_measured_and_served_in_fp32(
    small_store, small_masks, tmp_path, monkeypatch, capsys, caplog
):
    monkeypatch.setattr(openvino_runtime, "has_bf16", lambda: False)
    config, folder = convert_copy(small_store, tmp_path, "bf16")
    assert "no bf16" in capsys.readouterr().out
    model = runtime.load(config, folder)
    assert len([record for record in caplog.records if "no bf16" in record.getMessage()]) >= 1
    assert agreement(outputs_of(model, image_batch(3)), small_masks(image_batch(3))) >= MIN_AGREEMENT["fp32"]


@pytest.mark.parametrize(
    ("calibrate", "message"),
    [
        (None, "--calibrate"),
        ("empty", "no photos"),
        ("unlabeled", "no label"),
        ("broken to calibrate", r"5\.png: not an image"),
        ("broken to measure", r"1\.png: not an image"),
        ("all to measure", "some to calibrate with and some to measure with"),
        ("none to measure", "some to calibrate with and some to measure with"),
    ],
)
def test_says_what_is_wrong_with_the_photos(small_store, camvid_folder, tmp_path, calibrate, message):
    folder, store = tmp_path / "photos", tmp_path / "store"
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    store.mkdir()
    if calibrate != "empty":
        for i in range(6):
            shutil.copy(camvid_folder / "images" / f"{i}.png", folder / "images")
        if calibrate in ("broken to calibrate", "broken to measure"):
            (folder / "images" / {"broken to calibrate": "5.png", "broken to measure": "1.png"}[calibrate]).write_bytes(
                b""
            )
        else:
            shutil.copy(camvid_folder / "labels" / "0_P.png", folder / "labels")
        listed = {"all to measure": range(6), "none to measure": []}.get(calibrate, range(2))
        (folder / "valid.txt").write_text("".join(f"{i}.png\n" for i in listed))
    with pytest.raises(ExportError, match=message) as error:
        convert_copy(small_store, store, "int8", folder if calibrate else None)
    assert "\n" not in str(error.value)
    assert [path.name for path in store.iterdir()] == ["fastunet.pth"]


@pytest.mark.parametrize(("package", "precision"), [("openvino", "fp32"), ("nncf", "int8")])
def test_a_missing_package_is_named_in_one_line(small_store, camvid_folder, tmp_path, monkeypatch, package, precision):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeUnavailable, match=f"pip install {package}") as error:
        convert_copy(small_store, tmp_path, precision, camvid_folder)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["fastunet.pth"]


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_refuses_a_precision_that_there_is_not(precision, small_store, tmp_path):
    with pytest.raises(RuntimeUnavailable, match=f"openvino.*{precision}"):
        convert_copy(small_store, tmp_path, precision)


@pytest.mark.parametrize("listing", [None, "0.png\n1.png\n2.png\n", "0\n1\n2\n"], ids=["no list", "names", "stems"])
@pytest.mark.parametrize("labels", [True, False])
def test_calibration_images_are_not_the_ones_that_measure(listing, labels, camvid_folder, tmp_path):
    folder = tmp_path / "images" if labels else tmp_path
    shutil.copytree(camvid_folder / "images", folder, dirs_exist_ok=True)
    if listing:
        (tmp_path / "valid.txt").write_text(listing)
    train, valid = calibration_images(tmp_path)
    assert not {*train} & {*valid}
    assert len(train) + len(valid) == 10
    if listing:
        assert [path.name for path in valid] == ["0.png", "1.png", "2.png"]


def test_calibration_images_are_chosen_evenly_where_there_are_many(camvid_folder, monkeypatch):
    monkeypatch.setattr(CONVERT, "CALIBRATION_IMAGES", 4)
    train, valid = calibration_images(camvid_folder)
    assert [path.name for path in train] == ["3.png", "4.png", "6.png", "8.png"] and len(valid) == 3


# --- large JPEGs at a fraction of their size ---


@pytest.fixture(scope="module")
def large_photos(tmp_path_factory):
    """Ten JPEGs, each eight times as wide and high as the model sees them."""
    folder = tmp_path_factory.mktemp("large")
    for i in range(10):
        draw_photo(i, (512, 512)).save(folder / f"{i}.jpg")
    return folder


def test_fast_decoding_is_measured_and_written_down(small_store, large_photos, tmp_path, capsys):
    config, folder = convert_copy(small_store, tmp_path, calibrate=large_photos, decode="fast")
    assert config.decode == "fast" and 0.98 <= config.accuracy["agreement"] < 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("fp32: 100.000% agreement") and lines[1].startswith("--decode fast: 9")
    write_config(config, folder)
    assert read_config(folder) == config


def test_fast_decoding_that_costs_too_much_is_refused(small_store, large_photos, tmp_path, monkeypatch):
    monkeypatch.setitem(MIN_AGREEMENT, "--decode fast", 1.0)
    with pytest.raises(ExportError, match="--decode fast: only 9.*of the answers are as PyTorch has them"):
        convert_copy(small_store, tmp_path, calibrate=large_photos, decode="fast")
    assert [path.name for path in tmp_path.iterdir()] == ["fastunet.pth"]


def test_fast_decoding_must_change_something_to_be_measured(small_store, camvid_folder, tmp_path):
    with pytest.raises(ExportError, match="changes nothing: no photo to measure with is a JPEG of 256 × 256 or more"):
        convert_copy(small_store, tmp_path, calibrate=camvid_folder, decode="fast")
    with pytest.raises(ExportError, match="must be measured: name a folder"):
        convert_copy(small_store, tmp_path, decode="fast")
    with pytest.raises(ExportError, match="resize them with Resize"):
        convert(dataclasses.replace(SMALL, resize=None), tmp_path, calibrate=camvid_folder, decode="fast")


def test_fast_decoding_is_for_openvino(tmp_path):
    with pytest.raises(ExportError, match="--decode fast is for --runtime openvino"):
        for_runtime(SMALL, tmp_path, "eager", None, None, 0.5, "fast")
