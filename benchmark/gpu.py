"""Serving on a GPU, measured: `python -m benchmark.gpu`. Says so in one line where there is no GPU.

Needs this file, benchmark/load.py and deployment/ alone; the weights are random, as speed does not depend on them. In
under ten minutes it prints, and writes to gpu_results.json under the card's name:

exactness    float32 on the GPU beside float32 on the CPU, and half precision beside float32: the share of equal pixels
in process   batches of 1 to 64 images, from pixels on the CPU to masks on it: PyTorch as it is in float32, what serves
             (`deployment.runtime.cuda`), and `torch.compile` in float16 where there is a compiler
over HTTP    JPEG images to answers, through the Python server and through TorchServe
memory       batches, and an image, for which there is too little: who gets an answer
"""

import base64
import contextlib
import dataclasses
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmark import load
from deployment import runtime
from deployment.config import Config
from deployment.export import write_config
from deployment.handler import Handler
from deployment.model import DynamicUnetDIY
from deployment.runtime import cuda
from deployment.runtime.pytorch import ServedModel
from deployment.server.processes import free_ports, started

RESULTS = Path(__file__).with_name("gpu_results.json")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CLIENTS = (1, 8, 32)
CLASSES = [f"class {i}" for i in range(32)]
CONFIG = Config("resnet34", 32, (96, 128), resize={"size": (96, 128)}, classes=CLASSES, precision="auto")


def write_model(config: Config, folder: Path) -> Path:
    """Write `config` and random weights into `folder`, as the export would."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    network = DynamicUnetDIY(config.arch, config.n_classes, config.img_size, **config.options)
    torch.save(network.state_dict(), folder / "fastunet.pth")
    write_config(config, folder)
    return folder


def photo(width: int, height: int) -> bytes:
    """A JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(cuda.warm_up_image((height, width, 3))[0].numpy()).save(buffer, "JPEG")
    return buffer.getvalue()


def exactness(folder: Path, device: torch.device) -> dict[str, float]:
    """Shares of equal pixels, on one image: on the GPU in each precision, beside float32 on the CPU."""
    pixels = cuda.warm_up_image((*CONFIG.img_size, CONFIG.channels))
    expected = cuda.compute(ServedModel(CONFIG, folder), pixels, torch.float32)
    torch.backends.cudnn.allow_tf32 = False  # as the GPU runtime has it
    model, shares = ServedModel(CONFIG, folder).to(device), {}
    for name, dtype in cuda.TYPES.items():
        if name != "bf16" or torch.cuda.is_bf16_supported(including_emulation=False):
            shares[name] = cuda.agreement(expected, cuda.compute(cuda.in_half(model, dtype), pixels, dtype).cpu())
    return shares


def eager(folder: Path, device: torch.device) -> Callable[[np.ndarray], object]:
    """PyTorch as it is, in float32."""
    model = ServedModel(CONFIG, folder).to(device)

    def predict(batch: np.ndarray) -> np.ndarray:
        return cuda.compute(model, torch.from_numpy(batch), torch.float32).cpu().numpy()

    return predict


def compiled(folder: Path, device: torch.device) -> Callable[[np.ndarray], object]:
    """`torch.compile` in float16, each size of batch on its own."""
    model = cuda.in_half(ServedModel(CONFIG, folder, exact=False).to(device), torch.float16)
    model.network = torch.compile(model.network, dynamic=False)

    def predict(batch: np.ndarray) -> np.ndarray:
        return cuda.compute(model, torch.from_numpy(batch), torch.float16).cpu().numpy()

    return predict


def served(folder: Path) -> Callable[[np.ndarray], object]:
    """What serves, on the first GPU."""
    model = runtime.load(CONFIG, folder)

    def predict(batch: np.ndarray) -> list[np.ndarray]:
        outputs = model(batch)
        for output in outputs:
            if isinstance(output, Exception):
                raise output
        return outputs

    return predict


def images_per_second(predict: Callable[[np.ndarray], object], n: int, at_least: float = 1.0) -> float:
    """By the median of as many batches of `n` as fit into `at_least` seconds, after three to warm up."""
    batch = np.random.default_rng(0).integers(0, 256, (n, *CONFIG.img_size, CONFIG.channels), np.uint8)
    for _ in range(3):
        predict(batch)
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < at_least or len(times) < 5:
        start = time.perf_counter()
        predict(batch)  # ends with a copy to the CPU, which waits for the GPU
        times.append(time.perf_counter() - start)
    return n / statistics.median(times)


def in_process(folder: Path, device: torch.device) -> dict[str, dict[int, float]]:
    """Images per second, by how the model runs and the size of the batch."""
    ways = {
        "eager fp32": lambda: eager(folder, device),
        "runtime.cuda": lambda: served(folder),
        "torch.compile fp16": lambda: compiled(folder, device),
    }
    rates = {}
    for name, make in ways.items():
        try:
            predict = make()
            rates[name] = {n: round(images_per_second(predict, n), 1) for n in BATCHES}
        except Exception as error:  # no Triton, no C compiler: torch raises what it likes
            print(f"{name}: not measured ({type(error).__name__}: {str(error).splitlines()[0][:100]})")
    return rates


@contextlib.contextmanager
def server(name: str, folder: Path) -> Iterator[str]:
    """The address of the predictions of a server, `torchserve` or `uvicorn`, once it answers."""
    from deployment.archive import make_archive

    make_archive(folder)
    port, management, metrics = free_ports(3)
    argv = [sys.executable, "-m", "deployment.serve", f"--server={name}", f"--model-store={folder}", "--require-gpu"]
    argv += [f"--port={port}", f"--management-port={management}", f"--metrics-port={metrics}"]
    log = folder / f"{name}.log"
    with log.open("wb") as output, started(argv, None, stdout=output, stderr=subprocess.STDOUT) as process:
        url, deadline = f"http://127.0.0.1:{port}/predictions/fastunet", time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(urllib.request.Request(url, photo(320, 240)), timeout=60).close()
                break
            except OSError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(log.read_text(errors="replace")[-1500:]) from error
                time.sleep(0.5)
        yield url


def over_http(folder: Path, seconds: float = 5) -> dict[str, dict[int, float]]:
    """Answers per second to JPEG photos of 1280 × 720, by server and number of clients."""
    photos, rates = [photo(1280, 720)] * 8, {}
    for name in ("uvicorn", "torchserve"):
        try:
            with server(name, folder) as url:
                rates[name] = {}
                for clients in CLIENTS:
                    result = load.run(url, photos, clients, seconds, lambda i, body: b'"classes"' in body)
                    if result["errors"] or result["wrong_masks"]:
                        raise RuntimeError(f"{result['errors']} errors, {result['wrong_masks']} wrong answers")
                    rates[name][clients] = result["rps"]
        except Exception as error:
            print(f"{name}: not measured ({error})")
            rates.pop(name, None)
    return rates


def out_of_memory(folder: Path, device: torch.device, limit: float = 4e9) -> dict[str, int]:
    """How many images get an answer where `limit` bytes are too few for their batch, and for one of them alone."""
    config = dataclasses.replace(CONFIG, resize=None, max_pixels=60_000_000)  # the model sees every pixel
    handler = Handler()
    handler.load(write_model(config, folder), device.index)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(device).total_memory)
    try:
        sizes = [(1024, 768)] * 16 + [(6000, 4000)]
        instances = [{"b64": base64.b64encode(photo(*size)).decode()} for size in sizes]
        job = handler.preprocess({"body": json.dumps({"instances": instances})})
        handler.inference([item for item in job.items if not item.error])
        refused = [item.error.type for item in job.items[16:] if item.error]
        return {
            "answered, of 16": sum(item.error is None for item in job.items[:16]),
            "refused for want of memory, of 1": refused.count("OutOfMemory"),
        }
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def table(rates: dict[str, dict[int, float]], columns: tuple[int, ...], title: str) -> str:
    lines = [f"| {title} | {' | '.join(map(str, columns))} |", f"|---{'|--:' * len(columns)}|"]
    lines += [f"| {name} | {' | '.join(f'{row[n]:.0f}' for n in columns)} |" for name, row in rates.items()]
    return "\n".join(lines)


def main() -> None:
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return
    device, begin = torch.device("cuda:0"), time.monotonic()
    card = torch.cuda.get_device_name(device)
    print(f"{card}, {CONFIG.arch} for {CONFIG.img_size}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_model(CONFIG, Path(scratch, "model"))
        result = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        result["equal pixels"] = exactness(folder, device)
        for name, share in result["equal pixels"].items():
            print(f"{name} on the GPU, fp32 on the CPU: {share:.3%} of the pixels equal")
        result["photos/s in process"] = in_process(folder, device)
        print(table(result["photos/s in process"], BATCHES, "photos/s, by batch"))
        result["answers/s over HTTP"] = over_http(folder)
        print(table(result["answers/s over HTTP"], CLIENTS, "answers/s, by clients"))
        result["memory"] = out_of_memory(Path(scratch, "free"), device)
        for what, n in result["memory"].items():
            print(f"{what}: {n}")
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(known | {card: result}, indent=1) + "\n")
    print(f"{time.monotonic() - begin:.0f} s; written to {RESULTS.name}")


if __name__ == "__main__":
    main()
