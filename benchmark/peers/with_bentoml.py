"""BentoML: WORKERS processes; photos are read in their threads while others are in the model.

Its own batches need clients that send lists, so none are made here: a batch gains little on a CPU.
"""

import os
import sys
from typing import Annotated

import bentoml
from bentoml.validators import ContentType

from benchmark import peers


@bentoml.service(workers=peers.WORKERS, threads=8, traffic={"timeout": 120}, metrics={"enabled": False})
class Segment:
    def __init__(self) -> None:
        self.handler = peers.load(os.environ["MODEL_DIR"])

    @bentoml.api(route="/predict")
    def predict(
        self, body: Annotated[bytes, ContentType("application/octet-stream")], /, ctx: bentoml.Context
    ) -> Annotated[bytes, ContentType("application/json")]:
        job = peers.read(self.handler, body)
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
