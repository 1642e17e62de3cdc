"""The command line of `marwright serve`; for what it then does see test_supervisor.py."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from marwright.archive import Packed
from marwright.cli import serve
from marwright.errors import ArchiveError, ConfigurationError, UsageError
from marwright.server.inspection import stop_server
from marwright.server.registry import list_records

NOTHING: dict[str, object] = {}


@pytest.fixture
def folder(tmp_path: Path, packed: Packed, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a store, and a runtime folder of its own."""
    packed.path.parent.rename(tmp_path / "model_store")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    yield tmp_path
    for record in list_records().values():
        stop_server(record, timeout=60)


def test_a_deploy_yaml_is_taken_where_nothing_else_is_said(folder: Path) -> None:
    assert serve._find_deploy(None, False, None) is None
    (folder / "deploy.yaml").touch()
    assert serve._find_deploy(None, False, None) == Path("deploy.yaml")
    assert serve._find_deploy(None, True, None) is None
    assert serve._find_deploy(None, False, Path("config.properties")) is None
    with pytest.raises(UsageError, match="exclude each other"):
        serve._find_deploy(Path("deploy.yaml"), False, Path("config.properties"))


def test_options_go_before_what_the_file_says(folder: Path) -> None:
    path = folder / "deploy.yaml"
    path.write_text("name: one\nports: {inference: 9000}\nlimits: {queue: 7}", encoding="utf-8")
    changes: dict[str, object] = {"name": "two", "supervision.start_timeout": 5.0, "tls": None}
    deployment = serve._read_deployment(path, None, changes, strict=True)
    assert deployment.name == "two"
    assert deployment.supervision.start_timeout == 5
    assert deployment.limits.queue == 7
    assert deployment.ports != "free"
    assert deployment.ports.inference == 9000
    assert deployment.ports.model_fields_set == {"inference"}
    assert deployment.store == folder / "model_store"


def test_only_a_strict_reading_refuses_what_is_wrong_with_an_archive(folder: Path) -> None:
    (folder / "model_store/none.mar").write_text("no archive", encoding="utf-8")
    path = folder / "deploy.yaml"
    path.write_text("name: one", encoding="utf-8")
    assert serve._read_deployment(path, None, NOTHING, strict=False).name == "one"
    with pytest.raises(ConfigurationError, match=r"none\.mar"):
        serve._read_deployment(path, None, NOTHING, strict=True)
    with pytest.raises(ArchiveError, match=r"none\.mar"):
        serve._read_deployment(None, None, NOTHING, strict=True)
    path.write_text("tls: {certificate: absent.pem, key: absent.key}", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"absent\.pem"):
        serve._read_deployment(path, None, NOTHING, strict=False)


def test_what_a_properties_file_says_in_vain_is_noted(folder: Path) -> None:
    path = folder / "own.properties"
    path.write_text("load_models=all\njob_queue_size=7\n", encoding="utf-8")
    notes: list[str] = []
    deployment = serve._read_deployment(None, path, NOTHING, say_note=notes.append, strict=True)
    assert deployment.limits.queue == 7
    assert "load_models of" in notes[0]
    with pytest.raises(UsageError, match="there is no absent"):
        serve._read_deployment(None, Path("absent"), NOTHING, strict=True)


def test_an_archive_outside_the_store_is_refused(folder: Path) -> None:
    assert serve._find_in_store("model_store/cnn.mar", None) == "cnn.mar"
    with pytest.raises(UsageError, match="--store elsewhere"):
        serve._find_in_store("elsewhere/cnn.mar", None)


def test_check_tells_all_that_is_wrong_and_starts_nothing(
    folder: Path, marwright: Callable[..., subprocess.CompletedProcess[str]], taken_port: int
) -> None:
    assert marwright("serve", "--check", "--free-ports", cwd=folder).returncode == 0
    (folder / "model_store/none.mar").write_text("no archive", encoding="utf-8")
    path = folder / "deploy.yaml"
    path.write_text(f"ports: {{inference: {taken_port}}}", encoding="utf-8")
    result = marwright("serve", "--check", "--json", cwd=folder)
    assert result.returncode == 1
    assert [item["where"] for item in json.loads(result.stdout)] == [
        "models.1.archive",
        "ports.inference",
    ]
    assert not (folder / "runtime").exists()


@pytest.mark.server
def test_detached_it_returns_once_ready_and_goes_on(
    folder: Path, marwright: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (folder / "model_store/none.mar").write_text("no archive", encoding="utf-8")
    result = marwright("serve", "--detach", "--free-ports", "--name", "away", cwd=folder)
    assert result.returncode == 1  # not ready: one archive is broken; the other is served
    assert "none.mar is no model archive" in result.stderr
    assert "it goes on" in result.stderr
    (folder / "model_store/none.mar").unlink()
    restarted = marwright("restart", "away", cwd=folder)
    assert restarted.returncode == 0, restarted.stderr
    assert "it was away for" in restarted.stderr
    assert marwright("status", "--ready").returncode == 0
    assert "cnn     1.0       yes       1 of 1" in marwright("status", "away").stdout
    stopped = marwright("stop")
    assert (stopped.returncode, stopped.stderr) == (0, "stopped away\n")
    assert marwright("status", "--ready").returncode == 1


def test_detached_it_says_why_it_could_not_start(
    folder: Path, marwright: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (folder / "model_store/cnn.mar").write_text("no archive", encoding="utf-8")
    result = marwright("serve", "--detach", "--free-ports", "cnn.mar", cwd=folder)
    assert result.returncode == 1
    assert "error: " in result.stderr
    assert "no model archive" in result.stderr
    assert "Traceback" not in result.stderr
