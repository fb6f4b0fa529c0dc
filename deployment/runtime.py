"""What computes: the network of a configuration as a plain function, by PyTorch (CPU, GPU) or by OpenVINO (CPU).

Each optional package is imported only where it is used.
"""

import importlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

if __package__:
    from . import gpu_runtime
    from .config import Config
    from .model import DynamicUnetDIY
    from .openvino_runtime import load_openvino
else:  # in the archive, where the files lie side by side
    import gpu_runtime
    from config import Config
    from model import DynamicUnetDIY
    from openvino_runtime import load_openvino

logger = logging.getLogger(__name__)

# By runtime, the default first. What is eager's is for a GPU, auto being what answers as fp32 there; a CPU has fp32.
PRECISIONS = {"eager": ("auto", "fp32", "fp16", "bf16"), "openvino": ("fp32", "bf16", "int8")}
ACTIVATIONS = {"softmax": lambda x: x.softmax(dim=1), "sigmoid": torch.sigmoid, None: lambda x: x}
Predict = Callable[[Tensor], Tensor]  # float32 (N, channels, H, W) to uint8 (N, H, W)


class RuntimeUnavailable(RuntimeError):
    """A runtime cannot be used: its package is missing, or it cannot do what is asked; the message says which."""


def load(config: Config, folder: Path | str, device: torch.device | None = None) -> Predict:
    """The model in `folder` as a function from photos to masks, warm: it has run already. Any thread may call it.

    `device` is where PyTorch computes (default: the CPU). OpenVINO computes on the CPU, with as many threads as torch
    has, which OMP_NUM_THREADS sets.

    Raises:
        RuntimeUnavailable: there is no such runtime or precision, or its package is missing.
        FileNotFoundError: `folder` lacks the model's file.
    """
    check_runtime(config.runtime, config.precision)
    device, precision = device or torch.device("cpu"), config.precision
    if config.exported_with.get("torch", torch.__version__).split(".")[:2] != torch.__version__.split(".")[:2]:
        exported = config.exported_with["torch"]
        logger.warning(
            "exported with torch %s, served with %s: masks may round differently", exported, torch.__version__
        )
    if config.runtime == "openvino":
        import_optional("openvino")
        predict = load_openvino(Path(folder, "fastunet.xml"), torch.get_num_threads(), config.precision)
        torch.set_num_threads(1)  # torch only makes tensors here: its threads would spin beside OpenVINO's
    elif device.type == "cuda":
        model, shape = Model(config, folder, exact=precision == "fp32"), (config.n_in, *config.img_size)
        predict, precision = gpu_runtime.load(model, shape, device, precision, not config.keeps_photo_size)
    else:
        predict, precision = eager(config, folder, device), "fp32"
    predict(torch.zeros(1, config.n_in, *config.img_size))
    logger.info("%s with %s in %s on %s", config.arch, config.runtime, precision, device)
    return predict


def check_runtime(runtime: str, precision: str) -> None:
    """Raises RuntimeUnavailable where there is no such runtime, or it has no such precision."""
    if precision not in PRECISIONS.get(runtime, ()):
        choices = ", ".join(f"{name} ({'/'.join(p)})" for name, p in PRECISIONS.items())
        raise RuntimeUnavailable(f"no runtime {runtime!r} with precision {precision!r}: there are {choices}")


def choose_device(gpu: int | None = None) -> torch.device:
    """The GPU of that index (without one: the first), else the CPU.

    The log says so where an NVIDIA driver is there and PyTorch finds no GPU.

    Raises:
        RuntimeUnavailable: there is no usable GPU, and the environment variable REQUIRE_GPU is 1.
    """
    if torch.cuda.is_available():
        return torch.device(f"cuda:{gpu or 0}")
    if os.environ.get("REQUIRE_GPU") == "1":
        raise RuntimeUnavailable(f"REQUIRE_GPU=1, but PyTorch {torch.__version__} finds no GPU it can use")
    if Path("/proc/driver/nvidia/version").exists() or os.environ.get("NVIDIA_VISIBLE_DEVICES", "void") != "void":
        logger.warning(
            "this machine has an NVIDIA driver, but PyTorch %s finds no GPU it can use (a CPU build, or a driver that "
            "is too old): serving on the CPU",
            torch.__version__,
        )
    return torch.device("cpu")


def load_network(config: Config, folder: Path | str) -> DynamicUnetDIY:
    """The network that `config` describes, with the weights in `folder`/fastunet.pth, in evaluation mode."""
    weights = torch.load(Path(folder, "fastunet.pth"), map_location="cpu", weights_only=True)
    with torch.device("meta"):  # no memory, no random initialization: every tensor comes from the file
        network = DynamicUnetDIY(config.arch, config.n_classes, config.img_size, **config.options)
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval()


class Model(torch.nn.Module):
    """A network and the decoding of its output: float32 (N, channels, H, W) to uint8 (N, H, W), classes.

    `exact` computes what `learn.predict` computes. Otherwise an activation that leaves the order of the classes as it
    is may be left out, which is faster.
    """

    def __init__(self, config: Config, folder: Path | str, exact: bool = True):
        super().__init__()
        self.network = load_network(config, folder)
        self.threshold = config.threshold
        self.activation = config.activation if exact or config.threshold is not None else None

    def forward(self, x: Tensor) -> Tensor:
        return decode(self.network(x), self.activation, self.threshold)


def decode(logits: Tensor, activation: str | None = "softmax", threshold: float | None = None) -> Tensor:
    """The mask that `learn.predict` makes of `logits`: its loss function's `activation`, then its `decodes`.

    The activation matters where rounding makes equal what was not: ties go to the first class.

    Args:
        logits: (N, n_classes, H, W) float.
        activation: one of `ACTIVATIONS`.
        threshold: None for the class of the highest value; a number, with one output channel, for class 1 above it.

    Returns:
        (N, H, W) uint8.
    """
    values = ACTIVATIONS[activation](logits)
    return (values.argmax(dim=1) if threshold is None else values[:, 0] > threshold).to(torch.uint8)


def eager(config: Config, folder: Path | str, device: torch.device) -> Predict:
    """The model as PyTorch runs it.

    On a CPU a batch takes as long as its photos one by one, and rounds a few logits differently: a mask could then
    depend on who else asks at the moment. So there it goes through one by one, whichever threads ask: how many compute
    decides how torch rounds, and is always the same.
    """
    model, lock = Model(config, folder).to(device), threading.Lock()

    @torch.inference_mode()
    def predict(batch: Tensor) -> Tensor:
        parts = batch.split(1 if device.type == "cpu" else len(batch))
        with lock:
            return torch.cat([model(x.to(device)).cpu() for x in parts])

    return predict


def free_memory(failure: Exception) -> None:
    """Let go of what a pass that ended with `failure` holds: its traceback keeps tensors, torch keeps GPU memory."""
    failure.__traceback__ = None
    torch.cuda.empty_cache()  # nothing to do where there is no GPU


def import_optional(package: str):
    """The module `package`, which only some runtimes need.

    Raises:
        RuntimeUnavailable: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise RuntimeUnavailable(f"this runtime needs `{package}`: pip install {package} ({error})") from None
