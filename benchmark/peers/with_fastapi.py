"""FastAPI on uvicorn: one process; photos are read in threads while another is in the model."""

import sys
import threading

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

from benchmark import peers
from deployment import protocol

app = FastAPI()
handler = peers.load(sys.argv[1])
model = threading.Lock()


def segment(body: bytes) -> protocol.Response:
    job = peers.read(handler, body)
    with model:
        peers.infer(handler, [job])
    return handler.postprocess(job)


@app.post("/predict")
async def predict(request: Request) -> Response:
    answer = await run_in_threadpool(segment, await request.body())
    return Response(answer.body, answer.status, media_type=answer.content_type)


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
