"""How the time of an answer grows with photo, model, classes and threads: `python -m benchmark.scaling`.

Everything is measured in process, with the same functions that the handler calls. The README has the formula:

    time of an answer = read(photo pixels) + forward(architecture, model pixels, classes) / speed-up(threads) + server
    requests/s of a replica = 1 / time, and replicas = ceil(load / (0.6 × requests/s of a replica))
"""

import argparse
import io
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmark.cost import HERE, cpu_rate, read
from deployment.config import Config
from deployment.export.convert import to_openvino
from deployment.model import DynamicUnetDIY
from deployment.photos import Preprocessor, to_array
from deployment.runtime import cores
from deployment.runtime.openvino import compile_model, infer

# vCPUs of machine types that AI Platform offers: https://cloud.google.com/vertex-ai/docs/predictions/configure-compute
MACHINES = {"n1-standard-2": 2, "n1-standard-4": 4, "n1-standard-8": 8, "n1-standard-16": 16}


def milliseconds(call: Callable[[], object], at_least: float = 0.5) -> float:
    """The median time of `call` over as many calls as fit into `at_least` seconds, after one to warm up."""
    call()
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < at_least or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def photo(width: int, height: int) -> bytes:
    """A JPEG of this size with the texture of a photo: about 2.5 bits for a pixel."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC)) + rng.normal(0, 8, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def network(arch: str, n_classes: int, img_size: tuple[int, int]) -> Config:
    """The configuration of a model that sees every photo at `img_size` (height, width)."""
    return Config(arch, n_classes, img_size, resize={"size": img_size})


def reading(img_size: tuple[int, int] = (96, 128)) -> Iterator[dict]:
    """Milliseconds to decode a JPEG, resize it and make an array of it, by its size."""
    preprocessor = Preprocessor(network("resnet34", 12, img_size))
    for width, height in ((480, 360), (960, 720), (1920, 1080), (4032, 3024)):
        data = photo(width, height)
        image = preprocessor.open(data)
        small = preprocessor.resize(image)
        yield {
            "photo": f"{width}x{height}",
            "kB": round(len(data) / 1000),
            "decode_ms": milliseconds(lambda data=data: preprocessor.open(data)),
            "resize_ms": milliseconds(lambda image=image: preprocessor.resize(image)),
            "array_ms": milliseconds(lambda small=small: to_array(small)),
        }


def forward(arch: str, n_classes: int, img_size: tuple[int, int], threads: int = 1) -> dict:
    """Milliseconds of one photo through a model with random weights, on OpenVINO in float32, and its parameters."""
    model = DynamicUnetDIY(arch, n_classes, img_size)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder, "fastunet.pth"))
        compiled = compile_model(to_openvino(network(arch, n_classes, img_size), folder), threads)
    request = compiled.create_infer_request()
    pixels = np.random.default_rng(0).integers(0, 256, (1, *img_size, 3), np.uint8)
    return {
        "arch": arch,
        "classes": n_classes,
        "size": f"{img_size[1]}x{img_size[0]}",
        "threads": threads,
        "parameters_M": sum(p.numel() for p in model.parameters()) / 1e6,
        "forward_ms": milliseconds(lambda: infer(request, pixels), 1.0),
    }


def replicas(load: float, per_replica: float, used: float = 0.6) -> int:
    """How many replicas answer `load` requests/s, when each does `per_replica` at best.

    `used` is the share of that at which the autoscaler adds a replica: `python -m deployment.ai_platform deploy
    --target 60` is the default.
    """
    return math.ceil(load / (used * per_replica))


def needs(machine: str, per_replica: float) -> dict:
    """How many replicas of `machine` some loads need. Its requests/s are estimated: as many for each vCPU as here."""
    return {"machine": machine, "requests/s": round(per_replica)} | {
        f"for {load}/s": replicas(load, per_replica) for load in (10, 100, 1000)
    }


def show(title: str, rows: Iterator[dict]) -> list[dict]:
    print(f"\n{title}")
    kept = []
    for row in rows:
        if not kept:
            print("| " + " | ".join(row) + " |\n|" + "--:|" * len(row))
        kept.append(row)
        print(
            "| " + " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()) + " |", flush=True
        )
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmark.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--archs", default="resnet18,resnet34,resnet50", help="default: %(default)s")
    args = parser.parse_args()
    size = (96, 128)
    sizes = ((96, 128), (192, 256), (360, 480))
    show("photos", reading())
    show("architectures", (forward(arch, 12, size) for arch in args.archs.split(",")))
    show("sizes of the model", (forward("resnet34", 12, s) for s in sizes))
    show("classes", (forward("resnet34", n, size) for n in (2, 12, 32, 150)))
    show("threads", (forward("resnet34", 12, size, n) for n in range(1, cores() + 1)))
    if best := cpu_rate(read(HERE / "results.json"), "openvino-int8"):
        title = f"replicas, from the {best:.0f} requests/s of openvino-int8 in results.json, on {cores()} cores"
        show(title, (needs(machine, best * n / cores()) for machine, n in MACHINES.items()))


if __name__ == "__main__":
    main()
