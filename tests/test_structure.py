"""Files built to cost time or memory are refused before Pillow reads them; what encoders write is not."""

import base64
import io
import json
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from conftest import draw_photo
from PIL import Image, PngImagePlugin, features

from deployment.config import Config
from deployment.handler import Handler
from deployment.photos import Preprocessor
from deployment.protocol import Rejected
from deployment.structure import check_structure

CONFIG = Config(arch=None, n_classes=2, img_size=(32, 32), resize={"size": [32, 32], "method": "squish"})


def saved(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


PHOTO = draw_photo(0, (320, 240))
JPEG, PNG, GIF = saved(PHOTO, "JPEG", progressive=True), saved(PHOTO, "PNG"), saved(PHOTO.quantize(), "GIF")
GIF_FIRST_BLOCK = 13 + 3 * (2 << (GIF[10] & 7))


def tiff(*tags: tuple[int, int, int, int], content: bytes = b"") -> bytes:
    """A TIFF with `content` from byte 8 on, and tags as (number, type, count, value or place)."""
    content += b"\0" * (len(content) % 2)
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + struct.pack("<H", len(tags)) + entries + bytes(4)


def tiff_with_a_large_tile(side: int) -> bytes:
    """An image of 32 × 32 gray pixels in one tile of `side` × `side`."""
    tile = zlib.compress(bytes(side * side))
    size = ((256, 3, 1, 32), (257, 3, 1, 32), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1))
    return tiff(*size, (322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 8), (325, 4, 1, len(tile)), content=tile)


def tiff_with_strips(n: int) -> bytes:
    """An image of gray pixels with `n` rows, each in a strip of its own that lies where the others do."""
    size = ((256, 3, 1, 32), (257, 4, 1, n), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1))
    places, lengths = np.full(n, 8, "<u4").tobytes(), np.full(n, 32, "<u4").tobytes()
    strips = ((273, 4, n, 40), (278, 3, 1, 1), (279, 4, n, 40 + len(places)))
    return tiff(*size, *strips, content=bytes(32) + places + lengths)


def run_length_bmp(size: tuple[int, int], runs: bytes) -> bytes:
    """An image of 8-bit gray pixels in run-length encoding."""
    palette = b"".join(bytes([level, level, level, 0]) for level in range(256))
    start = 54 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, *size, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + header + palette + runs


LAST_SCAN = JPEG[JPEG.rfind(b"\xff\xda") : -2]
BOMBS = {
    "jpeg of 400 scans": JPEG[:-2] + 400 * LAST_SCAN + JPEG[-2:],
    "jpeg of 400 scans, behind a comment that says that it ends": (
        JPEG[:-2] + b"\xff\xfe\0\x04\xff\xd9" + 400 * LAST_SCAN + JPEG[-2:]
    ),
    "jpeg of 2 million segments": JPEG[:2] + b"\xff\xe0\0\x02" * 2_000_000 + JPEG[2:],
    "jpeg of 4 million markers": JPEG[:2] + b"\xff\xd0" * 4_000_000 + JPEG[2:],
    "jpeg with 8 MB between segments": JPEG[:2] + b"\xff\xe0\0\x02" + bytes(8_000_000) + JPEG[2:],
    "jpeg with 8 MB of fill bytes": JPEG[:2] + b"\xff" * 8_000_000 + JPEG[2:],
    "png of 500,000 chunks": PNG[:33] + 500_000 * png_chunk(b"prVt") + PNG[33:],
    "png of 500,000 chunks at its end": PNG[:-12] + 500_000 * png_chunk(b"prVt") + PNG[-12:],
    "gif of a million comments": (GIF[:GIF_FIRST_BLOCK] + b"\x21\xfe\x01a\0" * 1_000_000 + GIF[GIF_FIRST_BLOCK:]),
    "gif with a comment of 2 million blocks": (
        GIF[:GIF_FIRST_BLOCK] + b"\x21\xfe" + b"\x01a" * 2_000_000 + b"\0" + GIF[GIF_FIRST_BLOCK:]
    ),
    "gif with 4 MB between blocks": GIF[:GIF_FIRST_BLOCK] + bytes(4_000_000) + GIF[GIF_FIRST_BLOCK:],
    "tiff of 250,000 strips": tiff_with_strips(250_000),
    "tiff with a large tile": tiff_with_a_large_tile(6400),
    "bmp of 5 million runs": run_length_bmp((320, 240), 5_000_000 * b"\x01\x05"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_at_once(name):
    began = time.process_time()
    with pytest.raises(Rejected, match="more than|larger than"):
        Preprocessor(CONFIG)(BOMBS[name])
    assert time.process_time() - began < 0.3  # seconds; what Pillow would take is between 2 and 60


def with_metadata(size: int) -> dict:
    """Options of a JPEG with as much of EXIF, a color profile and comments as cameras and editors write."""
    exif = Image.Exif()
    exif[0x010E] = "x" * size
    return {"exif": exif, "icc_profile": np.random.default_rng(0).bytes(size), "comment": b"a" * size}


def ordinary_files() -> dict[str, bytes]:
    """Files as encoders write them."""
    photo, frames = draw_photo(1, (1200, 900)), [draw_photo(i, (200, 150)).quantize() for i in range(8)]
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", "x" * 900_000, zip=True)
    trailer = np.random.default_rng(1).bytes(8_000_000)  # as the film behind a motion photo
    files = {
        "jpeg": saved(photo, "JPEG"),
        "jpeg, restarts": saved(photo, "JPEG", restart_marker_blocks=1),
        "jpeg, progressive": saved(photo, "JPEG", progressive=True, quality=95, **with_metadata(60_000)),
        "jpeg and a film": saved(photo, "JPEG", progressive=True) + trailer,
        "mpo": saved(photo, "MPO", save_all=True, append_images=[photo]),
        "png": saved(photo, "PNG", compress_level=0),
        "png, text": saved(photo, "PNG", pnginfo=text),
        "png, and zeros behind": saved(photo, "PNG") + bytes(1_000_000),
        "gif": saved(photo.quantize(), "GIF", comment=b"a" * 100_000),
        "gif, animated": saved(frames[0], "GIF", save_all=True, append_images=frames[1:], loop=0),
        "tiff": saved(photo, "TIFF"),
        "tiff, strips": saved(photo, "TIFF", compression="tiff_lzw", strip_size=1),
        "tiff, jpeg": saved(photo, "TIFF", compression="jpeg"),
        "bigtiff": saved(photo, "TIFF", big_tiff=True),
        "bmp": saved(photo, "BMP"),
        "bmp, runs": run_length_bmp((600, 400), 400 * (b"\xff\x05\xff\x60\x5a\xc8\0\0") + b"\0\1"),
    }
    if features.check("webp"):
        files["webp"] = saved(photo, "WEBP")
    return files


def test_what_encoders_write_is_opened():
    preprocessor = Preprocessor(CONFIG)
    for name, data in ordinary_files().items():
        check_structure(data)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))
        assert np.array_equal(preprocessor(data), expected), name


def test_a_file_that_is_cut_short_is_damaged_and_no_bomb():
    for data in (JPEG, PNG, GIF, saved(PHOTO, "TIFF"), saved(PHOTO, "TIFF", big_tiff=True), saved(PHOTO, "BMP")):
        for length in (2, 3, 4, 7, 9, 12, 20, 33, len(data) // 2):
            with pytest.raises(Rejected, match="not an image of a known format|damaged or cut short"):
                Preprocessor(CONFIG)(data[:length])


def test_scans_behind_the_only_one_cost_nothing():
    """A baseline JPEG ends with the first scan of all components: the count ends there, and libjpeg does."""
    photo = saved(draw_photo(2, (800, 600)), "JPEG")
    scan = photo[photo.rfind(b"\xff\xda") : -2]
    longer = photo[:-2] + 80 * scan + photo[-2:]
    began = time.process_time()
    with pytest.raises(Rejected, match="damaged"):
        Preprocessor(CONFIG)(longer)
    assert time.process_time() - began < 0.3


def test_a_small_tile_may_be_larger_than_the_image():
    assert Preprocessor(CONFIG)(tiff_with_a_large_tile(256)).shape == (32, 32, 3)


def test_texts_are_not_kept_beside_the_pixels(small_store):
    """PNGs whose texts take 60 times the bytes of the file: they are gone when the next image is read."""
    text = zlib.compress(("a" * 1_000_000 + "\N{SLIGHTLY SMILING FACE}").encode(), 9)
    texts = b"".join(png_chunk(b"iTXt", b"k%d\0\1\0\0\0" % i + text) for i in range(3))
    photo = PNG[:33] + texts + PNG[33:]
    handler = Handler()
    handler.load(small_store)
    instance = {"b64": base64.b64encode(photo).decode()}
    body = json.dumps({"instances": [instance] * 8}).encode()
    handler.read({"body": body}, "")
    tracemalloc.start()
    try:
        job = handler.read({"body": body}, "")
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(job.items) == 8 and not any(item.error for item in job.items)
    assert kept < 8 * len(photo) + 1_000_000 and most < kept + 40_000_000  # bytes; the texts of one image take 12 MB


def test_a_bomb_costs_the_photo_beside_it_nothing(small_store):
    handler = Handler()
    handler.load(small_store)
    bomb, photo = ({"b64": base64.b64encode(data).decode()} for data in (BOMBS["jpeg of 400 scans"], JPEG))
    job = handler.preprocess({"body": json.dumps({"instances": [bomb, photo]}).encode()})
    assert [item.error and item.error.status for item in job.items] == [400, None]
    assert job.items[1].pixels is not None
