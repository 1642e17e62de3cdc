"""What a supervisor does beside the server, seen without one: settings, signals, connections."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from marwright.client import ModelVersion
from marwright.client.results import Worker
from marwright.errors import AnswerError, ArchiveError
from marwright.server import certificate
from marwright.server.certificate import make_certificate
from marwright.server.deployment import Deployment, ModelEntry
from marwright.server.launch import RUNNING_NAME
from marwright.server.state import State
from marwright.server.supervision import boot, care, supervisor
from marwright.server.supervision.care import Care
from marwright.server.supervision.census import Census
from marwright.server.supervision.source import Source
from marwright.server.supervision.status import UNANSWERED, VersionStatus
from marwright.server.supervision.supervisor import Supervisor
from marwright.server.wanted import Wanted


class Server:
    """As far as a supervisor's own doings need one."""

    log_offset = 0
    linger = 0.0
    health_url = ""

    def __init__(self, folder: Path, **values: Any) -> None:
        self.run_folder = folder
        self.log_file = folder / "logs/server.log"
        self.deployment = Deployment.model_validate({"store": folder, "models": [], **values})
        self.endpoint = SimpleNamespace(inference_url="http://127.0.0.1:1")
        self.staging = SimpleNamespace(folder=folder, check=lambda file: None)
        self.wanted: list[Any] = []
        self.failed: dict[Any, Any] = {}
        self.refused: dict[Any, Any] = {}
        self.lingers: list[float] = []
        self.ended_by: list[Any] = []

    def restart(self, deployment: Deployment) -> None:
        self.lingers.append(self.linger)
        self.deployment = deployment

    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)


class Connection:
    """A client that knows whether it was closed."""

    made: list[Connection]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.is_closed = False
        self.made.append(self)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *reason: object) -> None:
        self.is_closed = True


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path, name="one")


@pytest.fixture
def watching(server: Server, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A supervisor that has begun with that server."""
    Connection.made = []
    monkeypatch.setattr(supervisor, "Client", Connection)
    it: Any = Supervisor(server.deployment)
    it._server = server
    opened: list[Any] = []
    it._journal = SimpleNamespace(open=lambda path, **sizes: opened.append((path.name, sizes)))
    it.opened = opened
    it._health = SimpleNamespace(url="http://127.0.0.1:2")
    it._probe = SimpleNamespace(forget=lambda: None)
    it._connect()
    return it


def test_a_restart_takes_the_supervisors_own_settings_too(watching: Any, server: Server) -> None:
    fresh = {"linger_seconds": 47}, {"file_bytes": 123_456, "files": 3}
    watching._restart(
        Deployment.model_validate(
            {
                "store": server.run_folder,
                "models": [],
                "name": "one",
                "supervision": fresh[0],
                "logging": fresh[1],
            }
        )
    )
    assert server.lingers == [47]
    assert watching.opened[-1] == ("supervisor.log", fresh[1])


def test_each_start_closes_the_connections_to_the_one_before(watching: Any) -> None:
    watching._restart(watching.deployment)
    assert [one.is_closed for one in Connection.made] == [True, True, False, False]
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        watching._stop()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert all(one.is_closed for one in Connection.made)


def test_a_signal_while_it_stops_is_nothing(watching: Any) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        watching._stop()  # whose server sends one
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == []


def test_signals_are_taken_until_all_is_cleared_away(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    heard: list[Any] = []
    it: Any = Supervisor(
        server.deployment.model_copy(update={"ports": "free"}),
    )

    def begin(stack: Any) -> None:
        raise ArchiveError("no")

    def leave() -> None:
        heard.append(signal.getsignal(signal.SIGUSR1))

    it._begin = begin
    monkeypatch.setattr(it._jobs, "close", leave)
    with pytest.raises(ArchiveError):
        it.run()
    assert len(heard) == 1
    assert heard[0] not in {signal.SIG_DFL, signal.SIG_IGN}


@pytest.mark.parametrize("wish", ["reload", "restart"])
def test_systemd_is_told_that_it_serves_again(
    watching: Any, monkeypatch: pytest.MonkeyPatch, wish: str
) -> None:
    told: list[str] = []
    monkeypatch.setattr(supervisor, "notify_systemd", told.append)
    monkeypatch.setattr(watching, "_reload", lambda: None)
    monkeypatch.setattr(watching, "_restart_as_asked", lambda: None)
    watching._wishes.put(wish)
    watching._obey(1)
    assert told[-1] == "READY=1\nSTATUS=serving"


def test_a_name_and_the_health_port_take_another_supervisor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def deploy(name: str, health: int) -> Deployment:
        return Deployment.model_validate(
            {"store": tmp_path, "name": name, "ports": {"health": health}}
        )

    begun, fresh = deploy("one", 8083), deploy("two", 9083)
    assert Source(begun, lambda: fresh).read(begun) is fresh
    assert "stop and marwright serve: name, ports.health" in caplog.text
    caplog.clear()
    Source(begun, lambda: deploy("one", 8083)).read(begun)
    Source(begun, None).read(begun)
    assert caplog.text == ""


@pytest.mark.parametrize(("days", "warns"), [(25, True), (1, False)])
def test_a_certificate_that_expires_soon_is_warned_of(
    watching: Any,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    days: int,
    warns: bool,
) -> None:
    made = make_certificate(tmp_path / "tls")  # good for 30 days
    now = datetime.now(timezone.utc) + timedelta(days=days)

    def warn(path: Path) -> str:
        return certificate.warn_of_expiry(path, now=now)

    monkeypatch.setattr(boot, "warn_of_expiry", warn)
    tls = {"certificate": made.certificate, "key": made.key}
    server.deployment = Deployment.model_validate({"store": tmp_path, "models": [], "tls": tls})
    caplog.clear()
    watching._connect()
    assert ("expires on" in caplog.text) == warns


def make_version(version: str, workers: int = 1) -> ModelVersion:
    return ModelVersion("cnn", version, f"cnn-{version}.mar", workers, workers, 8, 1, False, ())


def test_one_version_that_does_not_come_back_keeps_no_other_from_it(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = [make_version("1.0"), make_version("2.0"), make_version("3.0", workers=2)]
    for version in before:
        (server.run_folder / version.archive).touch()
    now = State({("cnn", "3.0"): make_version("3.0")}, {"cnn": "3.0"})
    done: list[Any] = []

    def start(client: Any, file: str, key: Any, workers: int) -> None:
        if key[1] == "1.0":
            raise AnswerError("it does not start", status=500)
        done.append(key)

    models = SimpleNamespace(
        scale=lambda *a, **k: done.append("scaled"), set_default=lambda *a: done.append("default")
    )
    monkeypatch.setattr(care, "read_state", lambda client: now)
    monkeypatch.setattr(care, "start_version", start)
    caring = Care(cast(Any, SimpleNamespace(models=models)), cast(Any, server), Census())
    versions = {(one.name, one.version): one for one in before}
    caring.restore(State(versions, {"cnn": "2.0"}))
    assert done == [("cnn", "2.0"), "scaled", "default"]
    assert "cnn 1.0 is not as it was before: it does not start" in caplog.text


def want(version: str, workers: int = 2) -> Wanted:
    file = f"cnn-{version}.mar"
    settings = {"minWorkers": workers, "maxWorkers": max(1, workers)}
    return Wanted("cnn", version, Path(file), ModelEntry(archive=file), {}, settings)


def live(told: int, ready: int) -> State:
    """Return a server that is told to have so many workers of cnn 1.0, of which some are READY."""
    workers = tuple(Worker(str(9000 + n), "READY", 100 + n, 0) for n in range(ready))
    version = ModelVersion("cnn", "1.0", "cnn-1.0.mar", told, told, 8, 1, False, workers)
    return State({("cnn", "1.0"): version}, {"cnn": "1.0"})


def say(server: Server, *messages: str) -> None:
    """Add what a worker prints to the server's log."""
    server.log_file.parent.mkdir(exist_ok=True)
    with server.log_file.open("a", encoding="utf-8") as log:
        for message in messages:
            thread = "W-9001-cnn_1.0-stdout"
            fields = {"time": "2026-11-23T23:39:32.045Z", "level": "INFO", "thread": thread}
            log.write(json.dumps({**fields, "logger": "MODEL_LOG", "message": message}) + "\n")


@pytest.fixture
def look(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[[State], VersionStatus]:
    """Return a function that looks at the server's only version, cnn 1.0 with two workers."""
    monkeypatch.setattr(care, "LOG_SECONDS", 0.0)
    server.wanted = [want("1.0")]
    say(server, "[PID]1", "[PID]2", "[PID]3")  # of a life before: it was adopted
    caring = Care(cast(Any, None), cast(Any, server), Census())
    probe = cast(Any, SimpleNamespace(ask=lambda *_: None, read=lambda _: ""))
    return lambda state: caring.look(state, probe, None).models[0]


GONE = State({}, {})
DIED = ("Backend worker process died.", "Traceback (most recent call last):")


def test_what_was_scaled_down_or_unregistered_by_hand_is_not_broken(
    look: Callable[[State], VersionStatus], server: Server
) -> None:
    assert look(live(2, 2)).problem == ""
    assert look(live(1, 1)).problem == "1 of 2 workers are READY"
    assert look(live(0, 0)).problem == "0 of 2 workers are READY"
    say(server, "[PID]4")
    assert look(GONE).problem == "it is not registered"


def test_a_worker_that_dies_in_vain_again_and_again_makes_a_broken_model(
    look: Callable[[State], VersionStatus], server: Server
) -> None:
    look(live(2, 2))
    say(server, "[PID]4", "[PID]5")
    assert look(live(2, 1)).problem == "1 of 2 workers are READY"
    say(server, "[PID]6")
    assert "it was killed, or ended itself" in look(live(2, 1)).problem
    assert look(live(1, 1)).problem == "1 of 2 workers are READY"  # it was given up by hand
    assert look(live(2, 2)).problem == ""
    assert look(live(2, 1)).problem == "1 of 2 workers are READY"


def test_a_worker_that_cannot_load_makes_a_broken_model(
    look: Callable[[State], VersionStatus], server: Server
) -> None:
    look(live(2, 2))
    say(server, *DIED, '  File "/tmp/m/handler.py", line 3, in initialize', "KeyError: 'labels'")
    assert "KeyError: 'labels' at handler.py:3" in look(live(2, 1)).problem
    assert "KeyError" in look(GONE).problem


def test_workers_that_nobody_wants_any_more_are_not_started_anew(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(care, "RETRY_SECONDS", -31)  # at once
    server.wanted = [want("1.0")]
    caring = Care(cast(Any, None), cast(Any, server), Census())
    probe = cast(Any, SimpleNamespace(ask=lambda *_: None, read=lambda _: ""))
    assert caring.look(live(2, 0), probe, None).job is not None
    assert caring.look(live(0, 0), probe, None).job is None


def test_who_asks_for_a_look_gets_one_that_begins_later(
    watching: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [
        VersionStatus("cnn", "1.0", True, 1, 1, problem=problem) for problem in (UNANSWERED, "")
    ]
    looks: list[int] = []

    def look(server: Any) -> None:
        looks.append(len(looks))
        watching._update(phase="serving", models=(versions[min(len(looks), 2) - 1],))

    monkeypatch.setattr(watching, "_look", look)
    watching._server.exit_status = None
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(watching.look_anew()))
    thread.start()
    while thread.is_alive():
        watching._obey(0.1)  # without a wish this waits
        watching._check()
    assert len(looks) >= 2
    assert found[0].not_ready == []


def test_while_a_server_is_restarted_no_worker_is_ready(watching: Any, server: Server) -> None:
    ready = VersionStatus("cnn", "1.0", True, 1, 1, memory_bytes=9)
    watching._update(phase="serving", models=(ready,), java_pid=7)
    seen: list[Any] = []
    server.restart = lambda deployment: seen.append(watching.read_status())  # type: ignore[method-assign]
    watching._restart(watching.deployment)
    (status,) = seen
    assert (status.phase, status.java_pid) == ("restarting", None)
    assert [(m.name, m.ready_workers, m.memory_bytes) for m in status.models] == [("cnn", 0, 0)]
    assert status.models[0].problem == UNANSWERED


def test_what_was_applied_is_taken_once_it_can_be_read(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    path = server.run_folder / RUNNING_NAME
    path.write_text(server.deployment.model_dump_json(), encoding="utf-8")
    caring = Care(cast(Any, None), cast(Any, server), Census())
    assert caring.follow(server.deployment) is server.deployment
    applied = server.deployment.model_dump(mode="json")
    applied["supervision"]["check_seconds"] = 7
    whole = Deployment.model_validate(applied).model_dump_json()
    with caplog.at_level(logging.INFO):
        for text in (whole[:-1], whole[:-1], whole):
            path.write_text(text, encoding="utf-8")
            os.utime(path, ns=(5, 5))  # one change, of which the rest comes later
            taken = caring.follow(server.deployment)
    assert taken.supervision.check_seconds == 7
    assert caplog.text.count("cannot be taken yet") == 1
    assert caring.follow(taken) is taken
