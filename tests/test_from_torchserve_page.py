"""docs/from-torchserve.md: the commands of both columns do what they are there for."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from marwright.archive import Run
from marwright.server import Ports
from marwright.server.deployment import Deployment
from marwright.server.java import find_java
from marwright.server.registry import list_records
from marwright.server.supervision.inspection import stop_server

PLAIN, OURS = 2, 3
DEFAULTS = {"8080": "inference", "8081": "management", "8082": "metrics"}

Type = Callable[[str], "subprocess.CompletedProcess[str]"]


def list_commands(root: Path, column: int) -> list[str]:
    """Return what is typed in a column, in the page's order."""
    rows = (root / "docs/from-torchserve.md").read_text("utf-8").splitlines()
    cells = [row.split("|")[column] for row in rows if row.startswith("| ")]
    return [
        command
        for cell in cells
        for command in re.findall(r"`((?:curl|marwright|tail|torchserve) [^`]+)`", cell)
    ]


@pytest.fixture
def ports() -> Ports:
    return Ports.find_free()


@pytest.fixture
def folder(
    tmp_path: Path, store: Path, run: Run, ports: Ports, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A folder as a user of plain TorchServe has it; the last server that is left is ended."""
    shutil.copytree(store, tmp_path / "model_store")
    shutil.copy(run.samples[0].path, tmp_path / "image.png")
    lines = [f"{key}={value}" for key, value in ports.to_properties().items()]
    lines += ["metrics_mode=prometheus", "load_models=cnn.mar"]
    (tmp_path / "config.properties").write_text("\n".join(lines), encoding="utf-8")
    for name in ("TMPDIR", "TEMP", "XDG_RUNTIME_DIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("JAVA_HOME", str(find_java().path.resolve().parents[1]))
    monkeypatch.setenv("NO_PROXY", "*")
    yield tmp_path
    for record in list_records().values():
        stop_server(record, timeout=60)


@pytest.fixture
def enter(folder: Path, ports: Ports) -> Type:
    """Return a function that runs a command as it is printed, but for the ports."""

    def run_command(command: str) -> subprocess.CompletedProcess[str]:
        for default, name in DEFAULTS.items():
            command = command.replace(f"localhost:{default}", f"localhost:{getattr(ports, name)}")
        words = shlex.split(command)
        words[:1] = {
            "curl": ["curl", "--silent", "--show-error", "--fail"],
            "tail": ["tail"],
        }.get(words[0], [str(Path(sys.executable).with_name(words[0]))])
        # Into files: a server in the background keeps them open.
        with (folder / "output").open("w+") as output, (folder / "errors").open("w+") as errors:
            done = subprocess.run(
                words, cwd=folder, stdout=output, stderr=errors, timeout=120, check=False
            )
            output.seek(0)
            errors.seek(0)
            return subprocess.CompletedProcess(words, done.returncode, output.read(), errors.read())

    return run_command


def wait_for(question: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not question():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def plain(folder: Path) -> Iterator[Path]:
    """The file that says which process a plain TorchServe is; that is ended in any case."""
    file = folder / "TMPDIR/.model_server.pid"
    yield file
    if file.exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.server
def test_what_is_typed_for_plain_torchserve_is_right(root: Path, enter: Type, plain: Path) -> None:
    start, *commands = list_commands(root, PLAIN)
    enter(f"{start} --disable-token-auth --enable-model-api")
    process = psutil.Process(int(plain.read_text()))
    assert commands[-1] == "torchserve --stop"
    for command in commands[:2]:
        wait_for(lambda command=command: enter(command).returncode == 0)  # type: ignore[misc]
    for command in commands[2:]:
        answer = enter(command)
        assert answer.returncode == 0, f"{command}: {answer.stderr}"
    process.wait(60)


@pytest.mark.server
def test_what_is_typed_with_marwright_does_the_same(
    root: Path, folder: Path, enter: Type, ports: Ports
) -> None:
    convert, start, bare, *commands = list_commands(root, OURS)
    answer = enter(f"{bare} --free-ports --check")
    assert answer.returncode == 0, answer.stderr
    assert enter(convert).returncode == 0
    deployment = folder / "deploy.yaml"
    health = Ports.find_free().inference
    deployment.write_text(deployment.read_text().replace("ports:", f"ports:\n  health: {health}"))
    said = {}
    for command in (start, *commands):
        answer = enter(command.replace("localhost:8083", f"localhost:{health}"))
        assert answer.returncode == 0, f"{command}: {answer.stderr}"
        said[command] = answer.stdout
    assert f"localhost:{ports.inference}" in said[start].replace("127.0.0.1", "localhost")
    assert '"pass"' in said["curl localhost:8083/ready"]
    assert "unregister" in said["marwright apply"]  # what `marwright models register` did
    assert "ts_inference_requests_total" in said["curl localhost:8082/metrics"]
    assert commands[-1] == "marwright stop"
    assert not list_records()


def test_what_the_page_says_in_yaml_can_stand_in_a_deployment(root: Path) -> None:
    page = (root / "docs/from-torchserve.md").read_text("utf-8")
    found = re.findall(r"`([a-z]+: \{.*?\})`", page)
    assert len(found) > 2
    for text in found:
        assert Deployment.model_validate({"store": "none", **yaml.safe_load(text)}).model_fields_set
