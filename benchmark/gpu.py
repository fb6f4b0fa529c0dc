"""Serving on a GPU, proven and measured in under eight minutes, without a network: `make gpu-check`.

`python -m benchmark.gpu` needs this file and deployment/ alone; weights are random and photos drawn, as neither speed
nor exactness depends on them. Each part runs in a process of its own, so that one that fails, hangs or loses the GPU is
a row of the table and not its end. It prints the table, and writes it to gpu_results.md, and the figures under the
card's name to gpu_results.json; the exit status is 1 where something does not hold.

With `--cpu` a CPU stands for the GPU, a small model for the large one: that shows that every part runs, and no figure.
"""

import argparse
import base64
import contextlib
import dataclasses
import functools
import gc
import http.client
import io
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

try:
    import numpy as np
    import torch
    import torchvision
    import yaml
    from PIL import Image
except ImportError as error:
    sys.exit(f"error: this needs PyTorch 2.11 or newer, torchvision, NumPy, Pillow and PyYAML: {error}")

from deployment.config import Config
from deployment.handler import Handler
from deployment.model import DynamicUnetDIY
from deployment.photos import Preprocessor
from deployment.runtime import cores, cuda
from deployment.runtime.pytorch import ServedModel, eager
from deployment.runtime.queue import ImageQueue
from deployment.server.processes import free_ports, started

HERE = Path(__file__).parent
SECONDS = 430  # for all parts together; what has not begun by then is not measured


@dataclass(frozen=True)
class Bench:
    """What is measured on, how large and how long. A part gets it with a folder of its own."""

    device: torch.device
    folder: Path = Path()
    arch: str = "resnet34"
    size: tuple[int, int] = (96, 128)  # (height, width) of what the model sees
    photo: tuple[int, int] = (1280, 720)  # (width, height) of a JPEG
    most: int = 33  # images in a batch that is compared with them one by one
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    programs: int = 6
    compiled: tuple[int, ...] = (32, 1, 8)  # batches; each is compiled anew
    compiler: str = "inductor"
    clients: tuple[int, ...] = (1, 8, 32, 64)
    seconds: float = 1.0  # that one figure takes, over HTTP three times as long
    memory: float = 4e9  # bytes that are too few for 16 photos
    many: tuple[int, int] = (1024, 768)  # (width, height) of these photos
    huge: tuple[int, int] = (6000, 4000)  # of one that does not fit alone

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


GPU = Bench(torch.device("cuda:0"))
CPU = Bench(
    torch.device("cpu"),
    arch="resnet18",
    size=(32, 48),
    photo=(160, 120),
    most=5,
    batches=(1, 2, 4),
    programs=2,
    compiled=(2,),
    compiler="eager",
    clients=(1, 4),
    seconds=0.3,
    memory=40_000,  # pixels: what is made up there
    many=(64, 48),
    huge=(400, 300),
)


@dataclass
class Row:
    """One line of the table."""

    what: str
    value: object  # a number, words, or numbers by the size of batch or the number of clients
    holds: bool | None = None  # whether it is as it has to be; None: it is only a figure

    def as_markdown(self, part: str) -> str:
        value = self.value
        if isinstance(value, dict):
            value = " · ".join(f"{key}: {shown(number)}" for key, number in value.items())
        holds = {None: "", True: "yes", False: "NO"}[self.holds]
        return f"| {part} | {self.what} | {shown(value)} | {holds} |"


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


# What the parts share


def config_of(bench: Bench, precision: str = "fp32", **changes) -> Config:
    names = [f"class {i}" for i in range(32)]
    config = Config(bench.arch, 32, bench.size, resize={"size": bench.size}, classes=names, precision=precision)
    config = dataclasses.replace(config, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    return dataclasses.replace(config, **changes)


def write_model(config: Config, folder: Path) -> Path:
    """Write `config` and random weights into `folder`, as the export would."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    network = DynamicUnetDIY(config.arch, config.n_classes, config.img_size, **config.options)
    torch.save(network.state_dict(), folder / "fastunet.pth")
    return write_config(config, folder)


def write_config(config: Config, folder: Path) -> Path:
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}
    values["resize"] = config.resize and {"size": list(config.resize["size"])}
    (folder / "model-config.yaml").write_text(yaml.safe_dump({"handler": values}))
    return folder


def drawn(n: int, width: int, height: int) -> np.ndarray:
    """Something like photos, uint8 (n, height, width, 3): areas, edges, and some noise."""
    random, photos = np.random.default_rng(0), []
    for _ in range(n):
        areas = random.integers(0, 256, (max(height // 16, 2), max(width // 16, 2), 3))
        rows, columns = np.arange(height) * len(areas) // height, np.arange(width) * areas.shape[1] // width
        photos.append(areas[rows][:, columns] + random.normal(0, 10, (height, width, 3)))
    return np.stack(photos).clip(0, 255).astype(np.uint8)


def jpeg(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(drawn(1, width, height)[0]).save(buffer, "JPEG")
    return buffer.getvalue()


def images_of(bench: Bench, n: int) -> np.ndarray:
    return drawn(n, *bench.size[::-1])


def model_on(device: torch.device, config: Config, folder: Path) -> ServedModel:
    """The served model, placed on `device` in the precision of `config`."""
    return cuda.placed(ServedModel(config, folder, config.precision == "fp32", device=device), device, config.precision)


def served(bench: Bench, config: Config, folder: Path) -> ImageQueue:
    """The model as `runtime.load` has it on a GPU."""
    return cuda.load(ServedModel(config, folder, config.precision == "fp32", device=bench.device), bench.device)[0]


def handler_of(bench: Bench, folder: Path) -> Handler:
    handler = Handler()
    handler.load(folder, bench.device.index if bench.on_gpu else -1)
    if not bench.on_gpu:
        handler.model = served(bench, handler.config, folder)
    return handler


def answers(model: ImageQueue, images: np.ndarray) -> np.ndarray:
    """The outputs of `model`, of which none may be an error."""
    outputs = model(images)
    for output in outputs:
        if isinstance(output, Exception):
            raise output
    return np.stack(outputs)


def equal(a: np.ndarray | torch.Tensor, b: np.ndarray | torch.Tensor) -> float:
    """The share of pixels that are the same."""
    return float((np.asarray(a) == np.asarray(b)).mean())


@contextlib.contextmanager
def warnings_of_the_runtime() -> Iterator[list[str]]:
    """What `runtime.cuda` logs within it."""
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    cuda.logger.addHandler(handler)
    try:
        yield lines
    finally:
        cuda.logger.removeHandler(handler)


def per_second(run: Callable, images, seconds: float) -> float:
    """Images per second, by the median time of `run(images)`, after three runs to warm up."""
    for _ in range(3):
        run(images)
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times) < 5:
        start = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - start)
    return round(len(images) / statistics.median(times), 1)


def side_by_side(run: Callable[[int], object], threads: int, seconds: float) -> float:
    """How often per second `threads` threads together call `run`, each with its own number; an error ends it."""
    done, stop = [0] * threads, time.perf_counter() + 1.2 * seconds
    begin = time.perf_counter() + 0.2 * seconds

    def loop(i: int) -> None:
        while time.perf_counter() < stop:
            run(i)
            done[i] += begin <= time.perf_counter() < stop

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(loop, range(threads)))
    return round(sum(done) / seconds, 1)


# The parts: each makes its rows one by one, so that those before a fault are kept


def machine(bench: Bench) -> Iterator[Row]:
    yield Row("PyTorch", torch.__version__)
    yield Row("cores of the CPU", cores())
    if bench.on_gpu:
        properties = torch.cuda.get_device_properties(bench.device)
        yield Row("GPUs", torch.cuda.device_count())
        yield Row("memory of the first in GB", round(properties.total_memory / 1e9))
        yield Row("compute capability", f"{properties.major}.{properties.minor}")
        driver = Path("/proc/driver/nvidia/version")
        yield Row("driver", driver.read_text().splitlines()[0] if driver.exists() else "not said")


def exactness(bench: Bench) -> Iterator[Row]:
    """What the GPU computes beside what the CPU does, in float32, and half precision beside that."""
    folder = write_model(config_of(bench), bench.folder)
    pixels = torch.from_numpy(images_of(bench, min(8, bench.most)))
    cuda.use_all_of_float32()

    def logits(device: torch.device, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
        model = model_on(device, config_of(bench, precision), folder)
        masks = cuda.compute(model, pixels, cuda.TYPES[precision]).cpu()
        model.decode = lambda values: values
        return cuda.compute(model, pixels, cuda.TYPES[precision]).cpu(), masks

    reference = ServedModel(config_of(bench), folder)
    with torch.inference_mode():
        inputs = reference.batch_transforms(pixels)
        expected, masks = reference.network(inputs), reference(pixels)
        moved = model_on(bench.device, config_of(bench), folder).batch_transforms(pixels.to(bench.device)).cpu()
    yield Row("inputs of the network: equal values", equal(moved, inputs), torch.equal(moved, inputs))
    yield Row("size of the logits", expected.abs().mean().item())
    for precision in cuda.TYPES:
        if precision == "bf16" and not cuda.has_bf16(bench.device):
            yield Row("bf16", "this GPU has none")
            continue
        values, mask = logits(bench.device, precision)
        share, strict = equal(mask, masks), precision == "fp32"
        yield Row(f"{precision}: largest difference of a logit", (values - expected).abs().max().item())
        yield Row(f"{precision}: equal pixels", share, share >= 0.999 if strict else None)


def graphs(bench: Bench) -> Iterator[Row]:
    """Every size of batch: padded, computed by a graph, and cut to size again."""
    folder, images = write_model(config_of(bench), bench.folder), images_of(bench, bench.most)
    for precision in ("fp32", "fp16"):
        with warnings_of_the_runtime() as said:
            model = served(bench, config_of(bench, precision), folder)
        yield Row(f"{precision}: batches that are no graph", "; ".join(said) or "none", not said)
        alone = np.concatenate([answers(model, image[None]) for image in images])
        share = min(equal(answers(model, images[:n]), alone[:n]) for n in range(1, bench.most + 1))
        yield Row(f"{precision}: 1 to {bench.most} images, least share of pixels as one by one", share, share >= 0.99)


def batches(bench: Bench) -> Iterator[Row]:
    """Images per second from pixels on the CPU to masks on it, by the size of the batch."""
    folder = write_model(config_of(bench), bench.folder)
    plain = ServedModel(config_of(bench), folder).to(bench.device)

    @torch.inference_mode()
    def eagerly(images: np.ndarray) -> None:
        plain(torch.from_numpy(images).to(bench.device)).cpu()

    def row(name: str, run: Callable[[np.ndarray], object]) -> Row:
        rates = {n: per_second(run, images_of(bench, n), bench.seconds) for n in bench.batches}
        return Row(f"{name}: images/s by batch", rates)

    yield row("PyTorch as it is, fp32 with TF32", eagerly)  # first: the runtime changes settings of the process
    for precision in ("fp32", "fp16"):
        model = served(bench, config_of(bench, precision), folder)
        yield row(f"this runtime, {precision}", functools.partial(answers, model))


def compiled(bench: Bench) -> Iterator[Row]:
    """`torch.compile` in fp16, each size of batch on its own."""
    model = model_on(bench.device, config_of(bench, "fp16"), write_model(config_of(bench), bench.folder))
    model.network = torch.compile(model.network, dynamic=False, backend=bench.compiler)

    def run(images: np.ndarray) -> None:
        cuda.compute(model, torch.from_numpy(images), torch.float16).cpu()

    for n in bench.compiled:
        images, begin = images_of(bench, n), time.perf_counter()
        run(images)
        yield Row(f"batch of {n}: seconds to compile", round(time.perf_counter() - begin, 1))
        yield Row(f"fp16, batch of {n}: images/s", per_second(run, images, bench.seconds))


def threads(bench: Bench) -> Iterator[Row]:
    """Two threads with batches of their own."""
    model = served(bench, config_of(bench), write_model(config_of(bench), bench.folder))
    images = [images_of(bench, n) for n in (8, 5)]
    expected, shares = [answers(model, batch) for batch in images], []

    def run(i: int) -> None:
        shares.append(equal(answers(model, images[i]), expected[i]))

    for n in (1, 2):
        yield Row(f"batches/s of {n} thread{'s'[: n - 1]}", side_by_side(run, n, bench.seconds))
    yield Row("least share of pixels as without the other thread", min(shares), min(shares) >= 0.99)


class Uncapturable(torch.nn.Module):
    """A network that waits for the GPU, which no graph can hold. If `seen` the rehearsal notices, else the capture."""

    def __init__(self, network: torch.nn.Module, seen: bool):
        super().__init__()
        self.network, self.seen = network, seen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.network(x)
        if self.seen:
            y.sum().item()
        elif y.is_cuda:
            torch.cuda.synchronize()
        return y


def failed_capture(bench: Bench) -> Iterator[Row]:
    """Networks that cannot be captured are served all the same, and the memory is as it was once they are gone."""
    folder, images = write_model(config_of(bench), bench.folder), images_of(bench, 5)
    expected = answers(served(bench, config_of(bench), folder), images)

    def reserved() -> float:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(bench.device) / 1e6 if bench.on_gpu else 0.0

    before = reserved()
    for seen, name in ((True, "before the capture"), (False, "within the capture")):
        model = ServedModel(config_of(bench), folder, device=bench.device)
        model.network = Uncapturable(model.network, seen)
        with warnings_of_the_runtime() as said:
            queue = cuda.load(model, bench.device)[0]
        share = equal(answers(queue, images), expected)
        yield Row(f"fails {name}: the log", "; ".join(said) or "nothing", len(said) == int(bench.on_gpu))
        yield Row(f"fails {name}: equal pixels", share, share >= 0.999)
        del model, queue
        kept = reserved() - before  # PyTorch keeps what a capture had when it failed
        yield Row(f"fails {name}: MB that are kept", kept, kept < 50 if seen else None)
        torch.empty(int(bench.memory) // 4, device=bench.device)
        kept = reserved() - before - kept
        yield Row(f"fails {name}: MB kept of what is allocated after that", kept, kept < 50)
    with warnings_of_the_runtime() as said:
        share = equal(answers(served(bench, config_of(bench), folder), images), expected)
    yield Row("a model with graphs after that: equal pixels", share, share >= 0.999 and not said)


def memory(bench: Bench) -> Iterator[Row]:
    """Too little memory for a batch, and for one image of another: who gets an answer?"""
    config = config_of(bench, resize=None, max_pixels=60_000_000)  # the model sees every pixel, 60 million at a time
    handler = handler_of(bench, write_model(config, bench.folder))
    if bench.on_gpu:
        total = torch.cuda.get_device_properties(bench.device).total_memory
        torch.cuda.set_per_process_memory_fraction(bench.memory / total, bench.device)
    else:
        forward = handler.model.compute

        def short(batch: np.ndarray, alone: bool) -> np.ndarray:
            if batch.size / 3 > bench.memory:
                raise torch.OutOfMemoryError("CUDA out of memory, made up")
            return forward(batch, alone)

        handler.model.compute = short
    photos = [jpeg(*bench.many)] * 16 + [jpeg(*bench.huge)]
    instances = [{"b64": base64.b64encode(photo).decode()} for photo in photos]
    for when in ("", ", asked again"):
        job = handler.preprocess({"body": json.dumps({"instances": instances})})
        handler.inference([item for item in job.items if not item.error])
        answered = sum(item.output is not None for item in job.items[:16])
        yield Row(f"answered, of 16{when}", answered, answered == 16)
        refusal = job.items[16].error.type if job.items[16].error else "answered"
        yield Row(f"what does not fit alone{when}", refusal, refusal == "OutOfMemory")


def break_for_good(bench: Bench) -> None:
    """Make the GPU fail as it does after an illegal access; on a CPU, pretend it."""
    if bench.on_gpu:
        with contextlib.suppress(RuntimeError):
            torch.zeros(4, device=bench.device)[torch.full((4,), 9, device=bench.device)].cpu()
    else:

        def fail(*_) -> None:
            raise RuntimeError("CUDA error: made up")

        cuda.compute, cuda.is_lost = fail, lambda device: True


def serve(bench: Bench, port: int) -> None:
    """The Python server on loopback, of the model in the folder. A line on its input breaks the GPU."""
    import uvicorn

    from deployment.server.app import application

    app = application(handler_of(bench, bench.folder), "fastunet")
    threading.Thread(target=lambda: sys.stdin.readline() and break_for_good(bench), daemon=True).start()
    uvicorn.run(app, port=port, http="h11", ws="none", lifespan="off", access_log=False, log_level="warning")


@contextlib.contextmanager
def server(bench: Bench, precision: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """The process of `serve` and its port, once it answers.

    Raises:
        RuntimeError: it does not start; the message is its last line.
    """
    folder, (port,) = write_model(config_of(bench, precision), bench.folder / precision), free_ports(1)
    log = folder / "log"
    with log.open("wb") as output:
        streams = {"stdin": subprocess.PIPE, "stdout": output, "stderr": subprocess.STDOUT, "cwd": HERE.parent}
        with started(command(bench, folder, "--serve", str(port)), os.environ.copy(), **streams) as process:
            deadline = time.monotonic() + 60
            while ask(port, "GET", "/ping") != 200:
                if process.poll() is not None or time.monotonic() > deadline:
                    lines = log.read_text(errors="replace").strip().splitlines() or ["it does not answer"]
                    raise RuntimeError(lines[-1])
                time.sleep(0.2)
            yield process, port


def ask(port: int, method: str, path: str, body: bytes | None = None) -> int:
    """The status of the answer of a server on loopback; 0: nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def lost(bench: Bench) -> Iterator[Row]:
    """A GPU that has failed for good: the request gets an error, then the process ends and no health check holds."""
    with server(bench, "fp32") as (process, port):
        path = "/predictions/fastunet"
        before = ask(port, "POST", path, jpeg(*bench.photo))
        yield Row("answer before", before, before == 200)
        process.stdin.write(b"break\n")
        process.stdin.flush()
        time.sleep(0.5)
        after = ask(port, "POST", path, jpeg(*bench.photo))
        yield Row("answer after", after, after == 500)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        yield Row("exit status of the server", process.returncode, process.returncode == 1)
        health = ask(port, "GET", "/ping")
        yield Row("health check after that (0: nobody answers)", health, health == 0)


def files(bench: Bench) -> Iterator[Row]:
    """From a JPEG to the answer in JSON, in one process."""
    photo = jpeg(*bench.photo)
    for precision in ("fp32", "fp16"):
        handler = handler_of(bench, write_model(config_of(bench, precision), bench.folder / precision))

        def run(_: int, handler=handler) -> None:
            job = handler.preprocess({"body": photo})
            handler.inference(job.items)
            if handler.postprocess(job).status != 200:
                raise job.items[0].error

        rates = {n: side_by_side(run, n, bench.seconds) for n in bench.clients}
        yield Row(f"{precision}: answers/s by threads", rates)


def over_http(bench: Bench) -> Iterator[Row]:
    """From a JPEG to the answer in JSON, through the Python server."""
    photo = jpeg(*bench.photo)
    for precision in ("fp32", "fp16"):
        with server(bench, precision) as (_, port):
            rates = {n: http_rate(port, photo, n, 3 * bench.seconds) for n in bench.clients}
        yield Row(f"uvicorn {precision}: answers/s by clients", rates)


def http_rate(port: int, photo: bytes, clients: int, seconds: float) -> float:
    """Answers per second to `clients` that each ask again when they have their answer."""
    connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(clients)]

    def post(i: int) -> None:
        connections[i].request("POST", "/predictions/fastunet", photo)
        answer = connections[i].getresponse()
        if b'"classes"' not in answer.read():
            raise RuntimeError(f"a client got {answer.status}")

    try:
        return side_by_side(post, clients, seconds)
    finally:
        for connection in connections:
            connection.close()


def networks() -> dict[str, Callable[[], torch.nn.Module]]:
    """Six architectures that make tensors or read memory in ways of their own: timm's, else torchvision's."""
    try:
        import timm
    except ImportError:
        names = ("swin_t", "vit_b_16", "convnext_tiny", "maxvit_t", "efficientnet_b0", "mobilenet_v3_small")
        return {name: lambda n=name: torchvision.models.get_model(n, weights=None, num_classes=10) for name in names}
    names = ("edgenext_xx_small", "levit_128s", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224")
    names += ("convnext_atto", "mobilenetv3_small_050")
    return {name: lambda n=name: timm.create_model(n, pretrained=False, num_classes=10) for name in names}


def write_program(network: torch.nn.Module, folder: Path, size: tuple[int, int]) -> Config:
    """Write `network`, a classifier, as a program for images of `size`, as the export would."""
    free = {0: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(network.eval(), (torch.rand(2, 3, *size),), dynamic_shapes=(free,), strict=False)
    program.example_inputs = None
    folder.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, folder / "fastunet.pt2")
    names = [f"class {i}" for i in range(10)]
    return Config(None, 10, size, resize={"size": size}, task="classification", classes=names)


def programs(bench: Bench) -> Iterator[Row]:
    """Programs of `torch.export`, moved to the GPU whole: probabilities beside those of the CPU."""
    size = (224, 224)  # these networks take no other
    images = drawn(3, *size)
    for name, make in list(networks().items())[: bench.programs]:
        try:
            config = write_program(make(), folder := bench.folder / name, size)
            expected = answers(eager(config, folder), images)
            for precision in ("fp32", "fp16") if bench.on_gpu else ("fp32",):
                with warnings_of_the_runtime() as said:
                    model = served(bench, dataclasses.replace(config, precision=precision), folder)
                off = float(np.abs(answers(model, images) - expected).max())
                note = f" ({said[0]})" if said else ""
                row = f"{name}, {precision}: largest difference of a probability{note}"
                yield Row(row, off, off < (1e-3 if precision == "fp32" else 0.05))
        except Exception as error:  # of one network: the others still have their turn
            yield Row(name, one_line(error), False)


def decoding(bench: Bench) -> Iterator[Row]:
    """A JPEG to the pixels that the model takes: Pillow in threads, and decoded on the GPU."""
    photo, preprocessor = jpeg(*bench.photo), Preprocessor(config_of(bench))
    yield Row(
        f"Pillow, {cores()} threads: photos/s", side_by_side(lambda _: preprocessor(photo), cores(), bench.seconds)
    )
    if not bench.on_gpu:
        return
    data = [torch.frombuffer(bytearray(photo), dtype=torch.uint8)] * 32
    decoded = torchvision.io.decode_jpeg(data, device=bench.device)[0].permute(1, 2, 0).cpu().numpy()
    there = preprocessor.resize(Image.fromarray(decoded))
    yield Row("on the GPU: equal values after the resize", equal(there, preprocessor(photo)))
    rate = per_second(lambda data: torchvision.io.decode_jpeg(data, device=bench.device)[0].cpu(), data, bench.seconds)
    yield Row("on the GPU, 32 at a time, without the resize: photos/s", rate)


# In this order; beside each the seconds after which it is given up.
PARTS = {
    "machine": (machine, 60),
    "exactness": (exactness, 60),
    "graphs": (graphs, 60),
    "batches": (batches, 90),
    "programs": (programs, 150),
    "failed capture": (failed_capture, 60),
    "out of memory": (memory, 60),
    "lost GPU": (lost, 90),
    "threads": (threads, 45),
    "files": (files, 60),
    "HTTP": (over_http, 120),
    "decoding": (decoding, 45),
    "torch.compile": (compiled, 120),
}


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")[:200]


def rows_of(part: str, bench: Bench) -> Iterator[Row]:
    """The rows of one part; its failure is one too."""
    try:
        yield from PARTS[part][0](bench)
    except Exception as error:
        traceback.print_exc()
        yield Row("failed", one_line(error), False)


def command(bench: Bench, folder: Path, *options: str) -> list[str]:
    """The command line of this module for a process of its own."""
    cpu = [] if bench.on_gpu else ["--cpu"]
    return [sys.executable, "-m", "benchmark.gpu", *cpu, "--folder", str(folder), *options]


def run_part(part: str, bench: Bench, seconds: float) -> list[Row]:
    """The rows of one part, in a process of its own that has so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        rows, log, ended = Path(folder, "rows"), Path(folder, "log"), None
        with log.open("wb") as output:
            argv = command(bench, Path(folder), "--part", part)
            streams = {"stdout": output, "stderr": subprocess.STDOUT, "cwd": HERE.parent}
            with started(argv, os.environ.copy(), **streams) as process, contextlib.suppress(subprocess.TimeoutExpired):
                ended = process.wait(seconds)
        made = [Row(**json.loads(line)) for line in rows.read_text().splitlines()] if rows.exists() else []
        if ended != 0 or any(row.what == "failed" for row in made):
            print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
        if ended != 0:
            how = f"given up after {seconds:.0f} s" if ended is None else f"the process ended with status {ended}"
            made.append(Row("failed", how, False))
        return made


def write_part(part: str, bench: Bench) -> None:
    """Add the rows of one part to the file `rows` in its folder, each when it is made."""
    with (bench.folder / "rows").open("a") as file:
        for row in rows_of(part, bench):
            print(json.dumps(vars(row)), file=file, flush=True)


def check(bench: Bench, parts: list[str], out: Path | None) -> bool:
    """Run `parts`, print the table, write it into `out`; whether everything holds."""
    begin = time.monotonic()
    name = torch.cuda.get_device_name(bench.device) if bench.on_gpu else "a CPU in the place of a GPU"
    head = [f"{name}, {bench.arch} for {bench.size[0]} × {bench.size[1]}, {time.strftime('%Y-%m-%d')}", ""]
    lines, results = [*head, "| part | | | holds |", "|---|---|--:|---|"], {}
    print("\n".join(lines), flush=True)
    for part in parts:
        left = SECONDS - (time.monotonic() - begin)
        results[part] = (
            run_part(part, bench, min(PARTS[part][1], left)) if left > 10 else [Row("no time left", "", False)]
        )
        new = [row.as_markdown(part) for row in results[part]]
        print("\n".join(new), flush=True)
        lines += new
    print(f"\n{time.monotonic() - begin:.0f} s")
    if out:
        rates = {
            row.what.partition(":")[0]: row.value for row in results.get("HTTP", []) if isinstance(row.value, dict)
        }
        entry = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "answers/s over HTTP": rates}
        entry["rows"] = {part: [vars(row) for row in rows] for part, rows in results.items()}
        path = out / "gpu_results.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {name: entry}, indent=1) + "\n")
        (out / "gpu_results.md").write_text("\n".join(lines) + "\n")
    return all(row.holds is not False for rows in results.values() for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmark.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="a CPU in the place of a GPU: shows that all parts run")
    parser.add_argument("--parts", help=f"of {', '.join(PARTS)}; separated by commas (default: all)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: this one; with --cpu none)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path(), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    bench = dataclasses.replace(CPU if args.cpu else GPU, folder=args.folder)
    if args.serve:
        serve(bench, args.serve)
    elif args.part:
        write_part(args.part, bench)
    elif not args.cpu and not torch.cuda.is_available():
        print("no GPU here: nothing measured")
    else:
        parts = args.parts.split(",") if args.parts else list(PARTS)
        sys.exit(not check(bench, parts, args.out or (None if args.cpu else HERE)))


if __name__ == "__main__":
    main()
