"""A folder or a bucket of images through the handler, on Ray Data: `python -m deployment.bulk PHOTOS --out OUT`.

Ray's actors read the files and answer them (see `actors`), and this process writes the answers (see `tables`). What OUT
holds is not computed again. Without --address Ray runs on this machine alone, listens on loopback, and ends with this
process, however that ends. The exit status is 1 where an image has an error, and 2 where nothing could be computed.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import zipfile
from pathlib import Path

try:
    import pyarrow as pa
    import ray.exceptions
except ImportError as missing:
    print(f"error: {missing}: pip install -r deployment/requirements-bulk.txt", file=sys.stderr)
    sys.exit(2)

from . import tables
from .actors import blocks_of, compute, keep_terminal_clean, start_ray
from .archive import find_archive
from .config import read_config
from .protocol import SIZES, Rejected, read_options

FAULTS = (OSError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, Rejected, ray.exceptions.RayError)
UNREADABLE = {"code": 500, "type": "Unreadable", "message": "it could not be read, or ended the process that read it"}


def read_task(archive: Path) -> str:
    """The task of the model in `archive`."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(archive) as content:
        content.extract("model-config.yaml", folder)
        return read_config(folder).task


def read_parameters(options: argparse.Namespace, task: str) -> dict:
    """What a request to a model for `task` would have as parameters; a mask is a PNG where nothing else is asked for.

    Raises:
        Rejected, ValueError: the options do not fit.
    """
    given = {name: value for name in ("format", "size", "top") if (value := getattr(options, name)) is not None}
    read_options(given)
    if task != "segmentation" and options.format:
        raise ValueError(f"a model for {task} gives no picture: leave out --format")
    return {"format": "png"} | given if task == "segmentation" else given


def run(options: argparse.Namespace) -> tables.Output:
    """Answer each file in `options.photos` that has no row in `options.out`; returns what is there then.

    Raises:
        OSError, ValueError, Rejected: there is no such archive or folder, no file in it, or an option does not fit.
        RuntimeError, ray.exceptions.RayError: the cluster, or the model, failed.
    """
    archive, _ = find_archive(options.model_store, options.name)
    task, data = read_task(archive), archive.read_bytes()
    parameters = read_parameters(options, task)
    files, folder, prefix = tables.locate(options.photos)
    output = tables.Output(options.out, json.dumps({"archive": hashlib.sha256(data).hexdigest()} | parameters))
    listed = tables.sizes_in(files, folder)
    sizes = {path: size for path, size in listed.items() if prefix + path not in output.found}
    if not sizes:
        raise ValueError(f"no file in {options.photos}")
    left = {path: size for path, size in sizes.items() if prefix + path not in output.paths}
    print(f"{len(sizes)} files, of which {len(sizes) - len(left)} are answered in {options.out}", file=sys.stderr)
    if not left:
        return output
    schema = tables.schema_of(task, parameters.get("format", ""))
    actors, threads = start_ray(options.address)
    settings = (actors, threads, files, [ray.put(data)], parameters, prefix, schema)
    output.start(len(output.paths) + len(left))
    try:
        for table in compute(blocks_of(left), False, *settings):
            output.add(table)
        missing = [path for path in left if prefix + path not in output.paths]  # unreadable, or of a block that failed
        for table in compute([[path] for path in missing], True, *settings) if missing else ():
            output.add(table)
        lost = [path for path in missing if prefix + path not in output.paths]
        if len(lost) == len(left) and any(tables.is_readable(files, path) for path in lost):
            raise RuntimeError("none of the images could be computed: Ray's logs in /tmp/ray say why")
        if lost:
            output.add(pa.Table.from_pylist([{"path": prefix + path, "error": UNREADABLE} for path in lost], schema))
    finally:
        output.write()
        output.show(end="\n")
        ray.shutdown()
    return output


def main(arguments: list[str] | None = None) -> None:
    """The command line; `arguments` in place of the process's own."""
    parser = argparse.ArgumentParser(prog="python -m deployment.bulk", description=__doc__.splitlines()[0])
    parser.add_argument("photos", help="a folder, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER")
    parser.add_argument("--model-store", default="model_store", help="folder of the archive (default: %(default)s)")
    parser.add_argument("--name", help="of the archive, where there are several (default: fastunet)")
    parser.add_argument("--out", required=True, help="folder for the Parquet files, also gs:// or s3://")
    parser.add_argument("--format", choices=tables.PICTURES, help="of a mask, as over HTTP (default: png)")
    parser.add_argument("--size", choices=SIZES, help="of a mask, as over HTTP")
    parser.add_argument("--top", type=int, help="only so many probabilities, the highest")
    parser.add_argument("--address", help="of a running Ray cluster, or auto (default: Ray starts here)")
    options = parser.parse_args(arguments)
    try:
        output = run(options)
    except KeyboardInterrupt:
        sys.exit(130)
    except FAULTS as error:
        message = str(error).strip() or type(error).__name__
        print(f"error: {message.splitlines()[-1]}", file=sys.stderr)  # of a stack the reason
        sys.exit(2)
    if output.errors:
        print(f"{output.errors} of {len(output.paths)} images have an error", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    keep_terminal_clean()
    main()
