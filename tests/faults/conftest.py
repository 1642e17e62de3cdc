"""Faults: a real server under a supervisor, a steady load from other processes, and a count."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tests.conftest import end_serving, start_serving, wait_until
from tests.loads import PATIENCE

from marwright.archive import Run, pack_run
from marwright.client import Client, Endpoint


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
        def is_so() -> bool:
            with contextlib.suppress(Exception):  # the server may be away: that is the fault
                return is_true()
            return False

        wait_until(is_so, timeout=PATIENCE, what=what)


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
            return stack.enter_context(serve_deployment(deploy, tmp_path, environment or {}))

        yield start


@contextlib.contextmanager
def serve_deployment(deploy: Path, folder: Path, environment: dict[str, str]) -> Iterator[Served]:
    """Serve a deploy.yaml until the block ends; what a killed supervisor left ends with it too."""
    runtime = folder / "runtime"
    runtime.mkdir(exist_ok=True, mode=0o700)
    env = {**os.environ, "XDG_RUNTIME_DIR": str(runtime), **environment}
    process, facts = start_serving(deploy, folder / "serve.err", env)
    run_folder = Path(facts["key_file"]).parent
    try:
        yield Served(process, deploy, run_folder / "endpoint.json", env)
    finally:
        end_serving(process)
        end_group(run_folder)


def end_group(run_folder: Path) -> None:
    """End what a supervisor left that was killed, by the number its guard wrote down."""
    with contextlib.suppress(OSError, ValueError):
        os.killpg(int((run_folder / "server_pid").read_text("ascii").split()[0]), signal.SIGKILL)
