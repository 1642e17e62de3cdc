"""Faults caused for real, and the alert that then arrives at a webhook.

A real TorchServe under `marwright serve`, a real Prometheus and Alertmanager under `marwright
monitor up`. Windows and pauses are divided by a factor, which is stated with each time that is
measured: MARWRIGHT_ALERTS=FILE keeps them (benchmarks/alerts.py).
"""

from __future__ import annotations

import contextlib
import email.policy
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime
from email import message_from_bytes
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, Envelope, Session
from PIL import Image, ImageOps
from tests.conftest import Served, end_serving, wait_until

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

SCALE = 120.0
LOGGED_SCALE = 60.0
"""Of what compares windows, which takes a second or two."""
ONCE = Retries(tries=1, after_loss=0, away=0)
PATIENCE = 200.0
USER, PASSWORD = "alerts", "a-secret-of-the-mail-server"
HANDLER = """\
import os
import time

KEPT = []

def handle(data, context):
    return data and [answer(bytes(item.get("body") or item.get("data")).decode()) for item in data]

def answer(asked):
    word, _, value = asked.partition(" ")
    if word == "fail":
        raise ValueError("asked to fail")
    if word == "sleep":
        time.sleep(float(value))
    if word == "grow":
        KEPT.append(bytearray(b"x" * int(value)))
    return "done"
"""
SINGLE = """\
import fcntl

LOCK = open({lock!r}, "w")
fcntl.flock(LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
"""
BROKEN = "raise RuntimeError('this handler never loads')\n"


def write_archive(path: Path, model: str, version: str = "1.0", handler: str = HANDLER) -> None:
    manifest = {
        "createdOn": "01/01/2026 00:00:00",
        "runtime": "python",
        "model": {"modelName": model, "handler": "odd.py", "modelVersion": version},
        "archiverVersion": "0.12.0",
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        archive.writestr("odd.py", handler)


def read_time(text: str) -> float:
    """Return seconds since the epoch; Go writes more digits than Python 3.10 reads."""
    whole, _, fraction = text.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")


class Receiver:
    """A webhook: it keeps every alert that comes, with the moment."""

    def __init__(self) -> None:
        self.alerts: list[tuple[float, dict[str, Any]]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                now = time.monotonic()
                receiver.alerts += [(now, alert) for alert in body["alerts"]]
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/a-secret"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def find(self, name: str, since: float, status: str = "firing") -> tuple[float, Any] | None:
        """Return an alert that has begun since then, and when it came."""
        return next(
            (
                (moment, alert)
                for moment, alert in list(self.alerts)
                if time.monotonic() - (time.time() - read_time(alert["startsAt"])) >= since
                and alert["labels"]["alertname"] == name
                and alert["status"] == status
            ),
            None,
        )

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Mailbox:
    """A mail server that keeps what comes from who has signed in."""

    def __init__(self) -> None:
        self.mails: list[EmailMessage] = []
        self._controller = Controller(
            self,
            hostname="127.0.0.1",
            port=Ports.find_free().inference,
            auth_require_tls=False,
            auth_exclude_mechanism=["LOGIN"],  # it asks for "User Name", which Go's does not answer
            authenticator=self._sign_in,
        )
        self._controller.start()

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "server": f"127.0.0.1:{self._controller.port}",
            "sender": "marwright@example.org",
            "to": "team@example.org",
            "user": USER,
            "password": "password",
            "tls": False,
        }

    async def handle_DATA(self, server: object, session: Session, envelope: Envelope) -> str:
        if not session.authenticated:
            return "530 5.7.0 Authentication required"
        assert isinstance(envelope.content, bytes)
        mail = message_from_bytes(envelope.content, policy=email.policy.default)
        assert isinstance(mail, EmailMessage)
        self.mails.append(mail)
        return "250 OK"

    def find(self, name: str) -> EmailMessage | None:
        return next((mail for mail in list(self.mails) if name in mail["Subject"]), None)

    def close(self) -> None:
        self._controller.stop()

    def _sign_in(self, server: object, session: object, mail: object, way: str, given: Any) -> Any:
        asked = (given.login, given.password)
        return AuthResult(success=asked == (USER.encode(), PASSWORD.encode()))


class Watched(Served):
    """A server with `marwright monitor up` beside it."""

    def __init__(self, folder: Path, name: str, *, scale: float = SCALE) -> None:
        super().__init__(folder, name)
        self.scale = scale
        self.receiver = Receiver()
        self.mailbox = Mailbox()
        self.monitor: subprocess.Popen[str] | None = None
        self.addresses: dict[str, str] = {}
        self.began = 0.0
        """When the monitoring was asked for."""
        (folder / "store").mkdir()
        (folder / "webhook").write_text(self.receiver.url + "\n")
        self.environment = {**os.environ, "XDG_STATE_HOME": str(folder / "state")}

    def write(self, *, monitoring: dict[str, Any] | None = None, **values: Any) -> None:
        ports = Ports.find_free()
        chosen = {
            "prometheus": ports.inference,
            "alertmanager": ports.management,
            "webhook": "webhook",
            **(monitoring or {}),
        }
        super().write(monitoring=chosen, **values)

    def watch(self) -> None:
        command = [sys.executable, "-m", "marwright", "monitor", "up", self.name, "--json"]
        self.began = time.monotonic()
        with (self.folder / "monitor.txt").open("ab") as errors:
            self.monitor = subprocess.Popen(
                [*command, "--scale", str(self.scale)],
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=self.environment,
            )
        assert self.monitor.stdout is not None
        line = self.monitor.stdout.readline()
        assert line, self.read_words()
        self.addresses = json.loads(line)

    def read_words(self) -> str:
        return (self.folder / "monitor.txt").read_text()

    def await_alert(
        self, name: str, since: float, during: Callable[[], Any] = lambda: None
    ) -> tuple[float, Any]:
        """Return how many seconds later it came, and the alert; `during` is done meanwhile."""

        def look() -> Any:
            during()
            return self.receiver.find(name, since)

        moment, alert = wait_until(look, timeout=PATIENCE, what=f"{name}; {self.read_words()}")
        assert alert["annotations"]["runbook_url"].endswith(f"#{name.lower()}")
        return moment - since, alert

    def end(self) -> None:
        try:
            if self.monitor is not None:
                end_serving(self.monitor)
        finally:
            super().end()
            self.receiver.close()
            self.mailbox.close()


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


def kill_java(watched: Watched) -> None:
    folder = Path(find_record(watched.name).run_folder)
    pid = int((folder / "server_pid").read_text("ascii").split()[0])
    os.kill(pid, signal.SIGKILL)


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
