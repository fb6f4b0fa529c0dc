"""The handler on Ray Data: actors read files and answer them, on this machine or on a cluster.

Ray carries paths alone. Through its object store a photo of 12 megapixels costs a fifth of what the model does.
"""

import io
import logging
import os
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import ray
from pyarrow.fs import FileSystem
from ray._private import ray_constants, services
from ray.util.annotations import RayDeprecationWarning

from .handler import Handler
from .memory import memory_limit
from .runtime import cores

BLOCK_BYTES, BLOCK_FILES = 32 * 2**20, 32  # at most, of files that an actor takes together
ALONE = {"max_concurrent_calls_per_actor": 1, "max_tasks_in_flight_per_actor": 1}  # what ends an actor ends no other
# A command in front of another, which PR_SET_PDEATHSIG (1) lets end by SIGKILL (9) when its parent has ended.
BOUND = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
FAILED_BLOCKS = 100  # after so many that could not be computed the run gives up

logger = logging.getLogger(__name__)


class Answers:
    """The handler in an actor, which reads and answers files. Blocks overlap: no core waits for a file or an end.

    Args:
        threads: cores of a machine that it uses.
        files: where they lie.
        archive: a list of one reference to the archive's bytes: Ray would resolve the bare reference, once a call.
        parameters: of a request: `format`, `size`, `top`.
        prefix: before the path of a file in its row.
        schema: of the rows.
    """

    def __init__(
        self, threads: int, files: FileSystem, archive: list, parameters: dict, prefix: str, schema: pa.Schema
    ):
        self.handler, self.files = Handler(), files
        self.parameters, self.prefix, self.schema = parameters, prefix, schema
        with tempfile.TemporaryDirectory(prefix="model-") as folder:
            zipfile.ZipFile(io.BytesIO(ray.get(archive[0]))).extractall(folder)
            self.handler.load(folder, threads=threads, share=0.5)  # Ray and files as read have the rest
        self.handler.budget.seconds = None  # an image waits for its memory as long as it takes
        self.readers, self.threads = ThreadPoolExecutor(BLOCK_FILES), ThreadPoolExecutor(2 * threads)

    def __call__(self, block: pa.Table) -> pa.Table:
        """The rows of the files whose paths are the one row of `block`; those that cannot be read are missing."""
        [paths] = block["paths"].to_pylist()
        rows = list(self.threads.map(self.answer, paths, self.readers.map(self.read, paths)))
        if self.handler.broken:
            raise RuntimeError("the model fails on every image")
        return pa.Table.from_pylist([row for row in rows if row], self.schema)

    def read(self, path: str) -> bytes | None:
        try:
            with self.files.open_input_stream(path, compression=None) as file:
                return file.read()
        except OSError as error:
            logger.warning("%s: %s", path, error)
            return None

    def answer(self, path: str, data: bytes | None) -> dict | None:
        """The row of one file, whose bytes are never taken for another form of a request."""
        if data is None:
            return None
        job = self.handler.read({"body": {"instances": [data], "parameters": self.parameters}}, "")
        self.handler.answer([job], time.perf_counter())
        [item] = job.items
        row = {"path": self.prefix + path, "warning": item.warning or None} | (item.answer or {})
        if item.error:
            reason = f": {item.error.__cause__}" if item.error.__cause__ else ""
            row["error"] = item.error.as_json() | {"message": item.error.message + reason}
        return row


def keep_terminal_clean() -> None:
    """From now on Python alone writes to the terminal: Ray's core writes to stderr itself, whatever its log level."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def bind_agents_to_raylet() -> None:
    """Linux kills Ray's two agents as it kills the raylet, their parent, once the process that started Ray is gone.

    By themselves they see within two seconds that the raylet is gone, but try for 60 s more to tell the cluster's head
    (`report_raylet_error_logs` in ray/_private/process_watcher.py), which is gone, too. On macOS Ray has a reaper.
    """
    if sys.platform == "linux":
        python = services._build_python_executable_command_memory_profileable

        def bound(component: str, session_dir: str, unbuffered: bool = True) -> list[str]:
            return [sys.executable, "-c", BOUND, *python(component, session_dir, unbuffered)]

        services._build_python_executable_command_memory_profileable = bound


def start_ray(address: str | None) -> tuple[int, int]:
    """Connect to the cluster at `address`, else start Ray here; returns how many actors, and the cores of each.

    Raises:
        RuntimeError: the cluster has no machine that computes.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    here: dict[str, Any] = {"num_cpus": cores(), "object_store_memory": max(memory_limit() // 8, 100 * 2**20)}
    if not address:
        here["include_dashboard"] = False
        # Of any address Ray makes this machine's public one, unless it believes that it cannot be part of a cluster.
        ray_constants.ENABLE_RAY_CLUSTER = False
        os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
        os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
        bind_agents_to_raylet()
    ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **({} if address else here))
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars, settings.target_max_block_size = False, BLOCK_BYTES
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are rows, or end the run
    machines = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    threads = min((n for n in machines if n), default=0)
    if not threads:
        raise RuntimeError(f"no machine of the cluster {address} has a CPU for Ray yet")
    return sum(n // threads for n in machines), threads


def blocks_of(sizes: dict[str, int]) -> list[list[str]]:
    """The paths of `sizes`, the files' bytes by path, in blocks as large as they may be."""
    blocks: list[list[str]] = [[]]
    room = BLOCK_BYTES
    for path, size in sizes.items():
        if blocks[-1] and (size > room or len(blocks[-1]) == BLOCK_FILES):
            blocks.append([])
            room = BLOCK_BYTES
        blocks[-1].append(path)
        room -= size
    return blocks


def compute(blocks: list[list[str]], alone: bool, actors: int, threads: int, *settings: Any) -> Iterator[pa.Table]:
    """The answers to the files whose paths are in `blocks`; an actor has two blocks at a time, or one `alone`.

    Those that cannot be read, and those of a block that fails, are missing. `settings` are arguments of `Answers`, but
    for its threads.

    Raises:
        ray.exceptions.RayError: not `alone`, and too many blocks failed.
    """
    ray.data.DataContext.get_current().max_errored_blocks = -1 if alone else FAILED_BLOCKS
    paths = ray.data.from_items([{"paths": block} for block in blocks], override_num_blocks=len(blocks))
    calls = ALONE if alone else {"max_concurrent_calls_per_actor": 2, "max_tasks_in_flight_per_actor": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # there is no other way to limit retries yet
        answers = paths.map_batches(
            Answers,
            fn_constructor_args=(threads, *settings),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=actors, enable_true_multi_threading=not alone, **calls),
            num_cpus=0.4 * threads,  # in Ray's books: the rest is for actors of a lost machine
            max_task_retries=2,
        )
    yield from answers.iter_batches(batch_size=None, batch_format="pyarrow")
