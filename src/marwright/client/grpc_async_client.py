"""The same as grpc_client, for asyncio."""

from __future__ import annotations

import random as randomness
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from pathlib import Path
from types import TracebackType

from marwright.client import grpc_inference, grpc_models
from marwright.client.endpoint import Endpoint
from marwright.client.grpc_calls import MESSAGE_BYTES, Caller
from marwright.client.grpc_drivers import AsyncDriver, Stream, end_too_early
from marwright.client.grpc_inference import (
    make_sequence,
    open_sequence,
    open_stream,
    read_prediction,
    read_sequence_answer,
)
from marwright.client.inputs import Input
from marwright.client.methods import awaited
from marwright.client.results import Answer
from marwright.client.retries import Retries

__all__ = ["AsyncGrpcClient", "AsyncGrpcModels"]


class AsyncGrpcClient:
    """Talks to one server over gRPC; use it in an `async with` block, or await `close`.

    Names, parameters and errors are those of GrpcClient; each object belongs to one event loop.

    Example:
        async with AsyncGrpcClient(endpoint) as client:
            async for answer in client.predict_stream("teller", b"Once"):
                print(answer.body.decode())
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        timeout: float = 30.0,
        start_timeout: float = 300.0,
        retries: Retries | None = None,
        random: Callable[[], float] = randomness.random,
        jar: Path | None = None,
        max_message_bytes: int = MESSAGE_BYTES,
    ) -> None:
        self.endpoint = endpoint
        self._caller = Caller(
            endpoint,
            timeout=timeout,
            start_timeout=start_timeout,
            retries=retries,
            random=random,
            jar=jar,
            max_message_bytes=max_message_bytes,
        )
        self._driver = AsyncDriver(self._caller)
        self._run = self._driver.run
        self.models = AsyncGrpcModels(self._driver)

    async def __aenter__(self) -> AsyncGrpcClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; calls that are under way end."""
        await self._driver.close()

    predict = awaited(grpc_inference.predict)
    predict_parts = awaited(grpc_inference.predict_parts)
    health = awaited(grpc_inference.ask_health)

    async def predict_stream(
        self,
        name: str,
        data: Input,
        *,
        version: str | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[Answer]:
        """Send one input, and yield the parts of the answer as they come.

        `timeout` holds for the whole stream; it is sent again only before the first part. The
        handler must answer in parts: TorchServe 0.12 loses the worker of one that does not.
        Leaving the loop early cancels the call.
        """
        started = time.monotonic()
        stream = await self._run(open_stream(name, data, version=version, timeout=timeout))
        try:
            while stream.first is not None:
                yield read_prediction(stream.first, time.monotonic() - started)
                stream.first = await self._driver.read(stream)
        finally:
            stream.call.cancel()

    async def predict_sequence(
        self,
        name: str,
        inputs: Iterable[Input] | AsyncIterable[Input],
        *,
        version: str | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[Answer]:
        """Send inputs over one open stream, and yield the answer to each before the next is sent.

        For models that are configured for sequences (`sequenceBatching`); the handler must answer
        each input once, and must not raise: TorchServe 0.12 then loses the worker, and this call
        waits until its time is over. `timeout` holds for the whole sequence; nothing is sent
        again. A problem that the handler writes ends the sequence.
        """
        make_message = make_sequence(self._caller, name, version=version)
        stream: Stream | None = None
        try:
            async for data in _iterate(inputs):
                started = time.monotonic()
                message = make_message(data)
                if stream is None:
                    attempt = await self._run(open_sequence(timeout=timeout))
                    stream = await self._driver.open(attempt, message)
                else:
                    stream.first = await self._driver.read(stream, message)
                if stream.first is None:
                    raise end_too_early(name)
                seconds = time.monotonic() - started
                yield read_sequence_answer(
                    stream.first, seconds, address=self.endpoint.grpc_inference
                )
            if stream is not None:
                await stream.call.done_writing()
                await self._driver.read(stream)
        finally:
            if stream is not None:
                stream.call.cancel()


class AsyncGrpcModels:
    """Models of one server; versions are named in every call that changes something."""

    def __init__(self, driver: AsyncDriver) -> None:
        self._run = driver.run

    list = awaited(grpc_models.list_models)
    describe = awaited(grpc_models.describe)
    versions = awaited(grpc_models.list_versions)
    register = awaited(grpc_models.register)
    scale = awaited(grpc_models.scale)
    set_default = awaited(grpc_models.set_default)
    unregister = awaited(grpc_models.unregister)


async def _iterate(inputs: Iterable[Input] | AsyncIterable[Input]) -> AsyncIterator[Input]:
    if isinstance(inputs, AsyncIterable):
        async for data in inputs:
            yield data
    else:
        for data in inputs:
            yield data
