"""Ray Serve: two replicas with one core each, `serve.batch` up to 32, its high-throughput mode.

That mode (HAProxy in front, replicas that answer HTTP themselves; both switched on by environment
variables, see servers.py) gave it some ten times the requests of its ordinary proxy. HTTP stays on
loopback; ports of its own (gRPC, HAProxy's statistics) are open on all interfaces while it runs.
"""

from __future__ import annotations

import os
import signal

import ray
from pipeline import Classifier
from ray import serve
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment(num_replicas=2, max_ongoing_requests=128, ray_actor_options={"num_cpus": 1})
class Server:
    """One replica."""

    def __init__(self) -> None:
        self.classifier = Classifier.from_environment()

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.001)
    async def classify(self, images: list[bytes]) -> list[str]:
        """Answer a batch."""
        return self.classifier.classify(images)

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        return Response(await self.classify(await request.body()), media_type="application/json")


if __name__ == "__main__":
    ray.init(
        num_cpus=4,  # the two replicas', and some for what Ray itself starts
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=os.environ["BENCH_FOLDER"],
        object_store_memory=100 << 20,
        log_to_driver=False,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["BENCH_PORT"])})
        serve.run(Server.bind(), route_prefix="/classify")
        signal.pause()
    except KeyboardInterrupt:
        serve.shutdown()
        ray.shutdown()
