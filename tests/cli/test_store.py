from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from marwright.archive import Spec, pack_spec
from marwright.archive.store import FOLDER, Store
from marwright.server import TorchServe
from marwright.server.deployment import Deployment
from marwright.server.registry import announce
from marwright.server.wanted import list_wanted

Command = Callable[..., subprocess.CompletedProcess[str]]


def pack(path: Path, version: str) -> Path:
    folder = path.with_suffix("")
    folder.mkdir()
    (folder / "handler.py").write_text("def handle(data, context): ...\n", encoding="utf-8")
    spec = Spec.create(name="m", version=version, handler="handler.py")
    return pack_spec(spec, folder=folder, out=path, preflight=None).path


@pytest.fixture
def run_in(marwright: Command, tmp_path: Path) -> Command:
    """Return a function that runs commands where `model_store` is, and no server of others."""
    (tmp_path / "model_store").mkdir()
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    return lambda *arguments: marwright(*arguments, cwd=tmp_path, env=environment)


def test_archives_are_added_listed_taken_back_and_removed(run_in: Command, tmp_path: Path) -> None:
    for version in ("1.0", "2.0"):
        answer = run_in("store", "add", pack(tmp_path / f"{version}.mar", version))
        assert answer.returncode == 0, answer.stderr
    rows = json.loads(run_in("store", "list", "--verify", "--json").stdout)
    assert [(row["version"], row["names"], row["state"]) for row in rows] == [
        ("2.0", ["m.mar"], "whole"),
        ("1.0", [], "whole"),
    ]
    deployment = Deployment(store=tmp_path / "model_store")
    assert [item.path.name for item in list_wanted(deployment)] == ["m.mar"]
    back = run_in("store", "add", rows[1]["key"], "--json")
    assert json.loads(back.stdout)[0]["names"] == ["m.mar"]
    removed = run_in("store", "remove", "m-2.0")
    assert (removed.returncode, f"m-2.0-{rows[0]['key']}.mar" in removed.stdout) == (0, True)
    assert "1.0" in run_in("store", "list").stdout


def test_gc_tells_what_it_would_remove(run_in: Command, tmp_path: Path) -> None:
    for version in ("1.0", "2.0", "3.0"):
        Store(tmp_path / "model_store").add(pack(tmp_path / f"{version}.mar", version))
    told = json.loads(run_in("store", "gc", "--keep", "1", "--dry-run", "--json").stdout)
    assert {row["version"] for row in told} == {"1.0", "2.0"}
    assert len(Store(tmp_path / "model_store").list()) == 3
    assert json.loads(run_in("store", "gc", "--keep", "1", "--json").stdout) == told
    assert len(Store(tmp_path / "model_store").list()) == 1


def test_what_is_damaged_or_not_stored_is_told(run_in: Command, tmp_path: Path) -> None:
    store = Store(tmp_path / "model_store")
    path = store.add(pack(tmp_path / "1.mar", "1.0")).path
    pack(tmp_path / "model_store/loose.mar", "2.0")
    path.chmod(0o644)
    with path.open("r+b") as stream:
        stream.write(b"damaged")
    answer = run_in("store", "list", "--verify")
    assert (answer.returncode, "damaged" in answer.stdout) == (1, True)
    assert (
        "note: loose.mar is not stored: marwright store add model_store/loose.mar" in answer.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["add", "absent.mar"], 1, "holds no archive absent.mar"),
        (["add", "folder/absent.mar"], 1, "there is no archive folder/absent.mar"),
        (["add", "text.mar"], 1, "text.mar is no model archive"),
        (["remove", "m"], 1, "holds no archive m"),
        (["gc", "--keep", "0"], 2, "keep"),
        (["list", "--store", "absent"], 1, "there is no store absent"),
        (["list", "--store", "text.mar"], 1, "there is no store text.mar: found a file"),
    ],
)
def test_a_mistake_gets_its_status(
    run_in: Command, tmp_path: Path, arguments: list[str], status: int, text: str
) -> None:
    (tmp_path / "text.mar").write_text("text", encoding="utf-8")
    answer = run_in("store", *arguments)
    assert (answer.returncode, text in answer.stderr) == (status, True), answer.stderr


@pytest.mark.server
def test_what_a_server_has_registered_is_told_and_kept(
    marwright: Command, server: TorchServe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    options = ["--store", server.store]
    store = Store(server.store)
    try:
        first = store.add(server.store / "cnn.mar")
        store.add(server.store / "cnn-2.0.mar", name="cnn-2.0.mar")
        with announce("here", server.run_folder):
            rows = json.loads(marwright("store", "list", *options, "--json").stdout)
            assert {row["version"]: row["served_by"] for row in rows} == {
                "1.0": ["here"],
                "2.0": [],
            }
            answer = marwright("store", "remove", first.key, *options)
            assert "a server uses it" in answer.stderr
            assert first.path.exists()
    finally:
        shutil.rmtree(server.store / FOLDER)
