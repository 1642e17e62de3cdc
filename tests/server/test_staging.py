"""The folder of archives that TorchServe reads."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest

from marwright.archive.keys import make_key_pair
from marwright.archive.policy import Policy
from marwright.archive.reader import Archive
from marwright.archive.signature import signature_path
from marwright.archive.signing import sign_with_key
from marwright.errors import ArchiveError
from marwright.server.deployment import Deployment, ModelEntry
from marwright.server.staging import Staging
from marwright.server.wanted import Wanted, read_wanted


@pytest.fixture
def folder(store: Path, tmp_path: Path) -> Path:
    """A store with cnn.mar, which a test may change."""
    (tmp_path / "own").mkdir()
    shutil.copy(store / "cnn.mar", tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def archive(folder: Path) -> Path:
    return folder / "cnn.mar"


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    return Staging(tmp_path / "staged", None)


def want(folder: Path, **settings: int) -> Wanted:
    entry = ModelEntry.model_validate({"archive": "cnn.mar", **settings})
    return read_wanted(Deployment(store=folder), entry)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def test_an_archive_comes_in_as_a_link_into_a_private_folder(
    staging: Staging, folder: Path, archive: Path
) -> None:
    item = want(folder)
    assert not staging.is_current(item)
    assert staging.stage(item) == "cnn.mar"
    assert (staging.folder / "cnn.mar").samefile(archive)
    assert staging.folder.stat().st_mode & 0o777 == 0o700
    assert staging.is_current(item)
    os.utime(archive)  # as another file of this name has another time
    assert not staging.is_current(item)
    assert staging.list_unchanged([item]) == []


def test_other_settings_make_a_copy_and_leave_the_store_alone(
    staging: Staging, folder: Path, archive: Path
) -> None:
    before = archive.read_bytes()
    changed = want(folder, batch_size=3)
    staging.stage(changed)
    staged = staging.folder / "cnn.mar"
    assert not staged.samefile(archive)
    assert archive.read_bytes() == before
    assert staging.is_current(changed)
    assert not staging.is_current(want(folder))
    assert staging.is_current(want(folder), besides=["batchSize"])
    assert staging.list_unchanged([want(folder)]) == ["cnn.mar"]
    with Archive.open(staged) as inside:
        assert "batchSize: 3" in inside.read("model-config.yaml").decode()


def test_a_trial_that_fails_leaves_all_as_it_was(
    staging: Staging, folder: Path, archive: Path
) -> None:
    changed = want(folder, batch_size=3)
    staging.stage(changed)
    with contextlib.suppress(ZeroDivisionError), staging.try_stage(want(folder)):
        assert (staging.folder / "cnn.mar").samefile(archive)
        raise ZeroDivisionError
    assert staging.is_current(changed)
    with staging.try_stage(want(folder)):
        pass
    assert staging.is_current(want(folder))
    assert sorted(path.name for path in staging.folder.iterdir()) == [".stamps.json", "cnn.mar"]


def test_a_broken_archive_does_not_take_the_place_of_a_whole_one(
    staging: Staging, folder: Path, archive: Path
) -> None:
    staging.stage(want(folder, batch_size=3))
    before = (staging.folder / "cnn.mar").read_bytes()
    item = want(folder)
    flip_a_byte(archive)
    with pytest.raises(ArchiveError):
        staging.stage(item)
    assert (staging.folder / "cnn.mar").read_bytes() == before


def test_what_is_taken_out_stays_in_the_store(
    staging: Staging, folder: Path, archive: Path
) -> None:
    staging.stage(want(folder))
    staging.unstage("cnn.mar")
    staging.unstage("cnn.mar")
    assert archive.exists()
    assert json.loads((staging.folder / ".stamps.json").read_text()) == {}
    assert [path.name for path in staging.folder.iterdir()] == [".stamps.json"]


def test_across_disks_it_is_a_symbolic_link(
    staging: Staging, folder: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Path) -> None:
        raise OSError(18, "cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    staging.stage(want(folder))
    assert (staging.folder / "cnn.mar").readlink() == archive.resolve()


class TestUnderAPolicy:
    """Signatures are brought in too, so that what is staged can be judged again."""

    @pytest.fixture
    def strict(self, tmp_path: Path, archive: Path) -> Staging:
        private, public = make_key_pair(tmp_path / "release")
        sign_with_key(archive, key=private)
        return Staging(tmp_path / "strict", Policy(keys=(public,)))

    def test_what_is_staged_can_be_judged_again(self, strict: Staging, folder: Path) -> None:
        strict.stage(want(folder))
        strict.check("cnn.mar")
        (strict.folder / "cnn.mar").unlink()
        shutil.copy(folder / "cnn.mar", strict.folder)
        flip_a_byte(strict.folder / "cnn.mar")
        with pytest.raises(ArchiveError):
            strict.check("cnn.mar")

    def test_a_signature_goes_with_its_archive(self, strict: Staging, folder: Path) -> None:
        strict.stage(want(folder))
        strict.unstage("cnn.mar")
        assert not signature_path(strict.folder / "cnn.mar").exists()
        strict.stage(want(folder))
        strict.stage(want(folder, batch_size=3))  # which nobody has signed
        assert not signature_path(strict.folder / "cnn.mar").exists()

    def test_a_trial_that_fails_puts_the_signature_back(
        self, strict: Staging, folder: Path
    ) -> None:
        strict.stage(want(folder))
        changed = want(folder, batch_size=3)
        with contextlib.suppress(ZeroDivisionError), strict.try_stage(changed):
            raise ZeroDivisionError
        strict.check("cnn.mar")
        assert len(list(strict.folder.iterdir())) == 3
