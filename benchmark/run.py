"""Serve the same weights and photos with every contender in turn and measure: `python -m benchmark.run`.

Writes `benchmark/results.json` (`{"machine": …, "rows": {contender: {load: {rps, p50_ms, errors, wrong_masks, …}}}}`),
`benchmark/results.png`, and the table in `benchmark/README.md`; prints all figures. They are those of this run alone. A
load is a number of clients, or BIG: eight clients with photos of 12 megapixels.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from tqdm import tqdm

from benchmark import contenders, load
from benchmark.contenders import ALL, ALONE, BASELINES, CHOSEN, FAST, FASTEST, HERE, PEERS, ROOT, store_of
from deployment.archive import ArchiveError
from deployment.config import read_config
from deployment.export import ExportError
from deployment.export.accuracy import outputs
from deployment.export.convert import MIN_AGREEMENT
from deployment.export.dataset import list_photos
from deployment.photos import Preprocessor
from deployment.runtime import cores
from deployment.runtime.openvino import load_openvino
from deployment.runtime.pytorch import eager
from deployment.runtime.queue import ImageQueue

RESULTS = HERE / "results.json"
BUILD = HERE / "build"  # model stores of the contenders, kept between runs
README = HERE / "README.md"
MARKS = "<!-- written by benchmark.run -->\n", "<!-- end -->\n"  # around the table in README.md
OVERLOAD = 150  # clients, more than either of our servers lets in at one time
OVERLOADED = (FASTEST, "uvicorn-int8")
BIG, BIG_SIZE, BIG_CLIENTS = "12 MP", (3024, 4032), 8
EXACT = (*BASELINES, "eager", "fastai")  # must agree in every pixel; the others in MIN_AGREEMENT of them


def photos(folder: Path | None, count: int = 16) -> list[bytes]:
    """The JPEG photos in `folder` (or its `images/`), or street scenes drawn for the purpose, 480 × 360.

    Raises:
        FileNotFoundError: `folder` holds none.
    """
    if folder:
        found = [path.read_bytes() for path in list_photos(folder) if path.suffix.lower() in (".jpg", ".jpeg")]
        if not found:
            raise FileNotFoundError(f"no JPEG photos in {folder}")
        return found[:count]
    return [encode(draw(seed, (360, 480))) for seed in range(count)]


def big_photos(folder: Path, count: int = 4) -> list[bytes]:
    """JPEGs of 12 megapixels, kept in `folder`: drawn scenes with the noise of a camera, which costs a decoder most."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, rng = [folder / f"{seed}.jpg" for seed in range(count)], np.random.default_rng(0)
    for seed, path in enumerate(paths):
        if not path.is_file():
            quarter = tuple(side // 4 for side in BIG_SIZE)
            scene = draw(100 + seed, quarter).resize(BIG_SIZE[::-1], Image.Resampling.BICUBIC)
            noisy = np.asarray(scene) + rng.normal(0, 8, (*BIG_SIZE, 3)).astype(np.float32)
            path.write_bytes(encode(Image.fromarray(noisy.clip(0, 255).astype(np.uint8))))
    return [path.read_bytes() for path in paths]


def draw(seed: int, size: tuple[int, int]):
    """A street scene of `size` (height, width) that no learner was trained on."""
    sys.path.append(str(ROOT / "notebook"))
    from scenes import draw_scene

    return draw_scene(1_000_000 + seed, size)[0]


def encode(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def calibration(folder: Path, img_size: tuple[int, int]) -> Path:
    """A folder of drawn scenes to calibrate int8 with, for when none is named."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(100):
        path = folder / f"{seed}.png"
        if not path.is_file():
            draw(1000 + seed, img_size).save(path)
    return folder


def references(model_store: Path, names: list[str], images: list[bytes]) -> dict[str, list[np.ndarray]]:
    """The right masks of `images`, in process, by whose they are.

    They are "fastai" (here of the copy that export proved equal) and, by the store's name, of what is not as exact,
    where one of `names` serves it.
    """
    config = read_config(model_store)
    pixels = [*map(Preprocessor(config, model_store), images)]
    masks = {"fastai": numpy_masks(eager(config, model_store), pixels)}
    for store in {"openvino-bf16", FASTEST, FAST} & {store_of(name) for name in names}:
        served = read_config(BUILD / store)
        pixels = [*map(Preprocessor(served, BUILD / store), images)]
        model = load_openvino(BUILD / store / "fastunet.xml", cores(), served.precision)
        masks[store] = numpy_masks(model, pixels)
    return masks


def numpy_masks(model: ImageQueue, images: list[np.ndarray]) -> list[np.ndarray]:
    """The mask of each of `images`, one by one."""
    return [output[0].numpy() for output in outputs(model, images)]


class Check:
    """Whether an answer holds the mask that it should, and how far the masks agree with fastai's."""

    def __init__(self, name: str, masks: dict[str, list[np.ndarray]]):
        self.expected, self.fastai = masks.get(store_of(name), masks["fastai"]), masks["fastai"]
        self.at_least = 1.0 if name in EXACT else MIN_AGREEMENT["fp32"]
        self.agreement: dict[int, float] = {}

    def __call__(self, photo: int, body: bytes) -> bool:
        try:
            mask = np.frombuffer(base64.b64decode(json.loads(body)["base64_prediction"]), np.uint8)
        except (ValueError, KeyError, TypeError):
            return False
        if mask.size != self.expected[photo].size:
            return False
        self.agreement[photo] = float((mask == self.fastai[photo].ravel()).mean())
        return float((mask == self.expected[photo].ravel()).mean()) >= self.at_least


def processes() -> dict[int, tuple[float, int]]:
    """Processor seconds and resident bytes of each process below this one: the server's."""
    seen = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            seen[process.pid] = times.user + times.system, process.memory_info().rss
    return seen


def choose_workers(name: str, images: list[bytes], check: Check) -> int:
    """With how many processes the contender `name` answers eight clients faster: one, or one for each core."""
    rates = {}
    for workers in {1, cores()}:
        with contenders.contender(name, BUILD, workers) as url:
            contenders.first_answer(url, images[0])
            rates[workers] = load.run(url, images, 8, 2, check)["rps"]
    return max(rates, key=rates.get)


def measure(
    name: str, loads: list[tuple[str, int, list[bytes], Check]], seconds: float, workers: int = 1
) -> dict[str, dict]:
    """One start of one contender: what each of `loads` got, which are a name, clients, photos, and their check."""
    rows = {}
    _, _, images, check = loads[0]
    begin = time.perf_counter()
    with contenders.contender(name, BUILD, workers) as url:
        body = contenders.first_answer(url, images[0])
        start_up = time.perf_counter() - begin
        if not check(0, body):
            raise RuntimeError(f"{name} answers with a wrong mask; the answer begins with {body[:200]!r}")
        for key, clients, images, check in loads:
            before, begin = processes(), time.perf_counter()
            row = load.run(url, images, clients, seconds, check)
            after, elapsed = processes(), time.perf_counter() - begin
            used = sum(cpu - before.get(pid, (0, 0))[0] for pid, (cpu, _) in after.items())
            row["cpu_cores"] = round(used / elapsed, 3)
            row["memory_mb"] = round(sum(rss for _, rss in after.values()) / 2**20)
            row["start_up_s"] = round(start_up, 2)
            row["workers"] = workers
            row["agreement"] = round(statistics.mean(check.agreement.values()), 6)
            rows[key] = row
    return rows


def measure_alone(name: str, folder: Path | None, seconds: float) -> dict[str, dict]:
    """As `measure`, of what has no server; `folder` holds the photos, None stands for drawn ones."""
    command = [sys.executable, "-m", "benchmark.limit", name, BUILD / FASTEST, f"--seconds={seconds}"]
    command += [f"--photos={folder.resolve()}"] if folder else []
    return json.loads(subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout)


def median(rows: list[dict]) -> dict:
    """The median of each figure; what was refused, errors and wrong masks are added up."""
    both = {key: [row[key] for row in rows] for key in rows[0]}
    return {
        key: sum(values) if key in ("refused", "errors", "wrong_masks") else round(statistics.median(values), 4)
        for key, values in both.items()
    } | {"runs": len(rows), "rps_spread": round(max(both["rps"]) - min(both["rps"]), 3)}


def write_table(machine: str, rows: dict) -> None:
    """Put `machine` and the `summary` of `rows` in their place in README.md."""
    text = README.read_text()
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    part = README.with_suffix(".part")
    part.write_text("".join([before, MARKS[0], f"{machine}:\n\n{summary(rows)}\n", MARKS[1], after]))
    os.replace(part, README)


def save(machine: str, rows: dict) -> None:
    part = RESULTS.with_suffix(".part")
    part.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    os.replace(part, RESULTS)


def by_load(key: str) -> tuple[bool, int]:
    """The order of loads: by the number of clients, and BIG at the end."""
    return (key == BIG, 0 if key == BIG else int(key))


def table(results: dict) -> str:
    """The figures as a Markdown table, in requests per second and milliseconds, and as ratios."""
    base = {n: row["rps"] for n, row in results.get("baseline", {}).items()}
    limit = results.get("limit", {})
    lines = [
        "| contender | clients | requests/s | × baseline | of the limit | p50 ms | p95 ms | p99 ms | CPU cores "
        "| memory MB | start-up s | errors | wrong masks | pixels as fastai |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in sorted(results, key=ALL.index):
        for n, row in sorted(results[name].items(), key=lambda item: by_load(item[0])):
            ratio = f"{row['rps'] / base[n]:.1f}" if base.get(n) else ""
            share = f"{row['rps'] / limit['8']['rps']:.0%}" if "8" in limit and n not in ("1", BIG) else ""
            if n == "1" and "1" in limit:
                share = f"{row['rps'] / limit['1']['rps']:.0%}"
            cells = [f"{row['rps']:.1f}", ratio, share, *(f"{row[f'p{q}_ms']:.0f}" for q in (50, 95, 99))]
            if name in ALONE:
                cells += ["", "", "", "", "", ""]
            else:
                cells += [f"{row['cpu_cores']:.2f}", f"{row['memory_mb']:.0f}", f"{row['start_up_s']:.1f}"]
                cells += [str(row["errors"]), str(row["wrong_masks"]), f"{row['agreement']:.4%}"]
            lines.append(f"| {name} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(results: dict) -> str:
    """The README's table: a line for each contender, with requests/s by the number of clients.

    The last column is the goodput under overload as a share of the peak.
    """
    counts = sorted({int(n) for name in results if name not in ALONE for n in results[name] if n != BIG} - {OVERLOAD})
    most = str(8 if 8 in counts else counts[-1])
    base, limit = (results.get(name, {}).get(most, {}).get("rps") for name in ("baseline", "limit"))
    heads = [f"{n} client{'s' * (n > 1)}" for n in counts]
    heads += [f"× baseline, {most} clients", f"of the limit, {most} clients", f"p50 ms, {counts[0]} client"]
    heads += ["start-up s", "memory MB", f"goodput, {OVERLOAD} clients", f"{BIG} photos, {BIG_CLIENTS} clients"]
    lines = ["| requests/s | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    for name in sorted(results, key=ALL.index):
        rows = results[name]
        cells = [f"{rows[str(n)]['rps']:.1f}" if str(n) in rows else "" for n in counts]
        for against, form in ((base, ".1f"), (limit, ".0%")):
            cells.append(format(rows[most]["rps"] / against, form) if against and most in rows else "")
        first = rows.get(str(counts[0]), {})
        cells.append(f"{first['p50_ms']:.1f}" if first else "")
        for key, form in (("start_up_s", ".1f"), ("memory_mb", ".0f")):
            cells.append(format(rows[most][key], form) if key in rows.get(most, {}) else "")
        peak = max((row["rps"] for n, row in rows.items() if n not in (str(OVERLOAD), BIG)), default=0)
        cells.append(f"{rows[str(OVERLOAD)]['rps'] / peak:.0%}" if str(OVERLOAD) in rows and peak else "")
        cells.append(f"{rows[BIG]['rps']:.1f}" if BIG in rows else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Requests per second and median latency of each contender over the number of clients."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    served = [name for name in sorted(results, key=ALL.index) if name not in ALONE]
    for i, name in enumerate(served):
        rows = sorted((int(n), row) for n, row in results[name].items() if n not in (str(OVERLOAD), BIG))
        ours = name in contenders.OURS or name in contenders.UVICORN
        style = dict(marker="o", color=plt.cm.tab20(i), linestyle="-" if ours else "--", linewidth=2.5 if ours else 1.2)
        left.plot([n for n, _ in rows], [row["rps"] for _, row in rows], label=name, **style)
        right.plot([n for n, _ in rows], [row["p50_ms"] for _, row in rows], label=name, **style)
    if "limit" in results:
        left.axhline(results["limit"]["8"]["rps"], color="black", linewidth=1, label="limit (the model alone)")
        right.axhline(results["limit"]["1"]["p50_ms"], color="black", linewidth=1, label="limit (the model alone)")
    for axes, title in ((left, "requests per second"), (right, "median latency, ms")):
        axes.set(title=title, xlabel="clients", xscale="log", yscale="log")
        ticks = sorted({int(n) for name in served for n in results[name] if n != BIG} - {OVERLOAD})
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=110)
    plt.close(figure)
    os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmark.run", description=__doc__.splitlines()[0])
    parser.add_argument("--contenders", default=",".join(ALL), help="default: %(default)s")
    parser.add_argument("--clients", default="1,4,8,32", help="default: %(default)s")
    parser.add_argument("--photos", type=Path, help="folder of JPEG photos to send (default: drawn scenes, 480 x 360)")
    parser.add_argument("--calibrate", type=Path, help="photos to calibrate int8 with (default: drawn scenes)")
    parser.add_argument("--model-store", type=Path, default=ROOT / "model_store", help="what `make demo` wrote")
    parser.add_argument("--repeat", type=int, default=2, help="starts of each contender (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement (default: %(default)s)")
    args = parser.parse_args()
    names, clients = args.contenders.split(","), [int(n) for n in args.clients.split(",")]
    unknown = [name for name in names if name not in ALL]
    if unknown:
        parser.error(f"no contender {', '.join(unknown)}: there are {', '.join(ALL)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that servers are stopped on the way out
    try:
        bench(names, clients, args)
    except (OSError, RuntimeError, ExportError, ArchiveError) as error:
        sys.exit(f"error: {error}")


def bench(names: list[str], clients: list[int], args) -> None:
    """Prepare, measure every contender in turn and again, and write what was found so far after each.

    Raises:
        RuntimeError: contenders failed; the others are measured all the same.
    """
    config, images = contenders.read_store(args.model_store, names), photos(args.photos)
    big = big_photos(BUILD / "12_megapixels")
    if {*PEERS} & {*names}:
        contenders.install_peers()
    scenes = args.calibrate or calibration(BUILD / "scenes", config.img_size)
    contenders.prepare(names, args.model_store, BUILD, scenes)
    masks, big_masks = (references(args.model_store, names, some) for some in (images, big))
    machine = f"{cores()} cores, {cpu_name()}; {args.repeat} starts each, {args.seconds:g} s per figure, medians"
    results, runs, failures, workers = {}, defaultdict(lambda: defaultdict(list)), [], {}
    for _, name in (progress := tqdm([(i, name) for i in range(args.repeat) for name in names], unit="run")):
        progress.set_postfix_str(name)
        if name in ALONE:
            rows = measure_alone(name, args.photos, args.seconds)
            if name == "in-process":
                rows[BIG] = measure_alone(name, BUILD / "12_megapixels", args.seconds)["8"]
        else:
            try:
                check = Check(name, masks)
                if name in CHOSEN and name not in workers:
                    workers[name] = choose_workers(name, images, check)
                counts = [*clients, *([OVERLOAD] if name in OVERLOADED else [])]
                loads = [(str(n), n, images, check) for n in counts]
                loads.append((BIG, BIG_CLIENTS, big, Check(name, big_masks)))
                rows = measure(name, loads, args.seconds, workers.get(name, 1))
            except (OSError, RuntimeError) as error:
                failures.append(f"{name}: {error}")
                continue
        for n, row in rows.items():
            runs[name][n].append(row)
            results.setdefault(name, {})[n] = median(runs[name][n])
        save(machine, results)
    shown = {name: results[name] for name in ALL if name in results}
    plot(shown, RESULTS.with_suffix(".png"))
    write_table(machine, shown)
    print(machine, summary(shown), table(shown), sep="\n\n")
    if failures:
        raise RuntimeError("\n".join(failures))


def cpu_name() -> str:
    """The processor's name, and what it has for int8 and bf16."""
    with contextlib.suppress(OSError, StopIteration):
        lines = dict(line.split("\t", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if "\t" in line)
        flags = lines["flags"].split()
        has = [name for name in ("avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8") if name in flags]
        return f"{lines['model name'].strip(': ')} ({', '.join(has) or 'neither VNNI nor bf16'})"
    return platform.processor()


if __name__ == "__main__":
    main()
