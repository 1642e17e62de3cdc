"""A gRPC server that answers as a test scripts it, and both clients asked in one way."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from marwright.client import Endpoint, Retries
from marwright.client.grpc_async_client import AsyncGrpcClient
from marwright.client.grpc_client import GrpcClient
from marwright.client.grpc_protocol import read_protocol
from marwright.server.certificate import Certificate

QUICK = Retries(tries=3, first=0.001, longest=0.001, after_loss=1)


class Fake(grpc.GenericRpcHandler):
    """A gRPC server that answers as a test scripts it, the last answer again and again."""

    def __init__(self, files: Certificate | None = None) -> None:
        self.replies: list[tuple[str, str] | bytes | None] = [b"ok"]
        """A status, what a handler answered, or the end of a sequence."""
        self.asked: list[str] = []
        self.act: Callable[[], None] = lambda: None
        """What it does when it is asked."""
        self.token = ""
        """The only one that it takes, if there is one."""
        self._server = grpc.server(ThreadPoolExecutor(8), handlers=[self])
        if files is None:
            port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            pair = files.key.read_bytes(), files.certificate.read_bytes()
            credentials = grpc.ssl_server_credentials([pair])
            port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def service(self, details: Any) -> grpc.RpcMethodHandler[Any, Any]:
        name = details.method.rpartition("/")[2]
        method = read_protocol().find(name)
        token = dict(details.invocation_metadata).get("authorization", "")

        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            self.asked.append(name)
            self.act()
            if self.token and token != f"Bearer {self.token}":
                context.abort(grpc.StatusCode.PERMISSION_DENIED, "Token Authorization failed. No")
            reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
            if isinstance(reply, tuple):
                context.abort(grpc.StatusCode[reply[0]], reply[1])
            if method.purpose == "inference":
                return method.response(prediction=reply)
            return method.response(msg=(reply or b"").decode())

        def answer_in_parts(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            yield answer(request, context)
            while len(self.replies) > 1:
                yield answer(request, context)

        def answer_in_turn(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            for request in requests:
                yield answer(request, context)
                if self.replies[0] is None:
                    return
                if isinstance(self.replies[0], tuple):  # without waiting for another input
                    answer(request, context)

        coders = (method.request.FromString, method.response.SerializeToString)
        if method.streams_requests:
            return grpc.stream_stream_rpc_method_handler(answer_in_turn, *coders)
        if method.streams_responses:
            return grpc.unary_stream_rpc_method_handler(answer_in_parts, *coders)
        return grpc.unary_unary_rpc_method_handler(answer, *coders)

    def close(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture
def make_fake() -> Iterator[Callable[..., Fake]]:
    """Return a function that starts another server."""
    with contextlib.ExitStack() as stack:

        def make(files: Certificate | None = None) -> Fake:
            fake = Fake(files)
            stack.callback(fake.close)
            return fake

        yield make


@pytest.fixture
def fake(make_fake: Callable[..., Fake]) -> Fake:
    return make_fake()


@pytest.fixture
def endpoint(fake: Fake) -> Endpoint:
    return Endpoint("", "", grpc_inference=fake.address, grpc_management=fake.address)


@pytest.fixture(params=[GrpcClient, AsyncGrpcClient])
def ask(request: pytest.FixtureRequest, endpoint: Endpoint) -> Callable[..., Any]:
    """Return a function that makes a client, calls a method of it, and closes it."""

    def run(method: str, *arguments: Any, point: Endpoint = endpoint, **options: Any) -> Any:
        limits = {key: options.pop(key) for key in ("jar", "retries") if key in options}
        client = request.param(point, **{"retries": QUICK, **limits})
        owner = client.models if method.startswith("models.") else client
        call = getattr(owner, method.removeprefix("models."))

        async def wait() -> Any:
            result = call(*arguments, **options)
            try:
                if inspect.isasyncgen(result):
                    return [item async for item in result]
                return await result
            finally:
                await client.close()

        if request.param is AsyncGrpcClient:
            return asyncio.run(wait())
        with client:
            result = call(*arguments, **options)
            return list(result) if inspect.isgenerator(result) else result

    return run
