"""What a server cannot exceed, measured in one process without one: `python -m benchmark.limit limit MODEL_DIR`.

`limit` is the model alone, on images that are decoded and resized already; `in-process` is the whole handler, from the
bytes of an image to those of its answer. Prints a line of JSON, `{"1": latency of one image, "8": best throughput}`.
"""

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmark import load, peers
from benchmark.contenders import ALONE
from benchmark.run import photos
from deployment.config import Config, read_config
from deployment.runtime import cores
from deployment.runtime.openvino import load_openvino

WARM_UP = 0.5  # seconds


def measure_model(folder: Path, config: Config, seconds: float) -> dict:
    """`{1: latency, 8: throughput}` of the OpenVINO model in `folder` on a random image, as results.json has them.

    Throughput is the better of one image at a time on all cores and one image per core.
    """
    model = load_openvino(folder / "fastunet.xml", cores())
    size = (*(config.pixels_size or config.img_size), config.channels)
    image = (255 * np.random.default_rng(0).random(size)).astype(config.dtype)

    def answer(_: int) -> None:
        (output,) = model([image])
        if isinstance(output, Exception):
            raise output

    alone, together = (figures(answer, threads, seconds) for threads in (1, 2 * cores()))
    return {"1": alone, "8": max(alone, together, key=lambda row: row["rps"])}


def measure_handler(model: Path, images: list[bytes], seconds: float) -> dict:
    """`{1: latency, 8: throughput}` of the handler with the model in the folder `model` on the photos `images`.

    Throughput is that of as many photos at once as `deployment.server.app` lets in: twice the number of cores.
    """
    handler = peers.load(str(model))

    def answer(i: int) -> None:
        job = peers.read(handler, images[i % len(images)])
        peers.infer(handler, [job])
        handler.postprocess(job)

    return {"1": figures(answer, 1, seconds), "8": figures(answer, 2 * cores(), seconds)}


def figures(answer: Callable[[int], None], threads: int, seconds: float) -> dict:
    """What results.json has of `threads` threads that call `answer`, with a number that counts up, again and again."""

    def answer_until(end: float, first: int) -> list[float]:
        times = []
        while (begin := time.perf_counter()) < end:
            answer(first + len(times))
            times.append(time.perf_counter() - begin)
        return times

    with ThreadPoolExecutor(threads) as pool:
        for duration in (WARM_UP, seconds):
            start = time.perf_counter()
            parts = [pool.submit(answer_until, start + duration, i) for i in range(threads)]
            times = [t for part in parts for t in part.result()]
            elapsed = time.perf_counter() - start
    return load.summary([(0.0, t, 0, 200, b"") for t in times], elapsed, lambda *_: True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmark.limit", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=ALONE)
    parser.add_argument("model", type=Path, help="folder of a model for OpenVINO")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement (default: %(default)s)")
    parser.add_argument("--photos", type=Path, help="folder of JPEG photos (default: drawn scenes, 480 x 360)")
    args = parser.parse_args()
    if args.what == "limit":
        rows = measure_model(args.model, read_config(args.model), args.seconds)
    else:
        rows = measure_handler(args.model, photos(args.photos), args.seconds)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
