"""From masks to answers: shares, colors, overlays."""

import io

import numpy as np
import pytest
from conftest import draw_photo
from PIL import Image

from deployment.answers import (
    CAMVID_COLORS,
    MAX_JPEG_SIDE,
    encode,
    mask_image,
    overlay,
    palette,
    segmentation_answer,
    shares,
)
from deployment.protocol import Rejected


@pytest.mark.parametrize("n", [1, 2, 12, 32, 256])
def test_palette_has_a_color_for_each_class(n):
    classes = [*CAMVID_COLORS][:n] if n == 32 else [f"class {i}" for i in range(n)]
    colors = palette(classes)
    assert colors.shape == (n, 3) and colors.dtype == np.uint8
    assert len({tuple(c) for c in colors}) == n


def test_palette_is_camvid_s():
    assert palette(["Sky", "Road", "something"])[:2].tolist() == [[128, 128, 128], [128, 64, 128]]


def test_mask_image_holds_class_and_color():
    mask = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    image = Image.open(io.BytesIO(encode(mask_image(mask, ["Sky", "Road", "Tree"]), "PNG")))
    assert image.mode == "P" and np.array_equal(np.array(image), mask)
    assert np.array_equal(np.array(image.convert("RGB")), palette(["Sky", "Road", "Tree"])[mask])


def test_shares_of_the_classes_that_occur():
    mask = np.array([[0, 0, 3, 1]], np.uint8)
    assert shares(mask, ["sky", "road", "tree", "car"]) == {"sky": 0.5, "road": 0.25, "car": 0.25}


def test_shares_of_classes_with_one_name_are_summed():
    mask = np.array([[0, 1, 2, 2], [0, 1, 2, 2]], np.uint8)
    found = shares(mask, ["car", "road", "car"])
    assert found == {"car": 0.75, "road": 0.25} and sum(found.values()) == 1
    names = ["car", "road", "car"]
    answer = segmentation_answer(mask, names, "json", None)
    assert answer == {"base64_prediction": mask.tobytes(), "shape": [2, 4], "classes": found, "names": names}


@pytest.mark.parametrize("format", ["json", "png", "overlay"])
def test_an_answer_names_each_index_of_its_mask(format):
    """In the order of the indices, those that do not occur included; JSON objects lose their order on the way."""
    names = ["void", "tree", "car", "bus"]
    mask = np.array([[2, 2, 0], [2, 0, 0]], np.uint8)
    answer = segmentation_answer(mask, names, format, draw_photo(0, (3, 2)))
    assert answer["names"] == names and answer["classes"] == {"void": 0.5, "car": 0.5}
    assert {names[i] for i in np.unique(mask)} == set(answer["classes"])


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(30, 20), (100, 90), (7, 5)], ids=str)
def test_overlay_has_the_mask_s_size(size, mode):
    """Half the color of each pixel is the photo's at that place, half is its class's."""
    mask = np.random.default_rng(0).integers(0, 3, (20, 30), np.uint8)
    photo = draw_photo(1, size).convert(mode)
    drawn = overlay(photo.copy(), mask, ["Sky", "Road", "Tree"])
    assert (drawn.size, drawn.mode) == ((30, 20), "RGB")
    below = np.array(photo.convert("RGB").resize((30, 20), Image.Resampling.BILINEAR), int)
    expected = (below + palette(["Sky", "Road", "Tree"])[mask]) / 2
    assert np.abs(np.array(drawn) - expected).max() <= 1


@pytest.mark.parametrize("shape", [(1, MAX_JPEG_SIDE + 1), (MAX_JPEG_SIDE + 1, 1)])
def test_no_jpeg_is_that_wide_or_high(shape):
    with pytest.raises(Rejected, match="format=png") as error:
        overlay(Image.new("RGB", shape[::-1]), np.zeros(shape, np.uint8), ["a", "b"])
    assert error.value.status == 400
