"""What each precision of OpenVINO costs and gains: `python -m benchmark.precisions FOLDER` prints a table.

FOLDER holds labeled photos in CamVid's layout, or as `deployment.export.accuracy` reads them. Every fifth training
photo is held out, int8 is calibrated on the others, and everything is measured on the validation photos and on those
held out. The rows of int8 differ in what stays in float, or in a setting of NNCF: up to the
first convolution, or more.
"""

import argparse
import logging
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from deployment.config import Config, read_config
from deployment.export.accuracy import compare, outputs, read_labels
from deployment.export.convert import CALIBRATION_IMAGES, convolutions, to_openvino, up_to_first_convolution
from deployment.export.dataset import split_photos
from deployment.photos import Preprocessor
from deployment.runtime import cores
from deployment.runtime.openvino import load_openvino
from deployment.runtime.pytorch import eager
from deployment.runtime.queue import ImageQueue


def variants(base, samples: list) -> Iterator[tuple[str, object, str]]:
    """Name, model and precision of each row; int8 is calibrated on `samples`, each (1, height, width, channels)."""
    os.environ.setdefault("NNCF_CI", "1")  # no usage statistics
    import nncf

    nncf.set_log_level(logging.WARNING)
    begin, names, preset = up_to_first_convolution(base), convolutions(base), nncf.QuantizationPreset

    def int8(in_float: list[str], preset=preset.MIXED, **options):
        scope = nncf.IgnoredScope(names=in_float, validate=False)
        data = nncf.Dataset(samples)
        return nncf.quantize(base, data, ignored_scope=scope, preset=preset, subset_size=len(samples), **options)

    smooth = nncf.AdvancedQuantizationParameters(
        smooth_quant_alphas=nncf.quantization.advanced_parameters.AdvancedSmoothQuantParameters(convolution=0.15)
    )
    yield "fp32", base, "fp32"
    yield "bf16", base, "bf16"
    yield "int8, every layer", int8([]), "int8"
    yield "int8, the first convolution in float", int8(begin), "int8"
    transformer = nncf.ModelType.TRANSFORMER  # without it NNCF leaves SmoothQuant out
    yield "the same with SmoothQuant", int8(begin, model_type=transformer, advanced_parameters=smooth), "int8"
    yield "the same, activations symmetric", int8(begin, preset.PERFORMANCE), "int8"
    yield "int8, the encoder's first block in float too", int8([*begin, *names[1:3]]), "int8"
    yield "int8, the last three in float too", int8([*begin, *names[-3:]]), "int8"


def milliseconds(model: ImageQueue, image: np.ndarray, times: int = 40) -> float:
    """The median time of one image."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        model([image])
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken)


def rows(config: Config, model_store: Path, folder: Path) -> Iterator[str]:
    """The lines of the table."""
    preprocessor, (train, valid) = Preprocessor(config, model_store), split_photos(folder)
    held_out = train[::5]
    step = max(1, -(-(len(train) - len(held_out)) // CALIBRATION_IMAGES))
    samples = [preprocessor(p.read_bytes())[None] for p in [p for p in train if p not in held_out][::step]]
    original, sets = eager(config, model_store), []
    for photos in (valid, held_out):
        inputs = [preprocessor(path.read_bytes()) for path in photos]
        sets.append((inputs, read_labels(photos, folder, preprocessor), outputs(original, inputs)))
    yield (
        f"| {config.arch or 'program'}, {len(samples)} photos to calibrate | ms a photo | "
        f"same answer, {len(valid)} validation photos | points lost | same, {len(held_out)} of training | points lost |"
    )
    yield "|---|--:|--:|--:|--:|--:|"
    for name, model, precision in variants(to_openvino(config, model_store), samples):
        converted = load_openvino(model, cores(), precision)
        cells = [f"{milliseconds(converted, sets[0][0][0]):.1f}"]
        for inputs, labels, expected in sets:
            report = compare(config, expected, outputs(converted, inputs), labels)
            cells += [f"{report['agreement']:.2%}", f"{report['drop']:.2f}" if "drop" in report else ""]
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmark.precisions", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="labeled photos")
    parser.add_argument("--model-store", type=Path, default="model_store", help="default: %(default)s")
    args = parser.parse_args()
    for row in rows(read_config(args.model_store), args.model_store, args.folder):
        print(row, flush=True)


if __name__ == "__main__":
    main()
