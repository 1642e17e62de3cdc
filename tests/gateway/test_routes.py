"""What a real nginx does with requests under a rendered configuration."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import wait_until

from marwright.gateway.accesses import list_tries
from marwright.gateway.capture import Capture
from marwright.gateway.configuration import Settings
from marwright.gateway.traffic import Split, Traffic
from marwright.server.certificate import make_certificate

PNG = bytes(range(256)) * 3


def is_problem(response: Any, status: int) -> bool:
    problem = json.loads(response.body)
    return (
        response.status == status
        and response.headers["content-type"] == "application/problem+json"
        and problem["status"] == status
        and problem["type"] == "about:blank"
    )


@pytest.mark.parametrize(
    "path",
    [
        "/predictions/cnn/1.0",
        "/predictions/cnn/1.0?top=3&x=%2F",
        "/explanations/cnn/3",
        "/predictions/other",
        "/explanations/other?a=b",
        "/predictions/other%20one%25/1%3F0",
        "/v1/models/cnn:predict",
        "/v1/models/cnn:explain",
        "/v2/models/cnn/infer",
        "/v2/models/cnn/explain",
        "/ping",
    ],
)
def test_what_names_a_version_or_no_split_passes_as_it_is(
    start: Any, settings: Settings, replica: Any, ask: Any, path: str
) -> None:
    start(settings)
    response = ask(settings, path, PNG)
    assert (response.status, response.body) == (200, PNG)
    assert replica.paths() == [path]
    assert response.headers["x-marwright-version"] is None


DENIED = [
    "/",
    "/models",
    "/models/cnn",
    "/models/cnn/invoke",
    "/invocations",
    "/api-description",
    "/metrics",
    "/workflows",
    "/wfpredict/x",
    "/predictions",
    "/predictions/",
    "/predictions/cnn/1.0/more",
    "/v1/models",
    "/v1/models/cnn",
    "/v2/models/cnn/ready",
    "//models",
    "/predictions/../models",
    "/predictions/%2e%2e/models",
    "/predictions/cnn/%2e%2e%2f%2e%2e%2fmodels",
    "/predictions%2f..%2fmodels",
    "/ping/../models",
    "/ping%2f..%2fmodels",
    "/predictions/a%0ab",
    "/.arm/stable",
    "/.arm/unsplit",
    "/.draining/predictions/cnn",
    "/.mirror",
    "/.problem/404",
    "/token",
]


def test_all_else_is_denied_however_it_is_written(
    start: Any, settings: Settings, replica: Any, ask: Any, shift: Any
) -> None:
    settings = shift(settings, shadow=100)
    gateway = start(settings)
    for draining in (False, True):
        if draining:
            (gateway.folder / "draining-1").touch()
        answers = {path: ask(settings, path) for path in DENIED}
        assert [path for path, answer in answers.items() if not is_problem(answer, 404)] == []
    assert replica.paths() == []


def test_what_is_sent_is_what_was_understood(
    start: Any, settings: Settings, replica: Any, ask: Any
) -> None:
    start(settings)
    for path in ("/x/..//predictions/./cnn", "/v1/../predictions%2Fcnn%2F2.0"):
        assert ask(settings, path).status == 200
    assert replica.paths() == ["/predictions/cnn/1.0", "/predictions/cnn/2.0"]


@pytest.mark.parametrize(("share", "version"), [(0, "1.0"), (100, "2.0")])
@pytest.mark.parametrize("verb", ["predictions", "explanations"])
def test_a_request_without_a_version_goes_where_the_split_says(
    start: Any,
    settings: Settings,
    replica: Any,
    ask: Any,
    shift: Any,
    verb: str,
    share: int,
    version: str,
) -> None:
    settings = shift(settings, share=share)
    start(settings)
    for path in (f"/{verb}/cnn", f"/{verb}/cnn/"):
        response = ask(settings, f"{path}?top=3", PNG)
        assert (response.status, response.body) == (200, PNG)
        assert response.headers["x-marwright-version"] == version
    assert replica.paths() == [f"/{verb}/cnn/{version}?top=3"] * 2
    assert ask(settings, "/predictions/CNN").headers["x-marwright-version"] is None


def test_shares_are_kept_and_an_id_always_goes_the_same_way(
    start: Any, settings: Settings, ask: Any, shift: Any
) -> None:
    settings = shift(settings, share=25)
    start(settings)
    connection = http.client.HTTPConnection(settings.host, settings.port)

    def find_version(id: str) -> str:
        connection.request("GET", "/predictions/cnn", headers={"X-Request-ID": id})
        response = connection.getresponse()
        response.read()
        return str(response.headers["x-marwright-version"])

    first = [find_version(f"request-{n}") for n in range(2000)]
    assert first[:100] == [find_version(f"request-{n}") for n in range(100)]
    connection.close()
    # 500 expected, of which the standard deviation is 19.
    assert 420 < first.count("2.0") < 580


def test_ids_are_the_clients_own_where_they_are_sane(
    start: Any, settings: Settings, replica: Any, ask: Any
) -> None:
    start(settings)
    mine = ask(settings, "/predictions/cnn", X_Request_ID="Mine_1.a-b")
    assert mine.headers.get_all("x-request-id") == ["Mine_1.a-b"]
    for bad in ("has space", "x" * 129, 'quo"te', ""):
        other = ask(settings, "/predictions/cnn", X_Request_ID=bad)
        (given,) = other.headers.get_all("x-request-id")
        assert given not in {bad, "the-replicas-own"}
        assert len(given) == 32
        assert replica.asked[-1].headers["X-Request-ID"] == given
    assert len(ask(settings, "/nothing").headers.get_all("x-request-id")) == 1


@pytest.mark.parametrize("status", [404, 500, 502, 503, 504, 507, 0])
def test_a_candidate_that_fails_costs_no_client_its_answer(
    start: Any,
    settings: Settings,
    replica: Any,
    ask: Any,
    shift: Any,
    read_accesses: Any,
    status: int,
) -> None:
    settings = shift(settings, share=100)
    gateway = start(settings)
    replica.answer = lambda asked: (
        replica.Answer(status or 200, b"failed", breaks=not status)
        if "/2.0" in asked.path
        else replica.Answer(body=asked.body)
    )
    body = PNG * 4000  # beyond what is kept in memory
    response = ask(settings, "/predictions/cnn?top=1", body, Content_Type="image/png")
    assert (response.status, response.body == body) == (200, True)
    assert response.headers.get_all("x-marwright-version") == ["1.0"]
    # One that answers is not asked again; a lost connection may be the replica's.
    assert sum("/2.0" in path for path in replica.paths()) == (1 if status else 2)
    last = replica.asked[-1]
    assert (last.method, last.path) == ("POST", "/predictions/cnn/1.0?top=1")
    assert last.headers["Content-Type"] == "image/png"
    (access,) = read_accesses(gateway, 1)
    assert (access.arm, access.version, access.status) == ("candidate", "1.0", 200)
    assert [(one.arm, one.status, one.failed) for one in access.tries] == [
        ("candidate", status or 502, True),
        ("stable", 200, False),
    ]
    assert list_tries([access], "cnn", "candidate")[0].failed


def test_a_candidates_refusal_is_its_answer(
    start: Any, settings: Settings, replica: Any, ask: Any, shift: Any
) -> None:
    settings = shift(settings, share=100)
    start(settings)
    replica.answer = lambda asked: replica.Answer(422, b"no image")
    response = ask(settings, "/predictions/cnn", PNG)
    assert (response.status, response.body) == (422, b"no image")
    assert len(replica.asked) == 1


def test_errors_of_the_stable_version_are_its_own(
    start: Any, settings: Settings, replica: Any, ask: Any, shift: Any
) -> None:
    settings = shift(settings, share=100)
    start(settings)
    replica.answer = lambda asked: replica.Answer(500, asked.path.encode())
    response = ask(settings, "/predictions/cnn", PNG)
    assert (response.status, response.body) == (500, b"/predictions/cnn/1.0")


@pytest.mark.parametrize("failure", [{"status": 503}, {"breaks": True}])
def test_a_single_replica_is_asked_once_more(
    start: Any, settings: Settings, replica: Any, ask: Any, failure: dict[str, Any]
) -> None:
    start(settings)
    replica.answer = lambda asked: (
        replica.Answer(**failure) if len(replica.asked) < 2 else replica.Answer(body=asked.body)
    )
    assert ask(settings, "/predictions/cnn", PNG).body == PNG
    assert len(replica.asked) == 2


def test_a_replica_that_does_not_know_a_model_yet_is_passed_over(
    start: Any, settings: Settings, replica: Any, make_replica: Any, ask: Any
) -> None:
    other = make_replica()
    other.answer = lambda asked: other.Answer(404, b"unknown")
    settings = replace(settings, replicas=(other.url, replica.url))
    start(settings)
    assert {ask(settings, "/predictions/cnn", PNG).body for _ in range(6)} == {PNG}
    replica.answer = other.answer
    assert ask(settings, "/predictions/cnn").body == b"unknown"


def test_replicas_share_the_load(
    start: Any, settings: Settings, replica: Any, make_replica: Any, ask: Any
) -> None:
    replicas = [replica, make_replica(), make_replica()]
    settings = replace(settings, replicas=tuple(one.url for one in replicas))
    start(settings)
    for one in replicas:
        one.answer = lambda asked: replica.Answer(seconds=0.05)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: ask(settings, "/predictions/cnn"), range(60)))
    assert all(len(one.asked) > 10 for one in replicas)


def test_copies_are_captured_and_cost_nothing_where_nobody_listens(
    start: Any, settings: Settings, replica: Any, ask: Any, shift: Any
) -> None:
    settings = shift(settings, share=50, shadow=100)
    gateway = start(settings)
    assert ask(settings, "/predictions/cnn", PNG).body == PNG
    with Capture(gateway.folder) as capture:
        for number in range(10):
            response = ask(
                settings,
                f"/predictions/cnn?n={number}",
                PNG,
                X_Request_ID=f"id-{number}",
                Content_Type="image/png",
                Authorization="Bearer secret",
            )
            assert (response.status, response.body) == (200, PNG)
        ask(settings, "/predictions/cnn/1.0", PNG)
        taken: list[Any] = []

        def are_there() -> bool:
            taken.extend(capture.take())
            return len(taken) >= 10

        wait_until(are_there)
    assert sorted((one.request, one.path, one.method) for one in taken) == sorted(
        (f"id-{n}", f"/predictions/cnn?n={n}", "POST") for n in range(10)
    )
    assert {(one.content_type, one.body) for one in taken} == {("image/png", PNG)}
    # A socket that a killed process left.
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(gateway.folder / "capture.sock"))
    assert ask(settings, "/predictions/cnn", PNG).body == PNG
    assert len(replica.asked) == 13


def test_a_share_of_requests_is_copied(
    start: Any, settings: Settings, ask: Any, shift: Any
) -> None:
    settings = shift(settings, shadow=20)
    gateway = start(settings)
    with Capture(gateway.folder) as capture:
        for number in range(400):
            ask(settings, "/predictions/cnn", b"x", X_Request_ID=f"id-{number}")
        time.sleep(0.2)
        # 80 expected, of which the standard deviation is 8.
        assert 45 < len(capture.take()) < 115


def test_a_shadow_that_hangs_harms_no_answer(
    start: Any, settings: Settings, ask: Any, shift: Any
) -> None:
    settings = shift(settings, shadow=100)
    gateway = start(settings)
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(str(gateway.folder / "capture.sock"))
        hanging.listen()
        assert ask(settings, "/predictions/cnn", PNG).body == PNG


@pytest.fixture
def guarded(tmp_path: Path, settings: Settings) -> Settings:
    tokens = tmp_path / "tokens"
    tokens.write_text("first-Token.1\n\nsecond+/=\n")
    return replace(settings, client_tokens=tokens, replica_token="replicas-own")


def test_clients_tokens_are_checked_and_the_replicas_own_is_sent_on(
    start: Any, guarded: Settings, replica: Any, ask: Any
) -> None:
    start(guarded)
    for token in ("Bearer first-Token.1", "bearer second+/="):
        assert ask(guarded, "/predictions/cnn", Authorization=token).status == 200
    assert {one.headers["Authorization"] for one in replica.asked} == {"Bearer replicas-own"}


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearer first-token.1", "Bearer first-Token", "Bearer first-Token.11",
     "Bearer first-TokenX1", "Basic first-Token.1", "1 Bearer first-Token.1",
     "Bearer replicas-own"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/predictions/cnn", "/predictions/a b/1", "/v2/models/c/infer"])
def test_without_a_token_nothing_is_answered(
    start: Any, guarded: Settings, replica: Any, ask: Any, header: str, path: str
) -> None:
    gateway = start(guarded)
    path = path.replace(" ", "%20")
    headers = {"Authorization": header} if header else {}
    for draining in (False, True):
        if draining:
            (gateway.folder / "draining-1").touch()
        response = ask(guarded, path, PNG, **headers)
        assert is_problem(response, 401)
        assert response.headers.get_all("www-authenticate") == ["Bearer"]
    assert replica.asked == []


def test_no_token_stands_in_a_log(
    start: Any, guarded: Settings, ask: Any, read_accesses: Any
) -> None:
    gateway = start(guarded)
    ask(guarded, "/predictions/cnn?token=first-Token.1", Authorization="Bearer first-Token.1")
    read_accesses(gateway, 1)
    logs = [path.read_text() for path in gateway.folder.glob("*.log")]
    assert logs
    assert not any("Token.1" in text or "replicas-own" in text for text in logs)


def test_too_large_a_request_is_413_at_either_arm(
    start: Any, settings: Settings, replica: Any, ask: Any, shift: Any
) -> None:
    settings = replace(shift(settings, share=50), request_bytes=1000)
    start(settings)
    for number in range(10):
        id = f"id-{number}"
        assert is_problem(ask(settings, "/predictions/cnn", b"x" * 1001, X_Request_ID=id), 413)
        chunks = [b"x" * 600] * 2
        assert is_problem(ask(settings, "/predictions/cnn", chunks, X_Request_ID=id), 413)
    assert replica.asked == []
    assert ask(settings, "/predictions/cnn", b"x" * 1000).status == 200


@pytest.mark.parametrize("sent", [b"POST /predictions/cnn HTTP/1.1\r\nHo", b"POST /predictions/cnn "
    b"HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf"])  # fmt: skip
def test_a_request_that_does_not_arrive_ends_its_connection(
    start: Any, settings: Settings, read_accesses: Any, sent: bytes
) -> None:
    settings = replace(settings, request_seconds=1)
    gateway = start(settings)
    with socket.create_connection((settings.host, settings.port), timeout=10) as connection:
        connection.sendall(sent)
        assert connection.recv(100) == b""
    assert read_accesses(gateway, 1)[0].status == 408


def test_what_is_no_http_is_a_400_problem(start: Any, settings: Settings) -> None:
    start(settings)
    with socket.create_connection((settings.host, settings.port), timeout=10) as connection:
        connection.sendall(b"POST /predictions/\x00 HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"application/problem+json" in answer


@pytest.mark.parametrize("share", [0, 100])
def test_more_requests_than_there_is_room_for_are_503(
    start: Any, settings: Settings, replica: Any, ask: Any, shift: Any, share: int
) -> None:
    settings = replace(shift(settings, share=share), connections=2, retry_after=7)
    start(settings)
    replica.answer = lambda asked: replica.Answer(seconds=0.5)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: ask(settings, "/predictions/cnn"), range(6)))
    refused = [answer for answer in answers if answer.status != 200]
    assert len(refused) == 4
    assert all(is_problem(answer, 503) for answer in refused)
    assert {tuple(answer.headers.get_all("retry-after")) for answer in refused} == {("7",)}
    assert len(replica.asked) == 2


def test_a_replicas_retry_after_is_sent_once(
    start: Any, settings: Settings, replica: Any, ask: Any
) -> None:
    start(settings)
    for headers, expected in (({}, ["1"]), ({"Retry-After": "9"}, ["9"])):
        replica.answer = lambda asked, h=headers: replica.Answer(503, b"busy", headers=h)
        response = ask(settings, "/predictions/cnn")
        assert (response.status, response.body) == (503, b"busy")
        assert response.headers.get_all("retry-after") == expected


def test_no_replica_is_502_and_a_slow_one_504(
    start: Any, settings: Settings, replica: Any, ask: Any, shift: Any
) -> None:
    settings = replace(shift(settings, share=100), answer_seconds=1)
    start(settings)
    replica.answer = lambda asked: replica.Answer(seconds=1.5)
    assert is_problem(ask(settings, "/predictions/cnn"), 504)
    replica.stop()
    assert is_problem(ask(settings, "/predictions/cnn"), 502)


def test_https_on_both_sides(
    start: Any, settings: Settings, make_replica: Any, tmp_path: Path
) -> None:
    made = make_certificate(tmp_path / "tls files")
    replica = make_replica(made)
    settings = replace(
        settings,
        replicas=(replica.url,),
        authority=made.certificate,
        certificate=made.certificate,
        key=made.key,
    )
    start(settings)
    context = ssl.create_default_context(cafile=str(made.certificate))
    url = f"https://127.0.0.1:{settings.port}/predictions/cnn"
    with urllib.request.urlopen(url, PNG, context=context, timeout=10) as response:
        assert response.read() == PNG
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(url.replace("https", "http"), timeout=10)
    with caught.value as error:
        assert error.code == 400
        assert error.headers["content-type"] == "application/problem+json"


def test_a_replica_with_another_certificate_is_not_trusted(
    start: Any, settings: Settings, make_replica: Any, ask: Any, tmp_path: Path
) -> None:
    replica = make_replica(make_certificate(tmp_path / "theirs"))
    other = make_certificate(tmp_path / "other").certificate
    settings = replace(settings, replicas=(replica.url,), authority=other)
    start(settings)
    assert is_problem(ask(settings, "/predictions/cnn"), 502)
    assert replica.asked == []


def test_hostile_versions_are_only_versions(
    start: Any, settings: Settings, replica: Any, ask: Any, read_accesses: Any
) -> None:
    hostile = "1\";}http{$uri'é~*"
    settings = replace(settings, traffic=Traffic((Split("cnn", hostile, "2", share=0),)))
    gateway = start(settings)
    response = ask(settings, "/predictions/cnn")
    quoted = urllib.parse.quote(hostile, safe="")
    assert replica.paths() == [f"/predictions/cnn/{quoted}"]
    assert response.headers["x-marwright-version"] == quoted
    assert read_accesses(gateway, 1)[0].version == hostile


def test_hostile_paths_are_only_text_in_the_log(
    start: Any, settings: Settings, ask: Any, read_accesses: Any
) -> None:
    gateway = start(settings)
    ask(settings, "/predictions/a%22,%22status%22:500/1%5C%22%C3%A9")
    (access,) = read_accesses(gateway, 1)
    assert (access.model, access.asked, access.arm) == ('a","status":500', '1\\"é', "none")
    assert access.status == 200
