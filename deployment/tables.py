"""Answers as rows of Parquet files: what `deployment.bulk` reads, and what it writes.

A row has the `path` of an image, the fields of its answer (see `answers`; a mask is the bytes of a PNG, an overlay of a
JPEG), `warning`, and `error`, `{"code", "type", "message"}` as over HTTP; what an image lacks is null.
"""

import os
import re
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
from pyarrow import dataset, fs, parquet

SHARES = pa.map_(pa.string(), pa.float64())
FIELDS = {  # of an answer, by task
    "segmentation": {"shape": pa.list_(pa.int32()), "classes": SHARES, "names": pa.list_(pa.string())},
    "classification": {"label": pa.string(), "probabilities": SHARES},
    "multi-label": {"labels": pa.list_(pa.string()), "probabilities": SHARES},
    "regression": {"values": pa.list_(pa.float64())},
    "points": {"points": pa.list_(pa.list_(pa.float64()))},
}
PICTURES = {"png": "png", "overlay": "jpeg"}  # the field of a picture, by format
ERROR = pa.struct({"code": pa.int32(), "type": pa.string(), "message": pa.string()})
FILE_BYTES, FILE_SECONDS = 32 * 2**20, 15  # of answers, after which they become a file


def schema_of(task: str, format: str) -> pa.Schema:
    """The schema of answers of a model for `task`; `format` is png or overlay for a mask, else empty."""
    pictures = {PICTURES[format]: pa.binary()} if format else {}
    return pa.schema({"path": pa.string(), **pictures, **FIELDS[task], "warning": pa.string(), "error": ERROR})


def locate(place: str) -> tuple[fs.FileSystem, str, str]:
    """The file system of a folder, or of a `gs://` or `s3://` address, the path there, and what stands before paths."""
    if "://" not in place:
        return fs.LocalFileSystem(), os.path.abspath(place), ""
    files, path = fs.FileSystem.from_uri(place)
    return files, path.rstrip("/"), place.partition("://")[0] + "://"


def sizes_in(files: fs.FileSystem, folder: str) -> dict[str, int]:
    """The bytes of each file in `folder` and below, by path. Hidden ones, which begin with `.` or `_`, are left out.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if isinstance(files, fs.LocalFileSystem):
        sizes = sizes_here(folder)
    else:
        found = files.get_file_info(fs.FileSelector(folder, recursive=True))
        sizes = {info.path: info.size for info in found if info.type == fs.FileType.File}
    return {path: size for path, size in sizes.items() if not re.search(r"/[._]", path.removeprefix(folder))}


def sizes_here(folder: str) -> dict[str, int]:
    """As `sizes_in`, with hidden files, of a folder on this machine. Links to folders may form loops: left out.

    Bytes of a path that are not UTF-8 are escaped. pyarrow takes no such path, so nothing can be read there, and the
    row of that file has an error.
    """

    def fail(error: OSError) -> None:
        raise error

    sizes = {}
    for place, _, names in os.walk(folder, onerror=fail):
        for path in (Path(place, name) for name in names):
            if path.is_file():  # and no link to nowhere or to itself
                escaped = path.as_posix().encode(errors="surrogateescape").decode(errors="backslashreplace")
                sizes[escaped] = path.stat().st_size
    return sizes


def is_readable(files: fs.FileSystem, path: str) -> bool:
    """Whether the file at `path` can be read from this machine."""
    try:
        with files.open_input_stream(path, compression=None) as file:
            file.read(1)
    except OSError:
        return False
    return True


class Output:
    """The answers in a folder: those of earlier runs, and those that are added, with a line about them in the terminal.

    Args:
        place: a folder, or a `gs://` or `s3://` address.
        made_by: model and options; all answers in the folder must have the same.

    Raises:
        ValueError: they have not.
    """

    def __init__(self, place: str, made_by: str):
        self.files, self.folder, prefix = locate(place)
        self.made_by, self.rows, self.errors = {"made_by": made_by}, [], 0
        self.paths: set[str] = set()  # that have a row
        found = [info.path for info in self.files.get_file_info(fs.FileSelector(self.folder, allow_not_found=True))]
        for path in [path for path in found if re.search(r"/\.[^/]+\.parquet$", path)]:
            self.files.delete_file(path)  # a run was killed while it wrote it
        whole = [path for path in found if re.search(r"/[^./][^/]*\.parquet$", path)]
        self.found = {prefix + path for path in whole}  # files of earlier runs, which are no images
        if whole:
            before = dataset.dataset(whole, filesystem=self.files)
            if (before.schema.metadata or {}).get(b"made_by") != made_by.encode():
                raise ValueError(f"{place} has answers of another archive or other options: choose another --out")
            self.count(before.to_table(["path", "error"]))

    def start(self, total: int) -> None:
        """From now on answers come, until there are those to `total` images."""
        self.total, self.before = total, len(self.paths)
        self.began = self.shown = self.written = time.monotonic()

    def count(self, rows: pa.Table) -> None:
        self.paths.update(rows["path"].to_pylist())
        self.errors += len(rows) - rows["error"].null_count

    def add(self, rows: pa.Table) -> None:
        """Take `rows`; they are written with others, at the latest by `write`."""
        self.rows.append(rows)
        self.count(rows)
        now = time.monotonic()
        if now - self.written > FILE_SECONDS or sum(part.nbytes for part in self.rows) > FILE_BYTES:
            self.write()
        if now - self.shown > (0.5 if sys.stderr.isatty() else 10):
            self.show()

    def write(self) -> None:
        """Write what was added to a new file, which appears whole or not at all; pyarrow, and Ray, write in place."""
        rows, self.rows, self.written = self.rows, [], time.monotonic()
        if not rows:
            return
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}.parquet"
        if isinstance(self.files, fs.LocalFileSystem):
            self.files.create_dir(self.folder)
        table = pa.concat_tables(rows).replace_schema_metadata(self.made_by)
        parquet.write_table(table, f"{self.folder}/.{name}", filesystem=self.files)
        self.files.move(f"{self.folder}/.{name}", f"{self.folder}/{name}")

    def show(self, end: str = "") -> None:
        """Say how far it is: in a terminal in one line that changes, and after which comes `end`."""
        self.shown, done = time.monotonic(), len(self.paths)
        rate = (done - self.before) / max(self.shown - self.began, 1e-3)
        left = timedelta(seconds=round((self.total - done) / rate)) if rate else "unknown"
        line = f"{done} of {self.total} images, {rate:.1f} images/s, time left {left}, {self.errors} error(s)"
        print(f"\r\033[K{line}{end}" if sys.stderr.isatty() else f"{line}\n", end="", file=sys.stderr, flush=True)
