"""The handler on Ray Data: files are read, and actors answer them, on this machine or on a cluster."""

import io
import logging
import math
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

BLOCK_BYTES, BLOCK_FILES = 8 * 2**20, 32  # at most, of files that travel together
ALONE = {"max_concurrent_calls_per_actor": 1, "max_tasks_in_flight_per_actor": 1}  # what ends an actor ends no other
# A command in front of another, which PR_SET_PDEATHSIG (1) lets end by SIGKILL (9) when its parent has ended.
BOUND = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
FAILED_BLOCKS = 100  # after so many that could not be read or computed the run gives up


class Answers:
    """The handler in an actor, which answers blocks of files; they overlap, so that no core waits for a block's end.

    Args:
        threads: cores of a machine that it uses.
        archive: a list of one reference to the archive's bytes: Ray would resolve the bare reference, once a call.
        parameters: of a request: `format`, `size`, `top`.
        prefix: before the path of a file in its row.
        schema: of the rows.
    """

    def __init__(self, threads: int, archive: list, parameters: dict, prefix: str, schema: pa.Schema):
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


def compute(
    sizes: dict[str, int], files: FileSystem, together: bool, actors: int, threads: int, *settings: Any
) -> Iterator[pa.Table]:
    """The answers to the files of `sizes`, their bytes by path, which travel `together` in blocks, or one by one.

    Those of a block that fails are missing. `settings` are arguments of `Answers`, but for its threads.

    Raises:
        ray.exceptions.RayError: `together` too many blocks failed.
    """
    ray.data.DataContext.get_current().max_errored_blocks = FAILED_BLOCKS if together else -1
    in_block = min(max(BLOCK_BYTES * len(sizes) // (sum(sizes.values()) + 1), 1), BLOCK_FILES) if together else 1
    blocks = math.ceil(len(sizes) / in_block)
    images = ray.data.read_binary_files(
        list(sizes),
        filesystem=files,
        include_paths=True,
        ignore_missing_paths=True,
        num_cpus=0.1,
        concurrency=min(2 * actors, blocks),  # each reads in a process of its own
        override_num_blocks=blocks,
    )
    calls = {"max_concurrent_calls_per_actor": 2, "max_tasks_in_flight_per_actor": 4} if together else ALONE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # there is no other way to limit retries yet
        answers = images.map_batches(
            Answers,
            fn_constructor_args=(threads, *settings),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=actors, enable_true_multi_threading=together, **calls),
            num_cpus=0.4 * threads,  # in Ray's books: the rest is for tasks that read, and for actors of a lost machine
            max_task_retries=2,
        )
    yield from answers.iter_batches(batch_size=None, batch_format="pyarrow")
