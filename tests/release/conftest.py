"""Real servers to release to: one behind a gateway, one without, each shared by all tests here."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import end_serving, start_serving, wait_until
from tests.loads import PATIENCE, Load, keep_loads

from marwright.archive import Spec, pack_spec
from marwright.client import Client, Endpoint
from marwright.release.history import History, Line
from marwright.server.ports import Ports

ANSWER = {"cat": 0.9, "dog": 0.1}
HANDLER = """
import time
class Handler:
    asked = 0
    def initialize(self, context):
        {initialize}
    def handle(self, data, context):
        self.asked += len(data)
        answer = {answer}
        time.sleep({seconds})
        {handle}
        return [answer] * len(data)
"""
MODELS = """\
models:
  # what answers today
  - archive: echo.mar
    workers: 1   # one is enough
"""
# On a busy machine a worker may stand still for a second, which fills the default queue of 100.
LIMITS = "limits: {queue: 1000}\n"
RELEASES = """\
# the gates
releases:
  warm_up: 5
  drain_seconds: 2
  shadow: {share: 50, requests: 20}
  canary: {steps: [20, 50], requests: 30, slower: 3}
"""


def pack_echo(out: Path, version: str, *, seconds: float = 0.002, **parts: Any) -> Path:
    """Pack a model that answers the same whatever it is asked, 120 times a second and more.

    `parts` are lines of its handler: `initialize`, `handle`, `answer`; `recorded` is what its
    samples say, none where that is None; `samples` how many it carries.
    """
    folder = out.parent / f".{out.stem}"
    folder.mkdir(parents=True)
    source = HANDLER.format(
        initialize=parts.get("initialize", "pass"),
        handle=parts.get("handle", "pass"),
        answer=parts.get("answer", ANSWER),
        seconds=seconds,
    )
    (folder / "echo.py").write_text(source, encoding="utf-8")
    samples = []
    for number in range(parts.get("samples", 3)):
        (folder / f"{number}.json").write_text(json.dumps({"number": number}), encoding="utf-8")
        sample = {"file": f"{number}.json", "content_type": "application/json"}
        recorded = parts.get("recorded", ANSWER)
        samples.append({**sample, **({"answer": recorded} if recorded is not None else {})})
    name = parts.get("name", "echo")
    spec = Spec.create(name=name, version=version, handler="echo.py", samples=samples)
    path = pack_spec(spec, folder=folder, out=out, preflight=None).path
    shutil.rmtree(folder)
    return path


class Served:
    """A `marwright serve` in a process of its own; all is asked of it as users do."""

    def __init__(self, folder: Path, name: str, text: str) -> None:
        self.folder = folder
        self.name = name
        self.text = text
        """The deploy.yaml that every test begins with."""
        self.deploy = folder / "deploy.yaml"
        self.store = folder / "store"
        self.env = {
            **os.environ,
            "XDG_RUNTIME_DIR": str(folder / "runtime"),
            "XDG_STATE_HOME": str(folder / "state"),
        }
        (folder / "runtime").mkdir(mode=0o700, parents=True)
        pack_echo(self.store / "echo.mar", "1.0")
        self.deploy.write_text(text, encoding="utf-8")

    def start(self) -> None:
        self._process, _ = start_serving(self.deploy, self.folder / "serve.err", self.env)
        wait_until(lambda: self.run("status", "--ready").returncode == 0)

    def stop(self) -> None:
        end_serving(self._process)

    def reset(self) -> None:
        """Bring it to where it was started."""
        self.deploy.write_text(self.text, encoding="utf-8")
        applied = self.run("apply", str(self.deploy))
        assert applied.returncode == 0, applied.stderr
        for path in self.store.glob("*.mar"):
            if path.name != "echo.mar":
                path.unlink()
        self.history.path.unlink(missing_ok=True)

    @property
    def history(self) -> History:
        return History(self.deploy.with_name("releases.jsonl"))

    @property
    def endpoint_file(self) -> Path:
        return self.folder / f"runtime/marwright/{self.name}.json"

    @property
    def client(self) -> Client:
        """A client of its server, past any gateway."""
        behind = self.endpoint_file.with_name(f"{self.name}.1.json")
        return Client(Endpoint.read(behind if behind.exists() else self.endpoint_file))

    def begin(self, *words: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "marwright", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.env,
            cwd=self.folder,
        )

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        process = self.begin(*words)
        try:
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def list_versions(self, model: str = "echo") -> dict[str, tuple[int, bool]]:
        """Return the READY workers of each version, and whether it is the default."""
        with self.client as client:
            default = client.models.describe(model).version
            return {
                item.version: (item.ready_workers, item.version == default)
                for item in client.models.versions(model)
            }

    def see(self) -> dict[str, Any]:
        """Return all that a release that was taken back must leave as it was."""
        return {
            "versions": self.list_versions(),
            "store": sorted(path.name for path in self.store.iterdir()),
            "deploy": self.deploy.read_text("utf-8"),
            "pending": self.run("apply", self.deploy, "--dry-run").stdout,
        }

    def read_last(self, event: str) -> Line:
        return [line for line in self.history.read() if line.event == event][-1]


@contextlib.contextmanager
def serve(folder: Path, name: str, text: str = "") -> Iterator[Served]:
    served = Served(folder, name, f"name: {name}\nstore: store\n{text}{LIMITS}{MODELS}{RELEASES}")
    served.start()
    try:
        yield served
    finally:
        served.stop()


@pytest.fixture(scope="session")
def running_site(nginx: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    text = f"replicas: 1\ngateway: {{port: {Ports.find_free().inference}}}\n"
    with serve(tmp_path_factory.mktemp("site"), "site", text) as served:
        yield served


@pytest.fixture(scope="session")
def running_plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("plain"), "plain", "ports: free\n") as served:
        yield served


@pytest.fixture
def site(running_site: Served) -> Iterator[Served]:
    """A gateway and one server, with echo 1.0."""
    yield running_site
    running_site.reset()


@pytest.fixture
def plain(running_plain: Served) -> Iterator[Served]:
    """One server without a gateway, with echo 1.0."""
    yield running_plain
    running_plain.reset()


@pytest.fixture(params=["site", "plain"])
def served(request: pytest.FixtureRequest) -> Served:
    """Each of both."""
    found: Served = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def load() -> Iterator[Callable[[Served], Load]]:
    """Return a function that begins a steady load on the echo of what is served."""
    with keep_loads() as begin:
        yield lambda served: begin(served.endpoint_file, served.deploy, "echo")


@pytest.fixture(scope="session")
def pack() -> Callable[..., Path]:
    """Return the function that packs a model of its own."""
    return pack_echo
