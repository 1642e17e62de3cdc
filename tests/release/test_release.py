"""Releases to real servers under a steady load: whole ones, and interrupted ones."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.loads import find_unanswered

from marwright.server import TorchServe
from marwright.server.deployment import Deployment

pytestmark = pytest.mark.server

Load = Callable[..., Any]
Record = Callable[..., None]
Pack = Callable[..., Path]

FIRST = {"1.0": (1, True)}
SECOND = {"1.0": (1, False), "2.0": (1, True)}
BACK = {"1.0": (1, True), "2.0": (1, False)}
STEPS = [
    "register",
    "warm-up",
    "samples",
    "shadow",
    "canary 20 %",
    "canary 50 %",
    "default",
    "drain",
    "keep",
]


def mark(*quick: str) -> list[Any]:
    """Return the steps, of which only some are interrupted in each run of the tests."""
    return [pytest.param(s, marks=[] if s in quick else [pytest.mark.slow]) for s in STEPS]


def begin_until(served: Any, archive: Path, step: str) -> subprocess.Popen[str]:
    """Begin a release, and return once it is in a step."""
    process: subprocess.Popen[str] = served.begin("release", archive)
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline:
        if any(line.step == step for line in served.history.read()):
            break
        time.sleep(0.002)
    return process


def end(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    process.send_signal(number)
    _, err = process.communicate(timeout=90)
    return process.returncode, err


def test_a_release_and_its_rollback_lose_no_request(
    served: Any, load: Load, record: Record, pack: Pack, tmp_path: Path
) -> None:
    traffic = load(served)
    released = served.run("release", pack(tmp_path / "echo-2.0.mar", "2.0"), "--json")
    assert released.returncode == 0, released.stderr
    lines = json.loads(released.stdout)
    assert [line["event"] for line in lines if line["event"] in {"begun", "released"}] == [
        "begun",
        "released",
    ]
    assert {(line["archive"], line["before_archive"]) for line in lines} == {
        ("echo-2.0.mar", "echo.mar")
    }
    assert all(len(line[key]) == 64 for line in lines for key in ("digest", "before_digest"))
    assert served.list_versions() == SECOND
    text = served.deploy.read_text("utf-8")
    assert "default: true" in text.partition("echo-2.0.mar")[2]
    assert "# what answers today" in text
    assert "# one is enough" in text
    assert "nothing to do" in served.run("apply", served.deploy).stdout

    began = time.monotonic()
    back = served.run("rollback", "--reason", "it was only a test")
    assert back.returncode == 0, back.stderr
    assert time.monotonic() - began < 10
    assert served.list_versions() == BACK
    assert "nothing to do" in served.run("apply", served.deploy).stdout
    assert served.history.read()[-1].reason == "it was only a test"
    reports = traffic.finish()
    record("a version change 1 -> 2 -> 1", reports)
    assert find_unanswered(reports) == {}
    table = served.run("releases").stdout
    assert "marwright diff echo.mar echo-2.0.mar" in table


def test_without_a_gateway_it_says_what_is_left_out(plain: Any, pack: Pack, tmp_path: Path) -> None:
    released = plain.run("release", pack(tmp_path / "echo-2.0.mar", "2.0"))
    assert "no shadow and no canary" in released.stderr
    assert {line.step for line in plain.history.read()} & {"shadow", "canary 20 %"} == set()


@pytest.mark.slow
def test_a_restart_keeps_what_was_released(plain: Any, pack: Pack, tmp_path: Path) -> None:
    assert plain.run("release", pack(tmp_path / "echo-2.0.mar", "2.0")).returncode == 0
    restarted = plain.run("restart", "plain")
    assert restarted.returncode == 0, restarted.stderr
    assert plain.list_versions() == SECOND


def test_what_is_older_than_the_version_to_return_to_is_unregistered(
    plain: Any, pack: Pack, tmp_path: Path
) -> None:
    for version in ("2.0", "3.0"):
        assert plain.run("release", pack(tmp_path / f"echo-{version}.mar", version)).returncode == 0
    assert plain.list_versions() == {"2.0": (1, False), "3.0": (1, True)}
    assert "echo.mar" not in plain.deploy.read_text("utf-8")
    assert "nothing to do" in plain.run("apply", plain.deploy).stdout
    assert plain.run("rollback").returncode == 0
    assert plain.list_versions() == {"2.0": (1, True), "3.0": (1, False)}
    gone = plain.run("rollback")
    assert gone.returncode == 1
    assert "echo 1.0 is not registered any more; release it again" in gone.stderr


@pytest.mark.slow
def test_a_second_release_at_once_is_refused(
    site: Any, load: Load, record: Record, pack: Pack, tmp_path: Path
) -> None:
    traffic = load(site)
    first = begin_until(site, pack(tmp_path / "echo-2.0.mar", "2.0"), "shadow")
    second = site.run("release", pack(tmp_path / "echo-3.0.mar", "3.0"))
    assert second.returncode == 1
    assert f"another release is being made: found process {first.pid}" in second.stderr
    back = site.run("rollback", "echo")
    assert back.returncode == 1
    assert "interrupt it" in back.stderr
    _, err = first.communicate(timeout=90)
    assert first.returncode == 0, err
    assert site.list_versions() == SECOND
    reports = traffic.finish()
    record("two releases at once", reports)
    assert find_unanswered(reports) == {}


@pytest.mark.parametrize("step", mark("canary 50 %"))
def test_ctrl_c_takes_it_back(
    site: Any, load: Load, record: Record, pack: Pack, tmp_path: Path, step: str
) -> None:
    before = site.see()
    traffic = load(site)
    process = begin_until(site, pack(tmp_path / "echo-2.0.mar", "2.0", samples=10), step)
    status, err = end(process, signal.SIGINT)
    if step == "keep" and status == 0:  # it was done before the signal came
        assert site.list_versions() == SECOND
        return
    assert status == 130, err
    after = site.see()
    if STEPS.index(step) >= STEPS.index("default"):  # said by then, where it was only meant
        after["deploy"] = after["deploy"].replace("    default: true\n", "")
    assert after == before
    last = site.history.list_standings()[-1].last
    assert (last.event, last.reason) == ("returned", "it was interrupted")
    reports = traffic.finish()
    record("Ctrl-C in each step of a release", reports)
    assert find_unanswered(reports) == {}


def test_ctrl_c_after_the_default_has_moved_loses_nothing_without_a_gateway(
    plain: Any, load: Load, pack: Pack, tmp_path: Path
) -> None:
    traffic = load(plain)
    process = begin_until(plain, pack(tmp_path / "echo-2.0.mar", "2.0", seconds=0.01), "drain")
    status, err = end(process, signal.SIGINT)
    assert status in {0, 130}, err
    if status == 130:
        assert plain.list_versions() == FIRST
    assert find_unanswered(traffic.finish()) == {}


@pytest.mark.parametrize("step", mark("canary 20 %"))
def test_a_killed_release_is_finished_by_the_same_command(
    site: Any, load: Load, record: Record, pack: Pack, tmp_path: Path, step: str
) -> None:
    traffic = load(site)
    archive = pack(tmp_path / "echo-2.0.mar", "2.0", samples=10)
    end(begin_until(site, archive, step), signal.SIGKILL)
    standing = site.history.list_standings()[-1]
    if step == "keep" and standing.last.event == "released":  # it was done before the signal came
        return
    assert standing.is_open
    assert f"open: {standing.step}" in site.run("releases").stdout
    other = site.run("release", pack(tmp_path / "echo-3.0.mar", "3.0"))
    assert other.returncode == 1
    assert "finish it: marwright release echo-2.0.mar" in other.stderr
    again = site.run("release", archive)
    assert again.returncode == 0, again.stderr
    assert f"stands at {standing.step}" in again.stderr
    assert site.list_versions() == SECOND
    assert "nothing to do" in site.run("apply", site.deploy).stdout
    reports = traffic.finish()
    record("marwright killed with -9 in each step of a release", reports)
    assert find_unanswered(reports) == {}


@pytest.mark.parametrize("step", mark("default"))
def test_a_killed_release_is_taken_back_by_a_rollback(
    site: Any, load: Load, record: Record, pack: Pack, tmp_path: Path, step: str
) -> None:
    before = site.see()
    traffic = load(site)
    end(
        begin_until(site, pack(tmp_path / "echo-2.0.mar", "2.0", samples=10), step),
        signal.SIGKILL,
    )
    back = site.run("rollback")
    assert back.returncode == 0, back.stderr
    assert "echo is back at 1.0" in back.stdout
    if step == "keep" and site.list_versions() == BACK:
        return
    after = site.see()
    after["deploy"] = after["deploy"].replace("    default: true\n", "")
    assert after == before
    reports = traffic.finish()
    record("marwright killed with -9 in each step of a release", reports)
    assert find_unanswered(reports) == {}


def test_another_torchserve_is_released_to_by_its_address(
    plain: Any, pack: Pack, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    pack(store / "echo.mar", "1.0")
    deployment = Deployment.model_validate(
        {"store": store, "models": ["echo.mar"], "ports": "free", "access": {"models": "token"}}
    )
    with TorchServe.deploy(deployment) as server:
        endpoint = server.endpoint
        # As a stock one: whoever releases knows its addresses, its tokens, and what it reads.
        words: list[Any] = ["--to", endpoint.management_url]
        words += ["--inference-url", endpoint.inference_url]
        words += ["--key-file", endpoint.key_file, "--store", server.staging.folder]
        released = plain.run("release", pack(tmp_path / "echo-2.0.mar", "2.0"), *words)
        assert released.returncode == 0, released.stderr
        assert server.client.models.describe("echo").version == "2.0"
        back = plain.run("rollback", *words)
        assert back.returncode == 0, back.stderr
        assert server.client.models.describe("echo").version == "1.0"
