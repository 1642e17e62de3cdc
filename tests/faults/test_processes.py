"""Processes that are killed or change in number while requests come in."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.server

Serve = Callable[..., Any]
Begin = Callable[..., Any]
Record = Callable[..., None]


def test_of_a_killed_worker_the_client_sees_nothing(
    serve: Serve, load: Begin, record: Record
) -> None:
    served = serve(models=[{"archive": "cnn.mar", "workers": 2}])
    traffic = load(served)
    for _ in range(2):
        before = list_pids(served)
        os.kill(before[0], signal.SIGKILL)
        served.wait_until(
            lambda before=before: (
                before[0] not in list_pids(served) and len(list_pids(served)) == 2
            ),
            "two workers again",
        )
    reports = traffic.finish()
    record("a worker killed with -9, twice", reports)
    assert reports["client"]["lost"] == 0
    assert reports["plain"]["answered"] > 0.9 * reports["plain"]["sent"]


def list_pids(served: Any) -> list[int]:
    """Return the processes of cnn's READY workers."""
    with served.client() as client:
        return [item.pid for item in client.models.describe("cnn").workers if item.ready]


def test_a_killed_server_comes_back_as_it_was(serve: Serve, load: Begin, record: Record) -> None:
    served = serve(models=["cnn.mar", {"archive": "cnn-2.0.mar", "default": True}])
    before = served.list_versions()
    assert before["cnn"] == [("1.0", 1, False), ("2.0", 1, True)]
    traffic = load(served)
    java = served.java
    java.kill()
    served.wait_until(lambda: served.java.pid != java.pid, "another Java")
    served.wait_until(lambda: served.list_versions() == before, "the same versions and default")
    time.sleep(2)
    reports = traffic.finish()
    record("the server killed with -9, restarted by its supervisor", reports)
    assert reports["client"]["lost"] == 0
    assert served.process.poll() is None


@pytest.mark.slow
def test_scaling_up_and_down_loses_the_client_nothing(
    serve: Serve, load: Begin, record: Record
) -> None:
    served = serve()
    traffic = load(served)
    with served.client() as client:
        for workers in (4, 1):
            client.models.scale("cnn", workers)
            served.wait_until(
                lambda workers=workers: served.list_versions()["cnn"][0][1] == workers,
                f"{workers} workers",
            )
            time.sleep(1)
    reports = traffic.finish()
    record("scaled from 1 to 4 to 1 workers", reports)
    assert reports["client"]["lost"] == 0


@pytest.mark.slow
def test_a_worker_over_its_memory_is_renewed_and_nothing_is_lost(
    serve: Serve, load: Begin, record: Record
) -> None:
    served = serve(models=[{"archive": "cnn.mar", "workers": 2, "memory_limit": "64 MiB"}])
    traffic = load(served)

    def renewed() -> bool:
        return "renewed" in (served.run_folder / "logs/supervisor.log").read_text("utf-8")

    served.wait_until(renewed, "a renewal in the supervisor's log")
    time.sleep(3)
    reports = traffic.finish()
    record("workers renewed for their memory", reports)
    assert reports["client"]["lost"] == 0
    assert reports["plain"]["lost"] == 0


@pytest.mark.slow
def test_the_second_supervisor_of_one_configuration_says_so(
    serve: Serve, load: Begin, record: Record, marwright: Callable[..., Any]
) -> None:
    served = serve()
    traffic = load(served)
    second = marwright("serve", "--deploy", served.deploy, env=served.environment)
    time.sleep(2)
    reports = traffic.finish()
    record("a second supervisor started on one configuration", reports)
    assert second.returncode == 1
    assert str(served.process.pid) in second.stderr
    assert reports["plain"]["lost"] == reports["client"]["lost"] == 0


@pytest.mark.slow
def test_a_killed_supervisor_is_replaced_and_nothing_is_lost(
    serve: Serve, load: Begin, record: Record
) -> None:
    served = serve(models=["cnn.mar"])
    traffic = load(served)
    java = served.java
    served.process.kill()
    served.process.wait()
    process = psutil.Popen(
        [*served.process.args], env=served.environment, stdout=-1, stderr=-3, text=True
    )
    try:
        assert process.stdout.readline()
        time.sleep(2)
        reports = traffic.finish()
        assert served.java == java
    finally:
        process.terminate()
        process.wait(40)
        process.stdout.close()
    record("the supervisor killed with -9, the server adopted by the next", reports)
    assert reports["plain"]["lost"] == reports["client"]["lost"] == 0
