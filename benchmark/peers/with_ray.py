"""Ray Serve: WORKERS replicas, batches by Ray Serve."""

import os
import signal
import sys
import threading

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from benchmark import peers
from deployment import protocol


@serve.deployment(num_replicas=peers.WORKERS, max_ongoing_requests=64)
class Segment:
    def __init__(self, model_dir: str) -> None:
        self.handler = peers.load(model_dir)

    @serve.batch(max_batch_size=peers.BATCH_SIZE, batch_wait_timeout_s=peers.DELAY)
    async def segment(self, bodies: list[bytes]) -> list[protocol.Response]:
        jobs = [peers.read(self.handler, body) for body in bodies]
        peers.infer(self.handler, jobs)
        return [self.handler.postprocess(job) for job in jobs]

    async def __call__(self, request: Request) -> Response:
        answer = await self.segment(await request.body())
        return Response(answer.body, answer.status, media_type=answer.content_type)


if __name__ == "__main__":
    model_dir, port = sys.argv[1:]
    os.environ["RAY_raylet_start_wait_time_s"] = "120"  # the first start reads much from disk
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    ray.init(_node_ip_address="127.0.0.1", include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    environment = {
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]}}
    }  # Ray sets it to 1 otherwise
    serve.run(Segment.options(ray_actor_options=environment).bind(model_dir), route_prefix="/predict")
    stopped.wait()
    serve.shutdown()
    ray.shutdown()
