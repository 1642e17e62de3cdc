from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from marwright.client import Client, Endpoint, Retries, TokenFile
from marwright.client.calls import Request
from marwright.errors import (
    AnswerError,
    ConnectionFailedError,
    MarwrightError,
    OverloadedError,
    TokenRejectedError,
)

SECRETS = {"management": "mAn4gE", "inference": "1nFeR", "API": "aP1kEy"}


@pytest.fixture
def key_file(write_keys: Callable[..., Path]) -> Path:
    return write_keys(**SECRETS)


@pytest.fixture
def guarded(service: Any, key_file: Path, quick: Retries, connect: Callable[..., Any]) -> Any:
    """A client of a server that wants tokens."""
    endpoint = Endpoint(service.url, service.url, key_file=key_file)
    return connect(endpoint, timeout=5, retries=quick)


@pytest.fixture
def expired(problem: Any) -> Any:
    return problem(400, "InvalidKeyException", "Token either incorrect, expired")


def read_tokens(service: Any) -> list[str]:
    return [asked.headers.get("Authorization", "") for asked in service.asked]


def test_each_api_gets_its_own_token(service: Any, guarded: Client) -> None:
    service.answer({"status": "Healthy", "models": []})
    guarded.health()
    guarded.predict("cnn", b"")
    guarded.models.list()
    assert read_tokens(service) == ["Bearer 1nFeR", "Bearer 1nFeR", "Bearer mAn4gE"]


def test_without_a_key_file_no_token_is_sent(service: Any, client: Client) -> None:
    service.answer({"models": []})
    client.models.list()
    assert "Authorization" not in service.asked[0].headers


@pytest.mark.parametrize(
    ("purpose", "call"),
    [
        ("inference", lambda client: client.predict("cnn", b"")),
        ("management", lambda client: client.models.unregister("cnn", "1.0")),
    ],
)
def test_an_expired_token_is_renewed_once_and_the_new_one_used(
    service: Any,
    guarded: Client,
    reply: Any,
    expired: Any,
    write_keys: Any,
    purpose: str,
    call: Callable[[Client], object],
) -> None:
    fresh = reply(act=lambda: write_keys(**{**SECRETS, purpose: "fresh"}))
    service.answer(expired, fresh, reply())
    call(guarded)
    old = f"Bearer {SECRETS[purpose]}"
    assert read_tokens(service) == [old, "Bearer aP1kEy", "Bearer fresh"]
    assert service.lines[1] == f"GET /token?type={purpose}"
    assert service.lines[0] == service.lines[2]


def test_a_token_that_is_rejected_after_renewal_is_rejected(
    service: Any, guarded: Client, expired: Any, reply: Any
) -> None:
    service.answer(expired, reply(), expired)
    with pytest.raises(TokenRejectedError, match="--key-file"):
        guarded.predict("cnn", b"")
    assert len(service.asked) == 3


def test_a_full_queue_after_renewal_is_still_tried_again(
    service: Any, guarded: Client, expired: Any, reply: Any
) -> None:
    service.answer(expired, reply(), reply(503), reply(body=b"7"))
    assert guarded.predict("cnn", b"").body == b"7"


def test_a_renewal_that_fails_leaves_the_first_rejection(
    service: Any, guarded: Client, expired: Any, reply: Any
) -> None:
    service.answer(expired, reply(500, b"cannot write the key file"))
    with pytest.raises(TokenRejectedError, match="expired"):
        guarded.predict("cnn", b"")
    assert service.lines == ["POST /predictions/cnn", "GET /token?type=inference"]


def test_without_an_api_key_nothing_is_renewed(
    service: Any, guarded: Client, expired: Any, write_keys: Any
) -> None:
    write_keys(inference="1nFeR")
    service.answer(expired)
    with pytest.raises(TokenRejectedError):
        guarded.predict("cnn", b"")
    assert len(service.asked) == 1


def test_a_key_file_that_appears_and_changes_is_read_anew(
    service: Any, guarded: Client, key_file: Path, write_keys: Any
) -> None:
    service.answer({"models": []})
    key_file.unlink()
    with pytest.raises(TokenRejectedError, match=r"key_file\.json"):
        guarded.models.list()
    for token in ("first", "second"):
        write_keys(management=token)
        guarded.models.list()
    assert read_tokens(service) == ["Bearer first", "Bearer second"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"text"',
        "{}",
        '{"inference": "bare"}',
        '{"inference": {"key": null}}',
        '{"inference": {"key": 7}}',
        '{"inference": {"key": ""}}',
        '{"inference": {"key": "s3cret\\n"}}',
        '{"inference": {"key": "s3cr\\u20act"}}',
    ],
)
def test_a_broken_key_file_is_a_rejected_token_that_sent_nothing(
    service: Any, guarded: Client, key_file: Path, text: str
) -> None:
    key_file.write_text(text, encoding="utf-8")
    with pytest.raises(TokenRejectedError, match="inference token") as caught:
        guarded.predict("cnn", b"")
    assert caught.value.status == 0
    assert "s3cr" not in "".join(traceback.format_exception(caught.value))
    assert service.asked == []


def test_a_key_file_of_other_bytes_is_a_rejected_token(key_file: Path) -> None:
    key_file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TokenRejectedError):
        TokenFile(key_file).read("API")


def test_no_token_shows_in_logs_texts_or_errors(
    service: Any, guarded: Client, key_file: Path, reply: Any, expired: Any, caplog: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    seen = [repr(guarded), str(guarded), repr(guarded.models), repr(guarded.endpoint)]
    seen += [repr(TokenFile(key_file)), str(vars(TokenFile(key_file)))]
    failures: list[tuple[type[MarwrightError], Any]] = [
        (TokenRejectedError, expired),
        (OverloadedError, reply(503)),
        (ConnectionFailedError, reply(hang_up=True)),
        (AnswerError, reply(500, b"it broke")),
    ]
    for kind, failure in failures:
        service.answer(failure)
        with pytest.raises(kind) as caught:
            guarded.predict("cnn", b"")
        seen += traceback.format_exception(caught.value)
        seen += [repr(caught.value), json.dumps(caught.value.to_json())]
    text = "\n".join([*seen, caplog.text])
    assert "trying again" in caplog.text
    assert "Bearer 1nFeR" in read_tokens(service)
    assert "Bearer aP1kEy" in read_tokens(service)
    assert not any(secret in text for secret in SECRETS.values())


@pytest.mark.parametrize(
    ("life", "left", "renews"), [(3600, 50, 1), (3600, 70, 0), (60, 5, 1), (60, 10, 0)]
)
def test_a_token_is_renewed_shortly_before_it_expires(
    service: Any,
    guarded: Client,
    key_file: Path,
    write_keys: Any,
    reply: Any,
    life: int,
    left: int,
    renews: int,
) -> None:
    write_keys(**SECRETS, expires_in=left)
    born = time.time() - life + left
    os.utime(key_file, (born, born))
    fresh = reply(act=lambda: write_keys(**{**SECRETS, "inference": "fresh"}))
    service.answer(*[fresh] * renews, reply())
    for _ in range(2):
        guarded.predict("cnn", b"")
    assert sum(line.startswith("GET /token") for line in service.lines) == renews
    assert read_tokens(service)[-1] == ("Bearer fresh" if renews else "Bearer 1nFeR")


def test_a_renewal_ahead_of_time_that_fails_is_no_error_and_not_begun_again_at_once(
    service: Any, guarded: Client, write_keys: Any, reply: Any
) -> None:
    write_keys(**SECRETS, expires_in=-1)
    service.answer(reply(500), reply(body=b"7"))
    assert [guarded.predict("cnn", b"").body for _ in range(2)] == [b"7", b"7"]
    assert sum(line.startswith("GET /token") for line in service.lines) == 1


def test_a_token_that_somebody_else_renewed_is_taken_and_not_renewed_again(
    service: Any, guarded: Client, expired: Any, reply: Any, write_keys: Any
) -> None:
    theirs = dataclasses.replace(
        expired, act=lambda: write_keys(**{**SECRETS, "inference": "theirs"})
    )
    service.answer(theirs, reply(body=b"7"))
    assert guarded.predict("cnn", b"").body == b"7"
    assert read_tokens(service) == ["Bearer 1nFeR", "Bearer theirs"]


def test_many_threads_renew_a_token_once(
    service: Any, endpoint: Endpoint, key_file: Path, write_keys: Any, reply: Any
) -> None:
    """Two clients of one process, eight threads; each request is rejected until the renewal."""

    renewals = []

    def answer(asked: Any) -> Any:
        if asked.path.startswith("/token"):
            renewals.append(asked)
            time.sleep(0.3)
            write_keys(**{**SECRETS, "inference": "fresh"})
            return reply()
        if asked.headers["Authorization"] == "Bearer fresh":
            return reply(body=b"7")
        body = {"code": 400, "type": "InvalidKeyException", "message": "expired"}
        return reply(400, json.dumps(body).encode())

    service.decide = answer
    guarded = dataclasses.replace(endpoint, key_file=key_file)
    with Client(guarded) as one, Client(guarded) as other, ThreadPoolExecutor(8) as pool:
        clients = [one, other] * 4
        bodies = list(pool.map(lambda client: client.predict("cnn", b"").body, clients))
    assert bodies == [b"7"] * 8
    assert len(renewals) == 1


def test_a_key_file_that_is_half_written_leaves_what_was_read_before(
    service: Any, guarded: Client, key_file: Path, reply: Any
) -> None:
    service.answer(reply())
    guarded.predict("cnn", b"")
    key_file.write_text('{"management": {"key": "x', encoding="utf-8")
    guarded.predict("cnn", b"")
    assert read_tokens(service) == ["Bearer 1nFeR"] * 2


def test_changes_carry_the_supervisors_key_and_reads_do_not(
    service: Any, endpoint: Endpoint, connect: Callable[..., Any], tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    key = tmp_path / "key"
    key.write_text("s3cret_-\n", encoding="utf-8")
    client = connect(dataclasses.replace(endpoint, supervisor_key=key))
    service.answer({"models": [], "status": "done"})
    client.models.list()
    client.predict("cnn", b"")
    client.models.unregister("cnn", "1.0")
    keys = [asked.headers.get("X-Marwright-Key") for asked in service.asked]
    assert keys == [None, None, "s3cret_-"]
    key.write_text("another", encoding="utf-8")
    client.models.unregister("cnn", "1.0")
    assert service.asked[-1].headers["X-Marwright-Key"] == "another"
    key.unlink()
    with pytest.raises(TokenRejectedError, match="supervisor") as caught:
        client.models.unregister("cnn", "1.0")
    assert len(service.asked) == 4
    assert "s3cret" not in caplog.text + repr(client) + str(caught.value)


def test_a_request_shows_neither_token_nor_input() -> None:
    request = Request("GET", "http://a", {"Authorization": "Bearer s3cret"}, b"private", 1, 1)
    assert "s3cret" not in repr(request)
    assert "private" not in repr(request)
