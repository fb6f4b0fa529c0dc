"""FastAPI on uvicorn: WORKERS processes; photos are read in threads while others are in the model."""

import os
import sys

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

from benchmark import peers
from deployment import protocol

app = FastAPI()
if __name__ != "__main__":  # in a worker
    handler = peers.load(os.environ["MODEL_DIR"])


def segment(body: bytes) -> protocol.Response:
    job = peers.read(handler, body)
    peers.infer(handler, [job])
    return handler.postprocess(job)


@app.post("/predict")
async def predict(request: Request) -> Response:
    answer = await run_in_threadpool(segment, await request.body())
    return Response(answer.body, answer.status, media_type=answer.content_type)


if __name__ == "__main__":
    os.environ["MODEL_DIR"] = sys.argv[1]
    app = "benchmark.peers.with_fastapi:app"
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), workers=peers.WORKERS, log_level="warning")
