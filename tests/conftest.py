"""What every test may use: one short training, one archive of it, one server."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from tests.loads import PATIENCE, Load, Reports, keep_loads

from marwright.archive import Packed, Run, pack_run
from marwright.errors import ServerError
from marwright.server import TorchServe
from marwright.server.nginx import find_nginx
from marwright.server.registry import find_record, list_records
from marwright.server.supervision.inspection import fetch_status, stop_server

ROOT = Path(__file__).parents[1]
HANDLERS = ROOT / "handlers"
BOOT_SECONDS = 150.0
"""Generous: other tests may have the machine."""


def wait_until(
    is_true: Callable[[], Any], *, timeout: float = BOOT_SECONDS, what: str = "what was awaited"
) -> Any:
    deadline = time.monotonic() + timeout
    while not (value := is_true()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.05)
    return value


def start_serving(
    deploy: Path, errors: Path, env: dict[str, str] | None = None
) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """Start `marwright serve`; return it and the line that it prints once it serves.

    What it writes to stderr is appended to `errors`, which a failure shows.
    """
    command = [sys.executable, "-m", "marwright", "serve", "--json", "--deploy", str(deploy)]
    began = errors.stat().st_size if errors.exists() else 0
    with errors.open("ab") as stream:
        process = subprocess.Popen(
            command, cwd=deploy.parent, stdout=subprocess.PIPE, stderr=stream, text=True, env=env
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, errors.read_bytes()[began:].decode()
        return process, json.loads(line)
    except BaseException:
        end_serving(process)
        raise


def end_serving(process: subprocess.Popen[str]) -> None:
    """End what `start_serving` started, also where it has ended by itself or does not obey."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()


class Served:
    """A `marwright serve` in a folder of its own, with what it says."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.config = folder / "deploy.yaml"
        self.errors = folder / "errors.txt"
        self.process: subprocess.Popen[str] | None = None

    def write(self, **values: Any) -> None:
        values = {
            "name": self.name,
            "store": str(self.folder / "store"),
            "ports": "free",
            "logging": {"folder": str(self.folder / "logs")},
            **values,
        }
        values.setdefault("supervision", {}).setdefault("check_seconds", 0.2)
        self.config.write_text(yaml.safe_dump(values), encoding="utf-8")

    def start(self) -> dict[str, Any]:
        """Start it; return the line that it prints once it serves."""
        if self.process is not None:
            end_serving(self.process)
        self.process, facts = start_serving(self.config, self.errors)
        return facts

    @property
    def endpoint_file(self) -> Path:
        return Path(find_record(self.name).run_folder) / "endpoint.json"

    def status(self) -> dict[str, Any]:
        record = find_record(self.name)
        return fetch_status(record.health_url, record.key) or {}

    def wait(self, key: str = "ready") -> dict[str, Any]:
        """Wait until a question's answer is yes; return the whole status."""
        return wait_until(lambda: (s := self.status()).get(key) and s)

    def find(self, key: str) -> dict[str, Any]:
        """Return the status of one version, as "cnn 1.0"."""
        found = {f"{m['name']} {m['version']}": m for m in self.status()["models"]}
        return found.get(key, {})

    def read_log(self) -> str:
        return (self.folder / "logs/supervisor.log").read_text()

    def end(self) -> None:
        if self.process is not None:
            end_serving(self.process)
        for record in list_records().values():
            stop_server(record, timeout=60)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """The folder of temporary files and, in it, the runtime folder: nothing else is in either.

    Its path is short, as those of run folders have to be.
    """
    with tempfile.TemporaryDirectory(dir="/tmp") as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name).resolve()
        (folder / "runtime").mkdir(mode=0o700)
        patch.setenv("XDG_RUNTIME_DIR", str(folder / "runtime"))
        patch.setenv("TMPDIR", str(folder))
        yield folder


@contextlib.contextmanager
def serve_alone(folder: Path, store: Path, name: str) -> Iterator[Served]:
    """Serve cnn 1.0 in a runtime folder of its own, where other tests stop nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder / "runtime"))
        served = Served(folder, name)
        served.write(store=str(store), models=["cnn.mar"])
        try:
            served.start()
            served.wait()
            yield served
        finally:
            served.end()


@pytest.fixture(scope="session")
def nginx() -> Path:
    """The nginx of this machine; tests that need it are skipped where there is none."""
    try:
        return find_nginx()
    except ServerError as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of four epochs: its accuracy is above 0.9, which is enough to tell labels apart."""
    from marwright.training.settings import Settings
    from marwright.training.train import train_run

    return train_run(tmp_path_factory.mktemp("runs") / "digits", settings=Settings(epochs=4))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """A store with versions 1.0 and 2.0 of that run's model."""
    folder = tmp_path_factory.mktemp("store")
    pack_run(run, out=folder / "cnn.mar", preflight=None)
    pack_run(run, out=folder / "cnn-2.0.mar", version="2.0", preflight=None)
    return folder


@pytest.fixture(scope="session")
def server(store: Path) -> Iterator[TorchServe]:
    """One real TorchServe for the session, with cnn 1.0; tests leave it as they found it."""
    with TorchServe(store, models=["cnn.mar"]) as running:
        yield running


@pytest.fixture
def packed(tmp_path: Path, run: Run) -> Packed:
    """A fresh archive in a folder of its own."""
    return pack_run(run, out=tmp_path / "store", preflight=None)


@pytest.fixture
def scan(run: Run) -> bytes:
    """The bytes of a PNG of one test scan."""
    return run.samples[0].path.read_bytes()


@pytest.fixture
def load(scan: bytes, tmp_path: Path) -> Iterator[Callable[[Any], Load]]:
    """Return a function that begins a steady load on the cnn of what is served."""
    image = tmp_path / "scan.png"
    image.write_bytes(scan)
    with keep_loads() as begin:
        yield lambda served: begin(served.endpoint_file, image, "cnn")


@pytest.fixture
def record() -> Callable[..., None]:
    """Return a function that keeps a fault's counts, where `make bench WHAT=faults` asks for them.

    A fault whose rate was below 50 requests a second fails: it would prove nothing.
    """

    def keep(fault: str, reports: Reports, **facts: Any) -> None:
        row = {"fault": fault, **reports["plain"], "client": reports["client"], **facts}
        for report in reports.values():
            assert report["rate"] >= 50, report
            assert report["sent"] == report["answered"] + report["refused"] + report["lost"]
        if target := os.environ.get("MARWRIGHT_FAULTS"):
            with Path(target).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")

    return keep


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests that keep a fault's counts: `-m fault` runs these, slow ones too."""
    if "record" in getattr(item, "fixturenames", ()):
        item.add_marker("fault")


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """Return a function that makes the bytes of an image."""

    def encode_image(
        size: tuple[int, int] = (24, 24), kind: str = "PNG", mode: str = "RGB"
    ) -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, size, 128).save(buffer, format=kind)
        return buffer.getvalue()

    return encode_image


@pytest.fixture(scope="session")
def umask() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """Return a context manager that sets the umask and puts it back."""

    @contextlib.contextmanager
    def set_umask(mask: int) -> Iterator[None]:
        before = os.umask(mask)
        try:
            yield
        finally:
            os.umask(before)

    return set_umask


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on loopback that somebody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


@pytest.fixture(scope="session")
def marwright() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs the command line in a process of its own."""

    def run_command(
        *arguments: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "marwright", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env=env,
            timeout=170,
            check=False,
        )

    return run_command
