from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from marwright.archive import Packed, Run, pack_run
from marwright.errors import (
    ArchiveError,
    JavaError,
    MarwrightError,
    ModelLoadError,
    NotReadyError,
    PortTakenError,
    ServerDiedError,
    ServerError,
)
from marwright.server import Ports, TorchServe, register
from marwright.server.deployment import Deployment
from marwright.server.state import compare, read_state

pytestmark = pytest.mark.server

HANDLER = """
import os, time
class Handler:
    def initialize(self, context):
        {statement}
    def handle(self, data, context):
        return ["ok"] * len(data)
"""


def pack_handler(run: Run, folder: Path, statement: str) -> Path:
    """Pack a handler that does something at load; return the store."""
    source = folder / "own_handler.py"
    source.write_text(HANDLER.format(statement=statement), encoding="utf-8")
    pack_run(run, out=folder / "store", name="bad", handler=str(source), preflight=None)
    return folder / "store"


def find_processes(folder: Path) -> list[int]:
    """Return the processes that name a run folder in their command line."""
    return [
        p.pid
        for p in psutil.process_iter(["cmdline"])
        if str(folder) in " ".join(p.info["cmdline"] or [])
    ]


def test_leaving_ends_every_process_and_removes_the_run_folder(packed: Packed) -> None:
    with TorchServe(packed.path.parent, models=["cnn.mar"]) as server:
        folder = server.run_folder
        assert folder.stat().st_mode & 0o777 == 0o700
        assert len(find_processes(folder)) >= 3  # the guard, Java, a worker
    assert not find_processes(folder)
    assert not folder.exists()


def test_a_stopped_server_starts_again_and_two_run_at_once(packed: Packed, scan: bytes) -> None:
    first = TorchServe(packed.path.parent, models=["cnn.mar"])
    second = TorchServe(packed.path.parent, models=["cnn.mar"])
    with first, second:
        assert first.client.predict("cnn", scan).json() == second.client.predict("cnn", scan).json()
    with first:
        assert first.client.predict("cnn", scan).status == 200


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("import absent_package", "ModuleNotFoundError: No module named 'absent_package'"),
        ("raise KeyError('labels')", "KeyError: 'labels'"),
        ("raise RuntimeError('broken weights')", "RuntimeError: broken weights"),
    ],
)
def test_a_model_that_fails_to_load_is_told_in_the_workers_words(
    run: Run, tmp_path: Path, statement: str, reason: str
) -> None:
    store = pack_handler(run, tmp_path, statement)
    with pytest.raises(ModelLoadError) as caught, TorchServe(store, models=["bad.mar"]):
        pass
    assert f"{reason} at own_handler.py:5" in str(caught.value)
    assert "Worker died" not in str(caught.value)
    assert statement in caught.value.detail


def test_a_model_that_never_gets_ready_ends_at_the_deadline(run: Run, tmp_path: Path) -> None:
    store = pack_handler(run, tmp_path, "time.sleep(600)")
    server = TorchServe(store, models=["bad.mar"], timeout=6)
    with pytest.raises(NotReadyError, match="READY workers"), server:
        pass
    assert not server.run_folder.exists()


def test_a_failed_registration_leaves_nothing_registered(
    server: TorchServe, run: Run, tmp_path: Path
) -> None:
    store = pack_handler(run, tmp_path, "raise RuntimeError('broken weights')")
    with pytest.raises(ModelLoadError, match="broken weights"):
        register(server.client, store / "bad.mar")
    assert [model.name for model in server.client.models.list()] == ["cnn"]
    assert not (server.store / "bad.mar").exists()


def test_a_taken_port_is_named_before_anything_starts(packed: Packed, taken_port: int) -> None:
    ports = Ports(inference=taken_port)
    with pytest.raises(PortTakenError, match=f"{taken_port} \\(inference\\)"):
        TorchServe(packed.path.parent, ports=ports).start()


def test_a_server_that_dies_while_starting_is_told_with_its_last_lines(packed: Packed) -> None:
    server = TorchServe(packed.path.parent, properties={"vmargs": "-Xmx1x"})
    with pytest.raises(ServerDiedError) as caught:
        server.start()
    assert "-Xmx1x" in caught.value.detail


def test_no_java_is_told_before_anything_starts(
    packed: Packed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(JavaError, match="none; install one"):
        TorchServe(packed.path.parent).start()


def test_broken_archives_doubles_and_absent_stores_are_told_before_the_start(
    packed: Packed, tmp_path: Path
) -> None:
    store = packed.path.parent
    (store / "text.mar").write_text("no archive", encoding="utf-8")
    (store / "twin.mar").write_bytes(packed.path.read_bytes())
    cases: list[tuple[type[MarwrightError], Path, list[str]]] = [
        (ArchiveError, store, ["text.mar"]),
        (ArchiveError, store, ["absent.mar"]),
        (ArchiveError, store, ["cnn.mar", "twin.mar"]),
        (ServerError, tmp_path / "absent", []),
    ]
    for kind, folder, models in cases:
        with pytest.raises(kind):
            TorchServe(folder, models=models).start()


def test_a_killed_guard_does_not_leave_the_server_behind(packed: Packed) -> None:
    with TorchServe(packed.path.parent, models=["cnn.mar"]) as server:
        processes = map(psutil.Process, find_processes(server.run_folder))
        (guard,) = (p for p in processes if any("guard.py" in word for word in p.cmdline()))
        guard.kill()
        guard.wait()
        assert server.exit_status == 1
        assert find_processes(server.run_folder)
    deadline = time.monotonic() + 10
    while find_processes(server.run_folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not find_processes(server.run_folder)
    assert not server.run_folder.exists()


def test_an_interrupt_before_the_guard_starts_leaves_no_folder(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    server = TorchServe(packed.path.parent)
    monkeypatch.setattr("subprocess.Popen", interrupt)
    with pytest.raises(KeyboardInterrupt):
        server.start()
    assert server.run_folder.name.startswith("marwright-")  # it was made
    assert not server.run_folder.exists()


def test_a_killed_server_is_told_from_one_that_ended(packed: Packed) -> None:
    with TorchServe(packed.path.parent, models=["cnn.mar"]) as server:
        java = [p for p in find_processes(server.run_folder) if "java" in psutil.Process(p).name()]
        os.kill(java[0], signal.SIGKILL)
        error = server.describe_death(server.wait())
    assert "the server was killed (SIGKILL); if nobody did, memory ran out" in str(error)


@pytest.mark.parametrize("partial", [False, True])
def test_a_server_that_runs_with_other_properties_is_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partial: bool
) -> None:
    monkeypatch.setattr(
        "marwright.server.torchserve.compare_properties",
        lambda *_: ["max_request_size: TorchServe runs with 7, wanted 8"],
    )
    values = {"store": tmp_path, "models": [], "ports": "free"}
    server = TorchServe.deploy(Deployment.model_validate(values), partial=partial)
    with pytest.raises(ServerError, match="max_request_size: TorchServe runs with 7"), server:
        pass
    assert not server.run_folder.exists()


def test_a_default_version_may_be_idle_from_the_start(store: Path, scan: bytes) -> None:
    idle = {"archive": "cnn-2.0.mar", "workers": 0, "default": True}
    values = {"store": store, "models": ["cnn.mar", idle], "ports": "free"}
    with TorchServe.deploy(Deployment.model_validate(values)) as server:
        state = read_state(server.client)
        assert {key: item.ready_workers for key, item in state.versions.items()} == {
            ("cnn", "1.0"): 1,
            ("cnn", "2.0"): 0,
        }
        assert state.defaults == {"cnn": "2.0"}
        assert compare(server.wanted, state) == []
        assert server.client.predict("cnn", scan, version="1.0").status == 200
        server.client.models.scale("cnn", 1, version="2.0")
        assert server.client.predict("cnn", scan).status == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_command_ends_the_server(
    packed: Packed, tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "runtime").mkdir()
    command = [sys.executable, "-m", "marwright", "serve", "--free-ports", "--json"]
    process = subprocess.Popen(
        [*command, "--store", str(packed.path.parent)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "runtime")},
    )
    assert process.stdout is not None
    with process, process.stdout:
        line = process.stdout.readline()
        folder = Path(line.split('"key_file": "')[1].split('"')[0]).parent
        assert find_processes(folder)
        process.send_signal(number)
        process.wait(30)
    deadline = time.monotonic() + 20
    while (folder.exists() or find_processes(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not find_processes(folder)
    assert not folder.exists()
