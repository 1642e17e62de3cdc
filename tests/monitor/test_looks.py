"""Looks at a server: rates between two of them, and a server that is away."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.conftest import Served, wait_until

from marwright.client import Client, Endpoint
from marwright.monitor.looks import Look, Rates, Recorder, compute_quantile
from marwright.server.registry import find_record

KEY = ("cnn", "1.0")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Served]:
    it = Served(tmp_path_factory.mktemp("looks"), "looks")
    it.write(store=str(store), models=["cnn.mar"])
    try:
        it.start()
        it.wait()
        yield it
    finally:
        it.end()


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


def test_quantiles_are_those_of_prometheus() -> None:
    buckets = [(0.1, 10.0), (0.2, 30.0), (float("inf"), 40.0)]
    assert compute_quantile(0.25, buckets) == pytest.approx(0.1)
    assert compute_quantile(0.5, buckets) == pytest.approx(0.15)
    assert compute_quantile(0.99, buckets) == 0.2  # the last edge that is a number
    assert compute_quantile(0.5, []) is None
    assert compute_quantile(0.5, [(0.1, 0.0), (float("inf"), 0.0)]) is None
    assert Rates().p99 is None
