"""LitServe: two workers that batch up to 32, two API servers, its fast queue."""

import os
from typing import Annotated

import litserve
from fastapi import Body, Response
from pipeline import Classifier, Pixels


class Server(litserve.LitAPI):
    """The hooks that LitServe calls, in their order."""

    def setup(self, device: str) -> None:
        """Load the model, once a worker."""
        self.classifier = Classifier.from_environment()

    def decode_request(self, request: Annotated[bytes, Body()]) -> Pixels:
        """Decode one image; the annotation makes LitServe pass a body on as it is."""
        return self.classifier.decode(request)

    def batch(self, inputs: list[Pixels]) -> list[Pixels]:
        """Keep the list: the model stacks it."""
        return inputs

    def predict(self, inputs: list[Pixels]) -> list[str]:
        """Run one batch."""
        return self.classifier.predict(inputs)

    def unbatch(self, output: list[str]) -> list[str]:
        """Give each request its own."""
        return output

    def encode_response(self, output: str) -> Response:
        """Answer the text as it is, without encoding it again."""
        return Response(output, media_type="application/json")


if __name__ == "__main__":
    server = litserve.LitServer(
        Server(max_batch_size=32, batch_timeout=0.001, api_path="/classify"),
        accelerator="cpu",
        workers_per_device=2,
        fast_queue=True,
    )
    server.run(
        host="127.0.0.1",
        port=int(os.environ["BENCH_PORT"]),
        num_api_servers=2,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )
