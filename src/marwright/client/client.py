"""One object for one server: predict, ask for health, and manage its models."""

from __future__ import annotations

import random as randomness
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any

from marwright.client import inference, models
from marwright.client.batches import WAIT, Outcome, ask, keep_in_flight
from marwright.client.endpoint import Endpoint
from marwright.client.exchange import Exchanges
from marwright.client.methods import blocking
from marwright.client.retries import Retries
from marwright.client.transport import Transport, make_session

if TYPE_CHECKING:
    import requests

__all__ = ["Client", "Models"]


class Models:
    """Models of one server; versions are named in every call that changes something."""

    def __init__(self, transport: Transport) -> None:
        self._run = transport.run

    list = blocking(models.list_models)
    list_page = blocking(models.list_page)
    describe = blocking(models.describe)
    versions = blocking(models.list_versions)
    register = blocking(models.register)
    scale = blocking(models.scale)
    set_default = blocking(models.set_default)
    unregister = blocking(models.unregister)
    wait_until_ready = blocking(models.wait_until_ready)


class Client:
    """Talks to one server; use it in a `with` block, or call `close`. Threads may share one.

    Example:
        with Client(Endpoint("http://127.0.0.1:8080", "http://127.0.0.1:8081")) as client:
            print(client.predict("cnn", Path("seven.png")).json())

    `timeout` is in seconds and holds for a whole call, with all its tries and pauses;
    `start_timeout` for calls that wait for workers. `connections` are kept open at most. An
    injected session is used as it is and stays open.
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
        session: requests.Session | None = None,
    ) -> None:
        self.endpoint = endpoint
        exchanges = Exchanges(endpoint, timeout, start_timeout, retries or Retries(), random)
        self._owns_session = session is None
        self._session = session or make_session(endpoint, connections)
        transport = Transport(exchanges, self._session)
        self._run = transport.run
        self.models = Models(transport)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, unless the session was injected."""
        if self._owns_session:
            self._session.close()

    predict = blocking(inference.predict)
    predict_parts = blocking(inference.predict_parts)
    predict_v1 = blocking(inference.predict_v1)
    explain = blocking(inference.explain)
    explain_v1 = blocking(inference.explain_v1)
    infer = blocking(inference.infer)
    health = blocking(inference.ask_health)
    metrics = blocking(inference.read_metrics)
    metrics_text = blocking(inference.read_metrics_text)
    openapi = blocking(inference.read_openapi)

    def predict_many(
        self,
        name: str,
        inputs: Iterable[Any],
        *,
        in_flight: int = 16,
        version: str | None = None,
        accept: str | None = None,
        timeout: float | None = None,
    ) -> Generator[Outcome, None, None]:
        """Send inputs as `predict` does, so many at a time, and yield (input, answer or error).

        They come as they finish, in no order. Inputs may be without end: they are taken one by
        one. Whoever stops taking outcomes waits for what is in flight, and sends no more.
        """
        done: SimpleQueue[Future[Outcome]] = SimpleQueue()
        steps = keep_in_flight(inputs, in_flight)
        with ThreadPoolExecutor(in_flight, thread_name_prefix="predict") as pool:
            for step in steps:
                if step is WAIT:
                    yield done.get().result()
                    continue
                asked = ask(name, step, version=version, accept=accept, timeout=timeout)
                pool.submit(self._run, asked).add_done_callback(done.put)
