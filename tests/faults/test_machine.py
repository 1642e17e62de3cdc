"""A machine whose disk is full, or whose clock jumps."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import requests

from marwright.server.java import find_java

pytestmark = pytest.mark.server

Serve = Callable[..., Any]
Begin = Callable[..., Any]
Record = Callable[..., None]

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
DAY = 86_400


@pytest.mark.slow
def test_a_full_disk_under_the_log_stops_no_answer(
    serve: Serve, load: Begin, record: Record, tmp_path: Path
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    for name in ("server.log", "supervisor.log"):
        (logs / name).symlink_to("/dev/full")  # each write fails with ENOSPC
    served = serve(logging={"folder": str(logs), "requests": "all"})
    traffic = load(served)
    time.sleep(5)
    reports = traffic.finish()
    record("no space left for the log", reports)
    assert reports["plain"]["lost"] == reports["client"]["lost"] == 0
    assert served.process.poll() is None
    # That they were written to, and in vain: log4j says so, the supervisor's journal cannot.
    assert "No space left on device" in (served.run_folder / "output.log").read_text("utf-8")
    for name in ("server.log", "supervisor.log"):
        assert (logs / name).readlink() == Path("/dev/full")


@pytest.mark.skipif(not FAKETIME.exists(), reason="needs Debian's package faketime")
@pytest.mark.slow
def test_a_clock_that_jumps_loses_the_client_nothing(
    serve: Serve, load: Begin, record: Record, tmp_path: Path
) -> None:
    offset = tmp_path / "offset"
    offset.write_text("+0\n", encoding="ascii")
    served = serve(environment={"JAVA_HOME": str(make_java(tmp_path / "jvm", offset))})
    traffic = load(served)
    for jump in (+DAY, -DAY, 0):
        jumped = offset.with_suffix(".new")
        jumped.write_text(f"{jump:+d}\n", encoding="ascii")
        jumped.replace(offset)
        served.wait_until(
            lambda jump=jump: abs(read_java_clock(served) - time.time() - jump) < DAY / 2,
            f"Java's clock {jump:+d} s from ours",
        )
        time.sleep(2)
    reports = traffic.finish()
    record("the clock jumps a day ahead, a day back, and home", reports)
    assert reports["client"]["lost"] == 0
    assert served.list_versions()["cnn"][0][1] == 1


def read_java_clock(served: Any) -> float:
    """Return the time of the log's last line, after provoking one."""
    endpoint = served.endpoint
    token = json.loads(endpoint.key_file.read_text("utf-8"))["inference"]["key"]
    answer = requests.get(
        f"{endpoint.inference_url}/predictions/%zz",  # logged with Java's exception
        headers={"Authorization": f"Bearer {token}"},
        timeout=10,
    )
    assert answer.status_code >= 400
    text = (served.run_folder / "logs/server.log").read_text("utf-8")
    line = json.loads(text.rstrip().rpartition("\n")[2])
    return datetime.fromisoformat(line["time"].replace("Z", "+00:00")).timestamp()


def make_java(folder: Path, offset: Path) -> Path:
    """Return a JAVA_HOME whose Java, and all that it starts, has a clock that a file moves.

    The supervisor's own clock is left alone: libfaketime breaks Python's time.sleep.
    """
    script = folder / "bin/java"
    script.parent.mkdir(parents=True)
    variables = {
        "LD_PRELOAD": FAKETIME,
        "FAKETIME_TIMESTAMP_FILE": offset,
        "FAKETIME_NO_CACHE": 1,
        "FAKETIME_DONT_FAKE_MONOTONIC": 1,
    }
    lines = [f"export {name}={shlex.quote(str(value))}" for name, value in variables.items()]
    command = f'exec {shlex.quote(str(find_java().path))} "$@"'
    script.write_text("\n".join(["#!/bin/sh", *lines, command, ""]), encoding="utf-8")
    script.chmod(0o755)
    return folder
