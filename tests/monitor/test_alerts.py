"""Faults caused for real, and the alert that then arrives at a webhook.

A real TorchServe under `marwright serve`, a real Prometheus and Alertmanager under `marwright
monitor up`. Windows and pauses are divided by a factor, which is stated with each time that is
measured: MARWRIGHT_ALERTS=FILE keeps them (benchmarks/alerts.py).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image, ImageOps
from tests.conftest import wait_until
from tests.monitor.receivers import PASSWORD
from tests.monitor.watched import HANDLER, PATIENCE, SCALE, Watched, kill_java, write_archive

from marwright.archive import Run, pack_run
from marwright.client import Client, Endpoint, Retries
from marwright.errors import MarwrightError
from marwright.gateway.traffic import Split
from marwright.release.history import HISTORY_NAME, History
from marwright.server.ports import Ports
from marwright.server.registry import find_record
from marwright.server.supervision.inspection import ask_supervisor

pytestmark = [
    pytest.mark.server,
    pytest.mark.usefixtures("scratch"),
    pytest.mark.skipif(
        not all(map(shutil.which, ("prometheus", "prometheus-alertmanager", "promtool", "amtool"))),
        reason="needs Debian's prometheus and prometheus-alertmanager",
    ),
]

LOGGED_SCALE = 60.0
"""Of what compares windows, which takes a second or two."""
ONCE = Retries(tries=1, after_loss=0, away=0)
SINGLE = """\
import fcntl

LOCK = open({lock!r}, "w")
fcntl.flock(LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
"""
BROKEN = "raise RuntimeError('this handler never loads')\n"


class Load:
    """Threads that send one question again and again, whatever is answered."""

    def __init__(self, endpoint_file: Path, model: str, text: str, threads: int = 1) -> None:
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._send, args=(endpoint_file, model, text), daemon=True)
            for _ in range(threads)
        ]

    def _send(self, endpoint_file: Path, model: str, text: str) -> None:
        with Client(Endpoint.read(endpoint_file), retries=ONCE) as client:
            while not self._stop.is_set():
                with contextlib.suppress(MarwrightError):
                    client.predict(model, text.encode())

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, scratch: Path) -> Iterator[Watched]:
    """A server with an odd model, and one whose workers never load."""
    one = Watched(tmp_path_factory.mktemp("watched"), "odd")
    (one.folder / "password").write_text(PASSWORD)
    write_archive(one.folder / "store/odd.mar", "odd")
    write_archive(one.folder / "store/broken.mar", "broken", handler=BROKEN)
    one.write(
        models=[{"archive": "odd.mar", "workers": 3, "queue": 6}, {"archive": "broken.mar"}],
        monitoring={"targets": {"p99_seconds": 0.05}, "mail": one.mailbox.settings},
        supervision={"linger_seconds": 5},
        releases={"samples": False},
    )
    try:
        one.start()
        one.watch()
        yield one
    finally:
        one.end()


@pytest.fixture
def keep() -> Callable[..., None]:
    """Return a function that keeps how long an alert took, where the benchmark asks for it."""

    def keep_time(fault: str, alert: str, seconds: float, scale: float = SCALE) -> None:
        row = {"fault": fault, "alert": alert, "seconds": round(seconds, 1), "scale": scale}
        if target := os.environ.get("MARWRIGHT_ALERTS"):
            with Path(target).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")

    return keep_time


Keep = Callable[..., None]


def test_a_version_whose_workers_never_load_is_told(watched: Watched, keep: Keep) -> None:
    seconds, alert = watched.await_alert("MarwrightVersionWithoutWorkers", watched.began)
    keep("a handler that never loads", "MarwrightVersionWithoutWorkers", seconds)
    assert alert["labels"]["model"] == "broken"


def test_a_java_that_was_killed_is_down(watched: Watched, keep: Keep) -> None:
    began = time.monotonic()
    kill_java(watched)
    seconds, alert = watched.await_alert("MarwrightDown", began)
    keep("Java killed", "MarwrightDown", seconds)
    assert alert["labels"]["server"] == "odd"
    assert "marwright status" in alert["annotations"]["summary"]
    mail = wait_until(lambda: watched.mailbox.find("MarwrightDown"), timeout=PATIENCE)
    assert (mail["To"], mail["From"]) == ("team@example.org", "marwright@example.org")
    assert "marwright status" in mail.get_body(("html",)).get_content()
    assert PASSWORD not in watched.read_words()


@pytest.mark.slow
def test_what_is_over_is_told_too(watched: Watched) -> None:
    wait_until(lambda: watched.receiver.find("MarwrightDown", 0, "resolved"), timeout=PATIENCE)


@pytest.mark.slow
def test_a_handler_that_fails_burns_the_error_budget(watched: Watched, keep: Keep) -> None:
    began = time.monotonic()
    with Load(watched.endpoint_file, "odd", "fail"):
        seconds, alert = watched.await_alert("MarwrightErrorBudgetBurnFast", began)
    keep("a handler that fails", "MarwrightErrorBudgetBurnFast", seconds)
    assert alert["labels"]["model"] == "odd"
    seconds, _ = watched.await_alert("MarwrightErrorBudgetBurnSlow", began)
    keep("a handler that failed", "MarwrightErrorBudgetBurnSlow", seconds)


@pytest.mark.slow
def test_a_slow_handler_is_told(watched: Watched, keep: Keep) -> None:
    began = time.monotonic()
    with Load(watched.endpoint_file, "odd", "sleep 0.05", threads=6):
        seconds, _ = watched.await_alert("MarwrightLatencyHigh", began)
    keep("a slow handler", "MarwrightLatencyHigh", seconds)


@pytest.mark.slow
def test_a_queue_that_is_full_is_told(watched: Watched, keep: Keep) -> None:
    began = time.monotonic()
    with Load(watched.endpoint_file, "odd", "sleep 1", threads=12):
        seconds, _ = watched.await_alert("MarwrightQueueGrowing", began)
    keep("a full queue", "MarwrightQueueGrowing", seconds)


@pytest.mark.slow
def test_memory_that_grows_is_told(watched: Watched, keep: Keep) -> None:
    began = time.monotonic()
    with Load(watched.endpoint_file, "odd", "grow 100000"):
        seconds, _ = watched.await_alert("MarwrightMemoryGrowing", began)
    keep("memory that grows", "MarwrightMemoryGrowing", seconds)


@pytest.mark.slow
def test_workers_that_are_killed_are_told(watched: Watched, keep: Keep) -> None:
    wait_until(lambda: watched.find("odd 1.0").get("ready_workers") == 3)
    began = time.monotonic()
    for pid in list_workers(watched, "odd"):
        os.kill(pid, signal.SIGKILL)
    seconds, alert = watched.await_alert("MarwrightWorkerRestarts", began)
    keep("three workers killed", "MarwrightWorkerRestarts", seconds)
    assert alert["labels"]["version"] == "1.0"


def list_workers(watched: Watched, model: str) -> list[int]:
    with Client(Endpoint.read(watched.endpoint_file)) as client:
        return [worker.pid for worker in client.models.describe(model).workers if worker.pid > 0]


@pytest.mark.slow
def test_a_release_that_nobody_finishes_is_told(watched: Watched, keep: Keep) -> None:
    history = History(watched.folder / HISTORY_NAME)
    write_archive(watched.folder / "odd-2.0.mar", "odd", "2.0")
    command = [sys.executable, "-m", "marwright", "release", "odd-2.0.mar"]
    began = time.monotonic()
    with (watched.folder / "release.txt").open("wb") as words:
        release = subprocess.Popen(
            command, cwd=watched.folder, stderr=words, stdout=words, env=watched.environment
        )
        try:
            wait_until(lambda: [one for one in history.list_standings() if one.is_open])
        finally:
            release.kill()
            release.wait()
    seconds, alert = watched.await_alert("MarwrightReleaseStuck", began)
    keep("a release that was killed", "MarwrightReleaseStuck", seconds)
    assert alert["labels"]["version"] == "2.0"


@pytest.mark.slow
def test_a_supervisor_killed_with_its_server_stays_down(watched: Watched, keep: Keep) -> None:
    record = find_record(watched.name)
    began = time.monotonic()
    os.kill(record.pid, signal.SIGKILL)
    seconds, _ = watched.await_alert("MarwrightDown", began)
    keep("the supervisor killed", "MarwrightDown", seconds)
    wait_until(lambda: not Path(record.run_folder).exists(), timeout=PATIENCE)
    assert watched.monitor is not None
    wait_until(lambda: "has failed and is gone" in watched.read_words(), timeout=PATIENCE)
    assert watched.monitor.poll() is None
    assert not watched.receiver.find("MarwrightDown", began, "resolved")


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory, run: Run, scratch: Path) -> Iterator[Watched]:
    """A server that keeps every prediction of the digits' network, and looks for drift.

    Beside it a model of which one worker loads, and a second never does.
    """
    one = Watched(tmp_path_factory.mktemp("logged"), "logged", scale=LOGGED_SCALE)
    single = SINGLE.format(lock=str(one.folder / "taken")) + HANDLER
    write_archive(one.folder / "store/single.mar", "single", handler=single)
    pack_run(run, out=one.folder / "store/cnn.mar", preflight=None)
    one.write(
        models=[{"archive": "cnn.mar", "workers": 1}, {"archive": "single.mar", "workers": 2}],
        monitoring={
            "predictions": {"share": 100, "folder": "predictions"},
            "drift": {"window": 100, "every_seconds": 8},
        },
    )
    try:
        one.start()
        one.watch()
        yield one
    finally:
        one.end()


def send_images(watched: Watched, run: Run, change: Callable[[Any], Any], count: int = 10) -> None:
    """Send some of the run's images, changed."""
    paths = [sample.path for sample in run.samples]
    with Client(Endpoint.read(watched.endpoint_file)) as client:
        for path in (paths * count)[:count]:
            buffer = io.BytesIO()
            with Image.open(path) as image:
                change(image.convert("L")).save(buffer, "PNG")
            client.predict("cnn", buffer.getvalue())


@pytest.mark.slow
def test_a_version_that_lacks_a_worker_is_not_ready(logged: Watched, keep: Keep) -> None:
    seconds, alert = logged.await_alert("MarwrightNotReady", logged.began)
    keep("a second worker that never loads", "MarwrightNotReady", seconds, LOGGED_SCALE)
    assert alert["labels"]["server"] == "logged"
    assert not logged.receiver.find("MarwrightVersionWithoutWorkers", logged.began)


@pytest.mark.slow
def test_images_that_are_inverted_are_drift(logged: Watched, run: Run, keep: Keep) -> None:
    began = time.monotonic()
    seconds, alert = logged.await_alert(
        "MarwrightDrift", began, during=lambda: send_images(logged, run, ImageOps.invert)
    )
    keep("inverted images", "MarwrightDrift", seconds, LOGGED_SCALE)
    assert (alert["labels"]["model"], alert["labels"]["version"]) == ("cnn", "1.0")


@pytest.mark.slow
def test_a_log_that_cannot_be_written_is_lost_and_stale(
    logged: Watched, run: Run, keep: Keep
) -> None:
    (pid,) = list_workers(logged, "cnn")
    began = time.monotonic()
    # The worker's disk takes nothing more: every further write fails.
    psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (0, 0))

    def send() -> None:
        send_images(logged, run, lambda image: image)

    seconds, _ = logged.await_alert("MarwrightPredictionsLost", began, during=send)
    keep("a disk that takes nothing more", "MarwrightPredictionsLost", seconds, LOGGED_SCALE)
    seconds, alert = logged.await_alert("MarwrightDataStale", began, during=send)
    keep("a disk that takes nothing more", "MarwrightDataStale", seconds, LOGGED_SCALE)
    assert alert["labels"]["model"] == "cnn"


@pytest.mark.slow
@pytest.mark.usefixtures("nginx")
def test_a_candidate_that_fails_more_is_told(
    tmp_path_factory: pytest.TempPathFactory, keep: Keep
) -> None:
    one = Watched(tmp_path_factory.mktemp("split"), "split")
    worse = HANDLER.replace('"done"', '1 / (time.monotonic_ns() // 1000 % 4) and "done"')
    write_archive(one.folder / "store/odd.mar", "odd")
    write_archive(one.folder / "store/odd-2.0.mar", "odd", "2.0", handler=worse)
    one.write(
        models=[{"archive": name, "workers": 1} for name in ("odd.mar", "odd-2.0.mar")],
        gateway={"port": Ports.find_free().grpc_inference},
        replicas=1,
    )
    try:
        one.start()
        one.wait()
        one.watch()
        began = time.monotonic()
        split = Split("odd", stable="1.0", candidate="2.0", share=50.0)
        ask_supervisor(find_record(one.name), "/traffic", asdict(split), timeout=30)
        with Load(one.endpoint_file, "odd", "hello", threads=4):
            seconds, alert = one.await_alert("MarwrightCanaryWorse", began)
        keep("a candidate that fails a fourth of its requests", "MarwrightCanaryWorse", seconds)
        assert alert["labels"]["version"] == "2.0"
    finally:
        one.end()


@pytest.fixture(scope="module")
def unhurried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A server whose rules and pauses are as they are."""
    if not os.environ.get("MARWRIGHT_ALERTS"):
        pytest.skip("takes minutes: benchmarks/alerts.py runs it")
    one = Watched(tmp_path_factory.mktemp("unhurried"), "unhurried", scale=1)
    write_archive(one.folder / "store/odd.mar", "odd")
    one.write(models=[{"archive": "odd.mar", "workers": 3, "queue": 6}])
    try:
        one.start()
        one.watch()
        time.sleep(20)  # it has been read some times before anything happens
        yield one
    finally:
        one.end()


@pytest.mark.slow
def test_without_a_scale_the_quick_alerts_come_within_minutes(
    unhurried: Watched, keep: Keep
) -> None:
    began = time.monotonic()
    for pid in list_workers(unhurried, "odd"):
        os.kill(pid, signal.SIGKILL)
    seconds, _ = unhurried.await_alert("MarwrightWorkerRestarts", began)
    keep("three workers killed", "MarwrightWorkerRestarts", seconds, 1)

    began = time.monotonic()
    with Load(unhurried.endpoint_file, "odd", "fail"):
        seconds, _ = unhurried.await_alert("MarwrightErrorBudgetBurnFast", began)
    keep("a handler that fails", "MarwrightErrorBudgetBurnFast", seconds, 1)

    began = time.monotonic()
    with Load(unhurried.endpoint_file, "odd", "sleep 1", threads=12):
        seconds, _ = unhurried.await_alert("MarwrightQueueGrowing", began)
    keep("a full queue", "MarwrightQueueGrowing", seconds, 1)

    kill_java(unhurried)
    wait_until(lambda: unhurried.status().get("restarts") == 1, timeout=PATIENCE)
    unhurried.wait()
    began = time.monotonic()
    kill_java(unhurried)
    seconds, _ = unhurried.await_alert("MarwrightServerRestarts", began)
    keep("Java killed a second time", "MarwrightServerRestarts", seconds, 1)

    unhurried.wait()
    time.sleep(20)
    began = time.monotonic()
    os.kill(find_record(unhurried.name).pid, signal.SIGKILL)
    seconds, _ = unhurried.await_alert("MarwrightDown", began)
    keep("the supervisor killed", "MarwrightDown", seconds, 1)
