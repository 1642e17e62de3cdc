from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from marwright.archive import Run, pack_run
from marwright.errors import ArchiveError, MarwrightError
from marwright.server.deployment import Deployment
from marwright.server.wanted import list_wanted, sort_versions


def deploy(store: Path, *models: object) -> Deployment:
    return Deployment.model_validate({"store": store, "models": list(models) or None})


def test_without_models_the_whole_store_is_wanted_lowest_version_first(
    store: Path, tmp_path: Path
) -> None:
    for file in ("cnn-2.0.mar", "cnn.mar"):  # others may put more into the common store
        shutil.copy(store / file, tmp_path)
    wanted = list_wanted(deploy(tmp_path))
    assert [(item.key, item.default) for item in wanted] == [
        (("cnn", "1.0"), True),
        (("cnn", "2.0"), False),
    ]


def test_the_default_comes_first(store: Path) -> None:
    models = ["cnn.mar", {"archive": "cnn-2.0.mar", "default": True}]
    wanted = list_wanted(deploy(store, *models))
    assert [(item.version, item.default) for item in wanted] == [("2.0", True), ("1.0", False)]
    first = list_wanted(deploy(store, "cnn-2.0.mar", "cnn.mar"))
    assert first[0].key == ("cnn", "2.0")  # the first one here, where none says so


def test_an_entry_goes_before_the_archive_and_that_before_torchserve(store: Path) -> None:
    entry = {"archive": "cnn.mar", "workers": 3, "batch_size": 4, "threads": 1}
    (item,) = list_wanted(deploy(store, entry))
    assert item.workers == 3
    assert item.changes == {
        "minWorkers": 3,
        "maxWorkers": 3,
        "batchSize": 4,
        "handler.threads": 1,
    }
    assert (item.settings["batchSize"], item.settings["responseTimeout"]) == (4, 60)


def test_what_the_archive_says_already_is_no_change(store: Path) -> None:
    (item,) = list_wanted(deploy(store, {"archive": "cnn.mar", "workers": 1, "batch_size": 8}))
    assert item.changes == {}


def test_no_workers_may_be_wanted(store: Path) -> None:
    (item,) = list_wanted(deploy(store, {"archive": "cnn.mar", "workers": 0}))
    assert item.workers == 0
    assert item.settings["maxWorkers"] == 0


def test_an_archive_without_settings_has_torchserve_s(tmp_path: Path, run: Run) -> None:
    pack_run(run, out=tmp_path / "cnn.mar", preflight=None)
    (item,) = list_wanted(deploy(tmp_path))
    assert item.settings["startupTimeout"] == 120


def test_two_archives_of_one_version_are_refused(tmp_path: Path, store: Path) -> None:
    for name in ("a.mar", "b.mar"):
        (tmp_path / name).hardlink_to(store / "cnn.mar")
    with pytest.raises(ArchiveError, match=r"a\.mar and b\.mar are both cnn 1\.0"):
        list_wanted(deploy(tmp_path))


def test_versions_are_sorted_as_numbers(store: Path) -> None:
    from dataclasses import replace

    (item,) = list_wanted(deploy(store, "cnn.mar"))
    versions = [replace(item, version=version) for version in ("10.0", "9.1", "9.0-rc", "9")]
    assert [found.version for found in sort_versions(versions)] == ["9", "9.0-rc", "9.1", "10.0"]


def test_what_is_broken_is_put_aside_and_the_lowest_version_stays_the_default(
    run: Run, tmp_path: Path
) -> None:
    for version in ("10.0", "2.0"):
        pack_run(run, out=tmp_path / f"cnn-{version}.mar", version=version, preflight=None)
    shutil.copy(tmp_path / "cnn-2.0.mar", tmp_path / "twin.mar")
    (tmp_path / "bad.mar").write_text("no archive", encoding="utf-8")
    refused: dict[str, MarwrightError] = {}
    wanted = list_wanted(deploy(tmp_path), refused=refused)
    assert [(item.version, item.default) for item in wanted] == [("2.0", True), ("10.0", False)]
    assert sorted(refused) == ["bad.mar", "twin.mar"]
