"""/metrics of a real server: what it says, and that it says so whatever happens to the server."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from tests.conftest import Served, serve_alone, wait_until

from marwright.client import Client, Endpoint
from marwright.server.metrics.exposition import OPENMETRICS
from marwright.server.metrics.files import MetricsWriter
from marwright.server.process import read_server_pid
from marwright.server.registry import find_record
from marwright.server.supervision.inspection import fetch_metrics

CNN = 'model="cnn",version="1.0"'


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Served]:
    with serve_alone(tmp_path_factory.mktemp("measures"), store, "measures") as it:
        yield it


def scrape(served: Served) -> dict[str, float]:
    """Return the samples by name and labels."""
    text = fetch_metrics(find_record(served.name).health_url)
    assert text is not None
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_server_models_and_workers_are_there_before_any_request(served: Served) -> None:
    found = scrape(served)
    assert found["marwright_server_up"] == found["marwright_server_ready"] == 1
    assert found[f"marwright_workers_ready{{{CNN}}}"] == 1
    assert found[f"marwright_model_default{{{CNN}}}"] == 1
    assert found[f"marwright_queue_room{{{CNN}}}"] == 100
    assert found[f'marwright_http_requests_total{{{CNN},status="500"}}'] == 0
    assert found[f"marwright_worker_memory_bytes{{{CNN}}}"] > 50 << 20
    assert found["marwright_server_memory_bytes"] > 50 << 20


def test_requests_are_counted_by_version_although_they_name_none(
    served: Served, scan: bytes
) -> None:
    def count(found: dict[str, float]) -> float:
        return found.get(f'marwright_http_requests_total{{{CNN},status="200"}}', 0)

    before = count(scrape(served))
    with Client(Endpoint.read(served.endpoint_file)) as client:
        for _ in range(5):
            client.predict("cnn", scan)
    found = scrape(served)
    assert count(found) == before + 5
    assert found[f'marwright_http_request_seconds_bucket{{{CNN},le="+Inf"}}'] >= 5
    assert found[f"marwright_queue_seconds_total{{{CNN}}}"] > 0
    wait_until(lambda: scrape(served).get(f"marwright_batch_size_count{{{CNN}}}"), timeout=20)
    assert not [name for name in found if "default" in name and "model_default" not in name]


def test_both_forms_pass_their_checks(served: Served) -> None:
    url = f"{find_record(served.name).health_url}/metrics"
    request = urllib.request.Request(url, headers={"Accept": "application/openmetrics-text"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.headers["Content-Type"] == OPENMETRICS
        assert list(read_openmetrics(answer.read().decode()))
    if promtool := shutil.which("promtool"):
        text = fetch_metrics(find_record(served.name).health_url)
        command = [promtool, "check", "metrics"]
        subprocess.run(command, input=text, text=True, check=True, capture_output=True)


def test_files_in_the_run_folder_are_read(served: Served) -> None:
    folder = Path(find_record(served.name).run_folder)
    with contextlib.closing(MetricsWriter(folder)) as writer:
        writer.write("drift", f"marwright_drift_detected{{{CNN}}} 1\nmarwright_drift_sc")
        found = scrape(served)
    assert f"marwright_drift_detected{{{CNN}}}" not in scrape(served)
    assert found[f"marwright_drift_detected{{{CNN}}}"] == 1
    assert found['marwright_scrape_errors_total{source="files"}'] == 1


def test_a_worker_that_died_is_counted(served: Served) -> None:
    (version,) = Client(Endpoint.read(served.endpoint_file)).models.versions("cnn")
    psutil.Process(version.workers[0].pid).kill()
    name = f"marwright_worker_restarts_total{{{CNN}}}"
    wait_until(lambda: scrape(served)[name] == 1)
    wait_until(lambda: scrape(served)["marwright_server_ready"] == 1)
    assert scrape(served)[name] == 1


def test_a_scrape_while_the_server_is_away_says_so(served: Served) -> None:
    pid = read_server_pid(Path(find_record(served.name).run_folder))
    assert pid is not None
    psutil.Process(pid[0]).kill()
    wait_until(lambda: scrape(served)["marwright_server_up"] == 0)
    found = scrape(served)
    assert found[f"marwright_workers_ready{{{CNN}}}"] == 0
    assert found[f"marwright_worker_restarts_total{{{CNN}}}"] == 1
    wait_until(lambda: scrape(served)["marwright_server_ready"] == 1)
    assert scrape(served)["marwright_server_restarts_total"] == 1
    assert scrape(served)[f"marwright_worker_restarts_total{{{CNN}}}"] == 1
