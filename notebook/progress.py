"""The training's progress in the terminal: the kernel writes it to the file that PROGRESS names, run.py shows it."""

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm


def report() -> None:
    """In the kernel: from now on, every `fit` of every learner writes its progress to the file, a JSON list a line."""
    from fastai.callback.core import Callback
    from fastai.learner import Learner

    file = open(os.environ["PROGRESS"], "a", buffering=1)  # as long as the kernel runs

    class Report(Callback):
        order = 60  # after the recorder, whose figures it passes on

        def after_batch(self):
            what = "training" if self.training else "validation"
            print(json.dumps([what, self.epoch + 1, self.n_epoch, self.iter + 1, self.n_iter]), file=file)

        def after_epoch(self):
            figures = dict(zip(self.recorder.metric_names, self.recorder.log, strict=False))
            shown = [f"{k.replace('_', ' ')} {v:.3f}" for k, v in figures.items() if isinstance(v, float)]
            print(json.dumps(["end", self.epoch + 1, self.n_epoch, [*shown, figures["time"]]]), file=file)

    fit = Learner.fit

    def reporting_fit(self: Learner, *args: Any, **kwargs: Any) -> None:
        with self.added_cbs(Report()):  # for the time of the training only: no exported learner holds it
            fit(self, *args, **kwargs)

    Learner.fit = reporting_fit


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """In run.py: while the block runs, epochs appear in the terminal as they end, and a bar within each."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "progress")
        path.touch()
        os.environ["PROGRESS"] = str(path)
        ended = threading.Event()
        thread = threading.Thread(target=follow, args=(path, ended))
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            del os.environ["PROGRESS"]


def follow(path: Path, ended: threading.Event) -> None:
    """Show what is written to `path` until `ended`, and what is left then."""
    bar, text = None, ""
    with open(path) as file:
        while True:
            last = ended.wait(0.3)
            *lines, text = (text + file.read()).split("\n")
            for what, epoch, n_epochs, *rest in map(json.loads, lines):
                if what == "end":
                    if bar is not None:
                        bar.close()
                    bar = None
                    tqdm.write(f"  epoch {epoch}/{n_epochs}: {', '.join(rest[0])}")
                    continue
                if bar is None:
                    bar = tqdm(
                        position=1, leave=False, disable=None, bar_format="  {desc} {bar:30} {n_fmt}/{total_fmt}"
                    )
                bar.desc, bar.n, bar.total = f"epoch {epoch}/{n_epochs}, {what}", *rest
            if bar is not None:
                bar.refresh()
            if last:
                break
    if bar is not None:
        bar.close()
