"""A folder or a bucket of images through the handler, on Ray Data: `python -m deployment.bulk PHOTOS --out OUT`.

Ray reads the files, actors answer them, and this process writes the answers (see `tables`). What OUT holds is not
computed again. Without --address Ray runs on this machine alone, listens on loopback, and ends with this process.
"""

import argparse
import hashlib
import io
import json
import logging
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

try:
    import pyarrow as pa
    import ray
except ImportError as missing:
    print(f"error: {missing}: pip install -r deployment/requirements-bulk.txt", file=sys.stderr)
    sys.exit(2)

from . import tables
from .archive import find_archive
from .config import read_config
from .handler import Handler
from .protocol import SIZES
from .runtime import cores, memory_limit

BLOCK_BYTES, BLOCK_FILES = 8 * 2**20, 32  # at most, of files that travel together
FAILED_BLOCKS = 100  # after so many that could not be read or computed the run gives up


class Answers:
    """The handler in an actor, which answers blocks of files; they overlap, so that no core waits for a block's end."""

    def __init__(self, archive: list, threads: int, parameters: dict, prefix: str, schema: pa.Schema):
        self.handler, self.parameters, self.prefix, self.schema = Handler(), parameters, prefix, schema
        with tempfile.TemporaryDirectory(prefix="model-") as folder:
            zipfile.ZipFile(io.BytesIO(ray.get(archive[0]))).extractall(folder)
            self.handler.load(folder, threads=threads, share=0.5)  # Ray and files on their way have the rest
        self.handler.budget.seconds = None  # an image waits for its memory as long as it takes
        self.threads = ThreadPoolExecutor(2 * threads)

    def __call__(self, files: pa.Table) -> pa.Table:
        rows = list(self.threads.map(self.answer, files["path"].to_pylist(), files["bytes"]))
        if self.handler.broken:
            raise RuntimeError("the model fails on every image")
        return pa.Table.from_pylist(rows, self.schema)

    def answer(self, path: str, data: pa.Scalar) -> dict:
        """The row of one file, whose bytes are never taken for another form of a request."""
        job = self.handler.read({"body": {"instances": [data.as_py()], "parameters": self.parameters}}, "")
        self.handler.answer([job], time.perf_counter())
        [item] = job.items
        row = {"path": self.prefix + path, "warning": item.warning or None} | (item.answer or {})
        if item.error:
            reason = f": {item.error.__cause__}" if item.error.__cause__ else ""
            row["error"] = item.error.as_json() | {"message": item.error.message + reason}
        return row


def start_ray(address: str | None) -> tuple[int, int]:
    """Connect to the cluster at `address`, else start Ray here; returns how many actors, and the cores of each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    here = {"num_cpus": cores(), "object_store_memory": max(memory_limit() // 8, 100 * 2**20)}
    here |= {"include_dashboard": False, "_node_ip_address": "127.0.0.2"}  # Ray replaces 127.0.0.1 by a public address
    ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **({} if address else here))
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars, settings.target_max_block_size = False, BLOCK_BYTES
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are rows, or end the run
    machines = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    threads = min(n for n in machines if n)
    return sum(n // threads for n in machines), threads


def compute(paths: list[str], files, rows: int, pool: tuple[int, int], archive: list, *settings) -> Iterator[pa.Table]:
    """The answers to `paths`, read in blocks of `rows` files; those of a block that fails are missing."""
    actors, threads = pool
    ray.data.DataContext.get_current().max_errored_blocks = FAILED_BLOCKS if rows > 1 else -1
    blocks = -(-len(paths) // rows)
    images = ray.data.read_binary_files(
        paths, filesystem=files, include_paths=True, num_cpus=0.1, override_num_blocks=blocks
    )
    calls = {"max_concurrent_calls_per_actor": 2, "max_tasks_in_flight_per_actor": 4}
    yield from images.map_batches(
        Answers,
        fn_constructor_args=(archive, threads, *settings),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors, enable_true_multi_threading=True, **calls),
        num_cpus=0.4 * threads,  # in Ray's books: the rest is for tasks that read, and for actors of a lost machine
        scheduling_strategy="SPREAD",
        max_task_retries=2,
    ).iter_batches(batch_size=None, batch_format="pyarrow")


def run(options: argparse.Namespace) -> tables.Output:
    """Answer each file in `options.photos` that has no row in `options.out`; returns what is there then.

    Raises:
        OSError, ValueError: there is no such archive or folder, no file in it, or an option does not fit.
    """
    archive, _ = find_archive(options.model_store)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(archive) as content:
        content.extract("model-config.yaml", folder)
        task = read_config(folder).task
    parameters = {name: value for name in ("format", "size", "top") if (value := getattr(options, name))}
    if task == "segmentation":
        parameters = {"format": "png"} | parameters
    elif options.format:
        raise ValueError(f"a model for {task} gives no picture: leave out --format")
    data = archive.read_bytes()
    output = tables.Output(options.out, json.dumps({"archive": hashlib.sha256(data).hexdigest()} | parameters))
    files, folder, prefix = tables.locate(options.photos)
    sizes = tables.sizes_in(files, folder)
    if not sizes:
        raise ValueError(f"no file in {options.photos}")
    left = [path for path in sizes if prefix + path not in output.paths]
    print(f"{len(sizes)} files, of which {len(sizes) - len(left)} are answered in {options.out}", file=sys.stderr)
    if not left:
        return output
    schema = tables.schema_of(task, parameters.get("format", ""))
    pool = start_ray(options.address)
    settings = ([ray.put(data)], parameters, prefix, schema)
    output.start(len(output.paths) + len(left))
    try:
        mean = sum(sizes.values()) // len(sizes) + 1
        for rows in (min(max(BLOCK_BYTES // mean, 1), BLOCK_FILES), 1):  # what is missing then gets a block of its own
            for table in compute(left, files, rows, pool, *settings) if left else ():
                output.add(table)
            left = [path for path in left if prefix + path not in output.paths]
        error = {"code": 500, "type": "Unreadable", "message": "it could not be read, or ended the process"}
        output.add(pa.Table.from_pylist([{"path": prefix + path, "error": error} for path in left], schema))
    finally:
        output.write()
        output.show()
        ray.shutdown()
    return output


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m deployment.bulk", description=__doc__.splitlines()[0])
    parser.add_argument("photos", help="a folder, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER")
    parser.add_argument("--model-store", default="model_store", help="folder of the archive (default: %(default)s)")
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
    except (OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    if output.errors:
        sys.exit(f"{output.errors} of {len(output.paths)} images have an error")


if __name__ == "__main__":
    main()
