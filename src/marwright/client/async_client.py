"""The same client for asyncio: the same methods, awaited."""

from __future__ import annotations

import asyncio
import random as randomness
from collections.abc import AsyncGenerator, Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from marwright.client import inference, models
from marwright.client.async_transport import AsyncTransport
from marwright.client.batches import WAIT, Outcome, ask, keep_in_flight
from marwright.client.endpoint import Endpoint
from marwright.client.exchange import Exchanges
from marwright.client.methods import awaited
from marwright.client.retries import Retries

if TYPE_CHECKING:
    import aiohttp

__all__ = ["AsyncClient", "AsyncModels"]


class AsyncModels:
    """Models of one server; versions are named in every call that changes something."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._run = transport.run

    list = awaited(models.list_models)
    list_page = awaited(models.list_page)
    describe = awaited(models.describe)
    versions = awaited(models.list_versions)
    register = awaited(models.register)
    scale = awaited(models.scale)
    set_default = awaited(models.set_default)
    unregister = awaited(models.unregister)
    wait_until_ready = awaited(models.wait_until_ready)


class AsyncClient:
    """Talks to one server; use it in an `async with` block, or await `close`.

    Example:
        async with AsyncClient(endpoint) as client:
            print((await client.predict("cnn", Path("seven.png"))).json())

    The parameters are Client's. One client belongs to one event loop. Files are read where they
    are sent from, in the loop: for a slow disk read them elsewhere and pass their bytes.

    Raises:
        UsageError: aiohttp is not installed.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        timeout: float = 30.0,
        start_timeout: float = 300.0,
        connections: int = 64,
        retries: Retries | None = None,
        random: Callable[[], float] = randomness.random,
        session: aiohttp.ClientSession | None = None,
    ) -> None:
        self.endpoint = endpoint
        exchanges = Exchanges(endpoint, timeout, start_timeout, retries or Retries(), random)
        self._transport = AsyncTransport(exchanges, session, connections)
        self._run = self._transport.run
        self.models = AsyncModels(self._transport)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections, unless the session was injected."""
        await self._transport.close()

    predict = awaited(inference.predict)
    predict_parts = awaited(inference.predict_parts)
    predict_v1 = awaited(inference.predict_v1)
    explain = awaited(inference.explain)
    explain_v1 = awaited(inference.explain_v1)
    infer = awaited(inference.infer)
    health = awaited(inference.ask_health)
    metrics = awaited(inference.read_metrics)
    metrics_text = awaited(inference.read_metrics_text)
    openapi = awaited(inference.read_openapi)

    async def predict_many(
        self,
        name: str,
        inputs: Iterable[Any],
        *,
        in_flight: int = 16,
        version: str | None = None,
        accept: str | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[Outcome, None]:
        """Send inputs as `predict` does, so many at a time, and yield (input, answer or error).

        They come as they finish, in no order. Inputs may be without end: they are taken one by
        one. Whoever stops taking outcomes ends what is in flight: close the iterator, or leave
        it to contextlib.aclosing.
        """
        done: asyncio.Queue[asyncio.Task[Outcome]] = asyncio.Queue()
        tasks: set[asyncio.Task[Outcome]] = set()
        try:
            for step in keep_in_flight(inputs, in_flight):
                if step is WAIT:
                    task = await done.get()
                    tasks.discard(task)
                    yield task.result()
                    continue
                asked = ask(name, step, version=version, accept=accept, timeout=timeout)
                task = asyncio.create_task(self._run(asked))
                tasks.add(task)
                task.add_done_callback(done.put_nowait)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
