"""Bulk beside the handler in a process of its own, on this machine: `python -m benchmark.bulk` prints a table.

Both answer the same JPEG files with PNG masks, one after the other and again: small photos, and some of 12 megapixels.
A rate counts from the first answers on; what passes until then is the start, most of it Ray's. Memory is that of all
processes, where shared pages count once (proportional set size), at its highest.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from benchmark.contenders import FASTEST, HERE, ROOT
from benchmark.run import BUILD, big_photos, cpu_name, photos
from deployment.handler import Handler
from deployment.runtime import cores

ROUNDS = 2
MEMORY_SECONDS = 5  # between looks at the memory: counting the pages of a dozen processes holds them up
RESULTS = HERE / "bulk_results.json"  # of the last whole run, for benchmark.cost
FILES = {"small": 750, "12 megapixels": 100}  # some nine minutes on two slow cores


def answer_in_process(folder: Path, store: Path) -> None:
    """Answer all files in `folder` with the model in `store`; prints when and how many, as `answer_in_bulk` does."""
    handler, answered = Handler(), []
    handler.load(store, threads=cores())

    def answer(path: Path) -> None:
        job = handler.read({"body": path.read_bytes()}, "image/png")
        handler.answer([job], time.perf_counter())

    with ThreadPoolExecutor(2 * cores()) as pool:
        for _ in pool.map(answer, sorted(folder.iterdir())):
            answered.append((time.time(), 1))
    print(json.dumps(answered))


def answer_in_bulk(folder: Path, store: Path) -> None:
    """The command, with the time at which each block of answers arrives, and how many they are, printed at its end."""
    from deployment import bulk, tables

    bulk.keep_terminal_clean()
    answered, add = [], tables.Output.add

    def timed(output, rows) -> None:
        add(output, rows)
        answered.append((time.time(), len(rows)))

    tables.Output.add = timed
    with tempfile.TemporaryDirectory() as out:
        bulk.run(argparse.Namespace(photos=str(folder), model_store=store, out=out, format=None, size=None, top=None,
                                    address=None))  # fmt: skip
    print(json.dumps(answered))


WAYS = {"in process": answer_in_process, "bulk": answer_in_bulk}


def measure(way: str, folder: Path, store: Path) -> dict[str, float]:
    """One run: images per second from the first answers on, seconds until these, and the most memory, in bytes."""
    began, most = time.time(), 0
    argv = [sys.executable, "-m", "benchmark.bulk", "--run", way, str(folder), str(store)]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(argv, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=output)
        while process.poll() is None:
            most = max(most, memory(process.pid))
            time.sleep(MEMORY_SECONDS)
        output.seek(0)
        answered = json.loads(output.read().splitlines()[-1])
    (first, early), (last, _) = answered[0], answered[-1]
    done = sum(n for _, n in answered)
    return {"rate": (done - early) / (last - first), "start": first - began, "memory": most, "images": done}


def memory(pid: int) -> int:
    """The bytes of process `pid` and all below it."""
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    for process in family:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has ended
            continue
    return total


def fill(folder: Path, images: list[bytes], count: int) -> None:
    """`count` files in `folder`, of `images` in turn."""
    for i in range(count):
        (folder / f"{i:05}.jpg").write_bytes(images[i % len(images)])


def measure_all(store: Path, files: dict[str, int]) -> dict[str, dict]:
    """The medians of the runs, by kind of photos and by way."""
    medians = {}
    for name, count in files.items():
        with tempfile.TemporaryDirectory() as folder:
            fill(Path(folder), photos(None) if name == "small" else big_photos(BUILD / "12_megapixels"), count)
            runs = {way: [] for way in WAYS}
            for _ in range(ROUNDS):  # in turn: the machine's speed changes
                for way in WAYS:
                    run = measure(way, Path(folder), store)
                    print(f"{name}, {way}: {run['rate']:.1f} images/s, start {run['start']:.1f} s", file=sys.stderr)
                    runs[way].append(run)
        medians[name] = {
            way: {key: statistics.median(run[key] for run in rows) for key in rows[0]} for way, rows in runs.items()
        }
    return medians


def table(results: dict[str, dict]) -> str:
    lines = ["| photos | files | | images/s | of in process | start s | memory MB |", "|---|--:|---|--:|--:|--:|--:|"]
    for name, ways in results.items():
        for way, row in ways.items():
            cells = [
                f"{row['images']:.0f}",
                way,
                f"{row['rate']:.1f}",
                f"{row['rate'] / ways['in process']['rate']:.2f}",
            ]
            cells += [f"{row['start']:.1f}", f"{row['memory'] / 1e6:.0f}"]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmark.bulk", description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, default=BUILD / FASTEST, help="archive and model for OpenVINO")
    parser.add_argument("--share", type=float, default=1.0, help="of the files, for a shorter run")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        way, folder, store = args.run
        WAYS[way](Path(folder), Path(store))
        return
    if not (args.store / "fastunet.mar").is_file():
        sys.exit(f"error: no {args.store / 'fastunet.mar'}: `make bench CONTENDERS=openvino-int8` makes it")
    results = measure_all(args.store, {name: max(round(args.share * count), 20) for name, count in FILES.items()})
    print(f"{cores()} cores, {cpu_name()}; medians of {ROUNDS} runs\n\n{table(results)}")
    if args.share == 1:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
