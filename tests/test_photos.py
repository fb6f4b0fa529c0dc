"""Images: which decoders a request reaches, the limits on pixels, and the way of a mask back to the image."""

import dataclasses
import io
import itertools
import warnings

import numpy as np
import pytest
import torch
from conftest import SMALL, bomb, draw_photo, encoded
from PIL import Image

from deployment.export.accuracy import as_model_sees
from deployment.geometry import resized_box
from deployment.photos import FORMATS, Preprocessor, clips, to_array
from deployment.protocol import Rejected
from deployment.runtime.pytorch import BatchTransforms, resample_affine

PREPROCESSOR = Preprocessor(SMALL)


def with_resize(options: dict | None, **settings) -> Preprocessor:
    return Preprocessor(dataclasses.replace(SMALL, resize=options, **settings))


# --- opening ---


@pytest.mark.parametrize("format", FORMATS)
def test_opens_the_formats_that_it_names(format):
    photo = draw_photo(0, (60, 40))
    opened = PREPROCESSOR.open(encoded(photo, format, **({"lossless": True} if format == "WEBP" else {})))
    assert (opened.size, opened.mode) == ((60, 40), "RGB")
    if format not in ("GIF", "JPEG"):
        assert np.array_equal(np.array(opened), np.array(photo))


@pytest.mark.filterwarnings("ignore:IM image format is deprecated:DeprecationWarning")
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
    assert calls == [{"formats": FORMATS}]


@pytest.mark.parametrize("format", FORMATS)
def test_a_photo_cut_short_is_refused(format):
    data = encoded(draw_photo(0), format)
    with pytest.raises(Rejected, match="damaged or cut short|not an image") as error:
        PREPROCESSOR.open(data[: len(data) // 2])
    assert error.value.status == 400


@pytest.mark.parametrize("step", ["load", "convert"])
def test_memory_that_runs_out_is_not_the_photo_s_fault(step, monkeypatch):
    image = PREPROCESSOR.identify(encoded(draw_photo(0).convert("L")))
    monkeypatch.setattr(image, step, lambda *_: [0] * 2**60)
    with pytest.raises(MemoryError):
        PREPROCESSOR.decode(image)


def test_colors_that_pillow_cannot_convert_are_refused():
    gray = Preprocessor(dataclasses.replace(SMALL, channels=1, mean=None, std=None))
    data = encoded(Image.new("LAB", (6, 5)), "TIFF")
    assert PREPROCESSOR(data).shape == (64, 64, 3)
    with pytest.raises(Rejected) as error:
        gray(data)
    assert error.value.status == 400


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B"])
def test_pixels_are_fastai_s(mode, channels):
    from fastai.vision.core import PILImage, PILImageBW

    format = "TIFF" if mode in ("CMYK", "I;16", "I;16B") else "PNG"
    data = encoded(draw_photo(0, (60, 40)).convert("L" if mode.startswith("I") else mode).convert(mode), format)
    own_size = Preprocessor(dataclasses.replace(SMALL, channels=channels, resize=None))
    expected = np.array((PILImage if channels == 3 else PILImageBW).create(data))
    pixels = own_size(data)
    assert (pixels.shape, pixels.dtype) == ((40, 60, channels), np.uint8)
    assert np.array_equal(pixels, expected.reshape(40, 60, channels))


@pytest.mark.parametrize("order", ["<u2", ">u2"])  # of ImageJ, the second
@pytest.mark.parametrize("highest", [255, 256])
def test_more_than_8_bits_are_told(order, highest):
    values = np.arange(32 * 32).reshape(32, 32) % 200
    values[0, 0] = highest
    mode = "I;16" if order == "<u2" else "I;16B"
    data = encoded(Image.frombytes(mode, (32, 32), values.astype(order).tobytes()), "TIFF")
    header = PREPROCESSOR.identify(data)
    PREPROCESSOR.decode(header)
    assert header.mode == mode and clips(header) == (highest > 255)


def test_limit_of_pixels():
    photo = encoded(draw_photo(0))
    assert with_limit(320 * 240).identify(photo).size == (320, 240)
    with pytest.raises(Rejected, match="more than 76799 pixels") as error:
        with_limit(320 * 240 - 1).identify(photo)
    assert (error.value.status, error.value.type) == (413, "TooLarge")


def test_an_opener_that_finds_no_pixels_is_refused(tmp_path):
    (tmp_path / "open_image.py").write_text(
        "import numpy as np\n\ndef open_image(data):\n    return np.zeros((0, 9, 3), np.uint8)\n"
    )
    preprocessor = Preprocessor(dataclasses.replace(SMALL, opener=True, resize=None), tmp_path)
    with pytest.raises(Rejected, match="no pixels") as error:
        preprocessor.open(b"any")
    assert error.value.status == 400


def with_limit(max_pixels: int) -> Preprocessor:
    return Preprocessor(dataclasses.replace(SMALL, max_pixels=max_pixels))


def test_a_bomb_is_refused_by_its_header():
    data = encoded(Image.new("1", (20_000, 20_000)))
    with pytest.raises(Rejected, match="pixels") as error:
        PREPROCESSOR.identify(data)
    assert error.value.status == 413


def test_pillow_s_own_limit_is_not_in_the_way():
    """It refuses what has more than 179 million pixels, and warns from half as many on."""
    size = (20_000, 10_000)
    data = bomb(*size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert with_limit(300_000_000).identify(data).size == size
    with pytest.raises(Rejected) as error:
        with_limit(199_999_999).identify(data)
    assert (error.value.status, error.value.type) == (413, "TooLarge")


def test_a_size_that_the_network_does_not_take_is_refused_by_the_header():
    preprocessor = with_resize(None, sides=[[30, None], [None, 100]])
    assert preprocessor.identify(encoded(draw_photo(0, (100, 30)))).size == (100, 30)
    for size in ((101, 30), (100, 29)):
        with pytest.raises(Rejected, match="no photo of this size") as error:
            preprocessor.identify(encoded(draw_photo(0, size)))
        assert error.value.status == 400


def test_a_photo_counts_for_the_model_s_pixels_at_least():
    assert PREPROCESSOR.counted_pixels((2, 3)) == 64 * 64
    assert PREPROCESSOR.counted_pixels((1000, 3)) == 64 * 64
    assert PREPROCESSOR.counted_pixels((1000, 30)) == 30_000
    assert with_resize(None).counted_pixels((2, 3)) == 6


# --- memory ---


@pytest.mark.parametrize(
    "image, format, options, measured",
    [
        (Image.new("RGB", (9, 7)), "JPEG", {}, 4.03),
        (Image.new("RGB", (9, 7)), "JPEG", {"progressive": True, "subsampling": 0}, 10.01),
        (Image.new("CMYK", (9, 7)), "JPEG", {"progressive": True}, 12.02),
        (Image.new("1", (9, 7)), "PNG", {}, 5.0),
        (Image.new("RGBA", (9, 7)), "PNG", {}, 8.01),
        (Image.new("I;16", (9, 7)), "PNG", {}, 6.0),
        (Image.new("RGB", (9, 7)), "WEBP", {}, 16.0),
        (Image.new("RGBA", (9, 7)), "WEBP", {"lossless": True}, 16.01),
        (Image.new("P", (9, 7)), "GIF", {}, 5.0),
        (Image.new("CMYK", (9, 7)), "TIFF", {"compression": "tiff_lzw"}, 8.02),
    ],
)
def test_the_memory_that_an_image_takes(image, format, options, measured):
    """`measured`, in bytes of a pixel: the peak of resident memory while 12 megapixels were opened and made RGB."""
    header = PREPROCESSOR.identify(encoded(image, format, **options))
    assert measured - 0.05 <= PREPROCESSOR.memory(header) / (9 * 7) <= measured * 2


def test_padding_counts():
    wide = PREPROCESSOR.identify(encoded(Image.new("1", (2000, 2))))
    pad = with_resize({"size": [64, 64], "method": "pad"})
    assert pad.memory(wide) > 2000 * 2000 * 10 > 100 * PREPROCESSOR.memory(wide)


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
    assert np.array_equal(squish.to_image_size(mask, size), expected)
    assert np.array_equal(with_resize(None).to_image_size(mask, mask.shape[::-1]), mask)


def test_a_mask_of_the_augmentations_size_comes_back_too():
    """Photos are resized to 100 × 100, then sampled at 48 × 64: the mask covers all of the photo."""
    affine = [{"size": [48, 64], "mode": "bilinear", "pad_mode": "reflection", "align_corners": True}]
    preprocessor = with_resize({"size": [100, 100], "method": "squish"}, affine=affine)
    mask = np.random.default_rng(0).integers(0, 9, (48, 64), np.uint8)
    assert preprocessor(encoded(draw_photo(0))).shape == (100, 100, 3)
    assert_nearest(preprocessor, (320, 240), mask)


def assert_nearest(preprocessor: Preprocessor, size: tuple[int, int], mask: np.ndarray) -> None:
    """Each pixel of the image has the value of the sample that lies nearest to it, by a search among all samples.

    Where the samples lie is found with images that hold the position of each pixel, which `resample_affine` samples.
    """
    config, (width, height) = preprocessor.config, size
    seen_h, seen_w = config.pixels_size or (height, width)
    rows, columns = np.mgrid[:seen_h, :seen_w] + 0.5
    x = torch.from_numpy(np.stack([rows, columns]))[None]  # float64
    for options in config.affine:
        x = resample_affine(x, **options)
    assert x.shape[-2:] == mask.shape
    resize = config.resize or {}
    resized = resize.get("size", (height, width))
    box = (height, width)
    if resize.get("method", "squish") != "squish":
        box = resized_box((height, width), resized, resize["method"])
    chosen = []
    for axis, positions in ((0, x[0, 0, :, 0]), (1, x[0, 1, 0, :])):
        n = (height, width)[axis]
        corner = (resized[axis] - (seen_h, seen_w)[axis]) // 2  # of what is cut out of the resized image
        in_image = (positions.numpy() + corner) * box[axis] / resized[axis] + int(0.5 * (n - box[axis]))
        distances = np.abs(in_image[None, :] - (np.arange(n) + 0.5)[:, None])
        chosen.append(distances <= distances.min(axis=1, keepdims=True) + 1e-6)  # several where it is a tie
    back = preprocessor.to_image_size(mask, size)
    assert back.shape == (height, width) and back.dtype == mask.dtype
    numbers = np.arange(mask.size).reshape(mask.shape)
    which = preprocessor.to_image_size(numbers, size)  # the number of the sample that each pixel got
    rows, columns = np.divmod(which, mask.shape[1])
    assert np.array_equal(back, mask.ravel()[which])
    assert chosen[0][np.arange(height)[:, None], rows].all()
    assert chosen[1][np.arange(width)[None, :], columns].all()


RESIZES = {
    "own size": None,
    "squish": {"size": [100, 120], "method": "squish"},
    "crop": {"size": [90, 90], "method": "crop"},
    "pad": {"size": [90, 131], "method": "pad", "pad_mode": "zeros"},
    "crop after squish": {"size": [120, 150], "method": "squish", "crop": [96, 99], "crop_pad_mode": "zeros"},
    "large": {"size": [400, 501], "method": "squish"},
}


@pytest.mark.parametrize("resize", RESIZES)
def test_where_fastai_resamples_each_pixel_takes_the_nearest_sample(resize):
    cuts = ({}, {"ratio": [0.75, 4 / 3], "scale": 0.8}, {"ratio": [1.0, 1.0], "scale": 0.8})
    for samples, cut in itertools.product([(48, 64), (64, 64), (224, 160), (17, 21)], cuts):
        step = {"size": list(samples), "mode": "bilinear", "pad_mode": "reflection", "align_corners": True} | cut
        preprocessor = with_resize(RESIZES[resize], affine=[step])
        mask = np.random.default_rng(0).integers(0, 9, samples, np.uint8)
        for size in ((320, 240), (97, 131), (1500, 1111), (60, 400)):
            assert_nearest(preprocessor, size, mask)


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
    step = {"size": [64, 96], "mode": "bilinear", "pad_mode": "zeros", "align_corners": True}
    affine = [step | {"ratio": ratio, "scale": 0.9}] if ratio else []
    resize = {name: value for name, value in options.items() if name != "ratio"}
    preprocessor = with_resize({"size": [64, 96], "pad_mode": "reflection"} | resize, affine=affine)
    width, height = size
    ramp = np.linspace(0, 250, width)[None, :] * 0.5 + np.linspace(0, 250, height)[:, None] * 0.5
    photo = Image.fromarray(ramp.astype(np.uint8))
    seen = as_model_sees(photo, preprocessor).numpy()
    back = preprocessor.to_image_size(seen, size).astype(int)
    middle = (slice(height // 2 - 5, height // 2 + 5), slice(width // 2 - 5, width // 2 + 5))
    cell = max(width / 96, height / 64)  # pixels of the photo to one of the mask
    assert back.shape == (height, width)
    assert np.abs(back - np.array(photo))[middle].max() <= cell * 125 * (1 / width + 1 / height) + 1


# --- large JPEGs at a fraction of their size ---


@pytest.mark.parametrize(("size", "decoded"), [((250, 250), 1), ((256, 300), 2), ((1000, 511), 2), ((1100, 1024), 8)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_large_jpegs_are_decoded_at_a_fraction_where_that_is_fast(size, decoded, mode):
    exact, fast = Preprocessor(SMALL), Preprocessor(dataclasses.replace(SMALL, decode="fast"))
    data = encoded(draw_photo(1, size).convert(mode), "JPEG", quality=90)
    image = fast.decode(fast.identify(data))
    assert image.mode == "RGB" and image.size == tuple(-(-side // decoded) for side in size)
    whole = fast.decode(fast.identify(data), whole=True)
    assert np.array_equal(whole, exact.open(data))
    difference = np.abs(fast(data).astype(int) - exact(data))
    assert difference.any() == (decoded > 1) and difference.mean() < 1.5


def test_other_formats_are_decoded_whole():
    fast = Preprocessor(dataclasses.replace(SMALL, decode="fast"))
    data = encoded(draw_photo(1, (1000, 800)))
    assert np.array_equal(fast(data), Preprocessor(SMALL)(data))


# --- labels ---


RESAMPLED = {"size": [32, 48], "mode": "bilinear", "pad_mode": "zeros", "align_corners": True}


@pytest.mark.parametrize("affine", [[], [RESAMPLED]], ids=["resized", "resampled too"])
def test_a_label_lies_where_its_photo_s_pixels_do(affine):
    """A label drawn like the photo, of two values far apart, has its edge where the photo's is."""
    label = np.zeros((120, 160), np.uint8)
    label[40:80, 30:100] = 200
    gray = dataclasses.replace(SMALL, channels=1, mean=None, std=None, affine=affine)
    preprocessor = Preprocessor(gray)
    found = as_model_sees(Image.fromarray(label), preprocessor)
    pixels = to_array(preprocessor.resize(Image.fromarray(label)))
    x = BatchTransforms(gray)(torch.from_numpy(np.stack([pixels])))[0, 0]
    assert found.dtype == torch.uint8 and set(found.unique().tolist()) == {0, 200}
    assert found.shape == x.shape == (64, 64) if not affine else (32, 48)
    assert ((found > 100) == (x * 255 > 100)).float().mean() > 0.97
