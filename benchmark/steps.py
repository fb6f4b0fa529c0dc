"""Where the time of a request goes, by the servers' own clocks: `python -m benchmark.steps`, after `make bench`.

The handler's steps and TorchServe's queue come from the server's metrics; what is left of the time that the clients
see is HTTP, TorchServe's Java and the way between its processes.
"""

import argparse
import re
from pathlib import Path

from benchmark import load
from benchmark.contenders import OURS, first_answer
from benchmark.run import BUILD, photos
from benchmark.scaling import show
from deployment.server.processes import free_ports
from deployment.server.torchserve import DIRECT, torchserve

STEPS = {
    "queue": ("ts_queue_latency_microseconds", 1e-3),
    "preprocess": ("preprocess_seconds_sum", 1e3),
    "inference": ("inference_seconds_sum", 1e3),
    "postprocess": ("postprocess_seconds_sum", 1e3),
}


def totals(metrics_port: int) -> dict[str, float]:
    """What the server has counted so far, over all workers: the milliseconds of each step, and how many batches."""
    with DIRECT.open(f"http://127.0.0.1:{metrics_port}/metrics") as answer:
        text = answer.read().decode()

    def total(name: str) -> float:
        return sum(float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.M))

    return {step: scale * total(name) for step, (name, scale) in STEPS.items()} | {
        "batches": total("inference_seconds_count"),
        "requests": total("ts_inference_requests_total"),
    }


def measure(name: str, clients: int, images: list[bytes], seconds: float) -> dict:
    """The mean milliseconds of a request, as `clients` clients see it, and of its batch in each step of the server."""
    [metrics_port] = free_ports(1)
    with torchserve(BUILD / name, timeout=300, metrics_port=metrics_port) as url:
        url += "/predictions/fastunet"
        first_answer(url, images[0])
        load.run(url, images, clients, 2, lambda photo, body: True)
        before = totals(metrics_port)
        seen = load.run(url, images, clients, seconds, lambda photo, body: True, warm_up=0)
        after = totals(metrics_port)
    new = {key: after[key] - before[key] for key in after}
    per = {step: new[step] / new["requests" if step == "queue" else "batches"] for step in STEPS}
    request = 1000 * clients / seen["rps"]
    row = {"contender": name, "clients": clients, "photos in a batch": new["requests"] / new["batches"]}
    return row | {"ms of a request": request} | per | {"rest": request - sum(per.values())}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmark.steps", description=__doc__.splitlines()[0])
    parser.add_argument("--contenders", default="eager,openvino-fp32,openvino-int8", help="default: %(default)s")
    parser.add_argument("--clients", default="1,8", help="default: %(default)s")
    parser.add_argument("--photos", type=Path, help="folder of JPEG photos to send (default: drawn scenes)")
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement (default: %(default)s)")
    args = parser.parse_args()
    names = args.contenders.split(",")
    if missing := [name for name in names if name not in OURS or not (BUILD / name / "fastunet.mar").is_file()]:
        parser.error(f"no archive of {', '.join(missing)}: run `make bench` first")
    images = photos(args.photos)
    rows = (measure(name, int(n), images, args.seconds) for name in names for n in args.clients.split(","))
    show("milliseconds of a batch in each step", rows)


if __name__ == "__main__":
    main()
