"""Going back where something has changed since."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.loads import find_unanswered

pytestmark = pytest.mark.server

Load = Callable[..., Any]
Record = Callable[..., None]
Pack = Callable[..., Path]


def release(served: Any, path: Path) -> None:
    released = served.run("release", path)
    assert released.returncode == 0, released.stderr


def test_an_archive_that_was_deleted_is_put_back(
    site: Any, load: Load, record: Record, pack: Pack, tmp_path: Path
) -> None:
    traffic = load(site)
    release(site, pack(tmp_path / "echo-2.0.mar", "2.0"))
    release(site, pack(tmp_path / "echo-3.0.mar", "3.0"))
    content = (site.store / "echo-2.0.mar").read_bytes()
    (site.store / "echo-2.0.mar").unlink()
    back = site.run("rollback")
    assert back.returncode == 0, back.stderr
    assert "echo-2.0.mar was missing in the store" in back.stderr
    assert (site.store / "echo-2.0.mar").read_bytes() == content
    assert site.list_versions() == {"2.0": (1, True), "3.0": (1, False)}
    assert "nothing to do" in site.run("apply", site.deploy).stdout
    reports = traffic.finish()
    record("a rollback whose archive was deleted from the store", reports)
    assert find_unanswered(reports) == {}


def test_one_that_cannot_be_put_back_is_named_and_the_default_moves_all_the_same(
    plain: Any, pack: Pack, tmp_path: Path
) -> None:
    release(plain, pack(tmp_path / "echo-2.0.mar", "2.0"))
    content = (plain.store / "echo.mar").read_bytes()
    (plain.store / "echo.mar").unlink()
    with plain.client as client:  # what the server reads is another file by now
        staged = client.endpoint.staging / "echo.mar"
    staged.unlink()
    staged.write_bytes(content + b"\0")
    back = plain.run("rollback")
    (plain.store / "echo.mar").write_bytes(content)
    assert back.returncode == 1
    assert "the store has no echo.mar" in back.stderr
    assert plain.list_versions() == {"1.0": (1, True), "2.0": (1, False)}
    assert plain.history.read()[-1].event == "rolled back"


def test_nothing_to_take_back_is_said(plain: Any, pack: Pack, tmp_path: Path) -> None:
    never = plain.run("rollback")
    assert never.returncode == 1
    assert "it is not clear which model is meant: found no release" in never.stderr
    named = plain.run("rollback", "echo")
    assert "there is no release of echo 1.0 to take back" in named.stderr
    release(plain, pack(tmp_path / "echo-2.0.mar", "2.0"))
    assert plain.run("rollback").returncode == 0
    twice = plain.run("rollback")
    assert twice.returncode == 1
    assert "there is no release of echo 1.0 to take back" in twice.stderr


def test_what_was_there_before_a_release_stays_when_it_is_taken_back(
    plain: Any, pack: Pack, tmp_path: Path
) -> None:
    pack(plain.store / "echo-2.0.mar", "2.0", recorded={"cat": 0.5})
    text = plain.deploy.read_text("utf-8")
    plain.deploy.write_text(
        text.replace("  - archive: echo.mar", "  - echo-2.0.mar\n  - archive: echo.mar").replace(
            "workers: 1   #", "default: true\n    workers: 1   #"
        ),
        encoding="utf-8",
    )
    assert plain.run("apply", plain.deploy).returncode == 0
    before = plain.see()
    refused = plain.run("release", "echo-2.0.mar")
    assert refused.returncode == 1
    assert "0.9 instead of 0.5" in refused.stderr
    assert plain.see() == before
