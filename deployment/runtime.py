"""What computes: the network of a configuration as a plain function, by PyTorch (CPU, GPU) or by OpenVINO (CPU).

Each optional package is imported only where it is used.
"""

import importlib
import io
import json
import logging
import os
import threading
import zipfile
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
Predict = Callable[[Tensor], Tensor]  # float32 (N, channels, H, W) to what `decode` returns


class RuntimeUnavailable(RuntimeError):
    """A runtime cannot be used: its package is missing, or it cannot do what is asked; the message says which."""


def load(config: Config, folder: Path | str, device: torch.device | None = None) -> Predict:
    """The model in `folder` as a function from photos to what `decode` makes of them, warm: it has run already.

    Any thread may call it.

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
            "exported with torch %s, served with %s: answers may round differently", exported, torch.__version__
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
    logger.info("%s with %s in %s on %s", config.arch or config.model_file, config.runtime, precision, device)
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
    given = os.environ.get("NVIDIA_VISIBLE_DEVICES", "")  # of a container
    if Path("/proc/driver/nvidia/version").exists() or given not in ("", "void", "none"):
        logger.warning(
            "this machine has an NVIDIA driver, but PyTorch %s finds no GPU it can use (a CPU build, or a driver that "
            "is too old): serving on the CPU",
            torch.__version__,
        )
    return torch.device("cpu")


def load_network(config: Config, folder: Path | str) -> torch.nn.Module:
    """The network of `config`, in evaluation mode: float32 (N, channels, H, W) to the learner's logits.

    It is a `DynamicUnetDIY` with the weights in `folder`/fastunet.pth, or the program in `folder`/fastunet.pt2.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the program is damaged, or holds what would have to be unpickled.
    """
    path = Path(folder, config.model_file)
    if not config.arch:
        return load_program(path)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):  # no memory, no random initialization: every tensor comes from the file
        network = DynamicUnetDIY(config.arch, config.n_classes, config.img_size, **config.options)
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval()


def load_program(path: Path) -> torch.nn.Module:
    """The program at `path` as a module of torch's own operations and its tensors: no fastai, no timm.

    A program must come from where you trust it. `torch.export.load` opens the pickles that it may hold, which can run
    any code: those that are more than tensors are refused here, by `weights_only`, before. But it also reads the sizes
    of the tensors as Python expressions, and nobody looks at these.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds pickles of more than tensors.
    """
    try:
        with zipfile.ZipFile(path) as file:
            entries = {entry: entry.filename.rpartition("/")[2] for entry in file.infolist()}
            configs = [json.loads(file.read(entry)) for entry, name in entries.items() if name.endswith("_config.json")]
            payloads = [payload for config in configs for payload in config["config"].values()]
            pickled = {payload["path_name"] for payload in payloads if payload["use_pickle"]}
            for entry, name in entries.items():
                if entry.file_size and (name.endswith(".pt") or name in pickled):
                    torch.load(io.BytesIO(file.read(entry)), weights_only=True)
        module = torch.export.load(path).module(check_guards=False).requires_grad_(False)
    except FileNotFoundError:
        raise
    except Exception as error:  # of a damaged file: any
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be loaded as a program of torch.export: {reason}") from None
    del module.train, module.eval  # which refuse: a program has no modes, and asking for one does no harm
    return module


class Model(torch.nn.Module):
    """A network and the decoding of its output: float32 (N, channels, H, W) to what `decode` returns.

    `exact` computes what `learn.predict` computes. Otherwise an activation that leaves the order of the classes of a
    mask as it is may be left out, which is faster.
    """

    def __init__(self, config: Config, folder: Path | str, exact: bool = True):
        super().__init__()
        self.network = load_network(config, folder)
        self.masks, self.threshold = config.task == "segmentation", config.threshold
        leave_out = self.masks and config.threshold is None and not exact
        self.activation = None if leave_out else config.activation

    def forward(self, x: Tensor) -> Tensor:
        return decode(self.network(x), self.activation, self.threshold, self.masks)


def decode(
    logits: Tensor, activation: str | None = "softmax", threshold: float | None = None, masks: bool = True
) -> Tensor:
    """What `learn.predict` makes of `logits`: its loss function's `activation`, and for masks also its `decodes`.

    In masks the activation matters where rounding makes equal what was not: ties go to the first class.

    Args:
        logits: float (N, n_classes, H, W) for masks, else (N, n_classes) or (N,).
        activation: one of `ACTIVATIONS`.
        threshold: of masks: None for the class of the highest value; a number, with one output channel, for class 1
            above it.

    Returns:
        Masks as uint8 (N, H, W); else float32 (N, n_classes): probabilities, values, or x and y of each point in turn,
        from -1 to 1.
    """
    values = ACTIVATIONS[activation](logits)
    if not masks:
        return values.flatten(1) if values.ndim > 1 else values[:, None]
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
