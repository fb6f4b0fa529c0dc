"""Refuse files that are cheap to send and expensive to open, by their structure, before Pillow reads them.

Pillow takes a file's parts one by one, in Python, at some 5 µs each, and a file of 20 MB can have millions of them. A
scan of a JPEG can be 14 bytes long, and costs a pass over the whole image.
"""

import re

from PIL import PngImagePlugin, TiffImagePlugin

from .protocol import bad_image

MOST_PARTS = 10_000  # segments of a JPEG, chunks of a PNG, blocks of a GIF, tags of a TIFF
MOST_SCANS = 100  # of a JPEG, as in libtiff; encoders write 1 to 20
MOST_VALUES = 100_000  # of a tag of a TIFF, such as the places of its strips
MOST_RUNS = 500_000  # of a BMP with run-length encoding, which Pillow decodes in Python; each has two bytes or more
TIFF_BYTES = (1, 2, 7)  # types of tags that are read as one string, however long
JPEG_PART = re.compile(rb"\xff([^\xff])", re.S)
JPEG_PART_BETWEEN_SCANS = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.S)
JPEG_FRAMES = {bytes([marker]) for marker in range(0xC0, 0xD0)} - {b"\xc4", b"\xc8", b"\xcc"}
JPEG_PROGRESSIVE = {b"\xc2", b"\xc6", b"\xca", b"\xce"}
JPEG_ALONE = {bytes([marker]) for marker in (0x00, 0x01, *range(0xD0, 0xDA))}  # markers without a segment
# Characters of all texts of an image, of up to four bytes each.
PngImagePlugin.MAX_TEXT_MEMORY = 4 << 20  # pyrefly: ignore[bad-assignment]  # read as a literal


def check_structure(data: bytes) -> None:
    """Raises Rejected, 400, if the file in `data` has more parts than any encoder writes."""
    if data.startswith(b"\xff\xd8"):
        check_jpeg(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        check_png(data)
    elif data.startswith((b"GIF87a", b"GIF89a")):
        check_gif(data)
    elif data.startswith(tuple(TiffImagePlugin.PREFIXES)):
        check_tiff(data)
    elif data.startswith(b"BM"):
        check_bmp(data)


def check_jpeg(data: bytes) -> None:
    """Count the segments and the scans, as libjpeg finds them, up to the end of the first image."""
    pattern, position, parts, scans, one_scan = JPEG_PART, 2, 0, 0, b""
    while parts < MOST_PARTS and scans <= MOST_SCANS:
        part = pattern.search(data, position)
        if not part or (scans and part[1] == b"\xd9"):  # the end of the image
            return
        if not scans:
            parts += part.start() - position  # bytes that belong to no segment, which Pillow skips one by one
        marker, start = part[1], part.end()
        if marker in JPEG_FRAMES - JPEG_PROGRESSIVE:
            one_scan = data[start + 7 : start + 8]  # the number of components: a scan of all of them is the only one
        if marker == b"\xda":
            if data[start + 2 : start + 3] == one_scan:
                return
            pattern, scans = JPEG_PART_BETWEEN_SCANS, scans + 1
        parts, position = parts + 1, start
        if marker not in JPEG_ALONE:
            position += int.from_bytes(data[start : start + 2], "big")
    raise bad_image(f"a JPEG of more than {MOST_PARTS} segments or {MOST_SCANS} scans")


def check_png(data: bytes) -> None:
    """Count the chunks."""
    position = 8
    for _ in range(MOST_PARTS):
        if data[position + 4 : position + 8] in (b"IEND", b""):
            return
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    raise bad_image(f"a PNG of more than {MOST_PARTS} chunks")


def check_gif(data: bytes) -> None:
    """Count the blocks before the first image; its own are the decoder's, in C."""
    colors = 2 << (data[10] & 7) if len(data) > 10 and data[10] & 128 else 0
    position, in_extension = 13 + 3 * colors, False
    for _ in range(MOST_PARTS):
        byte = data[position : position + 1]
        if in_extension:
            position += 1 + int.from_bytes(byte, "big")
            in_extension = byte not in (b"\0", b"")
        elif byte in (b",", b";", b""):
            return
        else:
            in_extension = byte == b"!"
            position += 2 if in_extension else 1
    raise bad_image(f"a GIF of more than {MOST_PARTS} blocks before the first image")


def check_tiff(data: bytes) -> None:
    """Count the tags of the first image, and the values of each."""
    order = "little" if data.startswith(b"II") else "big"
    wide = data[2] == 43  # BigTIFF, as Pillow knows it

    def number(start: int, length: int) -> int:
        return int.from_bytes(data[start : start + length], order)

    directory = number(8, 8) if wide else number(4, 4)
    if not directory:  # no image
        return
    tags = number(directory, 8) if wide else number(directory, 2)
    if tags > MOST_PARTS:
        raise bad_image(f"a TIFF of more than {MOST_PARTS} tags")
    start, step, count_length = (directory + 8, 20, 8) if wide else (directory + 2, 12, 4)
    for tag in range(start, start + tags * step, step):
        if number(tag + 2, 2) not in TIFF_BYTES and number(tag + 4, count_length) > MOST_VALUES:
            raise bad_image(f"a TIFF with a tag of more than {MOST_VALUES} values")


def check_bmp(data: bytes) -> None:
    """Count the bytes of one with run-length encoding, which its header tells."""
    header, compression = (int.from_bytes(data[start : start + 4], "little") for start in (14, 30))
    if header >= 40 and compression in (1, 2) and len(data) > 2 * MOST_RUNS:
        raise bad_image(f"a BMP of more than {2 * MOST_RUNS} bytes with run-length encoding: send it as PNG")
