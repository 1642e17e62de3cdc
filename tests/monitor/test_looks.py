"""Looks at a server: rates between two of them, and a server that is away."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.conftest import Served, serve_alone, wait_until

from marwright.client import Client, Endpoint
from marwright.monitor.looks import (
    Look,
    Rates,
    Recorder,
    _compare,
    _gather,
    _Reading,
    compute_quantile,
)
from marwright.server.metrics.exposition import read_lines
from marwright.server.registry import find_record

KEY = ("cnn", "1.0")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Served]:
    with serve_alone(tmp_path_factory.mktemp("looks"), store, "looks") as it:
        yield it


def test_a_second_look_has_the_rates_since_the_first(served: Served, scan: bytes) -> None:
    recorder = Recorder(find_record(served.name))
    first = recorder.look()
    assert (first.problem, dict(first.rates)) == ("", {})
    assert first.status["ready"]
    with Client(Endpoint.read(served.endpoint_file)) as client:
        for _ in range(20):
            client.predict("cnn", scan)
    second = recorder.look()
    rates = second.rates[KEY]
    seconds = second.time - first.time
    assert rates.requests * seconds == pytest.approx(20, rel=0.1)
    assert rates.errors == 0
    assert rates.p50 is not None
    assert rates.p99 is not None
    assert 0 < rates.p50 <= rates.p99 < 10
    third = recorder.look()
    assert third.rates[KEY].p50 is None
    assert recorder.looks == [first, second, third]


def test_a_recorder_goes_on_while_the_server_is_away_and_comes_back(served: Served) -> None:
    with Recorder(find_record(served.name), seconds=0.1) as recorder:
        assert wait_until(lambda: recorder.looks)
        assert served.process is not None
        served.process.terminate()
        served.process.wait()
        wait_until(lambda: recorder.looks[-1].problem)
        served.start()
        served.wait()
        wait_until(lambda: not recorder.looks[-1].problem and recorder.looks[-1].rates)
    assert any("no server" in look.problem for look in recorder.looks)


def test_who_waits_gets_the_next_look(served: Served) -> None:
    recorder = Recorder(find_record(served.name), seconds=0.1)
    assert recorder.wait(0.0, timeout=0.05) is None
    with recorder:
        first = recorder.wait(0.0, timeout=30)
        assert first is not None
        second = recorder.wait(first.time, timeout=30)
    assert isinstance(second, Look)
    assert second.time > first.time


def test_an_answer_that_breaks_off_is_no_look_with_numbers(served: Served) -> None:
    class Half(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"marwright_server_up 1\nmarwright_se")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Half)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        from marwright.server.supervision.inspection import fetch_metrics

        assert fetch_metrics(f"http://127.0.0.1:{server.server_address[1]}") is None
    finally:
        server.shutdown()
        server.server_close()


def read(*lines: str) -> _Reading:
    return _Reading(float(len(lines)), _gather(read_lines("\n".join(lines) + "\n")[0]))


def count(replica: int, value: int, status: str = "200") -> str:
    labels = f'model="cnn",version="1.0",status="{status}",replica="{replica}"'
    return f"marwright_http_requests_total{{{labels}}} {value}"


def test_a_reading_without_a_replicas_counts_makes_no_spike() -> None:
    both = replace(read(count(1, 1_000_000), count(2, 500)), clock=0.0)
    one = replace(read(count(2, 510)), clock=1.0)
    again = replace(read(count(1, 1_000_020), count(2, 520)), clock=2.0)
    assert _compare(both, one)[KEY].requests == 10
    assert _compare(one, again)[KEY].requests == 10  # of the other one nothing is known


def test_a_server_that_counts_anew_and_a_status_that_is_new_are_counted() -> None:
    before = replace(read(count(1, 900)), clock=0.0)
    after = replace(read(count(1, 40), count(1, 7, "500"), count(1, 3, "other")), clock=1.0)
    rates = _compare(before, after)[KEY]
    assert (rates.requests, rates.errors) == (50, 7)


def test_quantiles_are_those_of_prometheus() -> None:
    buckets = [(0.1, 10.0), (0.2, 30.0), (float("inf"), 40.0)]
    assert compute_quantile(0.25, buckets) == pytest.approx(0.1)
    assert compute_quantile(0.5, buckets) == pytest.approx(0.15)
    assert compute_quantile(0.99, buckets) == 0.2  # the last edge that is a number
    assert compute_quantile(0.5, []) is None
    assert compute_quantile(0.5, [(0.1, 0.0), (float("inf"), 0.0)]) is None
    assert Rates().p99 is None
