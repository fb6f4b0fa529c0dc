"""Run the notebooks head to foot: `python notebook/run.py 01 02 03 --into model_store -p EPOCHS 3`.

Each notebook runs in a kernel of its own, in the folder `notebook`. The lines that cells tagged `report` print are
repeated here, and the epochs of a training as they end. With `--into FOLDER` the executed notebooks are written there
and the originals stay as they are; without it their outputs are written into the originals.
"""

import argparse
import base64
import hashlib
import io
import logging
import os
import sys
import tempfile
import threading
from modulefinder import ModuleFinder
from pathlib import Path

import nbformat
import papermill
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client import AsyncKernelClient, AsyncKernelManager
from papermill.exceptions import PapermillExecutionError
from PIL import Image
from traitlets import Type

import progress

HERE = Path(__file__).parent
DATA_SETS = ("scenes", "camvid_tiny")
BAR = "{desc}{bar:30} {n_fmt}/{total_fmt} cells, {elapsed}"


class Client(AsyncKernelClient):
    """A client of a kernel that closes in seconds, so that a run ends after its last cell.

    jupyter_client's own listens to the kernel's heartbeat in a thread, and waits for this thread to end. That may
    take for ever, as the thread may read from a socket that another one has closed. nbclient sees by the process
    whether the kernel lives, and needs no heartbeat.
    """

    def start_channels(self, **channels: bool) -> None:  # pyrefly: ignore[bad-override]
        super().start_channels(**channels | {"hb": False})

    def stop_channels(self) -> None:
        """Close the channels, for five seconds at most: the kernel has ended by now, and nothing waits for them."""
        closing = threading.Thread(target=super().stop_channels, daemon=True)
        closing.start()
        closing.join(5)


class Manager(AsyncKernelManager):
    """jupyter_client's own, with `Client`."""

    client_factory = Type(Client, klass=AsyncKernelClient)


def run(notebook: Path, output: Path, parameters: dict[str, str | int]) -> nbformat.NotebookNode:
    """Execute `notebook` with `parameters`, write it to `output`, and return it.

    Raises:
        PapermillExecutionError: a cell failed; `output` shows which.
    """
    takes = papermill.inspect_notebook(notebook)
    # It warns that it listens on loopback, and an interrupt is an error to it. That of a cell is in the notebook.
    arguments = ["--IPKernelApp.log_level=50"]
    if "EPOCHS" in takes:  # it trains
        arguments.append("--IPKernelApp.exec_lines=import progress; progress.report()")
    with progress.shown():
        papermill.execute_notebook(
            notebook,
            output,
            parameters={name: value for name, value in parameters.items() if name in takes},
            cwd=HERE,
            kernel_name="python3",
            kernel_manager_class=Manager,
            extra_arguments=arguments,
            progress_bar={"desc": f"{notebook.stem}: ", "bar_format": BAR},
        )
    return nbformat.read(output, as_version=4)  # pyrefly: ignore[bad-return]


def numbered(number: str) -> Path:
    """The notebook whose name starts with `number`; raises ValueError where there is none."""
    notebooks = {path.name.partition("_")[0]: path for path in sorted(HERE.glob("*_*.ipynb"))}
    if number not in notebooks:
        raise ValueError(f"there is no notebook {number}: there are {', '.join(notebooks)}")
    return notebooks[number]


def check(parameters: dict[str, str | int]) -> None:
    """What would fail minutes later otherwise.

    Raises:
        ValueError: DATA is no data set and no folder, LEARNER no file, EPOCHS no number, or ARCH makes no U-Net.
    """
    sys.path.insert(0, str(HERE.parent))
    data = str(parameters.get("DATA", DATA_SETS[0]))
    if data not in DATA_SETS and not Path(data).expanduser().is_dir():
        from deployment.archive import near

        folders = [path.name for path in Path(data).parent.glob("*") if path.is_dir()]
        meant = near(data, DATA_SETS) or near(Path(data).name, folders) or f": give {', '.join(DATA_SETS)} or a folder"
        raise ValueError(f"DATA={data}: there is no such folder{meant}")
    if (learner := parameters.get("LEARNER")) and not Path(str(learner)).is_file():
        raise ValueError(f"LEARNER={learner}: there is no such file")
    epochs = parameters.get("EPOCHS", 1)
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"EPOCHS={epochs}: give a whole number, 1 or more")
    if arch := parameters.get("ARCH"):
        import torch

        from deployment.model import DynamicUnetDIY

        try:
            with torch.device("meta"):  # shapes alone
                DynamicUnetDIY(str(arch), 2)
        except ValueError as e:
            raise ValueError(f"ARCH={arch}: {e}") from e


def report(executed: nbformat.NotebookNode) -> str:
    """What the cells tagged `report` printed."""
    cells = [c for c in executed.cells if "report" in c.metadata.get("tags", [])]
    return "".join(o.text for c in cells for o in c.outputs if o.output_type == "stream" and o.name == "stdout")


def source_hash(notebook: nbformat.NotebookNode) -> str:
    """A hash of the code in `notebook` and in the modules of this repository that it imports.

    It is kept with the outputs, so that a test sees when they are older than the code.
    """
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    code = "\n".join(TransformerManager().transform_cell(source) for source in cells)
    finder = ModuleFinder([str(HERE.parent), str(HERE)], excludes=["tests"])  # no package, which it cannot follow
    finder.scan_code(compile(code, "notebook", "exec"), finder.add_module("__main__"))
    paths = [getattr(module, "__file__", None) for module in finder.modules.values()]
    files = sorted(path for path in paths if path)
    sources = [source.encode() for source in cells] + [Path(file).read_bytes() for file in files]
    return hashlib.sha256(b"\0".join(sources)).hexdigest()


def shrink_pictures(executed: nbformat.NotebookNode) -> None:
    """Give the pictures in outputs 256 colors, a third of the bytes: they stay in the repository's history."""
    for cell in executed.cells:
        for output in cell.get("outputs", []):
            if picture := output.get("data", {}).get("image/png"):
                image, smaller = Image.open(io.BytesIO(base64.b64decode(picture))), io.BytesIO()
                image.convert("RGB").quantize(256).save(smaller, "PNG", optimize=True)
                output["data"]["image/png"] = base64.b64encode(smaller.getvalue()).decode()


def write_outputs(executed: nbformat.NotebookNode, notebook: Path) -> None:
    """Replace `notebook` by `executed`, less what the run itself added: parameters, times, and whose home it was in."""
    executed.metadata.pop("papermill", None)
    executed.cells = [c for c in executed.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    for count, cell in enumerate((c for c in executed.cells if c.cell_type == "code"), 1):
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if output.output_type == "stream":
                output.text = output.text.replace(f"{HERE.parent}/", "../").replace(f"{Path.home()}/", "~/")
    executed.metadata["sources"] = source_hash(executed)
    shrink_pictures(executed)
    for cell in executed.cells:
        for added in ("papermill", "execution"):
            cell.metadata.pop(added, None)
    part = notebook.with_suffix(".part")
    nbformat.write(executed, part)
    os.replace(part, notebook)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="+", help="which notebooks, by the number that their name starts with")
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="where the executed notebooks go")
    parser.add_argument("-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    args = parser.parse_args()
    logging.getLogger("papermill").setLevel(logging.WARNING)
    os.environ |= {"PYTHONWARNINGS": "ignore", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}

    parameters = {name: int(value) if value.isdecimal() else value for name, value in args.parameters}
    try:
        notebooks = [numbered(number) for number in args.numbers]
        check(parameters)
    except ValueError as e:
        sys.exit(f"error: {e}")
    for name in ("DATA", "STORE", "LEARNER", "PHOTO"):  # paths from here; the kernel runs in notebook/
        if os.path.exists(path := str(parameters.get(name, ""))):
            parameters[name] = os.path.relpath(path, HERE)
    for notebook in notebooks:
        with tempfile.TemporaryDirectory() as scratch:
            output = (args.into or Path(scratch)) / notebook.name
            try:
                executed = run(notebook, output, parameters)
            except PapermillExecutionError as e:
                kept = f"\nThe notebook as far as it ran: {output}" if args.into else ""
                sys.exit(f"error in {notebook.name}, cell {e.exec_count}: {e.ename}: {e.evalue}{kept}")
            if not args.into:
                write_outputs(executed, notebook)
        print(report(executed), flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
