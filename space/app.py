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

from answers import palette  # noqa: E402  (both come out of the archive)
from handler import Handler  # noqa: E402

handler = Handler()
handler.load(unpacked.name)


def ask(photo: bytes) -> dict:
    """The handler's answer to one photo, or an error with its `message`."""
    job = handler.preprocess({"data": photo, "size": "original"})
    handler.inference([photo for photo in job.photos if not photo.error])
    return json.loads(handler.postprocess(job).body)


build(ask, palette, HERE / Path(SAMPLE).name, "the model in this Space").launch(footer_links=[])
