"""The same model, runtime and handler code as ours behind other servers, so that only the server differs.

Each module takes the folder of the model and a port: `python -m benchmark.peers.with_fastapi MODEL_DIR PORT`. They run
in an environment of their own, which `benchmark/requirements.txt` pins and `benchmark.run` makes. The variable WORKERS
says how many processes hold the model: one, which computes as many photos side by side as there are cores, or one for
each core. `benchmark.run` tries both and measures the faster.
"""

import os

from deployment.handler import Handler, Job

WORKERS = int(os.environ.get("WORKERS", 1))
BATCH_SIZE, DELAY = 4, 0.001  # photos and seconds, for the servers that make batches; with 16 they are slower


def load(model_dir: str) -> Handler:
    """Our handler, ready to answer, without TorchServe around it."""
    handler = Handler()
    handler.load(model_dir)
    return handler


def read(handler: Handler, body: bytes) -> Job:
    """The request in `body`, with the pixels of its images."""
    return handler.preprocess({"body": body})


def infer(handler: Handler, jobs: list[Job]) -> None:
    """Give every image of `jobs` that could be read its mask; `handler.postprocess` makes the answers."""
    handler.inference([item for job in jobs for item in job.items if not item.error])
