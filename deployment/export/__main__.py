"""The command line of the export: `python -m deployment.export LEARNER.pkl --out model_store`."""

import argparse
import sys
import warnings
import zipfile
from pathlib import Path

from ..archive import missing_folder, near
from ..config import read_config
from ..runtime import PRECISIONS

OWN_LEARNER = Path(__file__).resolve().parents[2] / "model_store" / "learner.pkl"  # that the notebooks write


def why_refused(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments as far as files tell by themselves, before torch and fastai are imported."""
    path = Path(args.learner)
    if not path.is_file():
        return f"no such file: {path}{near(path.name, [file.name for file in path.parent.glob('*.pkl')])}"
    with path.open("rb") as file:
        head = file.read(4)
    if not (head[:1] == b"\x80" or zipfile.is_zipfile(path)):
        how = "it is cut short" if head == b"PK\3\4" else "it is nothing that learn.export() writes"
        return f"{path} cannot be loaded as a learner: {how}"
    if not args.trust and path.resolve() != OWN_LEARNER:
        return f"loading a learner runs the code in it: add --trust if you know where {path} is from"
    for folder in filter(None, (args.check, args.calibrate)):
        if not Path(folder).is_dir():
            return missing_folder(folder)
    if args.open and not Path(args.open).is_file():
        return f"no such file: {args.open}"
    return None


def main() -> None:
    """The command line; ends with status 2 and one line on stderr where the learner cannot be exported."""
    parser = argparse.ArgumentParser(
        prog="python -m deployment.export",
        description="Export a fastai vision learner for serving, once its copy without fastai is proven equal.",
    )
    parser.add_argument("learner", help="the file that learn.export() wrote")
    parser.add_argument("--out", default="model_store", help="folder to write into (default: %(default)s)")
    parser.add_argument("--check", metavar="DIR", help="images to prove the copy on (default: generated ones)")
    parser.add_argument(
        "--open", metavar="FILE.py", help="your open_image(data), where the learner opens images itself"
    )
    parser.add_argument(
        "--trust", action="store_true", help="you know where the file is from: loading it runs its code"
    )
    parser.add_argument(
        "--rescue",
        action="store_true",
        help="for a learner of fastai 2.0 to 2.7: prove it against that fastai too, which uv installs",
    )
    parser.add_argument("--runtime", default="eager", choices=tuple(PRECISIONS), help="default: %(default)s")
    choices = "; ".join(f"{runtime}: {', '.join(precisions)}" for runtime, precisions in PRECISIONS.items())
    parser.add_argument("--precision", help=f"{choices} (default: the first; eager's others are for GPUs)")
    parser.add_argument("--calibrate", metavar="DIR", help="images for int8, fp16, bf16; labels, to measure accuracy")
    parser.add_argument("--max-drop", type=float, default=0.5, help="points of accuracy that may be lost: %(default)s")
    parser.add_argument(
        "--decode", default="exact", choices=("exact", "fast"), help="large JPEGs, for openvino (default: %(default)s)"
    )
    parser.add_argument("--onnx", action="store_true", help="write fastunet.onnx too, checked with onnxruntime")
    args = parser.parse_args()
    try:
        refused = why_refused(args)
    except OSError as error:
        refused = str(error)
    if refused:
        print(f"error: {refused}", file=sys.stderr)
        sys.exit(2)
    warnings.filterwarnings("ignore", category=FutureWarning)  # fastai's own, about torch.jit
    from .write import EXPORTED, ExportError, export_learner, load_learner, load_rescued  # takes seconds

    try:
        of_opening = ("learner", "out", "trust", "rescue")
        options = {name: value for name, value in vars(args).items() if name not in of_opening}
        learner, earlier = load_rescued(args.learner) if args.rescue else (load_learner(args.learner), None)
        out = export_learner(learner, args.out, earlier=earlier, **options)
    except (ExportError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        if getattr(e, "hint", ""):
            print(f"for example:\n\n{e.hint}", file=sys.stderr)
        sys.exit(2)
    except Exception as e:  # whatever a learner of other versions does when it is looked at
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        print(f"error: {args.learner} cannot be exported ({reason})", file=sys.stderr)
        sys.exit(2)
    names = [*EXPORTED, *(["open_image.py"] if read_config(out).opener else []), "model-config.yaml", "MODEL_CARD.md"]
    print("wrote " + ", ".join(str(out / name) for name in names if (out / name).exists()))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
