"""Tokens of gRPC calls, which are renewed over REST; the twins of the REST client's tests."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from marwright.client import Endpoint, Retries
from marwright.client.grpc_async_client import AsyncGrpcClient
from marwright.client.grpc_calls import Attempt
from marwright.client.grpc_client import GrpcClient
from marwright.client.grpc_inference import open_sequence
from marwright.errors import RequestTimeoutError, TokenRejectedError


@pytest.fixture
def guarded(endpoint: Endpoint, service: Any, write_keys: Callable[..., Path]) -> Endpoint:
    """A server that no longer takes the token that lies in its key file."""
    keys = write_keys(inference="old", API="api")
    return dataclasses.replace(endpoint, key_file=keys, management_url=service.url)


def test_an_expired_token_is_renewed_over_rest(
    ask: Callable[..., Any],
    fake: Any,
    endpoint: Endpoint,
    service: Any,
    reply: Any,
    write_keys: Callable[..., Path],
) -> None:
    keys = write_keys(inference="old", API="api")
    fake.token = "new"
    service.answer(reply(act=lambda: write_keys(inference="new", API="api")))
    point = dataclasses.replace(endpoint, key_file=keys, management_url=service.url)
    assert ask("predict", "cnn", b"1", point=point).body == b"ok"
    assert service.lines == ["GET /token?type=inference"]
    assert service.asked[0].headers["Authorization"] == "Bearer api"


def test_a_token_is_renewed_once(
    ask: Callable[..., Any],
    fake: Any,
    endpoint: Endpoint,
    service: Any,
    write_keys: Callable[..., Path],
) -> None:
    fake.token = "new"
    service.answer({})
    point = dataclasses.replace(
        endpoint, key_file=write_keys(inference="old", API="api"), management_url=service.url
    )
    with pytest.raises(TokenRejectedError):
        ask("predict", "cnn", b"1", point=point)
    assert len(service.asked) == 1


def test_no_token_is_shown(endpoint: Endpoint, write_keys: Callable[..., Path]) -> None:
    keys = write_keys(inference="topsecret")
    client = GrpcClient(dataclasses.replace(endpoint, key_file=keys))
    attempt = client._run(open_sequence())
    assert isinstance(attempt, Attempt)
    assert "topsecret" in str(attempt.metadata)
    assert "topsecret" not in repr(attempt) + repr(vars(client._caller))
    client.close()


def test_a_token_that_somebody_else_renewed_is_taken_and_not_renewed_again(
    ask: Callable[..., Any],
    fake: Any,
    guarded: Endpoint,
    service: Any,
    write_keys: Callable[..., Path],
) -> None:
    fake.token = "theirs"
    fake.act = lambda: write_keys(inference="theirs", API="api")
    assert ask("predict", "cnn", b"1", point=guarded).body == b"ok"
    assert len(fake.asked) == 2
    assert service.asked == []


@pytest.mark.parametrize("kind", [GrpcClient, AsyncGrpcClient])
def test_many_renew_a_token_once(
    kind: type[Any],
    fake: Any,
    guarded: Endpoint,
    service: Any,
    reply: Any,
    write_keys: Callable[..., Path],
) -> None:
    """Two clients of one process, eight calls; each is rejected until the renewal."""
    fake.token = "fresh"

    def renew() -> None:
        time.sleep(0.3)
        write_keys(inference="fresh", API="api")

    service.answer(reply(act=renew))

    async def gather() -> list[Any]:
        async with AsyncGrpcClient(guarded) as one, AsyncGrpcClient(guarded) as other:
            calls = [client.predict("cnn", b"1") for client in [one, other] * 4]
            return list(await asyncio.gather(*calls))

    if kind is AsyncGrpcClient:
        answers = asyncio.run(gather())
    else:
        with kind(guarded) as one, kind(guarded) as other, ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda client: client.predict("cnn", b"1"), [one, other] * 4))
    assert [answer.body for answer in answers] == [b"ok"] * 8
    assert service.lines == ["GET /token?type=inference"]


def test_a_renewal_ends_with_the_calls_time(
    ask: Callable[..., Any], fake: Any, guarded: Endpoint, service: Any, reply: Any
) -> None:
    fake.token = "never"
    service.answer(reply(delay=20))
    started = time.monotonic()
    with pytest.raises((TokenRejectedError, RequestTimeoutError)):
        ask("predict", "cnn", b"1", point=guarded, timeout=0.5)
    assert time.monotonic() - started < 10


def test_a_token_that_is_due_is_renewed_before_it_is_sent(
    ask: Callable[..., Any],
    fake: Any,
    guarded: Endpoint,
    service: Any,
    reply: Any,
    write_keys: Callable[..., Path],
) -> None:
    write_keys(expires_in=-1, inference="old", API="api")
    fake.token = "new"
    service.answer(reply(act=lambda: write_keys(inference="new", API="api")))
    answers = ask("predict_sequence", "cnn", [b"1", b"2"], point=guarded)
    assert [answer.body for answer in answers] == [b"ok"] * 2
    assert len(service.asked) == 1


def test_a_key_file_that_is_not_there_yet_is_waited_for(
    ask: Callable[..., Any], fake: Any, guarded: Endpoint, write_keys: Callable[..., Path]
) -> None:
    """A server that starts again writes its file a while later."""
    fake.token = "fresh"
    assert guarded.key_file is not None
    guarded.key_file.unlink()
    patient = Retries(tries=1000, first=0.02, longest=0.02)

    def write_late() -> None:
        time.sleep(0.3)
        write_keys(inference="fresh")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(write_late)
        assert ask("predict", "cnn", b"1", point=guarded, retries=patient).body == b"ok"
    assert len(fake.asked) == 1


def test_a_key_file_that_never_comes_is_a_rejected_token_that_sent_nothing(
    ask: Callable[..., Any], fake: Any, guarded: Endpoint
) -> None:
    assert guarded.key_file is not None
    guarded.key_file.unlink()
    with pytest.raises(TokenRejectedError, match=r"key_file\.json") as caught:
        ask("predict", "cnn", b"1", point=guarded)
    assert caught.value.status == 0
    assert fake.asked == []
