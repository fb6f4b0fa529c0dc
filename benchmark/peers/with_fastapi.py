"""FastAPI on uvicorn: one process; photos are read in threads while another is in the model."""

import sys
import threading

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

from benchmark import peers

app = FastAPI()
handler = peers.load(sys.argv[1])
model = threading.Lock()


def segment(body: bytes) -> bytes:
    photo = peers.read(handler, body)
    with model:
        handler.inference([photo])
    return peers.answer(handler, photo)


@app.post("/predict")
async def predict(request: Request) -> Response:
    return Response(await run_in_threadpool(segment, await request.body()), media_type="application/json")


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
