"""The limit: a converted model alone in a process, no photos to read, no server. `python -m benchmark.limit MODEL_DIR`

Prints one line of JSON: the best latency of one photo, and the best throughput of two ways to use all cores.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import openvino as ov

from deployment.config import read_config
from deployment.processes import cores


def measure(model: Path, img_size: tuple[int, int], seconds: float, n_in: int = 3) -> dict:
    """`{1: latency, 8: throughput}` of the OpenVINO model at `model` on random photos, as results.json has them.

    Throughput is the better of one photo at a time on all cores and one photo per core.
    """
    core = ov.Core()
    results = {}
    for streams in sorted({1, cores()}):
        settings = {"INFERENCE_NUM_THREADS": cores(), "NUM_STREAMS": streams, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(model, "CPU", settings)
        x = np.random.default_rng(0).random((1, n_in, *img_size), np.float32)
        times, done = [], 0
        queue = ov.AsyncInferQueue(compiled, streams)
        queue.set_callback(lambda request, start, times=times: times.append(time.perf_counter() - start))
        for warm in (True, False):
            done, start = 0, time.perf_counter()
            times.clear()
            while time.perf_counter() - start < (0.5 if warm else seconds):
                queue.get_idle_request_id()  # waits for a free stream
                queue.start_async([x], time.perf_counter(), share_inputs=True)
                done += 1
            queue.wait_all()
            elapsed = time.perf_counter() - start
        quantiles = [1000 * q for q in statistics.quantiles(times, n=100, method="inclusive")]
        results[streams] = {
            "rps": round(done / elapsed, 3),
            "p50_ms": round(quantiles[49], 2),
            "p95_ms": round(quantiles[94], 2),
            "p99_ms": round(quantiles[98], 2),
            "refused": 0,
            "errors": 0,
            "wrong_masks": 0,
        }
    best = max(results, key=lambda streams: results[streams]["rps"])
    return {"1": results[1], "8": results[best] | {"streams": best}}


def main() -> None:
    folder = Path(sys.argv[1])
    config = read_config(folder)
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 3.0
    print(json.dumps(measure(folder / "fastunet.xml", config.img_size, seconds, config.n_in)))


if __name__ == "__main__":
    main()
