"""Write a served model as `fastunet.onnx`, for onnxruntime and every other runtime that reads ONNX.

The graph takes `photos`, float32 (N, channels, H, W) as `photos.Preprocessor` makes them, any N, and gives what the
learner's loss function makes of the logits: `probabilities` (of a mask: (N, classes, H, W)), `values` or `points`, x
and y of each point in turn, from -1 to 1. The metadata of the file hold the configuration, `config`, and the class
names, `classes`, as JSON.
"""

import dataclasses
import json
import math
import os
import warnings
from pathlib import Path

import torch

from ..config import Config
from ..photos import Preprocessor
from ..runtime import ACTIVATIONS, decode, import_optional, load_network
from .learner import ExportError
from .program import capture_widest
from .tasks import decision

MAX_DIFFERENCE = 1e-3  # of a probability, or of a value relative to the greatest, that onnxruntime may be off PyTorch
MIN_AGREEMENT = 0.999  # share of the answers (pixels, labels) that must be the same


class Activated(torch.nn.Module):
    """The network of `config` and the activation of its loss function."""

    def __init__(self, config: Config, folder: Path | str):
        super().__init__()
        self.network, self.activation = load_network(config, folder), ACTIVATIONS[config.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.network(x))


def write_onnx(config: Config, folder: Path | str, photos: list[Path]) -> None:
    """Write `folder`/fastunet.onnx of the model that the export wrote into `folder`, checked on `photos`.

    Raises:
        ExportError: the graph cannot be made, or onnxruntime's answers are too far from PyTorch's.
        RuntimeUnavailable: onnx, onnxscript or onnxruntime is not installed.
    """
    onnx, onnxruntime = import_optional("onnx"), import_optional("onnxruntime")
    import_optional("onnxscript")
    model = Activated(config, folder)
    program = capture_widest(model, config)
    output = {"regression": "values", "points": "points"}.get(config.task, "probabilities")
    part = Path(folder, "fastunet.part.onnx")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(
                program, dynamo=True, input_names=["photos"], output_names=[output], verbose=False
            )
            exported.save(part, external_data=False)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"no ONNX of this network: {' '.join(str(error).split())[:300]}") from error
    graph = onnx.load(part)
    metadata = {"config": json.dumps(dataclasses.asdict(config)), "classes": json.dumps(config.classes)}
    onnx.helper.set_model_props(graph, metadata)
    onnx.save(graph, part)
    session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
    preprocessor, difference, equal, answers = Preprocessor(config), 0.0, 0, 0
    for path in photos:
        x = preprocessor(path.read_bytes())[None]
        with torch.inference_mode():
            ours = model(x)
        theirs = torch.from_numpy(session.run(None, {"photos": x.numpy()})[0])
        scale = 1 if output == "probabilities" else max(1.0, ours.abs().max().item())
        apart = (theirs - ours).abs().max().item() / scale
        difference = max(difference, apart if math.isfinite(apart) else math.inf)
        same = agree(theirs, ours, config)
        equal, answers = equal + int(same.sum()), answers + same.numel()
    agreement = equal / answers
    if not (difference <= MAX_DIFFERENCE and agreement >= MIN_AGREEMENT):
        raise ExportError(f"onnxruntime is off by up to {difference:.2g}, {agreement:.2%} of its answers are the same")
    print(
        f"fastunet.onnx: off by {difference:.1g} at most, {agreement:.3%} of the answers on {len(photos)} photos equal"
    )
    os.replace(part, Path(folder, "fastunet.onnx"))


def agree(theirs: torch.Tensor, ours: torch.Tensor, config: Config) -> torch.Tensor:
    """Where the answers of two runtimes are the same: for each pixel, label or value."""
    masks = config.task == "segmentation"
    a, b = (decision(decode(x, None, config.threshold, masks), config.task, config.threshold) for x in (theirs, ours))
    return torch.isclose(a, b, rtol=MAX_DIFFERENCE, atol=MAX_DIFFERENCE) if a.is_floating_point() else a == b
