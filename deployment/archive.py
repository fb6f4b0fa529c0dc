"""Make the archive that TorchServe serves, of what the export wrote: `python -m deployment.archive model_store`.

This is the one place that knows which files an archive needs.
"""

import argparse
import difflib
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from .config import Config, read_config

HERE = Path(__file__).parent
# What handler.py imports, whatever computes; and by runtime.
CODE = ("answers.py", "config.py", "geometry.py", "memory.py", "photos.py", "protocol.py", "structure.py")
CODE += ("runtime/__init__.py", "runtime/queue.py")
RUNTIME_CODE = {
    "eager": ("model.py", "runtime/cuda.py", "runtime/program.py", "runtime/pytorch.py"),
    "openvino": ("runtime/openvino.py",),
}
MODEL_FILES = {"eager": (), "openvino": ("fastunet.bin", "fastunet.xml")}  # by runtime; eager has Config.model_file

# Requests that a worker gets together, at most. PyTorch on a CPU computes them one by one, and what waits with one
# worker another cannot take; OpenVINO computes them side by side; on a GPU they go through the model as one.
BATCH_SIZES = {"eager": 4, "openvino": 16, "cuda": 32}


class ArchiveError(Exception):
    """The archive cannot be made; the message says why, in one line."""


def near(name: str, names: Iterable[str]) -> str:
    """The end of a message that there is no `name`: which of `names` may be meant, if one is much like it."""
    found = difflib.get_close_matches(name, sorted(names), n=1)
    return f": did you mean {found[0]}?" if found else ""


def missing_folder(folder: Path | str) -> str:
    """The message that `folder` does not exist."""
    path = Path(folder).resolve()
    beside = [other.name for other in path.parent.glob("*") if other.is_dir()]
    return f"there is no folder {folder}{near(path.name, beside)}"


def code_files(config: Config) -> list[str]:
    """What an archive of `config` holds of this folder beside handler.py: code that can be imported where it serves."""
    return sorted([*CODE, *RUNTIME_CODE[config.runtime]])


def checked_config(folder: Path) -> Config:
    """The configuration in `folder`, all of whose files are there.

    Raises:
        ArchiveError: it is wrong, or a file is missing.
    """
    if not folder.is_dir():
        raise ArchiveError(missing_folder(folder))
    try:
        config = read_config(folder)
    except (OSError, ValueError) as error:
        raise ArchiveError(f"{error}: run `python -m deployment.export LEARNER.pkl --out {folder}` first") from None
    if config.runtime not in MODEL_FILES:
        there = ", ".join(MODEL_FILES)
        raise ArchiveError(f"{folder / 'model-config.yaml'}: no runtime {config.runtime!r}: there are {there}")
    for path in model_files(config, folder):
        if not path.is_file():
            raise ArchiveError(f"no {path}, which the runtime {config.runtime} needs: export the learner again")
    return config


def model_files(config: Config, folder: Path) -> list[Path]:
    """The files of the model in `folder`: first the one that TorchServe calls serialized."""
    names = [*(MODEL_FILES[config.runtime] or (config.model_file,)), *(["open_image.py"] if config.opener else [])]
    return [folder / name for name in names]


def archiver_command(folder: Path, code: Path, name: str, version: str) -> list[str]:
    """The command that packs what the export wrote into `folder`, and the files in `code`, as `folder`/`name`.mar.

    torch-model-archiver takes what lies in a folder that it is given, folders included: so `runtime/` stays one.
    """
    serialized, *extra = model_files(read_config(folder), folder)
    return [
        "torch-model-archiver",
        *("--model-name", name, "--version", version, "--force"),
        *("--archive-format", "zip-store"),  # compressing weights saves little, and costs time
        *("--handler", shown(HERE / "handler.py"), "--extra-files", ",".join(map(shown, [code, *extra]))),
        *("--serialized-file", shown(serialized), "--config-file", shown(folder / "model-config.yaml")),
        *("--export-path", shown(folder)),
    ]


def shown(path: Path) -> str:
    """`path` from here, where it lies below the working directory."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def make_archive(folder: Path | str, name: str = "fastunet", version: str = "1.0") -> Path:
    """Pack what the export wrote into `folder`, and the code that serves it; return the archive.

    It appears whole or not at all, and beside it its digest, `check_digest`'s. The command that does it is printed.

    Raises:
        ArchiveError: a file is missing, or torch-model-archiver is, or it failed; the folder's path has a comma.
    """
    folder = Path(folder)
    config = checked_config(folder)
    beside = Path(sys.executable).parent  # an environment's commands, also where it is not activated
    program = shutil.which("torch-model-archiver", path=beside) or shutil.which("torch-model-archiver")
    if not program:
        raise ArchiveError("torch-model-archiver is not installed: pip install torch-model-archiver")
    target = folder / f"{name}.mar"
    if "," in shown(folder):  # it splits --extra-files there
        raise ArchiveError(f"{folder}: torch-model-archiver takes no path with a comma: rename it, or work inside it")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".archive-") as scratch:
        code = Path(scratch, "code")
        for file in code_files(config):
            (code / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HERE / file, code / file)
        command = archiver_command(folder, code, name, version)
        print(f"CODE: {', '.join(code_files(config))}, of {shown(HERE)}")
        readable = shlex.join(word.replace(shown(code), "CODE") for word in command)
        print(readable.replace(" --", " \\\n    --"), flush=True)
        # The archiver works in $TMPDIR/NAME, whoever else does, and writes as it goes: both happen aside.
        command = [program, *command[1:-1], scratch]
        run = subprocess.run(command, env=os.environ | {"TMPDIR": scratch}, capture_output=True, text=True)
        if run.returncode:
            raise ArchiveError(f"torch-model-archiver failed: {(run.stderr.strip() or run.stdout.strip())[-500:]}")
        made, digest = Path(scratch, target.name), Path(scratch, "digest")
        digest.write_text(f"{digest_of(made)}  {target.name}\n", encoding="utf-8")
        digest_file(target).unlink(missing_ok=True)  # never one of another archive, whenever this ends
        os.replace(made, target)
        os.replace(digest, digest_file(target))
    return target


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_file(archive: Path) -> Path:
    """Where the digest of `archive` lies: NAME.mar.sha256, in the form of `sha256sum`."""
    return archive.with_name(f"{archive.name}.sha256")


def check_digest(archive: Path) -> None:
    """Compare `archive` with the digest beside it, where there is one.

    Raises:
        ValueError: it is another file than the one that was made, or only a part of it.
    """
    beside = digest_file(archive)
    if beside.exists() and beside.read_text(encoding="utf-8").split()[:1] != [digest_of(archive)]:
        raise ValueError(
            f"{archive} is not the file that {beside.name} was made of: copy both again, or make the archive anew "
            f"(`python -m deployment.archive`)"
        )


def set_batch_size(folder: Path | str, device: str) -> None:
    """Write into `folder`/model-config.yaml how many requests a worker gets together, at most: what pays on `device`.

    `device` is cpu or cuda.

    Raises:
        ArchiveError: there is no such file, it has no such setting, or it cannot be read.
    """
    path = Path(folder, "model-config.yaml")
    try:
        size = BATCH_SIZES["cuda" if device == "cuda" else read_config(folder).runtime]
        text = path.read_text(encoding="utf-8")
        text, n = re.subn(r"^batchSize: *\d+ *", f"batchSize: {size}".ljust(21), text, flags=re.MULTILINE)
    except (OSError, ValueError, KeyError) as error:
        raise ArchiveError(f"{error}: run `python -m deployment.export LEARNER.pkl --out {folder}` first") from None
    if not n:
        raise ArchiveError(f"{path} has no line `batchSize: …`")
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def about_half_precision(config: Config) -> str:
    """What a GPU does with a model of `config`: what half precision would bring, or what it cost where it is chosen."""
    if config.runtime != "eager":
        return f"{config.runtime} computes on the CPU, also where there is a GPU: export with --runtime eager for that"
    if config.precision == "fp32":
        return (
            "fp32: a GPU answers as the CPU does, but for rounding. Half precision moves half the bytes, on a GPU's "
            "fastest units:\n`python -m deployment.export … --precision fp16 --calibrate DIR` measures on your photos "
            "what it costs, `make gpu-check` how much faster a GPU is with it"
        )
    report = config.accuracy or {}
    cost = f", {report['drop']:.2f} points lost" if "drop" in report else ""
    return f"{config.precision}: {report.get('agreement', 0):.2%} of the answers as in fp32{cost}, when it was exported"


def find_archive(model_store: Path | str, name: str | None = None) -> tuple[Path, str]:
    """The archive in `model_store` and the name to serve it by: `name`, else its own.

    That is `name`.mar, else the only archive there is. With several and no `name` it is fastunet.mar.

    Raises:
        FileNotFoundError: there is none; the message says what there is.
    """
    archives = sorted(Path(model_store).resolve().glob("*.mar"))
    wanted = name or (archives[0].stem if len(archives) == 1 else "fastunet")
    found = next((path for path in archives if path.stem == wanted), archives[0] if len(archives) == 1 else None)
    if found:
        return found, wanted
    if not Path(model_store).is_dir():
        raise FileNotFoundError(missing_folder(model_store))
    how = "`make demo` makes one, or `python -m deployment.archive` of what was exported"
    if archives:
        meant = near(wanted, [path.stem for path in archives])
        how = f"there are {', '.join(path.name for path in archives)}{meant or ': choose with --name'}"
    raise FileNotFoundError(f"no archive {wanted}.mar in {model_store}: {how}")


def runtime_of(archive: Path) -> str:
    """The runtime that `archive` was made for, by the files in it: one of MODEL_FILES.

    Raises:
        zipfile.BadZipFile: it is not an archive.
    """
    with zipfile.ZipFile(archive) as file:
        return "openvino" if {*MODEL_FILES["openvino"]} <= {*file.namelist()} else "eager"


def fetch(uri: str, name: str | None = None) -> Path:
    """A new folder with the archives in `uri`, a Cloud Storage folder `gs://BUCKET/FOLDER`, and their digests.

    Subfolders are left out.

    Raises:
        FileNotFoundError: there is none; other errors are google-cloud-storage's own.
    """
    from google.cloud import storage

    folder = Path(tempfile.mkdtemp(prefix="model-store-"))
    bucket, _, prefix = uri.removeprefix("gs://").rstrip("/").partition("/")
    for blob in storage.Client().list_blobs(bucket, prefix=f"{prefix}/" if prefix else None, delimiter="/"):
        file = blob.name.rpartition("/")[2]
        archive = file.removesuffix(".sha256")
        if archive.endswith(".mar") and name in (None, archive.removesuffix(".mar")):
            blob.download_to_filename(folder / file)
    if not any(folder.glob("*.mar")):
        raise FileNotFoundError(f"no archive {name or '*'}.mar in {uri}")
    return folder


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m deployment.archive", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default="model_store", help="what the export wrote (default: %(default)s)")
    parser.add_argument("--name", default="fastunet", help="name of the model, and so of its route: %(default)s")
    parser.add_argument("--version", default="1.0", help="default: %(default)s")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="set batchSize for it; cuda: say what fp16 would bring"
    )
    args = parser.parse_args()
    try:
        if args.device:
            set_batch_size(args.folder, args.device)
        if args.device == "cuda":
            print(about_half_precision(read_config(args.folder)))
        archive = make_archive(args.folder, args.name, args.version)
    except ArchiveError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {archive} ({archive.stat().st_size / 1e6:.0f} MB) and its digest, {digest_file(archive).name}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
