"""The same weights on faster runtimes than plain PyTorch: `torch.compile` (CPU and GPU) and OpenVINO (CPU).

`load` is the half that serves, and goes into the archive when `handler: runtime` is not `eager`. `convert` is the half
that `python -m deployment.export … --runtime openvino` calls: it writes OpenVINO's model, in int8 with NNCF if asked,
and measures it beside the original. Each optional package is imported only where it is used.
"""

import contextlib
import importlib
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

if __package__:
    from . import handler
    from .model import decode
else:  # inside the archive, where the files lie side by side
    import handler
    from model import decode

PRECISIONS = {"eager": ("fp32",), "compile": ("fp32", "fp16", "bf16"), "openvino": ("fp32", "int8")}
SAME = 0.9999  # share of pixels on which a float32 runtime must give the class that PyTorch gives


class RuntimeUnavailable(Exception):
    """A runtime cannot be used: its package is missing, or it cannot do what is asked; the message says which."""


class ConversionError(Exception):
    """The converted model is not good enough or cannot be made; nothing was written."""


def optional(package: str):
    """The module `package`, which only some runtimes need.

    Raises:
        RuntimeUnavailable: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise RuntimeUnavailable(f"this runtime needs `{package}`: pip install {package} ({error})") from None


class Segmenter(torch.nn.Module):
    """The network of `config` and the choice of a class for each pixel: float32 (N, C, H, W) to uint8 (N, H, W)."""

    def __init__(self, config: dict, weights: Path | str):
        super().__init__()
        self.network = handler.load_model(config, str(weights))
        self.options = {"activation": "softmax", "threshold": None} | config.get("decode", {})
        if self.options["threshold"] is None:  # the activation keeps the order of the classes and costs time
            self.options["activation"] = None

    def forward(self, x: Tensor) -> Tensor:
        return decode(self.network(x), **self.options)


def own_size(config: dict) -> bool:
    """Whether the network sees photos at their own size: nothing gives them the size `img_size`."""
    return not config["resize"] and not any(options["size"] for options in config.get("affine") or ())


def n_in(config: dict) -> int:
    """The number of channels of a photo."""
    return config["options"].get("n_in", 3)


def check(runtime: str, precision: str) -> None:
    """Raises RuntimeUnavailable where there is no such runtime, or it has no such precision."""
    if precision not in PRECISIONS.get(runtime, ()):
        choices = ", ".join(f"{name} ({'/'.join(p)})" for name, p in PRECISIONS.items())
        raise RuntimeUnavailable(f"no runtime {runtime!r} with precision {precision!r}: choose of {choices}")


# --- serving ---


def load(config: dict, model_dir: Path | str, device: torch.device, max_batch: int = 8) -> Callable[[Tensor], Tensor]:
    """The model in `model_dir` as a function from photos, float32 (N, channels, H, W), to classes, uint8 (N, H, W).

    `config` is the section `handler` of `model-config.yaml`. The function is warm: it has run already. Its threads go
    by torch's, which OMP_NUM_THREADS sets. A GPU takes batches up to `max_batch` in one piece.

    Raises:
        RuntimeUnavailable: a package is missing, or runtime, precision and device do not go together.
        FileNotFoundError: `model_dir` lacks the model's file.
    """
    runtime, precision = config["runtime"], config["precision"]
    check(runtime, precision)
    if runtime == "openvino":
        predict = openvino_models(find(model_dir, "*.xml"), torch.get_num_threads())
        torch.set_num_threads(1)  # torch only makes tensors here: its threads would spin beside OpenVINO's
        sizes = [1]
    else:
        model = Segmenter(config, find(model_dir, "*.pth"))
        sizes = [1] if device.type == "cpu" else [2**i for i in range((max_batch - 1).bit_length() + 1)]
        predict = compiled_model(model, precision, device, sizes, one_size=not own_size(config))
    for size in sizes:
        predict(torch.zeros(size, n_in(config), *config["img_size"]))
    return predict


def find(folder: Path | str, pattern: str) -> Path:
    """The first file in `folder` that matches `pattern`.

    Raises:
        FileNotFoundError: there is none.
    """
    path = next(iter(sorted(Path(folder).glob(pattern))), None)
    if path is None:
        raise FileNotFoundError(f"the archive holds no {pattern}: see the README on archiving for this runtime")
    return path


def compiled_model(
    model: torch.nn.Module, precision: str, device: torch.device, sizes: list[int], one_size: bool = True
) -> Callable[[Tensor], Tensor]:
    """`model` under `torch.compile`, as `load` returns it.

    Every batch is filled up to the next of `sizes`, and a larger one is split, so that only these shapes are ever
    compiled; on a GPU each is then one CUDA graph. On a CPU a batch gains nothing over its photos one by one.

    Raises:
        RuntimeUnavailable: half precision on a CPU.
    """
    gpu = device.type == "cuda"
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    if dtype and not gpu:
        raise RuntimeUnavailable(f"runtime `compile` with precision {precision} needs a GPU: use fp32, or openvino")
    model = model.to(device, memory_format=torch.channels_last)
    torch._inductor.config.freezing = not gpu  # packs the weights once instead of at every call
    mode = "reduce-overhead" if gpu else "default"  # CUDA graphs
    compiled = torch.compile(model, mode=mode, dynamic=False if one_size else None)

    @torch.no_grad()  # freezing does not know inference_mode
    def predict(batch: Tensor) -> Tensor:
        masks = []
        for part in batch.split(sizes[-1]):
            size = next(size for size in sizes if size >= len(part))
            full = torch.cat([part, part.new_zeros(size - len(part), *part.shape[1:])]) if size > len(part) else part
            full = full.to(device).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                masks.append(compiled(full)[: len(part)].cpu())  # a copy: the next call reuses a graph's output
        return torch.cat(masks)

    return predict


def openvino_models(path: Path, share: int) -> Callable[[Tensor], Tensor]:
    """The model at `path`, as `load` returns it, with more threads for a photo while other workers have nothing to do.

    `share` is this worker's part of the cores. Threads that wait for each other on busy cores cost
    throughput, so under load it is not exceeded. A lone photo finds idle cores, and is ready sooner with twice the
    threads. The workers tell each other by a lock on the model's file, and by its time where one was refused.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    together = openvino_model(path, share)
    if share >= cores:
        return together
    import fcntl

    alone, file = openvino_model(path, min(2 * share, cores)), path.open()

    def under_load() -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another worker computes at this moment
            with contextlib.suppress(OSError):  # on a read-only disk
                os.utime(path)
        return time.time() - path.stat().st_mtime < 1

    def predict(batch: Tensor) -> Tensor:
        masks = []
        for x in batch.split(1):
            try:
                masks.append(together(x) if under_load() else alone(x))
            finally:  # an error too must not leave the others waiting for this photo to end
                fcntl.flock(file, fcntl.LOCK_UN)
        return torch.cat(masks)

    return predict


def openvino_model(model, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """What `convert` made, a path or a model in memory, as `load` returns it; with `threads`, else as many as torch."""
    compiled = (
        optional("openvino")
        .Core()
        .compile_model(
            model,
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
                "INFERENCE_PRECISION_HINT": "f32",  # the default is bfloat16 where the CPU has it: other masks
                "ENABLE_CPU_PINNING": False,  # several workers would all be pinned to the same cores
            },
        )
    )
    request = compiled.create_infer_request()

    def predict(batch: Tensor) -> Tensor:
        return torch.cat([torch.from_numpy(request.infer([x.numpy()], share_inputs=True)[0]) for x in batch.split(1)])

    return predict


# --- conversion ---


def convert(
    config: dict,
    weights: Path | str,
    out_dir: Path | str,
    precision: str = "fp32",
    calibrate: Path | str | None = None,
    max_drop: float = 0.5,
) -> dict:
    """Write the model of `config` and `weights` for OpenVINO: `fastunet.xml` and `fastunet.bin` in `out_dir`.

    `calibrate` is a folder of photos, or one with `images/`, `labels/` and perhaps `valid.txt` as CamVid has them. int8
    is calibrated on the training photos; with labels, accuracy is measured on the others, and int8 that loses more
    than `max_drop` points of pixel accuracy or of mean IoU is tried again more carefully: without the last layers,
    then with NNCF's accuracy control. Without labels only the agreement of the masks is measured.

    Returns:
        `config` with the new runtime and precision, and with what was measured under `accuracy`.

    Raises:
        ConversionError: accuracy falls by more than `max_drop` points whatever is tried, float32 masks differ from
            PyTorch's, or `calibrate` cannot be used.
        RuntimeUnavailable: OpenVINO or NNCF is not installed, or has no such precision.
    """
    check("openvino", precision)
    if precision == "int8" and not calibrate:
        raise ConversionError("int8 must be calibrated: name a folder of some hundred photos with --calibrate")
    ov = optional("openvino")
    model = Segmenter(config, weights)
    train, valid = photos(calibrate) if calibrate else ([], [])
    train = train if precision == "int8" else []
    noise = torch.rand(4, 1, n_in(config), *config["img_size"], generator=torch.Generator().manual_seed(0))
    inputs = [read(path, config) for path in valid] or list(noise)
    labels = [read_label(path, config) for path in valid] if valid and label_of(valid[0]).exists() else None
    with torch.inference_mode():
        original = [model(x) for x in inputs]

    best = None
    base = to_openvino(model, config)
    for candidate in quantized(base, config, train, inputs, labels, original, max_drop) if train else [base]:
        predict = openvino_model(candidate)
        report = compare(original, [predict(x) for x in inputs], labels, config["codes"])
        if best is None or report.get("drop", 0) < best[1].get("drop", 0):
            best = candidate, report
        if report.get("drop", 0) <= max_drop:
            break
    candidate, report = best
    print(describe(report))
    if report.get("drop", 0) > max_drop:
        raise ConversionError(f"{precision} loses {report['drop']:.2f} points, more than --max-drop {max_drop:g}")
    if precision == "fp32" and report["mask_agreement"] < SAME:
        raise ConversionError(f"only {report['mask_agreement']:.4%} of the pixels are as PyTorch has them")

    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    part = out_dir / "fastunet.part.xml"
    ov.save_model(candidate, part, compress_to_fp16=False)
    os.replace(part.with_suffix(".bin"), out_dir / "fastunet.bin")
    os.replace(part, out_dir / "fastunet.xml")
    return config | {"runtime": "openvino", "precision": precision, "accuracy": report}


def to_openvino(model: torch.nn.Module, config: dict):
    """`model` as an OpenVINO model of one photo, whose height and width are free where photos keep their own.

    A fixed shape is faster than a free one, and on a CPU a batch is no faster than its photos one by one.
    """
    ov = optional("openvino")
    h, w = config["img_size"]
    shape = [1, n_in(config), h, w]
    if own_size(config):  # tracing keeps what it saw: with odd sides every step up resizes, as some photos need it
        shape, h, w = [1, n_in(config), -1, -1], h | 1, w | 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of just that
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)  # OpenVINO's way in
        return ov.convert_model(model, example_input=torch.rand(1, n_in(config), h, w), input=shape)


def quantized(base, config: dict, train: list[Path], inputs, labels, original, max_drop: float) -> Iterator:
    """int8 versions of `base`, each more careful and slower than the one before; made only when asked for."""
    os.environ.setdefault("NNCF_CI", "1")  # no usage statistics
    nncf = optional("nncf")
    data = nncf.Dataset([read(path, config).numpy() for path in train])
    settings = {"preset": nncf.QuantizationPreset.MIXED, "subset_size": len(train)}
    yield nncf.quantize(base, data, **settings)
    if labels is None:
        return
    yield nncf.quantize(base, data, ignored_scope=nncf.IgnoredScope(names=last_layers(base)), **settings)

    def change(compiled, _) -> tuple[float, None]:
        masks = [torch.from_numpy(compiled(x.numpy())[0]) for x in inputs]
        return -compare(original, masks, labels, config["codes"])["drop"], None

    yield nncf.quantize_with_accuracy_control(base, data, nncf.Dataset(inputs), change, max_drop=max_drop, **settings)


def last_layers(base, count: int = 3) -> list[str]:
    """The names of the last `count` convolutions: the head and the block before it."""
    convolutions = [op for op in base.get_ordered_ops() if op.get_type_name() == "Convolution"]
    return [op.get_friendly_name() for op in convolutions[-count:]]


# --- photos and labels, and the measure ---


def photos(folder: Path | str, at_most: int = 300) -> tuple[list[Path], list[Path]]:
    """The photos in `folder` (or its `images/`) to calibrate with, `at_most` so many, and those to measure with.

    Those named in `valid.txt` are measured with; without that file, every fifth.

    Raises:
        ConversionError: there is no photo.
    """
    folder = Path(folder)
    if (folder / "images").is_dir():
        split, folder = folder / "valid.txt", folder / "images"
    else:
        split = folder / "valid.txt"
    files = sorted(p for p in folder.glob("*") if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".bmp", ".webp"})
    if not files:
        raise ConversionError(f"{folder} holds no photos (png, jpg, bmp, webp)")
    names = set(split.read_text().split()) if split.is_file() else {p.name for p in files[::5]}
    valid = [p for p in files if p.name in names]
    train = [p for p in files if p.name not in names] or files
    return [train[i] for i in np.linspace(0, len(train) - 1, min(at_most, len(train))).astype(int)], valid or files


def label_of(photo: Path) -> Path:
    """The label that belongs to `photo` in CamVid's layout: `images/NAME.png` has `labels/NAME_P.png`."""
    return photo.parent.parent / "labels" / f"{photo.stem}_P.png"


def read(photo: Path, config: dict) -> Tensor:
    """`photo` as the handler sees it: float32 (1, channels, H, W)."""
    image = handler.open_image(photo.read_bytes(), n_in(config))
    if config["resize"]:
        image = handler.resize(image, **config["resize"])
    return handler.to_tensor(image, config["mean"], config["std"], config.get("affine"))[None]


def read_label(photo: Path, config: dict) -> Tensor:
    """The label of `photo` at the size the model sees: uint8 (1, H, W).

    Raises:
        ConversionError: it is missing, or names a class that the model does not have.
    """
    path = label_of(photo)
    if not path.is_file():
        raise ConversionError(f"no label {path} for {photo.name}: give every photo its label, or none")
    with Image.open(path) as image:
        if config["resize"]:
            image = handler.resize(image, **config["resize"] | {"resample": "nearest"})
        label = torch.from_numpy(np.array(image, np.uint8))[None]
    for options in config.get("affine") or ():
        label = handler.resample(label.float(), **options | {"mode": "nearest"}).to(torch.uint8)
    if label.max() >= len(config["codes"]):
        raise ConversionError(f"{path} has class {label.max()}, but the model knows {len(config['codes'])} classes")
    return label


def compare(original: list[Tensor], converted: list[Tensor], labels: list[Tensor] | None, codes: list[str]) -> dict:
    """The masks of the converted model beside the original's: agreement, and with `labels` the accuracy of both.

    Accuracies are shares of 1 over all pixels that are not void; `drop` is in points of percent, the larger of the two.
    """
    same = sum((a == b).sum().item() for a, b in zip(original, converted, strict=True))
    report = {"photos": len(original), "mask_agreement": round(same / sum(m.numel() for m in original), 6)}
    if labels is not None:
        before, after = scores(original, labels, codes), scores(converted, labels, codes)
        for name in before:
            report[name] = {"original": round(before[name], 5), "converted": round(after[name], 5)}
        report["drop"] = round(100 * max(before[name] - after[name] for name in before), 3)
    return report


def scores(masks: list[Tensor], labels: list[Tensor], codes: list[str]) -> dict[str, float]:
    """Pixel accuracy and mean IoU (over the classes that occur) of `masks`; void, found by its name, does not count."""
    n = len(codes)
    pairs = np.zeros((n, n), np.int64)  # rows: label, columns: mask
    for mask, label in zip(masks, labels, strict=True):
        pairs += np.bincount(label.numpy().ravel() * np.int64(n) + mask.numpy().ravel(), minlength=n * n).reshape(n, n)
    void = [i for i, code in enumerate(codes) if re.fullmatch("void", code, re.I)]
    pairs[void] = 0
    hits, occurs = pairs.diagonal(), pairs.sum(axis=1) > 0
    iou = hits[occurs] / (pairs.sum(axis=0) + pairs.sum(axis=1) - hits)[occurs]
    return {"pixel_accuracy": float(hits.sum() / pairs.sum()), "mean_iou": float(iou.mean())}


def describe(report: dict) -> str:
    """What `compare` found, in words."""
    lines = [f"{report['mask_agreement']:.3%} of the pixels of {report['photos']} photos as before the conversion"]
    for name in ("pixel_accuracy", "mean_iou"):
        if name in report:
            lines.append(f"{name}: {report[name]['original']:.4f} before, {report[name]['converted']:.4f} after")
    return "\n".join(lines)
