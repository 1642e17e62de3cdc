"""Prometheus' files: what promtool takes, what a real Prometheus does with them."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
import yaml
from tests.conftest import wait_until

from marwright.errors import ConfigurationError, PortTakenError, ServerDiedError, ServerError
from marwright.monitor import program as programs
from marwright.monitor.program import Program, find_program, read_key, write_private
from marwright.monitor.prometheus import (
    CONFIGURATION,
    RULES,
    TARGETS,
    check_configuration,
    make_prometheus,
    render_files,
    render_targets,
    write_targets,
)
from marwright.server.deployment import Deployment
from marwright.server.ports import Ports
from marwright.server.sections import MonitoringSettings

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("prometheus", "promtool"))),
    reason="needs Debian's prometheus",
)
KEY = "a-key"
URL = "http://127.0.0.1:8083"


class Endpoint:
    """What a supervisor answers at /metrics."""

    def __init__(self, value: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(f"marwright_server_up {value}\n".encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def deployment() -> Deployment:
    return Deployment(monitoring=MonitoringSettings(prometheus=Ports.find_free().inference))


@pytest.fixture
def prometheus(deployment: Deployment, tmp_path: Path) -> Iterator[Program]:
    """A real one, not started yet."""
    files = render_files(deployment, "main", URL, key=KEY, scale=60)
    made = make_prometheus(deployment, files, key=KEY, data=tmp_path / "data")
    yield made
    made.end()


def ask(url: str, **headers: str) -> Any:
    request = urllib.request.Request(url, headers=headers)
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5)


def query(prometheus: Program, expression: str) -> list[dict[str, Any]]:
    with ask(f"{prometheus.url}/api/v1/query?query={expression}") as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found


@pytest.mark.parametrize("scale", [1, 60])
def test_promtool_takes_the_files(deployment: Deployment, tmp_path: Path, scale: float) -> None:
    for name, text in render_files(deployment, "main", URL, scale=scale).items():
        (tmp_path / name).write_text(text)
    check_configuration(tmp_path)


@pytest.mark.parametrize("file", [CONFIGURATION, RULES])
def test_what_promtool_says_of_a_broken_file_is_told(
    deployment: Deployment, tmp_path: Path, file: str
) -> None:
    for name, text in render_files(deployment, "main", URL).items():
        (tmp_path / name).write_text(text)
    (tmp_path / file).write_text("groups: [{name: x, rules: [{alert: A, expr: 'sum by ('}]}]\n")
    with pytest.raises(ConfigurationError) as caught:
        check_configuration(tmp_path)
    assert file in str(caught.value)
    assert "parse error" in caught.value.detail or "not found in type" in caught.value.detail


def test_the_server_keeps_its_name_and_brings_one_target() -> None:
    (target,) = json.loads(render_targets("main", "http://127.0.0.1:9999"))
    assert target == {"targets": ["127.0.0.1:9999"], "labels": {"server": "main"}}
    assert json.loads(render_targets("main", ""))[0]["targets"] == []


def test_only_one_target_is_read_and_no_redirect_followed(deployment: Deployment) -> None:
    values = yaml.safe_load(render_files(deployment, "main", URL)[CONFIGURATION])
    (scrape,) = values["scrape_configs"]
    assert scrape["follow_redirects"] is False
    assert scrape["file_sd_configs"][0]["files"] == [TARGETS]


def test_a_missing_program_is_named_with_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ServerError) as caught:
        find_program("prometheus")
    assert "apt-get install prometheus prometheus-alertmanager" in str(caught.value)
    assert "9090 and 9093" in str(caught.value)


def test_a_taken_port_is_named_by_its_setting(prometheus: Program, deployment: Deployment) -> None:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", deployment.monitoring.prometheus))
        sock.listen()
        with pytest.raises(PortTakenError, match=r"monitoring\.prometheus"):
            prometheus.begin()


def test_a_server_that_moves_is_followed_and_stays_the_same_series(prometheus: Program) -> None:
    first, second = Endpoint(1), Endpoint(7)
    try:
        write_targets(prometheus, "main", first.url)
        prometheus.begin()
        prometheus.wait()
        wait_until(lambda: query(prometheus, "marwright_server_up==1"), timeout=30)
        write_targets(prometheus, "main", second.url)
        wait_until(lambda: query(prometheus, "marwright_server_up==7"), timeout=30)
        (series,) = query(prometheus, "marwright_server_up")
        assert series["metric"] == {
            "__name__": "marwright_server_up",
            "instance": "main",
            "job": "marwright",
            "server": "main",
        }
    finally:
        first.close()
        second.close()


def test_a_prometheus_lets_in_who_knows_its_key_and_no_web_page(
    prometheus: Program, deployment: Deployment
) -> None:
    prometheus.begin()
    prometheus.wait()
    with ask(f"{prometheus.url}/api/v1/alerts", Origin="http://elsewhere.example") as answer:
        assert "Access-Control-Allow-Origin" not in answer.headers
    with ask(f"{prometheus.url}/") as answer:  # its page, with all that this loads
        assert f"/{KEY}/" in answer.geturl()
        assert f'src="/{KEY}/' in answer.read().decode()
    bare = f"http://127.0.0.1:{deployment.monitoring.prometheus}"
    for path in ("/graph", "/api/v1/status/config", "/-/ready"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask(bare + path)
    for path in ("/-/quit", "/-/reload", "/api/v1/admin/tsdb/snapshot"):
        request = urllib.request.Request(prometheus.url + path, data=b"")
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(request, timeout=5)
    assert prometheus.is_running
    pid = int((prometheus.folder / "server_pid").read_text().split()[0])
    process = psutil.Process(pid)
    assert KEY not in " ".join(process.cmdline())
    listening = {item.laddr.ip for item in process.net_connections() if item.status == "LISTEN"}
    assert listening == {"127.0.0.1"}


def test_a_prometheus_is_given_no_secret_of_the_environment(
    prometheus: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", "correct horse")
    prometheus.begin()
    prometheus.wait()
    pid = int((prometheus.folder / "server_pid").read_text().split()[0])
    assert b"correct horse" not in Path(f"/proc/{pid}/environ").read_bytes()


def test_its_end_leaves_its_data_and_nothing_else(prometheus: Program, tmp_path: Path) -> None:
    prometheus.begin()
    prometheus.wait()
    pid = int((prometheus.folder / "server_pid").read_text().split()[0])
    prometheus.end()
    prometheus.end()
    assert not prometheus.folder.exists()
    assert not psutil.pid_exists(pid)
    assert (tmp_path / "data/wal").is_dir()


def test_what_a_prometheus_said_before_it_ended_is_told(
    prometheus: Program, tmp_path: Path
) -> None:
    (tmp_path / "data").write_text("a file where its folder should be")
    prometheus.begin()
    with pytest.raises(ServerDiedError) as caught:
        prometheus.wait()
    assert "data" in caught.value.found
    assert caught.value.detail


def test_a_file_of_ones_own_is_readable_by_nobody_else(tmp_path: Path) -> None:
    for text in ("first", "second"):
        write_private(tmp_path / "secret", text)
        assert (tmp_path / "secret").read_text() == text
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [tmp_path / "secret"]


def test_a_key_is_made_once(tmp_path: Path) -> None:
    key = read_key(tmp_path)
    assert len(key) >= 24
    assert read_key(tmp_path) == key
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_a_program_that_hangs_while_it_looks_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "promtool"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(programs, "CHECK_SECONDS", 0.2)
    with pytest.raises(ServerError, match="could not look"):
        programs.check_file(["promtool"], tmp_path / "rules.yml")


def test_no_process_is_left_by_a_look(deployment: Deployment, tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    for name, text in render_files(deployment, "main", URL).items():
        (tmp_path / name).write_text(text)
    check_configuration(tmp_path)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert subprocess.run([find_program("promtool"), "--version"], check=True).returncode == 0
