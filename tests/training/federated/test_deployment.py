from __future__ import annotations

import os
import re
import socket
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from marwright.archive import Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("flwr") is None, reason="needs flwr"),
]

TOOLS = ("flower-superlink", "flower-supernode", "flwr")


def read_page(root: Path, language: str, mark: str) -> str:
    """Return the first block of docs/federated.md in a language that holds a text."""
    page = (root / "docs/federated.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
    return next(block for block in blocks if mark in block)


@contextmanager
def start(command: Sequence[str], log: Path, environment: dict[str, str]) -> Iterator[psutil.Popen]:
    """Run a process; afterwards end it, and those that it has detached."""
    with log.open("wb") as stream:
        process = psutil.Popen(command, env=environment, stdout=stream, stderr=stream)
    try:
        yield process
    finally:
        end(process)


def end(process: psutil.Popen) -> None:
    if process.poll() is None:
        for member in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait(20)


def find_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def await_port(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"nobody listens on {port}")


def test_flowers_own_commands_run_the_page_s_app_and_outlive_a_client(
    root: Path, tmp_path: Path, scripts: Path, measurements: Path
) -> None:
    app, home, port = tmp_path / "app", tmp_path / "home", find_port()
    for folder in (app, home):
        folder.mkdir()
    (app / "pyproject.toml").write_text(read_page(root, "toml", "serverapp"), encoding="utf-8")
    (app / "apps.py").write_text(read_page(root, "python", "servers.app"), encoding="utf-8")
    connection = f"[superlink]\ndefault = 'here'\n[superlink.here]\naddress = '127.0.0.1:{port}'\n"
    (home / "config.toml").write_text(connection + "insecure = true\n", encoding="utf-8")
    environment = {
        **os.environ,
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
    }
    superlink, supernode, flwr = (str(scripts / name) for name in TOOLS)
    local = ["--insecure", "--host", "127.0.0.1"]
    with ExitStack() as stack:
        command = [superlink, *local, "--port", str(port)]
        command += ["--disable-runtime-dependency-installation"]
        stack.enter_context(start(command, tmp_path / "superlink.log", environment))
        await_port(port)
        nodes = []
        for number in range(3):
            command = [supernode, *local, "--port", str(find_port())]
            command += ["--superlink", f"127.0.0.1:{port}"]
            command += ["--node-config", f"partition-id={number}"]
            log = tmp_path / f"{number}.log"
            nodes.append(stack.enter_context(start(command, log, environment)))
        config = (
            f"out='{tmp_path}/run' recipe.dataset='table:{measurements}' federation.clients=3 "
            "federation.rounds=3 federation.timeout=150.0"
        )
        log = tmp_path / "run.log"
        command = [flwr, "run", str(app), "here", "--stream", "--run-config", config]
        stack.enter_context(start(command, log, environment))
        await_text(log, "ROUND 2/3", tmp_path)
        end(nodes[2])
        await_text(log, "execution finished", tmp_path)
        deadline = time.monotonic() + 60
        while not (tmp_path / "run").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
    run = Run.open(tmp_path / "run")
    answered = sorted(client["answered"] for client in run.report["federated"]["clients"])
    assert answered[0] < 3, run.report["federated"]
    assert answered[1:] == [3, 3]
    assert len(run.report["federated"]["accuracy_by_round"]) == 3


def await_text(log: Path, text: str, folder: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if text in log.read_text(encoding="utf-8", errors="replace"):
            return
        time.sleep(0.3)
    tails = [
        f"{path.name}:\n{path.read_text(errors='replace')[-1500:]}" for path in folder.glob("*.log")
    ]
    raise AssertionError(f"no {text!r} came:\n" + "\n".join(tails))


@pytest.fixture
def scripts() -> Path:
    """Where this environment's commands lie."""
    return Path(sysconfig.get_path("scripts"))
