"""Monitoring beside a server: once, until the server ends, and with all of it gone after that."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.conftest import end_serving, wait_until
from tests.monitor.watched import Watched, kill_java, write_archive

from marwright.archive import Run, pack_run
from marwright.archive.run import REFERENCE_NAME
from marwright.errors import StorageError
from marwright.monitor import watch
from marwright.monitor.duties import Duties, Failures
from marwright.monitor.program import Program
from marwright.monitor.prometheus import TARGETS
from marwright.monitor.release_metrics import render_releases
from marwright.monitor.watch import Keeper, Watch, data_folder
from marwright.release.history import HISTORY_NAME, History, make_line, start_line
from marwright.server.deployment import Deployment
from marwright.server.metrics.exposition import read_lines
from marwright.server.ports import Ports
from marwright.server.process import read_start_time
from marwright.server.registry import Record, claim, find_record
from marwright.server.sections import MonitoringSettings, PredictionSettings
from marwright.server.supervision.inspection import (
    fetch_metrics,
    restart_server,
    stop_server,
)
from marwright.server.supervision.journal import LOG_NAME

pytestmark = pytest.mark.usefixtures("scratch")

Make = Callable[..., dict[str, Any]]
Write = Callable[..., Path]

PROGRAMS = ("prometheus", "prometheus-alertmanager", "promtool", "amtool")
needs_programs = pytest.mark.skipif(
    not all(map(shutil.which, PROGRAMS)),
    reason="needs Debian's prometheus and prometheus-alertmanager",
)


def read_metrics() -> str:
    return fetch_metrics(find_record("kept").health_url) or ""


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, scratch: Path) -> Iterator[Watched]:
    """A monitored server; the last test here stops it."""
    one = Watched(tmp_path_factory.mktemp("watched"), "kept", scale=60)
    write_archive(one.folder / "store/odd.mar", "odd")
    one.write(models=["odd.mar"])
    try:
        one.start()
        one.watch()
        yield one
    finally:
        one.end()


def find_process(scratch: Path, name: str) -> psutil.Process:
    """Return a program by its run folder in the scratch folder."""
    (path,) = [
        path
        for path in scratch.glob(f"marwright-{name}-*/server_pid")
        if path.parent.name.rpartition("-")[0] == f"marwright-{name}"
    ]
    return psutil.Process(int(path.read_text().split()[0]))


def query(watched: Watched, expression: str) -> list[dict[str, Any]]:
    url = f"{watched.addresses['prometheus']}/api/v1/query?query={expression}"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    except OSError:
        return []
    return found


@needs_programs
@pytest.mark.server
def test_a_second_monitor_of_a_server_says_so(watched: Watched) -> None:
    command = [sys.executable, "-m", "marwright", "monitor", "up", "kept"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=watched.environment, check=False
    )
    assert done.returncode == 1
    assert watched.monitor is not None
    assert f"monitored already: found process {watched.monitor.pid}" in done.stderr


@needs_programs
@pytest.mark.server
def test_releases_are_among_the_servers_own_metrics(watched: Watched) -> None:
    history = History(watched.folder / HISTORY_NAME)
    begun = history.add(start_line("odd", "2.0", before="1.0"))
    wait_until(lambda: query(watched, "marwright_release_open==1"), timeout=30)
    history.add(make_line(begun, "returned"))
    wait_until(lambda: not query(watched, "marwright_release_open"), timeout=30)


@needs_programs
@pytest.mark.server
def test_a_prometheus_that_was_killed_is_started_again(watched: Watched, scratch: Path) -> None:
    process = find_process(scratch, "prometheus")
    process.kill()
    wait_until(lambda: not process.is_running(), timeout=10)
    wait_until(lambda: query(watched, "up==1"), timeout=30)
    assert "prometheus has ended" in watched.read_words()


@needs_programs
@pytest.mark.server
def test_a_restart_of_the_server_is_survived(watched: Watched) -> None:
    restart_server(find_record("kept"), timeout=120)
    wait_until(lambda: query(watched, "marwright_server_ready==1"), timeout=30)
    assert watched.monitor is not None
    assert watched.monitor.poll() is None


@needs_programs
@pytest.mark.server
def test_a_monitor_that_is_killed_leaves_no_process_and_no_folder(
    watched: Watched, scratch: Path
) -> None:
    processes = [find_process(scratch, name) for name in PROGRAMS[:2]]
    history = watched.folder / HISTORY_NAME
    History(history).add(start_line("odd", "2.0", before="1.0"))
    wait_until(lambda: "marwright_release_open{" in read_metrics(), timeout=20)
    assert watched.monitor is not None
    watched.monitor.kill()
    end_serving(watched.monitor)
    # Its file is there; what it said is no news any more.
    left = Path(find_record("kept").run_folder) / "metrics/releases.prom"
    assert "marwright_release_open{" in left.read_text()
    assert "marwright_release_open{" not in read_metrics()
    history.unlink()
    wait_until(lambda: not any(map(psutil.Process.is_running, processes)), timeout=20)
    wait_until(lambda: not [*scratch.glob("marwright-prometheus*")], timeout=20)
    watched.watch()
    wait_until(lambda: left.exists() and not left.read_text(), timeout=20)


@needs_programs
@pytest.mark.server
def test_sigterm_takes_its_processes_and_files_with_it(watched: Watched, scratch: Path) -> None:
    processes = [find_process(scratch, name) for name in PROGRAMS[:2]]
    metrics = Path(find_record("kept").run_folder) / "metrics"
    wait_until(lambda: [*metrics.glob("*.prom")], timeout=20)
    assert watched.monitor is not None
    end_serving(watched.monitor)
    assert watched.monitor.returncode == 0
    assert not any(map(psutil.Process.is_running, processes))
    assert not [*scratch.glob("marwright-prometheus*")]
    assert not [*metrics.glob("*.prom")]
    watched.watch()


@needs_programs
@pytest.mark.server
def test_it_ends_with_a_server_that_is_stopped_in_order(watched: Watched, scratch: Path) -> None:
    stop_server(find_record("kept"), timeout=60)
    assert watched.monitor is not None
    assert watched.monitor.wait(30) == 0
    assert "the server kept has ended" in watched.read_words()
    assert not [*scratch.glob("marwright-*")]


@needs_programs
@pytest.mark.server
def test_it_ends_with_a_server_that_is_stopped_while_it_fails(watched: Watched) -> None:
    assert watched.monitor is not None
    end_serving(watched.monitor)
    watched.start()
    watched.watch()
    kill_java(watched)
    wait_until(lambda: watched.status().get("phase") == "restarting", timeout=20)
    time.sleep(2 * watch.LOOK_SECONDS)
    stop_server(find_record("kept"), timeout=60)
    assert watched.monitor.wait(30) == 0


def test_data_are_kept_by_the_servers_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert data_folder("main") == tmp_path / "marwright/monitoring/main"


def test_pauses_before_a_program_that_keeps_ending_double(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "FIRST_PAUSE", 0.05)
    told: list[str] = []
    program = Program(
        "false",
        "monitoring.prometheus",
        Ports.find_free().inference,
        key="k",
        files={},
        arguments=[],
    )
    try:
        keeper = Keeper(program, told.append)

        def look() -> bool:
            keeper.look()
            return len(told) >= 4

        wait_until(look, timeout=20)
        pauses = [float(line.rpartition(" in ")[2].removesuffix(" s")) for line in told]
        assert pauses[:4] == [0.05, 0.1, 0.2, 0.4]
        assert keeper.restarts == 3
    finally:
        program.end()


def make_record(folder: Path) -> Record:
    (folder / "run").mkdir()
    return Record("main", os.getpid(), "", "", str(folder / "deploy.yaml"), str(folder / "run"))


def test_a_duty_that_fails_stops_no_other_and_is_told_once(tmp_path: Path) -> None:
    (tmp_path / HISTORY_NAME).mkdir()  # no history can be read of a folder
    predictions = PredictionSettings(folder=tmp_path / "predictions")
    deployment = Deployment(monitoring=MonitoringSettings(predictions=predictions))
    told: list[str] = []
    duties = Duties(deployment, tell=told.append, scale=100)
    record = make_record(tmp_path)
    with duties.perform(lambda: record):
        wait_until(lambda: duties.failures.counts["releases"] >= 2, timeout=20)
        wait_until((tmp_path / "run/metrics/predictions.prom").exists, timeout=20)
    assert len([line for line in told if line.startswith("releases failed")]) == 1
    (tmp_path / HISTORY_NAME).rmdir()
    with duties.perform(lambda: record):
        wait_until(lambda: "releases works again" in told, timeout=20)
    duties.close()
    assert not [*(tmp_path / "run/metrics").iterdir()]


def test_what_collecting_leaves_out_is_counted(
    tmp_path: Path, spool_record: Make, spool_write: Write
) -> None:
    predictions = PredictionSettings(folder=tmp_path / "predictions")
    deployment = Deployment(monitoring=MonitoringSettings(predictions=predictions))
    now = time.time()
    records = [
        *(b"{half\n", spool_record("a"), spool_record("old", time=now - 60 * 86400)),
        spool_record("ahead", time=now + 7200),
    ]
    spool_write(predictions.folder, records)
    duties = Duties(deployment, tell=print)
    record = make_record(tmp_path)
    for duty in duties._duties:
        duties.do(duty, record)
    text = (tmp_path / "run/metrics/predictions.prom").read_text()
    duties.close()
    rows = [sample for sample in read_lines(text)[0] if "rows" in sample.name]
    counts = {sample.labels[0][1]: float(sample.value) for sample in rows}
    assert counts == {"kept": 2, "malformed": 1, "expired": 1, "skewed": 1, "dropped": 0}


def test_a_comparison_that_fails_is_counted_and_leaves_the_one_before(
    tmp_path: Path, run: Run, spool_record: Make, spool_write: Write
) -> None:
    store = tmp_path / "store"
    packed = pack_run(run, out=store / "cnn.mar", preflight=None)
    (tmp_path / "deploy.yaml").write_text(
        "store: store\nmodels: [cnn.mar]\nmonitoring: {predictions: {folder: predictions}}\n"
    )
    spool_write(tmp_path / "predictions", [spool_record(str(number)) for number in range(200)])
    deployment = Deployment.parse(tmp_path / "deploy.yaml")[0]
    duties, record = Duties(deployment, tell=print), make_record(tmp_path)
    drift = next(duty for duty in duties._duties if duty.name == "drift")
    file = tmp_path / "run/metrics/drift.prom"
    duties.do(drift, record)
    before = find_times(file)
    assert len(before) == 1
    spoil_reference(packed.path)
    duties.do(drift, record)
    assert duties.failures.counts["drift of cnn 1.0"] == 1
    assert find_times(file) == before
    duties.close()


def test_how_often_drift_is_looked_for_is_read_before_each_comparison(tmp_path: Path) -> None:
    monitoring = "{{predictions: true, drift: {{every_seconds: {}}}}}"
    text = f"store: store\nmodels: []\nmonitoring: {monitoring}\n"
    (tmp_path / "store").mkdir()
    (tmp_path / "deploy.yaml").write_text(text.format(60))
    duties = Duties(Deployment.parse(tmp_path / "deploy.yaml")[0], tell=print)
    drift = next(duty for duty in duties._duties if duty.name == "drift")
    assert drift.every_seconds == 60
    (tmp_path / "deploy.yaml").write_text(text.format(7))
    duties.do(drift, make_record(tmp_path))
    duties.close()
    assert drift.every_seconds == 7
    assert drift.due - time.monotonic() > 5


def find_times(file: Path) -> list[str]:
    samples, _ = read_lines(file.read_text())
    return [sample.value for sample in samples if "drift_timestamp" in sample.name]


def spoil_reference(archive: Path) -> None:
    """Write an archive anew, with half of its reference."""
    with zipfile.ZipFile(archive) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(archive, "w") as new:
        for name, content in members.items():
            half = len(content) // 2 if name == REFERENCE_NAME else len(content)
            new.writestr(name, content[:half])


def test_a_server_that_is_gone_gets_no_folder_back(tmp_path: Path) -> None:
    told: list[str] = []
    duties = Duties(Deployment(), tell=told.append, scale=100)
    record = make_record(tmp_path)
    (tmp_path / "run").rmdir()
    with duties.perform(lambda: record):
        time.sleep(0.3)
    assert not (tmp_path / "run").exists()
    assert not told


def test_a_server_that_only_begins_gets_no_files_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics").mkdir()
    kept = tmp_path / "metrics/releases.prom"
    kept.write_text("")
    record = Record("main", os.getpid(), "", "", str(tmp_path / "deploy.yaml"))
    duties = Duties(Deployment(), tell=print, scale=100)
    for duty in duties._duties:
        duties.do(duty, record)
    duties.close()
    assert [*(tmp_path / "metrics").iterdir()] == [kept]
    assert not kept.read_text()


def test_where_no_log_is_kept_pyarrow_is_not_needed() -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "import marwright.monitor.watch\n"
        "from marwright.monitor.duties import Duties\n"
        "from marwright.monitor.page.sources import Sources\n"
        "from marwright.server.deployment import Deployment\n"
        "from marwright.server.registry import Record\n"
        "Duties(Deployment(), tell=print)\n"
        "print(Sources(Record('main', 1, '', ''), None).open_log())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr


def test_failures_that_nobody_hears_of_are_counted_all_the_same() -> None:
    reading, writing = os.pipe()
    os.close(reading)

    def tell(line: str) -> None:
        os.write(writing, line.encode())

    failures = Failures(tell)
    with failures.note("collecting"):
        raise StorageError("full")
    with failures.note("collecting"):
        pass
    os.close(writing)
    assert failures.counts["collecting"] == 1


class Supervisor:
    """A record, and a health endpoint that says what it is told to."""

    def __init__(self, folder: Path, **status: Any) -> None:
        (folder / LOG_NAME).touch()
        self.journal = folder / LOG_NAME
        self.status = {
            "phase": "serving",
            "live": True,
            "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "log": str(folder / "server.log"),
            **status,
        }
        said = self.status

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(said).encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._claim = claim("begun")
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        start = read_start_time(os.getpid()) or ""
        self.record = Record("begun", os.getpid(), start, "", "", str(folder), self.url)
        self._claim.write(self.record)
        self._watches: list[Watch] = []

    def watch(self, told: list[str]) -> Watch:
        one = Watch(self.record, Deployment(), tell=told.append)
        self._watches.append(one)
        return one

    def say(self, level: str) -> None:
        line = {"time": datetime.now(timezone.utc).isoformat(), "level": level, "message": "x"}
        with self.journal.open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def end(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._claim.release()

    def close(self) -> None:
        self.end()
        for one in self._watches:
            one._journal.close()


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    one = Supervisor(tmp_path)
    yield one
    one.close()


@pytest.mark.parametrize("live", [True, False], ids=["serving", "in a crash loop"])
@pytest.mark.parametrize("last", ["INFO", "CRITICAL"])
def test_a_server_that_is_stopped_has_ended_and_one_that_gave_up_is_missed(
    supervisor: Supervisor, live: bool, last: str
) -> None:
    told: list[str] = []
    one = supervisor.watch(told)
    supervisor.status |= {"live": live, "phase": "serving" if live else "restarting"}
    supervisor.say("ERROR")
    assert one._follow()
    supervisor.say(last)
    supervisor.journal.unlink()  # it goes with the run folder
    supervisor.end()
    assert one._follow() is (last == "CRITICAL")
    assert len(told) == (last == "CRITICAL")


def test_an_old_end_in_a_kept_journal_is_not_of_this_supervisor(supervisor: Supervisor) -> None:
    one = supervisor.watch([])
    supervisor.say("CRITICAL")
    later = datetime.now(timezone.utc) + timedelta(seconds=5)
    supervisor.status["since"] = later.isoformat(timespec="seconds")
    assert one._follow()
    supervisor.end()
    assert not one._follow()


def test_an_address_that_cannot_be_written_is_written_later(supervisor: Supervisor) -> None:
    told: list[str] = []
    one = supervisor.watch(told)
    one._written = "http://127.0.0.1:1"
    one._prometheus = Program(
        *("true", "monitoring.prometheus", 1), key="k", files={}, arguments=[]
    )
    try:
        targets = one._prometheus.folder / TARGETS
        targets.mkdir()
        for _ in range(3):
            assert one._follow()
        assert len(told) == 1
        assert "the server's new address failed: cannot write" in told[0]
        targets.rmdir()
        for _ in range(2):
            assert one._follow()
        assert supervisor.url.removeprefix("http://") in targets.read_text()
        assert told[1:] == [
            f"the server begun is at {supervisor.url} now",
            "the server's new address works again",
        ]
    finally:
        one._prometheus.end()


def test_a_reason_that_changes_is_told_again() -> None:
    told: list[str] = []
    failures = Failures(told.append)
    for reason in ("full", "full", "gone"):
        with failures.note("collecting"):
            raise StorageError(reason)
    with failures.note("collecting"):
        pass
    assert told == ["collecting failed: full", "collecting failed: gone", "collecting works again"]
    assert failures.counts["collecting"] == 3


def test_only_open_releases_are_metrics(tmp_path: Path) -> None:
    history = History(tmp_path / HISTORY_NAME)
    done = history.add(start_line("cnn", "2.0", before="1.0"))
    history.add(make_line(done, "released"))
    begun = history.add(start_line("cnn", "3.0", before="2.0"))
    history.add(make_line(begun, "step", step='canary "50" %'))
    samples, failed = read_lines(render_releases(history.list_standings()))
    assert failed == 0
    assert [sample.name for sample in samples] == [
        "marwright_release_open",
        "marwright_release_begun_timestamp_seconds",
    ]
    assert dict(samples[0].labels)["version"] == "3.0"
    assert abs(float(samples[1].value) - time.time()) < 60


def test_a_release_without_a_time_is_open_all_the_same(tmp_path: Path) -> None:
    history = History(tmp_path / HISTORY_NAME)
    history.add(replace(start_line("cnn", "2.0", before="1.0"), time="?"))
    assert "marwright_release_open" in render_releases(history.list_standings())


@needs_programs
def test_without_a_server_nothing_is_started(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "marwright", "monitor", "up"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "marwright serve" in done.stderr
