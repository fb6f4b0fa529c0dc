"""The handler's model on a GPU, in process: `python -m benchmark.gpu`. Says so in one line where there is no GPU.

Batches of 1 to 64 photos, eager in float32 against `torch.compile` in float16, from tensors on the CPU to masks on it.
Uses the model in `model_store/`, or random weights where there is none (the speed is the same).
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch import Tensor

from benchmark.contenders import ROOT
from deployment import runtime
from deployment.model import DynamicUnetDIY

BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONFIG = {"arch": "resnet34", "n_classes": 32, "img_size": [96, 128], "options": {}, "resize": {"size": [96, 128]}}


def eager(config: dict, folder: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The model as the handler runs it by default."""
    model = runtime.Segmenter(config, runtime.find(folder, "*.pth")).to(device)

    @torch.inference_mode()
    def predict(batch: Tensor) -> Tensor:
        return model(batch.to(device)).cpu()

    return predict


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


def measure(config: dict, folder: Path, device: torch.device) -> list[dict]:
    """For each batch size: photos per second of both runtimes, latencies in ms, share of pixels on which they agree."""
    fast = config | {"runtime": "compile", "precision": "fp16"}
    plain, compiled = eager(config, folder, device), runtime.load(fast, folder, device, max(BATCHES))
    rows = []
    for n in BATCHES:
        x = torch.rand(n, runtime.n_in(config), *config["img_size"])
        a, b = seconds_per_batch(plain, x), seconds_per_batch(compiled, x)
        same = (plain(x) == compiled(x)).float().mean().item()
        rows.append(
            {"batch": n, "eager_ms": 1000 * a, "compile_ms": 1000 * b}
            | {"eager_per_s": n / a, "compile_per_s": n / b, "agreement": same}
        )
    return rows


def main() -> None:
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return
    device = torch.device("cuda:0")
    store = ROOT / "model_store"
    with tempfile.TemporaryDirectory() as scratch:
        if (store / "fastunet.pth").is_file():
            config, folder = yaml.safe_load((store / "model-config.yaml").read_text())["handler"], store
        else:
            config, folder = CONFIG, Path(scratch)
            model = DynamicUnetDIY(config["arch"], config["n_classes"], config["img_size"])
            torch.save(model.state_dict(), folder / "fastunet.pth")
        print(
            f"{torch.cuda.get_device_name(device)}, {config['arch']}, {config['img_size']}, torch {torch.__version__}"
        )
        print("| batch | eager fp32 ms | photos/s | compile fp16 ms | photos/s | speed-up | pixels that agree |")
        print("|--:|--:|--:|--:|--:|--:|--:|")
        for row in measure(config, folder, device):
            speed_up = row["compile_per_s"] / row["eager_per_s"]
            print(
                f"| {row['batch']} | {row['eager_ms']:.2f} | {row['eager_per_s']:.0f} | {row['compile_ms']:.2f} "
                f"| {row['compile_per_s']:.0f} | {speed_up:.1f} | {row['agreement']:.3%} |"
            )


if __name__ == "__main__":
    main()
