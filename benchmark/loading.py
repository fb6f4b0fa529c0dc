"""What it costs to open a network: `python -m benchmark.loading` opens a U-Net as weights and as a program.

A resnet34 U-Net for 96 × 128 pixels is written both ways, as the export does it. A fresh process opens each, five
times; torch is imported before the clock starts. The medians are printed.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from deployment.config import Config
from deployment.export import write_config
from deployment.export.program import capture_network
from deployment.model import DynamicUnetDIY

CONFIG = Config(arch="resnet34", n_classes=12, img_size=(96, 128), resize={"size": [96, 128], "method": "squish"})
OPEN = """
import json, sys, time
import psutil, torch
from deployment.config import read_config
from deployment.runtime.pytorch import load_network

config = read_config(sys.argv[1])
memory, start = psutil.Process().memory_info(), time.perf_counter()
network = load_network(config, sys.argv[1])
opened, used = time.perf_counter() - start, psutil.Process().memory_info().rss - memory.rss
with torch.inference_mode():
    network(torch.zeros(1, 3, 96, 128))
print(json.dumps([opened, time.perf_counter() - start, used / 1e6]))
"""


def measure(folder: Path, times: int = 5) -> list[float]:
    """Seconds to open the network in `folder`, seconds until its first answer is there, and MB of memory to open it."""
    runs = []
    for _ in range(times):
        run = subprocess.run([sys.executable, "-c", OPEN, folder], check=True, capture_output=True, text=True)
        runs.append(json.loads(run.stdout))
    return [statistics.median(values) for values in zip(*runs, strict=True)]


def main() -> None:
    model = DynamicUnetDIY(CONFIG.arch, CONFIG.n_classes, CONFIG.img_size).eval()
    print("| | file | open | first answer | memory |\n|---|--:|--:|--:|--:|")
    for name, arch in (("state dict and `DynamicUnetDIY`", CONFIG.arch), ("program", None)):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            config = dataclasses.replace(CONFIG, arch=arch)
            if arch:
                torch.save(model.state_dict(), folder / config.model_file)
            else:
                program = capture_network(model, [], (config.channels, *config.img_size), free_size=False)
                torch.export.save(program, folder / config.model_file)
            write_config(config, folder)
            size = (folder / config.model_file).stat().st_size / 1e6
            opened, first, memory = measure(folder)
        print(f"| {name} | {size:.0f} MB | {opened:.2f} s | {first:.2f} s | {memory:.0f} MB |", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
