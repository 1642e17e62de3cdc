"""One object for one server, over gRPC: predict, whole or in parts, and manage its models."""

from __future__ import annotations

import random as randomness
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from marwright.client import grpc_inference, grpc_models
from marwright.client.endpoint import Endpoint
from marwright.client.grpc_calls import MESSAGE_BYTES, Caller
from marwright.client.grpc_drivers import Driver, Stream, end_too_early
from marwright.client.grpc_inference import (
    make_sequence,
    open_sequence,
    open_stream,
    read_prediction,
    read_sequence_answer,
)
from marwright.client.inputs import Input
from marwright.client.methods import blocking
from marwright.client.results import Answer
from marwright.client.retries import Retries

__all__ = ["GrpcClient", "GrpcModels"]


class GrpcClient:
    """Talks to one server over gRPC; use it in a `with` block, or call `close`.

    Example:
        with GrpcClient(endpoint) as client:
            for answer in client.predict_stream("teller", b"Once"):
                print(answer.body.decode())

    `timeout` is in seconds and holds for a whole call, its tries included; `start_timeout` for
    calls that wait for workers. `jar` is a model-server.jar, where no TorchServe is installed.
    Answers carry no content type and no request id: gRPC has neither.

    Raises:
        UsageError: the extra `grpc` is not installed, or the protocol is not to be found.
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
        self._driver = Driver(self._caller)
        self._run = self._driver.run
        self.models = GrpcModels(self._driver)

    def __enter__(self) -> GrpcClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls that are under way end."""
        self._driver.close()

    predict = blocking(grpc_inference.predict)
    predict_parts = blocking(grpc_inference.predict_parts)
    health = blocking(grpc_inference.ask_health)

    def predict_stream(
        self,
        name: str,
        data: Input,
        *,
        version: str | None = None,
        timeout: float | None = None,
    ) -> Iterator[Answer]:
        """Send one input, and yield the parts of the answer as they come.

        `timeout` holds for the whole stream; it is sent again only before the first part. The
        handler must answer in parts: TorchServe 0.12 loses the worker of one that does not.
        Leaving the loop early cancels the call.
        """
        started = time.monotonic()
        stream = self._run(open_stream(name, data, version=version, timeout=timeout))
        try:
            while stream.first is not None:
                yield read_prediction(stream.first, time.monotonic() - started)
                stream.first = self._driver.read(stream)
        finally:
            stream.call.cancel()

    def predict_sequence(
        self,
        name: str,
        inputs: Iterable[Input],
        *,
        version: str | None = None,
        timeout: float | None = None,
    ) -> Iterator[Answer]:
        """Send inputs over one open stream, and yield the answer to each before the next is sent.

        For models that are configured for sequences (`sequenceBatching`); the handler must answer
        each input once, and must not raise: TorchServe 0.12 then loses the worker, and this call
        waits until its time is over. `timeout` holds for the whole sequence; nothing is sent
        again. A problem that the handler writes ends the sequence.
        """
        make_message = make_sequence(self._caller, name, version=version)
        waiting: SimpleQueue[Any] = SimpleQueue()
        stream: Stream | None = None
        try:
            for data in inputs:
                started = time.monotonic()
                waiting.put(make_message(data))
                if stream is None:
                    attempt = self._run(open_sequence(timeout=timeout))
                    stream = self._driver.open(attempt, iter(waiting.get, None))
                else:
                    stream.first = self._driver.read(stream)
                if stream.first is None:
                    raise end_too_early(name)
                seconds = time.monotonic() - started
                yield read_sequence_answer(
                    stream.first, seconds, address=self.endpoint.grpc_inference
                )
            waiting.put(None)
            if stream is not None:
                self._driver.read(stream)
        finally:
            waiting.put(None)  # whatever happened, the thread that sends must end
            if stream is not None:
                stream.call.cancel()


class GrpcModels:
    """Models of one server; versions are named in every call that changes something."""

    def __init__(self, driver: Driver) -> None:
        self._run = driver.run

    list = blocking(grpc_models.list_models)
    describe = blocking(grpc_models.describe)
    versions = blocking(grpc_models.list_versions)
    register = blocking(grpc_models.register)
    scale = blocking(grpc_models.scale)
    set_default = blocking(grpc_models.set_default)
    unregister = blocking(grpc_models.unregister)
