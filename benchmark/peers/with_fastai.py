"""fastai's own `learn.predict` behind FastAPI: what one does before knowing better."""

import base64
import sys
import threading

import uvicorn
from fastai.vision.all import PILImage
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool

from deployment.export import load_learner

app = FastAPI()
learn = load_learner(f"{sys.argv[1]}/learner.pkl")
model = threading.Lock()  # a learner keeps state while it predicts


def segment(body: bytes) -> dict:
    with model, learn.no_bar():
        mask = learn.predict(PILImage.create(body))[0].numpy().astype("uint8")
    return {"base64_prediction": base64.b64encode(mask.tobytes()).decode(), "shape": mask.shape}


@app.post("/predict")
async def predict(request: Request) -> dict:
    return await run_in_threadpool(segment, await request.body())


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
