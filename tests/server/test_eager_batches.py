from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from marwright.server import TorchServe, register
from marwright.server.eager_batches import MODEL_CLASS, write_eager_model

# Answers how many requests shared its batch, which takes a while.
HANDLER = """
import time
class Handler:
    def initialize(self, context):
        pass
    def handle(self, data, context):
        time.sleep(0.1)
        return [str(len(data))] * len(data)
"""
DELAY = 3000
"""maxBatchDelay: milliseconds to TorchServe, microseconds with eager batches."""


@pytest.fixture(scope="module")
def jar() -> Path:
    """TorchServe's own."""
    spec = find_spec("ts")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "frontend/model-server.jar"


def write_jar(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_one_word_of_the_class_is_changed_and_nothing_else(jar: Path, tmp_path: Path) -> None:
    assert write_eager_model(jar, tmp_path / "classes")
    written = [path for path in (tmp_path / "classes").rglob("*") if path.is_file()]
    assert written == [tmp_path / "classes" / MODEL_CLASS]
    with zipfile.ZipFile(jar) as archive:
        before = archive.read(MODEL_CLASS)
    after = written[0].read_bytes()
    assert after != before
    assert after.replace(b"MICROSECONDS", b"MILLISECONDS") == before
    changed = [place for place in range(len(before)) if before[place] != after[place]]
    assert changed[-1] - changed[0] < len("MICROSECONDS")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            {MODEL_CLASS: b"of another release \x01\x00\x0cMILLISECONDS"},
            "is not TorchServe 0.12.0's",
        ),
        ({"other.class": b""}, "cannot be read"),
        (b"no jar", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_another_torchserve_is_left_alone_and_the_log_says_what_that_means(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    content: dict[str, bytes] | bytes | None,
    reason: str,
) -> None:
    path = tmp_path / "model-server.jar"
    if isinstance(content, dict):
        write_jar(path, content)
    elif content is not None:
        path.write_bytes(content)
    assert not write_eager_model(path, tmp_path / "classes")
    assert not (tmp_path / "classes").exists()
    assert "requests will wait for maxBatchDelay" in caplog.text
    assert reason in caplog.text


@pytest.fixture(scope="module")
def ask(
    server: TorchServe, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], int]]:
    """Return a function that asks an eager server's worker for the size of the batch."""
    path = tmp_path_factory.mktemp("patient") / "patient.mar"
    model = {"modelName": "patient", "handler": "patient.py", "configFile": "model-config.yaml"}
    manifest = json.dumps({"runtime": "python", "model": model}).encode()
    config = f"batchSize: 8\nmaxBatchDelay: {DELAY}\n".encode()
    members = {"MAR-INF/MANIFEST.json": manifest, "model-config.yaml": config}
    write_jar(path, {**members, "patient.py": HANDLER.encode()})
    register(server.client, path)
    yield lambda: int(server.client.predict("patient", b"x").body)
    server.client.models.unregister("patient", "1.0")
    (server.store / "patient.mar").unlink()


@pytest.mark.server
def test_a_lone_request_does_not_wait_for_company(ask: Callable[[], int]) -> None:
    ask()
    started = time.monotonic()
    assert ask() == 1
    assert time.monotonic() - started < DELAY / 1000 / 2


@pytest.mark.server
def test_requests_that_come_while_a_worker_computes_share_the_next_batch(
    ask: Callable[[], int],
) -> None:
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(ask)
        time.sleep(0.05)
        rest = [pool.submit(ask) for _ in range(8)]
        assert first.result() == 1
        sizes = [future.result() for future in rest]
    assert max(sizes) > 4
