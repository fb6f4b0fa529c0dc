"""Photos: which decoders a request reaches, the limit on pixels, and the way of a mask back to the photo."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from conftest import SMALL, draw_photo, encoded
from PIL import Image

from deployment.photos import PHOTO_FORMATS, Preprocessor
from deployment.protocol import Rejected

PREPROCESSOR = Preprocessor(SMALL)


def with_resize(options: dict | None, **settings) -> Preprocessor:
    return Preprocessor(dataclasses.replace(SMALL, resize=options, **settings))


# --- opening ---


@pytest.mark.parametrize("format", PHOTO_FORMATS)
def test_opens_the_formats_that_it_names(format):
    photo = draw_photo(0, (60, 40))
    opened = PREPROCESSOR.open(encoded(photo, format, **({"lossless": True} if format == "WEBP" else {})))
    assert (opened.size, opened.mode) == ((60, 40), "RGB")
    if format not in ("GIF", "JPEG"):
        assert np.array_equal(np.array(opened), np.array(photo))


@pytest.mark.parametrize("format", ["PPM", "IM", "TGA", "ICNS", "PCX", "SGI", "EPS", "PDF"])
def test_no_other_decoder_is_reached(format):
    with pytest.raises(Rejected, match="not an image of a known format") as error:
        PREPROCESSOR.open(encoded(draw_photo(0, (64, 64)), format))
    assert (error.value.status, error.value.type) == (400, "BadImage")


def two_photos_in_one(photo: Image.Image) -> bytes:
    """A WebP file of `photo` that Pillow, left to choose, opens as a PhotoCD: 768 × 512 other pixels."""
    data = encoded(photo, "WEBP", lossless=True)
    assert len(data) < 2048
    photo_cd = b"PCD_".ljust(96 * 2048 - 2048) + bytes(768 * 512 * 3 // 2)  # its header begins at byte 2048
    return data.ljust(2048, b"\0") + photo_cd


def test_a_file_that_two_decoders_take_is_opened_by_the_one_that_was_asked():
    photo = draw_photo(1, (20, 16))
    data = two_photos_in_one(photo)
    with Image.open(io.BytesIO(data)) as chosen:  # without the list of formats
        assert (chosen.format, chosen.convert("RGB").size) == ("PCD", (768, 512))
    identified = PREPROCESSOR.identify(data)
    assert (identified.format, identified.size) == ("WEBP", (20, 16))
    assert np.array_equal(np.array(PREPROCESSOR.open(data)), np.array(photo))


def test_each_photo_is_opened_once_with_the_list_of_formats(monkeypatch):
    real, calls = Image.open, []
    monkeypatch.setattr(Image, "open", lambda *args, **options: (calls.append(options), real(*args, **options))[1])
    PREPROCESSOR(encoded(draw_photo(0)))
    assert calls == [{"formats": PHOTO_FORMATS}]


@pytest.mark.parametrize("format", PHOTO_FORMATS)
def test_a_photo_cut_short_is_refused(format):
    data = encoded(draw_photo(0), format)
    with pytest.raises(Rejected, match="damaged or cut short|not an image") as error:
        PREPROCESSOR.open(data[: len(data) // 2])
    assert error.value.status == 400


def test_memory_that_runs_out_is_not_the_photo_s_fault(monkeypatch):
    image = PREPROCESSOR.identify(encoded(draw_photo(0)))
    monkeypatch.setattr(image, "convert", lambda mode: [0] * 2**60)
    with pytest.raises(MemoryError):
        PREPROCESSOR.decode(image)


def test_limit_of_pixels():
    photo = encoded(draw_photo(0))
    assert with_limit(320 * 240).identify(photo).size == (320, 240)
    with pytest.raises(Rejected, match="more than 76799 pixels") as error:
        with_limit(320 * 240 - 1).identify(photo)
    assert (error.value.status, error.value.type) == (413, "TooLarge")


def with_limit(max_pixels: int) -> Preprocessor:
    return Preprocessor(dataclasses.replace(SMALL, max_pixels=max_pixels))


def test_a_bomb_is_refused_by_its_header():
    data = encoded(Image.new("1", (20_000, 20_000)))
    with pytest.raises(Rejected, match="pixels") as error:
        PREPROCESSOR.identify(data)
    assert error.value.status == 413


def test_a_photo_counts_for_the_model_s_pixels_at_least():
    assert PREPROCESSOR.counted_pixels((2, 3)) == 64 * 64
    assert PREPROCESSOR.counted_pixels((1000, 3)) == 64 * 64
    assert PREPROCESSOR.counted_pixels((1000, 30)) == 30_000
    assert with_resize(None).counted_pixels((2, 3)) == 6


# --- geometry ---


def test_a_photo_of_which_nothing_would_be_left_is_refused():
    with pytest.raises(Rejected, match="too narrow") as error:
        with_resize({"size": [8, 64], "method": "crop"}).resize(Image.new("RGB", (5, 1)))
    assert error.value.status == 400


@pytest.mark.parametrize("size", [(320, 240), (97, 65), (1, 1), (5, 700), (4000, 3)])
def test_nearest_is_pillow_s(size):
    mask = np.random.default_rng(0).integers(0, 9, (64, 96), np.uint8)
    expected = np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    squish = with_resize({"size": [64, 96], "method": "squish"})
    assert np.array_equal(squish.to_photo_size(mask, size), expected)
    assert np.array_equal(with_resize(None).to_photo_size(mask, mask.shape[::-1]), mask)


def test_a_mask_of_the_augmentations_size_comes_back_too():
    """Photos are resized to 100 × 100, then sampled at 48 × 64: the mask covers all of the photo."""
    affine = [{"size": [48, 64], "mode": "bilinear", "pad_mode": "reflection", "align_corners": True}]
    preprocessor = with_resize({"size": [100, 100], "method": "squish"}, affine=affine)
    mask = np.random.default_rng(0).integers(0, 9, (48, 64), np.uint8)
    assert preprocessor(encoded(draw_photo(0))).shape == (3, 48, 64)
    expected = np.array(Image.fromarray(mask).resize((320, 240), Image.Resampling.NEAREST))
    assert np.array_equal(preprocessor.to_photo_size(mask, (320, 240)), expected)


@pytest.mark.parametrize("size", [(321, 240), (150, 400), (96, 64), (96, 640)])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "squish"},
        {"method": "pad", "pad_mode": "zeros"},
        {"method": "crop"},
        {"method": "squish", "size": [80, 112], "crop": [64, 96]},
        {"method": "crop", "ratio": [1.0, 1.0]},
        {"method": "squish", "size": [90, 131], "crop": [64, 96], "ratio": [0.75, 4 / 3]},
    ],
    ids=lambda options: "+".join([options["method"], *(name for name in ("crop", "ratio") if name in options)]),
)
def test_a_mask_comes_back_to_where_the_photo_was(size, options):
    """The photo itself, taken for a mask, goes through the transforms and back: what was seen lies where it lay."""
    ratio = options.get("ratio")
    affine = [{"size": [64, 96], "pad_mode": "zeros", "ratio": ratio, "scale": 0.9}] if ratio else []
    resize = {name: value for name, value in options.items() if name != "ratio"}
    preprocessor = with_resize({"size": [64, 96], "pad_mode": "reflection"} | resize, affine=affine)
    width, height = size
    ramp = np.linspace(0, 250, width)[None, :] * 0.5 + np.linspace(0, 250, height)[:, None] * 0.5
    photo = Image.fromarray(ramp.astype(np.uint8))
    seen = preprocessor.label(photo).numpy()
    back = preprocessor.to_photo_size(seen, size).astype(int)
    middle = (slice(height // 2 - 5, height // 2 + 5), slice(width // 2 - 5, width // 2 + 5))
    cell = max(width / 96, height / 64)  # pixels of the photo to one of the mask
    assert back.shape == (height, width)
    assert np.abs(back - np.array(photo))[middle].max() <= cell * 125 * (1 / width + 1 / height) + 1


# --- labels ---


@pytest.mark.parametrize("affine", [[], [{"size": [32, 48], "mode": "bilinear", "pad_mode": "zeros"}]])
def test_a_label_lies_where_its_photo_s_pixels_do(affine):
    """A label drawn like the photo, of two values far apart, has its edge where the photo's is."""
    label = np.zeros((120, 160), np.uint8)
    label[40:80, 30:100] = 200
    gray = dataclasses.replace(SMALL, options={"n_in": 1}, mean=None, std=None, affine=affine)
    preprocessor = Preprocessor(gray)
    found = preprocessor.label(Image.fromarray(label))
    x = preprocessor.to_tensor(preprocessor.resize(Image.fromarray(label)))[0]
    assert found.dtype == torch.uint8 and set(found.unique().tolist()) == {0, 200}
    assert found.shape == x.shape == (64, 64) if not affine else (32, 48)
    assert ((found > 100) == (x * 255 > 100)).float().mean() > 0.97
