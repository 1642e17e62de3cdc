"""Faults: a real server under a supervisor, a steady load from other processes, and a count."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from marwright.archive import Run, pack_run
from marwright.client import Client, Endpoint

LOAD = Path(__file__).with_name("load.py")
RATE = 60.0
"""Requests a second of each of the two loads."""
PATIENCE = 90.0


@dataclass
class Served:
    """A `marwright serve` in a process of its own."""

    process: subprocess.Popen[str]
    deploy: Path
    endpoint_file: Path
    environment: dict[str, str]

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint.read(self.endpoint_file)

    @property
    def run_folder(self) -> Path:
        return self.endpoint_file.parent

    @property
    def java(self) -> psutil.Process:
        pid = int((self.run_folder / "server_pid").read_text("ascii").split()[0])
        return psutil.Process(pid)

    def client(self) -> Client:
        return Client(self.endpoint)

    def list_versions(self) -> dict[str, list[tuple[str, int, bool]]]:
        """Return each model's versions, with READY workers and whether it is the default."""
        with self.client() as client:
            return {
                summary.name: [
                    (
                        item.version,
                        item.ready_workers,
                        item.version == client.models.describe(summary.name).version,
                    )
                    for item in client.models.versions(summary.name)
                ]
                for summary in client.models.list()
            }

    def wait_until(self, is_true: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):  # the server may be away: that is the fault
                if is_true():
                    return
            time.sleep(0.1)
        pytest.fail(f"not within {PATIENCE:g} s: {what}")


@pytest.fixture(scope="session")
def fault_store(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """A store with cnn 1.0 and 2.0, that faults may damage copies of."""
    folder = tmp_path_factory.mktemp("faults") / "store"
    folder.mkdir()
    pack_run(run, out=folder / "cnn.mar", preflight=None)
    pack_run(run, out=folder / "cnn-2.0.mar", version="2.0", preflight=None)
    return folder


@pytest.fixture
def serve(tmp_path: Path, fault_store: Path) -> Iterator[Callable[..., Served]]:
    """Return a function that serves a deployment under a supervisor; all end with the test."""
    with contextlib.ExitStack() as stack:

        def start(
            *,
            store: Path | None = None,
            environment: dict[str, str] | None = None,
            **values: Any,
        ) -> Served:
            deploy = tmp_path / "deploy.yaml"
            content = {
                "name": "faults",
                "store": str(store or fault_store),
                "ports": "free",
                "models": ["cnn.mar"],
                **values,
            }
            deploy.write_text(yaml.safe_dump(content), encoding="utf-8")
            return stack.enter_context(start_serving(deploy, tmp_path, environment or {}))

        yield start


@contextlib.contextmanager
def start_serving(deploy: Path, folder: Path, environment: dict[str, str]) -> Iterator[Served]:
    """Serve a deploy.yaml until the block ends; what a killed supervisor left ends with it too."""
    runtime = folder / "runtime"
    runtime.mkdir(exist_ok=True, mode=0o700)
    env = {**os.environ, "XDG_RUNTIME_DIR": str(runtime), **environment}
    command = [sys.executable, "-m", "marwright", "serve", "--deploy", str(deploy), "--json"]
    with (folder / "serve.err").open("ab") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env
        )
    assert process.stdout is not None
    run_folder: Path | None = None
    try:
        line = process.stdout.readline()
        if not line:
            pytest.fail((folder / "serve.err").read_text("utf-8"))
        run_folder = Path(json.loads(line)["key_file"]).parent
        yield Served(process, deploy, run_folder / "endpoint.json", env)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        if run_folder is not None:
            end_group(run_folder)


def end_group(run_folder: Path) -> None:
    """End what a supervisor left that was killed, by the number its guard wrote down."""
    with contextlib.suppress(OSError, ValueError):
        os.killpg(int((run_folder / "server_pid").read_text("ascii").split()[0]), signal.SIGKILL)


@dataclass
class Load:
    """Two loads at once: plain requests, and marwright's client."""

    processes: dict[str, subprocess.Popen[str]]

    def finish(self) -> dict[str, dict[str, Any]]:
        """Stop sending, wait for the answers, return the counts of each."""
        for process in self.processes.values():
            process.terminate()
        reports = {}
        for name, process in self.processes.items():
            process.wait(PATIENCE)
            assert process.stdout is not None
            reports[name] = json.loads(process.stdout.read())
        return reports


@pytest.fixture
def load(scan: bytes, tmp_path: Path) -> Iterator[Callable[..., Load]]:
    """Return a function that begins a steady load on a served model."""
    running: list[subprocess.Popen[str]] = []
    image = tmp_path / "scan.png"
    image.write_bytes(scan)

    def begin(served: Served, *, model: str = "cnn", rate: float = RATE) -> Load:
        processes = {}
        for name, options in {"plain": [], "client": ["--retries"]}.items():
            command = [sys.executable, str(LOAD), str(served.endpoint_file), str(image)]
            command += ["--model", model, "--rate", str(rate), "--seconds", "600", *options]
            processes[name] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            running.append(processes[name])
        deadline = time.monotonic() + PATIENCE
        for name, process in processes.items():
            wait_for_answers(process, name, deadline)
        return Load(processes)

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def wait_for_answers(process: subprocess.Popen[str], name: str, deadline: float) -> None:
    """Wait for the line of a load's first answer: before it nothing is in flight to be lost."""
    assert process.stdout is not None
    left = max(0.0, deadline - time.monotonic())
    if not select.select([process.stdout], [], [], left)[0]:
        pytest.fail(f"the load {name} got no answer within {PATIENCE:g} s")
    line = process.stdout.readline()
    assert line == "answering\n", f"the load {name} said {line!r}"


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return a function that keeps a fault's counts, where `make bench WHAT=faults` asks for them.

    A fault whose rate was below 50 requests a second fails: it would prove nothing.
    """

    def keep(fault: str, reports: dict[str, dict[str, Any]], **facts: Any) -> None:
        row = {"fault": fault, **reports["plain"], "client": reports["client"], **facts}
        for report in reports.values():
            assert report["rate"] >= 50, report
            assert report["sent"] == report["answered"] + report["refused"] + report["lost"]
        if target := os.environ.get("MARWRIGHT_FAULTS"):
            with Path(target).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")

    return keep
