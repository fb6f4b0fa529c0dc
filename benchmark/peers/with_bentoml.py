"""BentoML: one worker; photos are read in its threads while another is in the model.

Its own batches need clients that send lists, so none are made here: a batch gains little on a CPU.
"""

import os
import sys
import threading
from typing import Annotated

import bentoml
from bentoml.validators import ContentType

from benchmark import peers


@bentoml.service(workers=1, threads=8, traffic={"timeout": 120}, metrics={"enabled": False})
class Segment:
    def __init__(self) -> None:
        self.handler = peers.load(os.environ["MODEL_DIR"])
        self.model = threading.Lock()

    @bentoml.api(route="/predict")
    def predict(
        self, body: Annotated[bytes, ContentType("application/octet-stream")], /, ctx: bentoml.Context
    ) -> Annotated[bytes, ContentType("application/json")]:
        job = peers.read(self.handler, body)
        with self.model:
            peers.infer(self.handler, [job])
        answer = self.handler.postprocess(job)
        ctx.response.status_code = answer.status
        return answer.body


if __name__ == "__main__":
    os.environ["MODEL_DIR"] = sys.argv[1]
    address = ["--host", "127.0.0.1", "--port", sys.argv[2]]
    os.execv(
        sys.executable, [sys.executable, "-m", "bentoml", "serve", "benchmark.peers.with_bentoml:Segment", *address]
    )
