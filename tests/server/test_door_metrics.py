"""What the door counts of a real TorchServe's requests, read at its metrics address."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import wait_until
from tests.server.test_door import Server, boot

from marwright.client.metrics import Metrics
from marwright.server.frontend import FrontendSettings
from marwright.server.metrics.families import find_family

pytestmark = pytest.mark.server

REQUESTS = "marwright_http_requests_total"
SECONDS = "marwright_http_request_seconds"
UPPER_BOUNDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, float("inf")]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server with the models plain and tokeniser, which answer what they are sent."""
    folder = Path("/tmp") / f"marwright-tally-{os.getpid()}"  # short enough for a socket below it
    settings = FrontendSettings(request_seconds=1, max_connections=4)
    try:
        with boot(folder, settings) as booted:
            target = "/models?url=tokeniser.mar&initial_workers=1&synchronous=true"
            assert booted.ask("POST", target, of="management").status == 200
            yield booted
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_metrics(server: Server) -> Metrics:
    text = server.ask("GET", "/metrics", of="metrics").body.decode()
    return Metrics.from_response(text)


def count(server: Server, model: str = "plain", version: str = "1.0") -> dict[str, float]:
    """Return how many requests were answered, by status."""
    samples = read_metrics(server).find(REQUESTS, model=model, version=version)
    return {sample.labels["status"]: sample.value for sample in samples}


def count_new(
    server: Server, before: dict[str, float], model: str = "plain", version: str = "1.0"
) -> dict[str, float]:
    """Return what has come since, by status."""
    after = count(server, model, version)
    return {key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key)}


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/predictions/tokeniser"),
        ("POST", "/predictions/tokeniser?x=1"),
        ("POST", "/predictions/tokeniser/1.0"),
        ("PUT", "/%70redictions/tokeniser/1.0"),
        ("POST", "x/predictions/tokeniser"),
        ("POST", "/explanations/tokeniser"),
        ("POST", "/explanations/tokeniser/1.0"),
        ("POST", "/models/tokeniser/invoke"),
        ("POST", "/tokeniser/predict"),
        ("POST", "/tokeniser/1.0/predict"),
        ("POST", "/v1/models/tokeniser:predict"),
        ("POST", "/v1/models/tokeniser:explain"),
        ("POST", "/v2/models/tokeniser/infer"),
        ("POST", "/v2/models/tokeniser/explain"),
    ],
)
def test_every_way_to_ask_for_a_prediction_is_counted_for_the_version_that_answers(
    server: Server, method: str, target: str
) -> None:
    before = count(server, "tokeniser")
    status = server.ask(method, target, b"x").status
    assert status != 404
    assert count_new(server, before, "tokeniser") == {str(status): 1}


def test_a_version_that_torchserve_does_not_route_to_is_counted_with_its_answer(
    server: Server,
) -> None:
    before = count(server, "tokeniser")
    answer = server.ask("POST", "/v2/models/tokeniser/versions/1.0/infer", b"x")
    assert count_new(server, before, "tokeniser") == {str(answer.status): 1}
    assert answer.status in (404, 501)


@pytest.mark.parametrize(
    ("method", "target", "of"),
    [
        ("GET", "/ping", "inference"),
        ("GET", "/models/plain/invoke", "management"),
        ("GET", "/models/plain", "management"),
        ("POST", "/predictions/plain", "management"),
        ("OPTIONS", "/predictions/plain", "inference"),
        ("GET", "/v2/models/plain", "inference"),
        ("GET", "/v1/models/plain", "inference"),
        ("GET", "/metrics", "metrics"),
    ],
)
def test_nothing_else_is_counted(server: Server, method: str, target: str, of: str) -> None:
    before = read_metrics(server).total(REQUESTS)
    server.ask(method, target, of=of)
    assert read_metrics(server).total(REQUESTS) == before


def test_what_a_handler_says_is_counted_and_odd_statuses_share_one_series(server: Server) -> None:
    before = count(server)
    for status in (418, 429, 600, 999):
        assert server.predict(b"status %d" % status).status == status
    assert server.predict(b"stream one two").status == 200
    assert count_new(server, before) == {"200": 1, "418": 1, "429": 1, "other": 2}


def test_models_and_versions_that_there_are_not_share_one_series(server: Server) -> None:
    before = count(server, "", "")
    paths = ["/predictions/none", "/predictions/plain/7.0", "/v1/models/none:predict"]
    paths += ["/predictions", '/predictions/a"b', "/predictions/plain//x"]
    assert [server.ask("POST", path, b"x").status for path in paths] == [404] * len(paths)
    assert count_new(server, before, "", "") == {"404": len(paths)}
    found = read_metrics(server).find(REQUESTS)
    assert {sample.labels["model"] for sample in found} <= {"", "plain", "tokeniser"}


def test_a_request_without_the_token_is_counted_with_its_refusal(server: Server) -> None:
    before = count(server)
    with server.connect() as connection:
        connection.send(b"POST /predictions/plain HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
        status = connection.read().status
    assert status in (400, 401)
    assert count_new(server, before) == {str(status): 1}


def test_what_the_door_refuses_is_counted(server: Server) -> None:
    before = count(server)
    with server.connect() as connection:  # of 4 bytes, one comes
        head = server.render("POST", "/predictions/plain", content_length="4")
        connection.send(head + b"x")
        assert connection.read().status == 408
    assert count_new(server, before) == {"408": 1}
    before = count(server)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(server.connect())
        time.sleep(0.2)  # all are known
        with server.connect() as connection:
            connection.send(server.render("POST", "/predictions/plain", b"x"))
            assert connection.read().status == 503
    wait_until(lambda: server.ask("GET", "/ping").status == 200, timeout=10)
    assert count_new(server, before) == {"503": 1}


def test_a_client_that_goes_before_its_answer_is_counted_499(server: Server) -> None:
    before = count(server)
    for reset in (False, True):
        with server.connect() as connection:
            connection.send(server.render("POST", "/predictions/plain", b"wait 1"))
            time.sleep(0.2)
            if reset:
                linger = struct.pack("ii", 1, 0)
                connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    wait_until(lambda: count_new(server, before) == {"499": 2}, timeout=10)
    assert server.predict().status == 200  # once the worker is done with both
    assert count_new(server, before) == {"200": 1, "499": 2}


def test_the_time_until_the_last_byte_is_observed_in_its_bucket(server: Server) -> None:
    before = read_metrics(server)
    assert server.predict(b"wait 0.3").status == 200
    after = read_metrics(server)
    grown = {
        float(sample.labels["le"]): sample.value
        - before.total(f"{SECONDS}_bucket", model="plain", le=sample.labels["le"])
        for sample in after.find(f"{SECONDS}_bucket", model="plain", version="1.0")
    }
    assert sorted(grown) == UPPER_BOUNDS
    assert [grown[bound] for bound in UPPER_BOUNDS[:8]] == [0] * 8
    assert [grown[bound] for bound in UPPER_BOUNDS[10:]] == [1] * 3
    seconds = after.total(f"{SECONDS}_sum") - before.total(f"{SECONDS}_sum")
    assert 0.3 < seconds < 2.5
    assert after.total(f"{SECONDS}_count") == after.total(REQUESTS)


def test_pipelined_requests_are_counted_one_by_one(server: Server) -> None:
    before = count(server)
    with server.connect() as connection:
        connection.send(server.render("POST", "/predictions/plain", b"x") * 3)
        assert [connection.read().status for _ in range(3)] == [200] * 3
    assert count_new(server, before) == {"200": 3}


def test_the_metrics_are_what_the_table_of_all_metrics_says(server: Server) -> None:
    server.predict()
    families = {family.name: family for family in read_metrics(server).families}
    for name, shown in ((REQUESTS, REQUESTS.removesuffix("_total")), (SECONDS, SECONDS)):
        family, known = families[shown], find_family(name)
        assert known is not None
        assert family.type == known.kind
        assert {sample.name for sample in family.samples} == set(known.series)
        labels = {label for sample in family.samples for label in sample.labels}
        assert labels - {"le"} == set(known.labels)
