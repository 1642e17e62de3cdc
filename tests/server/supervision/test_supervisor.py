"""The supervisor as users start it: `marwright serve` in a process of its own, over a real server.

The tests of the first server share it, in the order in which they stand here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.conftest import BOOT_SECONDS, Served, wait_until

from marwright.archive import Run, pack_run
from marwright.archive.admission import POLICY_NAME
from marwright.archive.keys import make_key_pair
from marwright.archive.signing import sign_with_key
from marwright.client import Client, Endpoint
from marwright.server import register
from marwright.server.registry import find_record
from marwright.server.supervision.inspection import is_current, restart_server

pytestmark = pytest.mark.server

BROKEN = """
class Handler:
    def initialize(self, context):
        raise KeyError("labels")
    def handle(self, data, context):
        return ["ok"] * len(data)
"""


@pytest.fixture(scope="module", autouse=True)
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A runtime folder of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("runtime")
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Iterator[Served]:
    """A server of two signed versions, of which the higher is the default."""
    folder = tmp_path_factory.mktemp("served")
    pack_run(run, out=folder / "store/cnn.mar", preflight=None)
    pack_run(run, out=folder / "store/cnn-2.0.mar", version="2.0", preflight=None)
    pack_run(run, out=folder / "cnn-3.0.mar", version="3.0", preflight=None)
    private, public = make_key_pair(folder / "release")
    for path in (*folder.glob("store/*.mar"), folder / "cnn-3.0.mar"):
        sign_with_key(path, key=private)
    (folder / "store" / POLICY_NAME).write_text(f"keys: [{public}]", encoding="utf-8")
    it = Served(folder, "pair")
    it.write(models=MODELS)
    it.facts = it.start()  # type: ignore[attr-defined]
    it.wait()
    yield it
    it.end()


MODELS = ["cnn.mar", {"archive": "cnn-2.0.mar", "default": True}]


def connect(served: Served) -> Client:
    return Client(Endpoint.read(Path(find_record(served.name).run_folder) / "endpoint.json"))


def ask(url: str, method: str = "GET") -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            body = answer.read()
            return answer.status, json.loads(body) if body else {}
    except urllib.error.HTTPError as exc:
        with exc:
            body = exc.read()
        return exc.code, json.loads(body) if body else {}


def find_guard(folder: Path) -> psutil.Process:
    (guard,) = (
        process
        for process in psutil.process_iter(["cmdline"])
        if "guard.py" in str(process.info["cmdline"]) and str(folder) in process.info["cmdline"]
    )
    return guard


def test_the_endpoints_say_that_it_lives_is_ready_and_has_started(served: Served) -> None:
    health = served.status()["health_url"]
    for path in ("live", "ready", "started"):
        assert ask(f"{health}/{path}") == (200, {"status": "pass"})
        assert ask(f"{health}/{path}", "HEAD") == (200, {})
    assert ask(f"{health}/else")[0] == 404
    with connect(served) as client:
        assert client.endpoint.health_url == health


def test_status_tells_versions_workers_and_memory_and_no_token(served: Served) -> None:
    status = served.status()
    assert [(m["name"], m["version"], m["default"]) for m in status["models"]] == [
        ("cnn", "2.0", True),
        ("cnn", "1.0", False),
    ]
    assert all(m["ready_workers"] == 1 and m["memory_bytes"] > 50e6 for m in status["models"])
    assert psutil.Process(status["java_pid"]).name() == "java"
    keys = json.loads(Path(served.facts["key_file"]).read_text())  # type: ignore[attr-defined]
    assert not any(key["key"] in json.dumps(status) for key in keys.values())


def test_a_second_supervisor_of_the_file_or_the_name_starts_nothing(
    served: Served, marwright: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    assert served.process is not None
    again = marwright("serve", cwd=served.folder)
    named = marwright(
        "serve", "--name", served.name, "--store", served.folder / "store", cwd=tmp_path
    )
    for result in (again, named):
        assert result.returncode == 1
        assert f"process {served.process.pid} has it" in result.stderr
    assert served.status()["ready"]


def test_sighup_takes_what_the_file_says_now(served: Served) -> None:
    assert served.process is not None
    served.write(models=["cnn.mar", "cnn-2.0.mar"], limits={"queue": 7})
    served.process.send_signal(signal.SIGHUP)
    wait_until(lambda: served.find("cnn 1.0").get("default"))
    assert "taken only by marwright restart: limits" in served.read_log()
    served.config.write_text("models: 7", encoding="utf-8")
    served.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "the configuration is not taken" in served.read_log())
    served.write(models=MODELS)
    served.process.send_signal(signal.SIGHUP)
    wait_until(lambda: served.find("cnn 2.0").get("default"))
    served.wait()


def test_its_supervisor_knows_whether_a_server_is_as_its_file_says(served: Served) -> None:
    record = find_record(served.name)
    assert is_current(record)
    archive = served.folder / "store/cnn.mar"
    archive.touch()  # as another archive of this name would be newer
    assert not is_current(record)
    served.write(models=MODELS, limits={"queue": 7})
    assert not is_current(record)
    served.config.write_text("models: 7", encoding="utf-8")
    assert not is_current(record)
    served.write(models=MODELS)
    served.process.send_signal(signal.SIGHUP)  # type: ignore[union-attr]  # it runs
    wait_until(lambda: is_current(record))


def test_what_is_changed_by_hand_is_warned_of_and_apply_undoes_it(
    served: Served, marwright: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        result = marwright(*words, cwd=served.folder)
        assert result.returncode == 0, result.stderr
        return result

    # So seldom that whoever does not ask for a look would not see anything new.
    served.write(models=MODELS, supervision={"check_seconds": 60})
    assert served.process is not None
    served.process.send_signal(signal.SIGHUP)
    wait_until(lambda: is_current(find_record(served.name)))
    assert "not ready" in run("models", "scale", "cnn", "0", "--version", "2.0").stderr
    assert served.find("cnn 2.0")["problem"] == "0 of 1 workers are READY"
    warned = run("models", "default", "cnn", "1.0").stderr
    assert f"not as {served.config} says: cnn: the default is 1.0, wanted 2.0" in warned
    assert "2.0 is not registered" in run("models", "unregister", "cnn", "2.0").stderr
    assert served.find("cnn 2.0")["problem"] == "it is not registered"
    assert "not ready" not in run("apply").stderr
    run("status", "--ready")
    served.write(models=MODELS)
    run("apply")
    assert served.status()["ready"]


def test_a_killed_java_comes_back_with_what_it_had(served: Served, scan: bytes) -> None:
    before = served.status()
    with connect(served) as client:  # by hand, which no file says
        client.models.set_default("cnn", "1.0")
        client.models.scale("cnn", 2, version="1.0", max_workers=2)
        register(client, served.folder / "cnn-3.0.mar")
    wait_until(lambda: "cnn 3.0 is registered, not wanted" in served.status()["differences"])
    wait_until(lambda: served.find("cnn 1.0").get("ready_workers") == 2)
    os.kill(before["java_pid"], signal.SIGKILL)
    wait_until(lambda: not served.status()["live"])
    after = wait_until(lambda: (s := served.status())["restarts"] and s["ready"] and s)
    wait_until(lambda: served.find("cnn 1.0").get("default"))
    assert after["java_pid"] != before["java_pid"]
    assert after["address"] == before["address"]
    assert "the server was killed (SIGKILL)" in served.read_log()
    with connect(served) as client:
        assert client.predict("cnn", scan).status == 200
        assert client.endpoint.key_file == Path(served.facts["key_file"])  # type: ignore[attr-defined]
        wait_until(lambda: "registered again: cnn 3.0" in served.read_log())
        assert client.predict("cnn", scan, version="3.0").status == 200
        version = client.models.describe("cnn", "1.0")
        assert (version.min_workers, version.ready_workers) == (2, 2)
        client.models.set_default("cnn", "2.0")
        client.models.scale("cnn", 1, version="1.0", max_workers=1)
        client.models.unregister("cnn", "3.0")


def test_a_killed_supervisor_leaves_a_server_that_the_next_adopts(
    served: Served, scan: bytes
) -> None:
    assert served.process is not None
    before = served.status()
    with connect(served) as client:
        os.kill(served.process.pid, signal.SIGKILL)
        served.process.wait()
        assert client.predict("cnn", scan).status == 200
        facts = served.start()
        assert client.predict("cnn", scan).status == 200
    after = served.wait()
    assert facts["adopted"]
    assert after["java_pid"] == before["java_pid"]
    assert after["health_url"] == before["health_url"]
    assert after["pid"] == served.process.pid


def test_restart_takes_what_needs_one(
    served: Served, scan: bytes, marwright: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    before = served.status()
    served.write(
        models=MODELS,
        limits={"queue": 9},
        logging={"folder": str(served.folder / "logs"), "file_bytes": 123_456},
        supervision={"linger_seconds": 47},
    )
    served.config.write_text(
        served.config.read_text().replace("name: pair", "name: other"), encoding="utf-8"
    )
    image = served.folder / "scan.png"
    image.write_bytes(scan)
    with connect(served) as client, ThreadPoolExecutor(2) as pool:
        restarting = pool.submit(restart_server, find_record(served.name), timeout=BOOT_SECONDS)
        wait_until(lambda: served.status()["phase"] == "restarting")
        assert [m["ready_workers"] for m in served.status()["models"]] == [0, 0]
        commanded = pool.submit(marwright, "predict", "cnn", image)
        # What is asked while the server ends may be refused with a 503.
        wait_until(
            lambda: not (Path(find_record(served.name).run_folder) / "key_file.json").exists()
        )
        assert client.predict("cnn", scan).status == 200
        assert commanded.result().returncode == 0, commanded.result().stderr
        assert restarting.result() > 0
    after = served.status()
    assert after["ready"]
    assert after["java_pid"] != before["java_pid"]
    folder = Path(find_record(served.name).run_folder)
    assert "job_queue_size=9" in (folder / "config.properties").read_text()
    assert "only by marwright stop and marwright serve: name" in served.read_log()
    guard = find_guard(folder)
    assert "47" in "".join(guard.cmdline()[:8])


def test_sigterm_leaves_nothing(served: Served, runtime: Path) -> None:
    assert served.process is not None
    folder = Path(find_record(served.name).run_folder)
    served.process.terminate()
    assert served.process.wait(60) == 0
    assert not folder.exists()
    assert list((runtime / "marwright").iterdir()) == []
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if str(folder) in str(p.info["cmdline"])
    ]
    lines = served.read_log().splitlines()
    assert all(
        {"time", "level", "thread", "logger", "message"} <= set(json.loads(x)) for x in lines
    )


def test_a_broken_model_is_named_and_too_many_failures_end_it(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken_handler.py").write_text(BROKEN, encoding="utf-8")
    pack_run(run, out=tmp_path / "store/cnn.mar", preflight=None)
    handler = str(tmp_path / "broken_handler.py")
    pack_run(run, out=tmp_path / "store/bad.mar", name="bad", handler=handler, preflight=None)
    served = Served(tmp_path, "broken")
    served.write(supervision={"restarts": 0, "memory_limit": "64 MiB"})
    try:
        served.start()
        wait_until(lambda: served.find("cnn 1.0").get("problem") == "")
        status = served.status()
        assert status["live"]
        assert not status["ready"]
        assert not status["started"]
        assert "KeyError: 'labels'" in served.find("bad 1.0")["problem"]
        assert 'raise KeyError("labels")' in served.find("bad 1.0")["detail"]
        assert ask(f"{status['health_url']}/ready")[0] == 503
        wait_until(lambda: "renewed worker" in served.read_log())
        os.kill(status["java_pid"], signal.SIGKILL)
        assert served.process is not None
        assert served.process.wait(60) == 1
        errors = served.errors.read_text()
        assert "failed 1 times in a row" in errors
        assert "raise KeyError(" in errors
    finally:
        served.end()


@pytest.mark.slow
def test_what_hangs_or_lost_its_guard_is_started_again_and_what_changed_is_not_adopted(
    run: Run, tmp_path: Path
) -> None:
    pack_run(run, out=tmp_path / "store/cnn.mar", preflight=None)
    served = Served(tmp_path, "sick")
    served.write(supervision={"calm_seconds": 1})
    try:
        served.start()
        first = served.wait()["java_pid"]
        os.kill(first, signal.SIGSTOP)
        second = wait_until(lambda: (s := served.status())["restarts"] == 1 and s["ready"] and s)
        assert "the server hangs" in served.read_log()
        folder = find_record("sick").run_folder
        find_guard(Path(folder)).kill()
        third = wait_until(lambda: (s := served.status())["restarts"] > 1 and s["ready"] and s)
        assert not psutil.pid_exists(second["java_pid"])
        assert served.process is not None
        served.process.kill()
        served.process.wait()
        served.write(limits={"queue": 7})
        facts = served.start()
        assert not facts["adopted"]
        assert "starting it again: limits changed" in served.read_log()
        assert not psutil.pid_exists(third["java_pid"])
        assert not Path(folder).exists()
        served.wait()
    finally:
        served.end()
