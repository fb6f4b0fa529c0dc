"""The handler's model on a GPU, in process: `python -m benchmark.gpu`. Says so in one line where there is no GPU.

Batches of 1 to 64 photos, from tensors on the CPU to masks on it. Uses the model in `model_store/`, or random weights
where there is none (the speed is the same).
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmark.contenders import ROOT
from deployment import runtime
from deployment.config import Config, read_config
from deployment.model import DynamicUnetDIY

BATCHES = (1, 2, 4, 8, 16, 32, 64)
DEFAULT = Config("resnet34", 32, (96, 128), resize={"size": (96, 128)})


def seconds_per_batch(predict: Callable[[Tensor], Tensor], batch: Tensor, at_least: float = 1.0) -> float:
    """The median over as many calls as fit into `at_least` seconds, after three to warm up."""
    for _ in range(3):
        predict(batch)
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < at_least or len(times) < 5:
        start = time.perf_counter()
        predict(batch)  # ends with a copy to the CPU, which waits for the GPU
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(config: Config, folder: Path, device: torch.device) -> Iterator[dict]:
    """For each batch size: milliseconds of a batch, and photos per second."""
    predict = runtime.eager(config, folder, device)
    for n in BATCHES:
        seconds = seconds_per_batch(predict, torch.rand(n, config.n_in, *config.img_size))
        yield {"batch": n, "ms": 1000 * seconds, "per_s": n / seconds}


def main() -> None:
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return
    device = torch.device("cuda:0")
    config, folder = DEFAULT, ROOT / "model_store"
    with tempfile.TemporaryDirectory() as scratch:
        if (folder / "fastunet.pth").is_file():
            config = read_config(folder)
        else:
            folder = Path(scratch)
            model = DynamicUnetDIY(config.arch, config.n_classes, config.img_size)
            torch.save(model.state_dict(), folder / "fastunet.pth")
        print(f"{torch.cuda.get_device_name(device)}, {config.arch}, {config.img_size}, torch {torch.__version__}")
        print("| batch | eager fp32 ms | photos/s |\n|--:|--:|--:|")
        for row in measure(config, folder, device):
            print(f"| {row['batch']} | {row['ms']:.2f} | {row['per_s']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
