"""Export a fastai U-Net learner for serving: `python -m deployment.export LEARNER.pkl --out model_store`.

Writes the state dict and TorchServe's model configuration, once the pure-PyTorch copy is proven equal.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import yaml

from deployment.handler import load_model, to_tensor  # noqa: F401


class ExportError(Exception):
    """The learner cannot be exported; the message says why."""


def export_learner(learner, out_dir: Path | str) -> Path:
    """Write `fastunet.pth` and `model-config.yaml` of `learner` into `out_dir`; returns `out_dir`.

    Raises:
        ExportError: the learner is no U-Net, or the copy's output differs from the original's.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    config = {
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": 8,
        "maxBatchDelay": 5,
        "responseTimeout": 120,
        "handler": describe(learner),
    }
    weights = out_dir / "fastunet.pth.part"
    torch.save(learner.model.state_dict(), weights)
    prove(learner, config["handler"], weights)
    os.replace(weights, out_dir / "fastunet.pth")
    text = out_dir / "model-config.yaml.part"
    text.write_text(yaml.safe_dump(config, sort_keys=False))
    os.replace(text, out_dir / "model-config.yaml")
    return out_dir


def describe(learner) -> dict:
    """All that serving must know of `learner`: the section `handler` of `model-config.yaml`."""
    from fastai.vision.all import AddMaskCodes, Normalize, Resize

    dls = learner.dls
    size = next((t for t in dls.after_item.fs if isinstance(t, Resize)), None)
    normalize = next((t for t in dls.after_batch.fs if isinstance(t, Normalize)), None)
    codes = next(t for t in dls.after_item.fs if isinstance(t, AddMaskCodes)).codes
    img_size = [size.size[1], size.size[0]]
    return {
        "arch": learner.arch.__name__,
        "n_classes": len(codes),
        "img_size": img_size,
        "options": {},
        "resize": {"size": img_size, "method": size.method, "pad_mode": size.pad_mode},
        "mean": normalize.mean.flatten().tolist() if normalize else None,
        "std": normalize.std.flatten().tolist() if normalize else None,
        "codes": [str(c) for c in codes],
        "runtime": "eager",
        "precision": "fp32",
    }


def prove(learner, config: dict, weights: Path) -> None:
    """Raises ExportError unless the copy's logits equal the learner's, bit for bit."""
    x = torch.rand(2, 3, *config["img_size"])
    with torch.inference_mode():
        original, copy = (
            m.eval().cpu()(x).as_subclass(torch.Tensor) for m in (learner.model, load_model(config, weights))
        )
    if not torch.equal(original, copy):
        raise ExportError("the copy's logits differ from the learner's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("learner", help="the file that learn.export() wrote")
    parser.add_argument("--out", default="model_store", help="folder to write into (default: %(default)s)")
    args = parser.parse_args()
    from fastai.vision.all import load_learner

    try:
        print(export_learner(load_learner(args.learner), args.out))
    except ExportError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
