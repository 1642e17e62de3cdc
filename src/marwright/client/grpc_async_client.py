"""The same as grpc_client, for asyncio."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from pathlib import Path
from types import TracebackType

from marwright.client.endpoint import Endpoint
from marwright.client.grpc_calls import (
    BODY,
    MESSAGE_BYTES,
    Caller,
    read_prediction,
)
from marwright.client.grpc_drivers import AsyncDriver, Stream, end_too_early
from marwright.client.grpc_models import ModelScripts
from marwright.client.inputs import Input
from marwright.client.results import Answer, Health, ModelSummary, ModelVersion
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
        jar: Path | None = None,
        max_message_bytes: int = MESSAGE_BYTES,
    ) -> None:
        self.endpoint = endpoint
        self._caller = Caller(
            endpoint,
            timeout=timeout,
            start_timeout=start_timeout,
            retries=retries,
            jar=jar,
            max_message_bytes=max_message_bytes,
        )
        self._driver = AsyncDriver(self._caller)
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

    async def predict(
        self,
        name: str,
        data: Input,
        *,
        version: str | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """Send one input; bytes and files as they are, dicts and lists as JSON, arrays as npy.

        The handler must not answer in parts: TorchServe 0.12 loses the worker over it.

        Raises:
            InputRejectedError: one of marwright's handlers refused the input.
            ModelNotFoundError: no such model or version.
            OverloadedError: no room in the queue, or no worker, after all tries.
        """
        return await self.predict_parts(name, {BODY: data}, version=version, timeout=timeout)

    async def predict_parts(
        self,
        name: str,
        parts: Mapping[str, Input],
        *,
        version: str | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """Send one input of several parts, each under its name."""
        return await self._driver.run(
            self._caller.predict(name, parts, version=version, timeout=timeout)
        )

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
        stream = await self._driver.run(
            self._caller.open_stream(name, data, version=version, timeout=timeout)
        )
        try:
            while stream.first is not None:
                yield read_prediction(stream.first, started)
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
        make_message = self._caller.make_sequence(name, version=version)
        stream: Stream | None = None
        try:
            async for data in _iterate(inputs):
                started = time.monotonic()
                message = make_message(data)
                if stream is None:
                    stream = await self._driver.open(self._caller.open_sequence(timeout), message)
                else:
                    stream.first = await self._driver.read(stream, message)
                if stream.first is None:
                    raise end_too_early(name)
                yield self._caller.read_sequence_answer(stream.first, started)
            if stream is not None:
                await stream.call.done_writing()
                await self._driver.read(stream)
        finally:
            if stream is not None:
                stream.call.cancel()

    async def health(self, *, timeout: float | None = None) -> Health:
        """Ask the inference service whether the server is up."""
        return await self._driver.run(self._caller.health(timeout))


class AsyncGrpcModels:
    """Models of one server; versions are named in every call that changes something."""

    def __init__(self, driver: AsyncDriver) -> None:
        self._driver = driver
        self._scripts = ModelScripts(driver.caller)

    async def list(self, *, timeout: float | None = None) -> tuple[ModelSummary, ...]:
        """Return every registered model, all pages of them."""
        return await self._driver.run(self._scripts.list(timeout))

    async def describe(
        self, name: str, version: str | None = None, *, timeout: float | None = None
    ) -> ModelVersion:
        """Return one version of a model: the default version where none is named.

        Raises:
            ModelNotFoundError: no such model or version.
        """
        return await self._driver.run(self._scripts.describe(name, version, timeout))

    async def versions(
        self, name: str, *, timeout: float | None = None
    ) -> tuple[ModelVersion, ...]:
        """Return every version of a model, lowest first as TorchServe sorts them."""
        return await self._driver.run(self._scripts.versions(name, timeout))

    async def register(
        self,
        archive: str,
        *,
        workers: int = 1,
        name: str | None = None,
        handler: str | None = None,
        runtime: str | None = None,
        batch_size: int | None = None,
        max_batch_delay_ms: int | None = None,
        response_timeout: int | None = None,
        startup_timeout: int | None = None,
        s3_sse_kms: bool = False,
        synchronous: bool = True,
        timeout: float | None = None,
    ) -> ModelVersion | None:
        """Register an archive by its file name in the server's store; wait for its workers.

        What is None the archive or the server decides. `response_timeout` and `startup_timeout`
        are the workers' and in seconds; `timeout` is this call's.

        Raises:
            ConflictError: this archive is registered already.
            ModelNotFoundError: the store holds no such file.
            AnswerError: the workers did not start.
            UsageError: no workers, which gRPC cannot say.
        """
        return await self._driver.run(
            self._scripts.register(
                archive,
                {
                    "initial_workers": workers,
                    "model_name": name,
                    "handler": handler,
                    "runtime": runtime,
                    "batch_size": batch_size,
                    "max_batch_delay": max_batch_delay_ms,
                    "response_timeout": response_timeout,
                    "startup_timeout": startup_timeout,
                    "s3_sse_kms": s3_sse_kms,
                    "synchronous": synchronous,
                },
                timeout,
            )
        )

    async def scale(
        self,
        name: str,
        workers: int,
        *,
        version: str | None = None,
        max_workers: int | None = None,
        synchronous: bool = True,
        timeout: float | None = None,
    ) -> ModelVersion:
        """Set how many workers a version has, at least one; wait for them unless told not to."""
        return await self._driver.run(
            self._scripts.scale(
                name,
                {
                    "min_worker": workers,
                    "max_worker": max_workers or workers,
                    "synchronous": synchronous,
                },
                version,
                timeout,
            )
        )

    async def set_default(
        self, name: str, version: str, *, force: bool = False, timeout: float | None = None
    ) -> ModelVersion:
        """Make a version the one that answers where none is named.

        Raises:
            OverloadedError: the version has no READY worker, and `force` does not say that it need
                not have any; nothing was changed.
        """
        return await self._driver.run(self._scripts.set_default(name, version, force, timeout))

    async def unregister(self, name: str, version: str, *, timeout: float | None = None) -> None:
        """Remove one version; the archive stays in the store.

        Raises:
            ConflictError: it is the default version and others exist.
        """
        await self._driver.run(self._scripts.unregister(name, version, timeout))


async def _iterate(inputs: Iterable[Input] | AsyncIterable[Input]) -> AsyncIterator[Input]:
    if isinstance(inputs, AsyncIterable):
        async for data in inputs:
            yield data
    else:
        for data in inputs:
            yield data
