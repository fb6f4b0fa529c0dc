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
        ("handler: {arch: [", "no YAML"),
        ("handler: {n_classes: 4}", "arch, img_size is missing"),
        (LEAST + ", bottle: true}", "unknown setting bottle"),
        (LEAST + ", decode: {activation: softmax}, codes: [sky]}", "unknown setting codes, decode"),
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
def test_knows_whether_photos_keep_their_size(settings, keeps, small_store, tmp_path):
    config = read_config(configured(small_store, tmp_path, **settings))
    assert config.keeps_photo_size is keeps


@pytest.mark.parametrize(("options", "n_in"), [({}, 3), ({"n_in": 1}, 1)])
def test_knows_the_channels_of_a_photo(options, n_in, small_store, tmp_path):
    assert read_config(configured(small_store, tmp_path, options=options)).n_in == n_in
