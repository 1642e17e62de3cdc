"""Archives that are broken, or whose model cannot be loaded, beside good ones."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marwright.archive import Run, pack_run

pytestmark = pytest.mark.server

Serve = Callable[..., Any]
Begin = Callable[..., Any]
Record = Callable[..., None]
Command = Callable[..., Any]

BROKEN_HANDLER = """
class Handler:
    def initialize(self, context):
        raise RuntimeError("these weights are of another network")

    def handle(self, data, context):
        return ["ok"] * len(data)
"""


@pytest.fixture
def own_store(fault_store: Path, tmp_path: Path) -> Path:
    """A copy of the store, to be damaged."""
    return shutil.copytree(fault_store, tmp_path / "store")


def read_status(served: Any, marwright: Command) -> Any:
    answer = marwright("status", "faults", "--json", env=served.environment)
    return json.loads(answer.stdout)


def test_an_archive_that_broke_on_disk_is_named_and_the_others_come_up(
    serve: Serve, load: Begin, record: Record, own_store: Path, marwright: Command
) -> None:
    shutil.copy(own_store / "cnn.mar", own_store / "other.mar")
    shutil.copy(own_store / "cnn-2.0.mar", own_store / "cnn.mar")
    shutil.copy(own_store / "other.mar", own_store / "good.mar")
    (own_store / "other.mar").unlink()
    served = serve(store=own_store, models=["good.mar", "cnn.mar"])
    traffic = load(served)
    broken = own_store / "cnn.mar"
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 0xFF
    broken.write_bytes(content)
    java = served.java
    java.kill()
    served.wait_until(lambda: served.java.pid != java.pid, "another Java")
    served.wait_until(
        lambda: served.list_versions() == {"cnn": [("1.0", 1, True)]}, "the good version"
    )
    reports = traffic.finish()
    record("an archive corrupted on disk, then a restart", reports)
    assert reports["client"]["lost"] == 0
    served.wait_until(
        lambda: "cnn.mar" in json.dumps(read_status(served, marwright)[0]["models"]),
        "the broken archive in the status",
    )
    assert marwright("status", "faults", "--ready", env=served.environment).returncode == 1
    assert marwright("status", "faults", "--live", env=served.environment).returncode == 0


@pytest.mark.slow
def test_a_model_that_fails_to_load_does_not_keep_the_others_from_serving(
    serve: Serve,
    load: Begin,
    record: Record,
    own_store: Path,
    run: Run,
    tmp_path: Path,
    marwright: Command,
) -> None:
    handler = tmp_path / "broken_handler.py"
    handler.write_text(BROKEN_HANDLER, encoding="utf-8")
    pack_run(run, out=own_store / "bad.mar", name="bad", handler=str(handler), preflight=None)
    served = serve(store=own_store, models=["bad.mar", "cnn.mar"])
    traffic = load(served)
    time.sleep(3)
    reports = traffic.finish()
    record("a model that fails to load, beside a good one", reports)
    assert reports["plain"]["lost"] == reports["client"]["lost"] == 0
    assert "these weights are of another network" in json.dumps(read_status(served, marwright))
