"""The page with the model in process, as a Hugging Face Space runs it. README.md says what else lies in the Space.

The archive is all that it needs of the project: handler and modules, weights, configuration. TorchServe and fastai stay
out.
"""

import json
import sys
import tempfile
import zipfile
from pathlib import Path

from page import SAMPLE, build

HERE = Path(__file__).resolve().parent
unpacked = tempfile.TemporaryDirectory(prefix="fastunet-")
with zipfile.ZipFile(HERE / "fastunet.mar") as archive:
    archive.extractall(unpacked.name)
sys.path.insert(0, unpacked.name)

import handler  # noqa: E402  (it comes out of the archive, and the rest with it)

model = handler.Handler()
model.load(unpacked.name)


def ask(image: bytes) -> dict:
    """The handler's answer to one image, or an error with its `message`."""
    job = model.preprocess({"data": image, "size": "original"})
    model.inference([item for item in job.items if not item.error])
    return json.loads(model.postprocess(job).body)


build(ask, handler.answers.palette, HERE / Path(SAMPLE).name, "the model in this Space").launch(footer_links=[])
