"""LitServe: WORKERS processes, batches by LitServe, photos read in the worker as its API provides."""

import sys
from typing import Annotated

import litserve
from fastapi import Body, Response

from benchmark import peers


class Segment(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.handler = peers.load(sys.argv[1])

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]):
        return peers.read(self.handler, request)

    def batch(self, jobs: list) -> list:
        return jobs

    def predict(self, jobs: list) -> list:
        peers.infer(self.handler, jobs)
        return jobs

    def unbatch(self, jobs: list) -> list:
        return jobs

    def encode_response(self, job) -> Response:
        answer = self.handler.postprocess(job)
        return Response(answer.body, answer.status, media_type=answer.content_type)


if __name__ == "__main__":
    api = Segment(max_batch_size=peers.BATCH_SIZE, batch_timeout=peers.DELAY, api_path="/predict")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=peers.WORKERS, timeout=120)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning")
