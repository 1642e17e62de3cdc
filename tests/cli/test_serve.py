"""The command line of `marwright serve`; for what it then does see test_supervisor.py."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import typer

from marwright.archive import Packed
from marwright.cli import serve
from marwright.cli.configuration import Configuration, find_configuration
from marwright.cli.detach import start_detached
from marwright.client import Endpoint
from marwright.errors import ConfigurationError, UsageError
from marwright.server.ports import Ports
from marwright.server.registry import list_records
from marwright.server.supervision.inspection import stop_server


@pytest.fixture
def folder(tmp_path: Path, packed: Packed, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a store, and a runtime folder of its own."""
    packed.path.parent.rename(tmp_path / "model_store")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    yield tmp_path
    for record in list_records().values():
        stop_server(record, timeout=60)


def test_files_of_the_working_folder_are_taken_where_none_is_named(folder: Path) -> None:
    deploy, properties = Path("deploy.yaml"), Path("config.properties")
    assert find_configuration(None, None, {}) == Configuration(None, None, {})
    properties.touch()
    assert find_configuration(None, None, {}) == Configuration(None, properties, {})
    deploy.touch()
    assert find_configuration(None, None, {"tls": None}) == Configuration(deploy, None, {})
    named = {"models": [{"archive": "cnn.mar"}]}
    assert find_configuration(None, None, named) == Configuration(None, properties, named)
    assert find_configuration(None, properties, {}) == Configuration(None, properties, {})
    with pytest.raises(UsageError, match="exclude each other"):
        find_configuration(deploy, properties, {})


def test_options_go_before_what_the_file_says(folder: Path) -> None:
    path = folder / "deploy.yaml"
    path.write_text("name: one\nports: {inference: 9000}\nlimits: {queue: 7}", encoding="utf-8")
    changes = {"name": "two", "supervision.start_timeout": 5.0}
    deployment = Configuration(path, None, changes).read(strict=True)
    assert deployment.name == "two"
    assert deployment.supervision.start_timeout == 5
    assert deployment.limits.queue == 7
    assert deployment.ports != "free"
    assert deployment.ports.inference == 9000
    assert deployment.ports.model_fields_set == {"inference"}
    assert deployment.store == folder / "model_store"


def test_what_options_replace_is_not_judged(folder: Path) -> None:
    path = folder / "deploy.yaml"
    path.write_text("name: one\nstore: gone\nmodels: [absent.mar]", encoding="utf-8")
    changes = {"store": folder / "model_store", "models": [{"archive": "cnn.mar"}]}
    assert Configuration(path, None, changes).read(strict=True).store == folder / "model_store"
    with pytest.raises(ConfigurationError, match=r"found line 2: store: .*/gone"):
        Configuration(path, None, {}).read(strict=False)
    with pytest.raises(ConfigurationError, match=r"found store: .*/lost"):  # not in line 2
        Configuration(path, None, {"store": folder / "lost"}).read(strict=True)


def test_only_a_strict_reading_refuses_what_is_wrong_with_an_archive(folder: Path) -> None:
    (folder / "model_store/none.mar").write_text("no archive", encoding="utf-8")
    path = folder / "deploy.yaml"
    path.write_text("name: one", encoding="utf-8")
    assert Configuration(path, None, {}).read(strict=False).name == "one"
    for deploy in (path, None):
        with pytest.raises(ConfigurationError, match=r"none\.mar"):
            Configuration(deploy, None, {}).read(strict=True)
    path.write_text("tls: {certificate: absent.pem, key: absent.key}", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"absent\.pem"):
        Configuration(path, None, {}).read(strict=False)


def test_what_a_properties_file_says_in_vain_is_noted(folder: Path) -> None:
    path = folder / "own.properties"
    path.write_text("load_models=all\njob_queue_size=7\n", encoding="utf-8")
    notes: list[str] = []
    deployment = Configuration(None, path, {}).read(strict=True, say_note=notes.append)
    assert deployment.limits.queue == 7
    assert "load_models of" in notes[0]


def test_a_properties_file_that_is_named_must_be_there(
    folder: Path, marwright: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    result = marwright("serve", "--check", "--config", "config.properties", cwd=folder)
    assert result.returncode == 2
    assert result.stderr == "error: there is no config.properties; check --config\n"


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
    ports = f"ports: {{inference: {taken_port}}}"
    path.write_text(f"store: gone\n{ports}", encoding="utf-8")
    result = marwright("serve", "--check", "--json", "--store", "model_store", cwd=folder)
    assert result.returncode == 1
    assert [(item["where"], item["line"]) for item in json.loads(result.stdout)] == [
        ("models.1.archive", None),
        ("ports.inference", 2),
    ]
    path.write_text(f"store: gone\n{ports}\nname: [one]", encoding="utf-8")
    result = marwright("serve", "--check", cwd=folder)
    assert result.returncode == 1
    assert [line.split(": ")[:2] for line in result.stderr.splitlines()] == [
        ["deploy.yaml:3", "name"],
        ["deploy.yaml:1", "store"],
        ["deploy.yaml:2", "ports.inference"],
        ["problems", "3"],
    ]
    assert not (folder / "runtime").exists()


@pytest.mark.server
def test_detached_it_returns_once_ready_and_goes_on(
    folder: Path, marwright: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (folder / "model_store/none.mar").write_text("no archive", encoding="utf-8")
    text = f"name: away\nports: {json.dumps(asdict(Ports.find_free()))}\n"
    (folder / "deploy.yaml").write_text(text, encoding="utf-8")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # then somebody else has it
            other.bind(("127.0.0.1", 8083))
            other.listen()
        result = marwright("serve", "--detach", cwd=folder)
    assert result.returncode == 1  # not ready: one archive is broken; the other is served
    assert "port 8083 is taken; the health endpoints are at http://127.0.0.1:" in result.stderr
    assert "none.mar is no model archive" in result.stderr
    assert "it goes on" in result.stderr
    (found,) = json.loads(marwright("status", "--json").stdout)
    assert found["endpoint"] == str(folder / "runtime/marwright/away.json")
    endpoint = Endpoint.read(Path(found["endpoint"]))
    assert (str(endpoint.key_file), endpoint.health_url) == (
        found["key_file"],
        found["health_url"],
    )
    (folder / "model_store/none.mar").unlink()
    (folder / "deploy.yaml").write_text(f"{text}nmae: x\n", encoding="utf-8")
    refused = marwright("restart", "away", cwd=folder)
    assert refused.returncode == 1
    told = f"{folder}/deploy.yaml cannot be used: found line 3: nmae: no such key"
    assert refused.stderr == f"error: {told}; did you mean name?\n"
    (folder / "deploy.yaml").write_text(text, encoding="utf-8")
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
    path = folder / "model_store/cnn.mar"
    assert result.stderr == (
        f"error: this cannot be served: found models.0.archive: {path} is no model archive:"
        " expected a zip file, found File is not a zip file; pack the model again; mend it, or pass"
        " other options\n"
    )


FAKE = """
import json, sys, time
print(json.dumps({"server": "fake", "health": "http://127.0.0.1:9"}), flush=True)
print("starting TorchServe", file=sys.stderr)
if sys.argv[1] == "speaks":
    error = {"message": "no", "expected": "a", "found": "b", "remedy": "c", "detail": "d\\ne"}
    print(json.dumps(error, indent=2), file=sys.stderr)
sys.exit(7)
"""


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("speaks", "error: no: expected a, found b; c\n    d\n    e\n"),
        ("is silent", "error: the server ended before it was ready: found exit status 7\n"),
    ],
)
def test_a_supervisor_that_dies_before_it_is_ready_is_not_waited_for(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    word: str,
    said: str,
) -> None:
    (folder / "marwright.py").write_text(FAKE, encoding="utf-8")  # found before the real one
    monkeypatch.setattr("sys.argv", ["marwright", word, "--detach"])
    with pytest.raises(typer.Exit):
        start_detached(as_json=False, timeout=600)
    assert capsys.readouterr().err == f"starting TorchServe\n{said}"
