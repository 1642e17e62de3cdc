from __future__ import annotations

import asyncio
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from marwright.client import AsyncClient, Client, Endpoint, Retries
from marwright.client.async_client import AsyncModels
from marwright.client.client import Models
from marwright.errors import ClientError, ConnectionFailedError, UsageError

UNREACHABLE = Endpoint("http://127.0.0.1:9", "http://127.0.0.1:9")


def read_methods(kind: type[Any]) -> dict[str, tuple[str, str]]:
    """Return public methods: name to parameters and what is returned, awaited or not."""
    methods = {}
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        if not name.startswith("_"):
            signature = inspect.signature(method)
            result = re.sub(
                r"^(Coroutine\[Any, Any, (.*)\]|Async(.*))$", r"\2\3", signature.return_annotation
            )
            result = result.replace(", None", "")
            methods[name] = (str(signature.replace(return_annotation="")), result)
    return methods


@pytest.mark.parametrize(("one", "other"), [(Client, AsyncClient), (Models, AsyncModels)])
def test_both_clients_have_the_same_methods(one: type[Any], other: type[Any]) -> None:
    assert read_methods(one) == read_methods(other)
    assert len(read_methods(one)) >= 9
    assert all(getattr(one, name).__doc__ for name in read_methods(one))


def test_both_clients_are_made_alike_but_for_the_session() -> None:
    one, other = (
        {
            name: (parameter.kind, parameter.default)
            for name, parameter in inspect.signature(kind).parameters.items()
        }
        for kind in (Client, AsyncClient)
    )
    assert one == other


def test_the_signature_says_what_comes_back() -> None:
    assert str(inspect.signature(Client.predict)).endswith("-> 'Answer'")
    assert str(inspect.signature(AsyncClient.predict)).endswith("-> 'Coroutine[Any, Any, Answer]'")


def list_exceptions() -> list[type[Exception]]:
    names = [name for name in aiohttp.__all__ if isinstance(getattr(aiohttp, name), type)]
    kinds = [getattr(aiohttp, name) for name in names]
    return [kind for kind in kinds if issubclass(kind, aiohttp.ClientError)] + [
        asyncio.TimeoutError,
        OSError,
        ValueError,
        UnicodeError,
    ]


class RaisingSession:
    """Raises instead of sending."""

    closed = False

    def __init__(self, error: Exception) -> None:
        self.error = error

    def request(self, *arguments: Any, **options: Any) -> Any:
        raise self.error


@pytest.mark.parametrize("kind", list_exceptions(), ids=lambda kind: kind.__name__)
def test_no_exception_of_aiohttp_leaves_the_client(kind: type[Exception]) -> None:
    nothing = {"__init__": lambda _: None, "__str__": lambda _: "it did not work"}
    error: Exception = type(kind.__name__, (kind,), nothing)()

    async def ask() -> None:
        client = AsyncClient(
            UNREACHABLE,
            retries=Retries(first=0.0),
            session=RaisingSession(error),  # type: ignore[arg-type]
        )
        await client.models.list()

    with pytest.raises(ClientError) as caught:
        asyncio.run(ask())
    assert caught.value.__cause__ is error
    assert caught.value.remedy


def test_aiohttp_is_imported_only_by_who_wants_it() -> None:
    script = "import sys, marwright.client; sys.exit('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_closed_client_says_so() -> None:
    async def ask() -> None:
        async with AsyncClient(UNREACHABLE) as client:
            pass
        await client.health()

    with pytest.raises(UsageError, match="closed"):
        asyncio.run(ask())


def test_an_injected_session_stays_open(service: Any, endpoint: Endpoint) -> None:
    service.answer({"status": "Healthy"})

    async def ask() -> bool:
        async with aiohttp.ClientSession() as session:
            async with AsyncClient(endpoint, session=session) as client:
                await client.health()
            return session.closed

    assert not asyncio.run(ask())


def test_requests_run_beside_one_another(service: Any, endpoint: Endpoint, reply: Any) -> None:
    service.answer(reply(delay=0.5))

    async def ask() -> float:
        loop = asyncio.get_running_loop()
        started = loop.time()
        async with AsyncClient(endpoint) as client:
            await asyncio.gather(*(client.predict("cnn", b"") for _ in range(10)))
        return loop.time() - started

    assert asyncio.run(ask()) < 4


def test_a_large_body_is_sent_whole(service: Any, client: Client, reply: Any) -> None:
    service.answer(reply())
    client.predict("cnn", bytes(3_000_000))
    assert len(service.asked[0].body) == 3_000_000
    assert service.asked[0].headers["Content-Length"] == "3000000"


@pytest.mark.parametrize("call", ["unregister", "scale"])
def test_a_change_is_not_sent_again_behind_our_back(
    service: Any, endpoint: Endpoint, connect: Callable[..., Any], reply: Any, call: str
) -> None:
    client = connect(endpoint, retries=Retries(tries=1))
    service.answer({"status": "Healthy"}, reply(hang_up=True))
    client.health()  # so that the next request goes over a kept connection
    change = getattr(client.models, call)
    with pytest.raises(ConnectionFailedError):
        change("cnn", "1.0") if call == "unregister" else change("cnn", 1)
    assert len(service.asked) == 2


def test_a_cancelled_request_leaves_the_client_usable(
    service: Any, endpoint: Endpoint, reply: Any
) -> None:
    service.answer(reply(delay=1.0), reply(body=b"7"))

    async def ask() -> bytes:
        async with AsyncClient(endpoint) as client:
            task = asyncio.create_task(client.predict("cnn", b""))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return (await client.predict("cnn", b"")).body

    assert asyncio.run(ask()) == b"7"


def test_a_certificate_that_is_missing_is_a_client_error(
    connect: Callable[..., Any], tmp_path: Any
) -> None:
    endpoint = Endpoint("https://127.0.0.1:9", "", certificate=tmp_path / "gone.pem")
    with pytest.raises(ClientError, match=r"gone\.pem"):
        connect(endpoint).health()
