"""The configuration of a served model: what is read, and what a mistake in it is told."""

from pathlib import Path

import pytest
from conftest import SMALL, configured

from deployment.config import Config, read_config

LEAST = "handler: {arch: resnet18, n_classes: 4, img_size: [6, 9]"


def write(folder: Path, text: str) -> Path:
    (folder / "model-config.yaml").write_text(text)
    return folder


def test_reads_what_the_export_wrote(small_store):
    assert read_config(small_store) == SMALL
    assert read_config(str(small_store)) == SMALL


def test_the_least_that_can_be_said(tmp_path):
    config = read_config(write(tmp_path, LEAST + "}"))
    assert config == Config(arch="resnet18", n_classes=4, img_size=[6, 9])
    assert (config.activation, config.threshold, config.runtime, config.precision) == ("softmax", None, "eager", "fp32")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no section `handler`"),
        ("batchSize: 4", "no section `handler`"),
        ("handler:", "no section `handler`"),
        ("handler: [resnet18]", "no section `handler`"),
        ("- handler", "no section `handler`"),
        ("handler: {arch: [", "not YAML"),
        ("handler: {n_classes: 4}", "arch, img_size is missing"),
        (LEAST + ", bottle: true}", "unknown setting bottle"),
        (LEAST + ", decoding: {activation: softmax}, codes: [sky]}", "unknown setting codes, decoding"),
        (LEAST + ", 3: true, max_pixel: 3}", "unknown setting 3, max_pixel"),
    ],
)
def test_a_mistake_is_named_with_its_file(text, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read_config(write(tmp_path, text))
    assert str(tmp_path / "model-config.yaml") in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="model-config.yaml"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("settings", "keeps"),
    [
        ({}, False),
        ({"resize": None}, True),
        ({"resize": None, "affine": [{"size": None}]}, True),
        ({"resize": None, "affine": [{"size": None}, {"size": [40, 56]}]}, False),
        ({"resize": {"crop": [40, 56]}}, False),
    ],
)
def test_knows_whether_images_keep_their_size(settings, keeps, small_store, tmp_path):
    config = read_config(configured(small_store, tmp_path, **settings))
    assert config.keeps_image_size is keeps


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, [64, 64]),
        ({"resize": None}, None),
        ({"resize": {"crop": [40, 56]}}, [40, 56]),
        ({"resize": {"size": [80, 90], "crop": [40, 56]}}, [40, 56]),
        ({"resize": {"size": [80, 90]}, "affine": [{"size": [40, 56]}]}, [80, 90]),
        ({"resize": None, "affine": [{"size": [40, 56]}]}, None),
    ],
)
def test_knows_the_size_of_an_image_s_pixels(settings, size, small_store, tmp_path):
    assert read_config(configured(small_store, tmp_path, **settings)).pixels_size == size


@pytest.mark.parametrize(
    ("sides", "taken", "not_taken"),
    [
        (None, [(1, 1), (9000, 3)], []),
        ([[30, None], [None, 200]], [(1, 30), (200, 9000)], [(1, 29), (201, 30)]),
        ([[64, 64], [96, 96]], [(96, 64)], [(64, 96), (95, 64), (96, 65)]),
    ],
)
def test_knows_which_sizes_the_network_takes(sides, taken, not_taken):
    config = Config(arch=None, n_classes=4, img_size=[64, 96], sides=sides)
    assert all(map(config.takes_size, taken)) and not any(map(config.takes_size, not_taken))
