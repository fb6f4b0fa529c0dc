"""Write a served model as `fastunet.onnx`, for onnxruntime and every other runtime that reads ONNX.

The graph takes `images` (N, height, width, channels), any N, as `photos.Preprocessor` makes them (uint8 RGB, resized as
the learner does), and gives the values of the answers: `masks`, uint8 (N, H, W), or `probabilities`, `values` or
`points`, x and y of each point in turn, from -1 to 1. The metadata of the file hold the configuration, `config`, and
the class names, `classes`, as JSON.
"""

import dataclasses
import json
import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch

from ..config import Config
from ..photos import Preprocessor
from ..runtime import import_optional
from ..runtime.pytorch import ServedModel
from .learner import ExportError
from .program import capture_served
from .tasks import decision

OUTPUTS = {"segmentation": "masks", "regression": "values", "points": "points"}  # else probabilities
MAX_DIFFERENCE = 1e-3  # of a probability, or of a value relative to the greatest, that onnxruntime may be off PyTorch
MIN_AGREEMENT = 0.999  # share of the answers (pixels, labels) that must be the same


def write_onnx(config: Config, folder: Path | str, images: list[Path]) -> None:
    """Write `folder`/fastunet.onnx of the model that the export wrote into `folder`, checked on `images`.

    Raises:
        ExportError: the graph cannot be made, or onnxruntime's answers are too far from PyTorch's.
        RuntimeUnavailable: onnx, onnxscript or onnxruntime is not installed.
    """
    onnxruntime = import_optional("onnxruntime")
    part = Path(folder, "fastunet.part.onnx")
    save_graph(config, folder, part)
    session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
    model, preprocessor = ServedModel(config, folder), Preprocessor(config, folder)
    difference, equal, answers = 0.0, 0, 0
    for path in images:
        pixels = np.stack([preprocessor(path.read_bytes())])
        with torch.inference_mode():
            ours = model(torch.from_numpy(pixels))
        theirs = torch.from_numpy(session.run(None, {"images": pixels})[0])
        if ours.is_floating_point():
            scale = max(1.0, ours.abs().max().item()) if config.task in OUTPUTS else 1.0
            apart = (theirs - ours).abs().max().item() / scale
            difference = max(difference, apart if math.isfinite(apart) else math.inf)
        same = agree(theirs, ours, config)
        equal, answers = equal + int(same.sum()), answers + same.numel()
    agreement = equal / answers
    if not (difference <= MAX_DIFFERENCE and agreement >= MIN_AGREEMENT):
        raise ExportError(f"onnxruntime is off by up to {difference:.2g}, {agreement:.2%} of its answers are the same")
    print(
        f"fastunet.onnx: {agreement:.3%} of the answers to {len(images)} images equal, off by {difference:.1g} at most"
    )
    os.replace(part, Path(folder, "fastunet.onnx"))


def save_graph(config: Config, folder: Path | str, path: Path) -> None:
    """Write the graph of the served model, with its metadata, to `path`."""
    onnx = import_optional("onnx")
    import_optional("onnxscript")
    program = capture_served(ServedModel(config, folder, in_graph=True), config)
    output = OUTPUTS.get(config.task, "probabilities")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(
                program, dynamo=True, input_names=["images"], output_names=[output], verbose=False
            )
            assert exported is not None  # as without `dynamo`
            exported.save(path, external_data=False)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"no ONNX of this network: {' '.join(str(error).split())[:300]}") from error
    graph = onnx.load(path)
    metadata = {"config": json.dumps(dataclasses.asdict(config)), "classes": json.dumps(config.classes)}
    onnx.helper.set_model_props(graph, metadata)
    onnx.save(graph, path)


def agree(theirs: torch.Tensor, ours: torch.Tensor, config: Config) -> torch.Tensor:
    """Where the answers of two runtimes are the same: for each pixel, label or value."""
    a, b = (decision(x, config.task, config.threshold) for x in (theirs, ours))
    return torch.isclose(a, b, rtol=MAX_DIFFERENCE, atol=MAX_DIFFERENCE) if a.is_floating_point() else a == b
