"""A gateway's life: started, changed under load, adopted, its log rotated, stopped."""

from __future__ import annotations

import contextlib
import http.client
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.conftest import wait_until

from marwright.errors import (
    ConfigurationError,
    PortTakenError,
    ServerDiedError,
    ServerError,
)
from marwright.gateway.accesses import AccessLog
from marwright.gateway.configuration import Settings
from marwright.gateway.gateway import Gateway
from marwright.gateway.traffic import Traffic
from marwright.server.certificate import make_certificate
from marwright.server.ports import Ports

HOLDER = """
import sys, time
from pathlib import Path
from marwright.gateway.configuration import Settings
from marwright.gateway.gateway import Gateway
folder, port, replica = sys.argv[1:]
settings = Settings(port=int(port), replicas=(replica,))
held = Gateway.start(Path(folder), settings, linger=30)
print("held", flush=True)
time.sleep(60)
"""


@dataclass
class Load:
    """What some clients got, each over a connection that it keeps; none tries anything twice."""

    answers: int = 0
    failures: list[str] = field(default_factory=list)


@contextlib.contextmanager
def put_under_load(settings: Settings, *, clients: int = 6, pause: float = 0.0) -> Iterator[Load]:
    load, stopping, lock = Load(), threading.Event(), threading.Lock()

    def ask_steadily() -> None:
        connection = http.client.HTTPConnection(settings.host, settings.port, timeout=20)
        while not stopping.is_set():
            try:
                connection.request("POST", "/predictions/cnn", b"body")
                response = connection.getresponse()
                found = "" if response.read() == b"body" else f"status {response.status}"
            except (OSError, http.client.HTTPException) as exc:
                found = repr(exc)
                connection.close()
            with lock:
                load.answers += not found
                load.failures += [found] if found else []
            time.sleep(pause)
        connection.close()

    with ThreadPoolExecutor(clients) as pool:
        for _ in range(clients):
            pool.submit(ask_steadily)
        try:
            yield load
        finally:
            stopping.set()


def test_changes_under_load_cost_no_request(
    start: Any, settings: Settings, replica: Any, shift: Any
) -> None:
    gateway = start(settings)
    replica.answer = lambda asked: replica.Answer(body=asked.body, seconds=0.01)
    with put_under_load(settings, clients=8, pause=0.004) as load:
        for number in range(8):
            gateway.change(shift(settings, share=10 + number), drain=0.25)
    assert load.answers > 500
    assert load.failures == []


def test_a_change_is_in_use_once_it_returns(
    start: Any, settings: Settings, ask: Any, shift: Any
) -> None:
    gateway = start(settings)
    for share, version in ((100, "2.0"), (0, "1.0"), (100, "2.0")):
        gateway.change(shift(settings, share=share), drain=0)
        found = {ask(settings, "/predictions/cnn").headers["x-marwright-version"] for _ in range(9)}
        assert found == {version}
    gateway.change(replace(settings, traffic=Traffic()), drain=0)
    assert ask(settings, "/predictions/cnn").headers["x-marwright-version"] is None


def test_the_same_settings_change_nothing(start: Any, settings: Settings) -> None:
    gateway = start(settings)
    workers = gateway._list_workers()
    gateway.change(settings)
    assert gateway._list_workers() == workers


def test_a_renewed_certificate_is_a_change(start: Any, settings: Settings, tmp_path: Path) -> None:
    def find_served() -> str:
        return ssl.get_server_certificate((settings.host, settings.port), timeout=10)

    made = make_certificate(tmp_path / "tls")
    settings = replace(settings, certificate=made.certificate, key=made.key)
    gateway = start(settings)
    assert find_served() == made.certificate.read_text()
    make_certificate(tmp_path / "tls")
    gateway.change(settings, drain=0)
    assert find_served() == made.certificate.read_text()


def test_connections_end_while_they_are_drained(start: Any, settings: Settings, ask: Any) -> None:
    gateway = start(settings)
    assert ask(settings, "/predictions/cnn").headers["connection"] == "keep-alive"
    (gateway.folder / "draining-1").touch()
    assert ask(settings, "/predictions/cnn").headers["connection"] == "close"
    assert ask(settings, "/ping").headers["connection"] == "close"


def test_a_change_that_nginx_refuses_leaves_all_as_it_was(
    start: Any, settings: Settings, ask: Any, tmp_path: Path
) -> None:
    gateway = start(settings)
    before = (gateway.folder / "nginx.conf").read_text()
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    with pytest.raises(ConfigurationError, match=r"nginx refuses.*wrong\.pem"):
        gateway.change(replace(settings, certificate=wrong, key=wrong))
    assert (gateway.folder / "nginx.conf").read_text() == before
    assert ask(settings, "/predictions/cnn").status == 200


def test_a_change_that_fails_late_leaves_all_as_it_was(
    start: Any, settings: Settings, ask: Any, shift: Any, taken_port: int
) -> None:
    gateway = start(settings)
    before = (gateway.folder / "nginx.conf").read_text()
    with pytest.raises(ServerError, match="did not take its new configuration"):
        gateway.change(replace(settings, port=taken_port), drain=0)
    assert (gateway.folder / "nginx.conf").read_text() == before
    assert not list(gateway.folder.glob("draining-*"))
    gateway.change(shift(settings, share=100), drain=0)
    assert ask(settings, "/predictions/cnn").headers["x-marwright-version"] == "2.0"


def test_a_replica_that_is_killed_under_load_costs_no_request(
    start: Any,
    settings: Settings,
    processes: Callable[[int], subprocess.Popen[bytes]],
    ask: Any,
) -> None:
    ports = [Ports.find_free().inference for _ in range(2)]
    running = [processes(port) for port in ports]
    settings = replace(settings, replicas=tuple(f"http://127.0.0.1:{port}" for port in ports))
    gateway = start(settings)
    wait_until(lambda: ask(settings, "/predictions/cnn", b"body").status == 200)
    with AccessLog(gateway.folder) as log, put_under_load(settings) as load:
        time.sleep(0.4)
        running[0].kill()
        running[0].wait()
        time.sleep(0.4)
        log.read()
        processes(ports[0])
        back = f"127.0.0.1:{ports[0]}"
        wait_until(
            lambda: any(
                one.status == 200 and one.replicas[-1] == back
                for access in log.read()
                for one in access.tries
            )
        )
    assert load.answers > 100
    assert load.failures == []


def test_a_gateway_whose_holder_was_killed_is_adopted(
    settings: Settings, tmp_path: Path, replica: Any, ask: Any, shift: Any
) -> None:
    folder = tmp_path / "gateway"
    command = [sys.executable, "-c", HOLDER, str(folder), str(settings.port), replica.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == "held\n"
        finally:
            holder.kill()
    (folder / "draining-1").touch()  # killed amid a change
    with Gateway.adopt(folder) as gateway:
        assert gateway.exit_status is None
        assert ask(settings, "/ping").headers["connection"] == "keep-alive"
        assert ask(settings, "/predictions/cnn").headers["x-marwright-version"] is None
        gateway.change(shift(settings, share=100), drain=0)
        assert ask(settings, "/predictions/cnn").headers["x-marwright-version"] == "2.0"
        pid = gateway.pid
        assert pid
    assert not psutil.pid_exists(pid)
    assert not folder.exists()


def test_stopping_answers_what_it_holds(
    start: Any, settings: Settings, replica: Any, ask: Any
) -> None:
    gateway = start(settings)
    replica.answer = lambda asked: replica.Answer(seconds=0.5)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, settings, "/predictions/cnn")
        wait_until(lambda: replica.asked)
        gateway.stop(keep_folder=True)
        assert answer.result().status == 200
    assert gateway.folder.exists()
    gateway.stop()
    assert not gateway.folder.exists()


def test_all_it_writes_is_its_owners_alone(start: Any, settings: Settings, ask: Any) -> None:
    gateway = start(settings)
    ask(settings, "/predictions/cnn", b"x" * (3 << 20))
    assert gateway.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_uid for path in gateway.folder.rglob("*")} == {
        gateway.folder.stat().st_uid
    }
    owners = {psutil.Process(pid).uids().effective for pid in gateway._list_workers()}
    assert owners == {gateway.folder.stat().st_uid}
    assert (gateway.folder / "error.log").read_text() == ""
    assert (gateway.folder / "output.log").read_text() == ""


def test_an_end_of_its_own_is_told(start: Any, settings: Settings, shift: Any) -> None:
    gateway = start(settings)
    psutil.Process(gateway.pid).send_signal(signal.SIGKILL)
    wait_until(lambda: gateway.exit_status is not None)
    assert gateway.exit_status == -9
    with pytest.raises(ServerDiedError):
        gateway.change(shift(settings, share=1))


def test_a_taken_port_is_named(settings: Settings, tmp_path: Path, taken_port: int) -> None:
    with pytest.raises(PortTakenError) as caught:
        Gateway.start(tmp_path / "gateway", replace(settings, port=taken_port))
    assert str(taken_port) in caught.value.detail


def test_logs_are_put_aside_and_read_over_that(
    start: Any, settings: Settings, ask: Any, read_accesses: Any
) -> None:
    gateway = start(settings)
    found = []
    with AccessLog(gateway.folder) as log:
        for number in range(40):
            ask(settings, "/predictions/cnn", X_Request_ID=f"id-{number}")
            if number % 5 == 4:
                time.sleep(0.15)  # nginx writes what it has every 100 ms
                gateway.rotate(most=100)
            if number % 7 == 6:
                found += log.read()
        time.sleep(0.2)
        found += log.read()
    assert [access.request for access in found] == [f"id-{number}" for number in range(40)]
    assert sorted(path.name for path in gateway.folder.glob("access.log*")) == [
        "access.log",
        "access.log.1",
    ]
    gateway.rotate()
    assert (gateway.folder / "access.log").exists()
