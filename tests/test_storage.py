from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

import pytest

from marwright.errors import MarwrightError, NotReadyError, StorageError
from marwright.storage import hold_path, translate_os_errors, write_file, write_folder

Umask = Callable[[int], AbstractContextManager[None]]


class _StoppedError(Exception):
    pass


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def stop_after(written: int, stop: type[BaseException]) -> None:
    assert written == len("half")
    raise stop


def run_with_little_space(program: str) -> str:
    """Run a program that may write files of 4,096 bytes at most, and return what it prints."""
    limited = """
        import resource, signal
        from pathlib import Path
        from marwright.errors import StorageError
        from marwright.storage import write_file, write_folder
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    """
    done = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(limited) + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_file_appears_when_the_block_ends_well(tmp_path: Path, old: bytes | None) -> None:
    path = tmp_path / "deep/er/file"
    if old is not None:
        path.parent.mkdir(parents=True)
        path.write_bytes(old)
    with write_file(path) as stream:
        stream.write(b"new")
        assert (path.read_bytes() if path.exists() else None) == old
    assert path.read_bytes() == b"new"
    assert list_names(path.parent) == ["file"]


@pytest.mark.parametrize("stop", [_StoppedError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_file_and_no_other(
    tmp_path: Path, stop: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(stop), write_file(path) as stream:
        stop_after(stream.write(b"half"), stop)
    assert path.read_bytes() == b"old"
    assert list_names(tmp_path) == ["file"]


def test_a_failure_leaves_no_file_where_none_was(tmp_path: Path) -> None:
    with pytest.raises(_StoppedError), write_file(tmp_path / "file"):
        raise _StoppedError
    assert list_names(tmp_path) == []


def test_a_full_disk_is_a_storage_error_that_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    told = run_with_little_space(f"""
        try:
            with write_file(Path({str(path)!r})) as stream:
                stream.write(bytes(100_000))
        except StorageError as exc:
            print(exc)
    """)
    assert told.startswith(f"cannot write {path}: found File too large")
    assert path.read_bytes() == b"old"
    assert list_names(tmp_path) == ["file"]


def test_a_full_disk_leaves_no_half_folder(tmp_path: Path) -> None:
    old = make_folder(tmp_path / "run", "old")
    told = run_with_little_space(f"""
        try:
            with write_folder(Path({str(old)!r}), replace=True) as folder:
                (folder / "large").write_bytes(bytes(100_000))
        except StorageError as exc:
            print(exc)
    """)
    assert told.startswith(f"cannot write {old}: found File too large")
    assert (old / "file").read_text() == "old"
    assert list_names(tmp_path) == ["run"]


def test_space_that_is_missing_when_the_file_is_flushed_is_a_storage_error() -> None:
    # /dev/full takes no byte; the buffer holds these until the block ends.
    expected = pytest.raises(StorageError, match="cannot write it: found No space left on device")
    with expected, translate_os_errors("write it"), Path("/dev/full").open("wb") as stream:
        stream.write(b"x")


@pytest.mark.parametrize("place", ["below a file", "too long a name"])
def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "in-the-way").write_bytes(b"")
    path = tmp_path / "in-the-way/sub/name" if place == "below a file" else tmp_path / ("n" * 300)
    with pytest.raises(StorageError, match="cannot write"), write_file(path):
        pass
    with pytest.raises(StorageError, match="cannot write"), write_folder(path):
        pass
    assert list_names(tmp_path) == ["in-the-way"]


def test_a_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    old = make_folder(tmp_path / "name", "old")
    with pytest.raises(StorageError, match="cannot write"), write_file(old) as stream:
        stream.write(b"new")
    assert (old / "file").read_text() == "old"
    assert list_names(tmp_path) == ["name"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_who_may_read(umask: Umask, tmp_path: Path, mask: int, mode: int) -> None:
    with umask(mask):
        with write_file(tmp_path / "file"):
            pass
        with write_folder(tmp_path / "folder"):
            pass
        assert os.umask(mask) == mask
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_folder_appears_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "deep/er/run"
    with write_folder(path) as folder:
        (folder / "file").write_text("new")
        assert not path.exists()
        assert folder.parent == path.parent  # one file system, so that a rename suffices
    assert (path / "file").read_text() == "new"
    assert list_names(path.parent) == ["run"]


def test_a_folder_that_exists_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    old = make_folder(tmp_path / "run", "old")
    expected = pytest.raises(StorageError, match="exists; choose another folder, or pass --force")
    with expected, write_folder(old):
        pytest.fail("the block ran")
    assert list_names(tmp_path) == ["run"]


def test_a_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    old = make_folder(tmp_path / "run", "old")
    with write_folder(old, replace=True) as folder:
        (folder / "other").write_text("new")
        assert (old / "file").read_text() == "old"
    assert list_names(old) == ["other"]
    assert list_names(tmp_path) == ["run"]


@pytest.mark.parametrize("stop", [_StoppedError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_folder_and_no_other(
    tmp_path: Path, stop: type[BaseException]
) -> None:
    old = make_folder(tmp_path / "run", "old")
    with pytest.raises(stop), write_folder(old, replace=True) as folder:
        stop_after((folder / "file").write_text("half"), stop)
    assert (old / "file").read_text() == "old"
    assert list_names(tmp_path) == ["run"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_folder(tmp_path / "run", "old")
    rename = Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if target == old and self.parent == tmp_path:  # the second of the two renames
            raise KeyboardInterrupt  # no real call lets a test in between them
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(KeyboardInterrupt), write_folder(old, replace=True) as folder:
        (folder / "file").write_text("new")
    assert (old / "file").read_text() == "old"
    assert list_names(tmp_path) == ["run"]


def test_a_foreign_error_becomes_ours_with_its_cause() -> None:
    expected = pytest.raises(StorageError, match=r"cannot do it: found .* \(/x\); free space")
    with expected as caught, translate_os_errors("do it"):
        raise PermissionError(errno.EACCES, "Permission denied", "/x")
    assert isinstance(caught.value.__cause__, PermissionError)


@pytest.mark.parametrize("ours", [StorageError("full"), NotReadyError("late")])
def test_an_error_of_ours_passes_as_it_is(ours: MarwrightError) -> None:
    assert isinstance(ours, OSError)
    with pytest.raises(MarwrightError) as caught, translate_os_errors("do it"):
        raise ours
    assert caught.value is ours


def test_an_error_that_is_not_the_operating_systems_passes_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError), translate_os_errors("do it"):
        raise ZeroDivisionError


HOLD = """
import sys
from pathlib import Path
from marwright.storage import hold_path
with hold_path(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def start_holder(path: Path) -> subprocess.Popen[bytes]:
    """Start a process that holds a path until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_path_is_held_while_the_block_runs(tmp_path: Path) -> None:
    with hold_path(tmp_path / "deep/run"):
        told = pytest.raises(StorageError, match=f"run is in use: found process {os.getpid()} ")
        with told, hold_path(tmp_path / "deep/run"):
            pytest.fail("two hold it")
        with hold_path(tmp_path / "deep/other"):
            pass
        assert list_names(tmp_path / "deep") == [".run.lock"]
    assert list_names(tmp_path / "deep") == []
    with hold_path(tmp_path / "deep/run"):
        pass


def test_a_path_that_another_process_holds_is_refused_with_its_number(tmp_path: Path) -> None:
    with start_holder(tmp_path / "run") as other:
        told = pytest.raises(StorageError, match=f"found process {other.pid} writes it; wait until")
        with told, hold_path(tmp_path / "run"):
            pytest.fail("two hold it")
        other.communicate()
    assert list_names(tmp_path) == []


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    with start_holder(tmp_path / "run") as other:
        other.kill()
        other.wait()
    with hold_path(tmp_path / "run"):
        assert (tmp_path / ".run.lock").read_text() == str(os.getpid())
    assert list_names(tmp_path) == []


def test_a_failure_lets_go_of_the_path(tmp_path: Path) -> None:
    with pytest.raises(_StoppedError), hold_path(tmp_path / "run"):
        raise _StoppedError
    assert list_names(tmp_path) == []


def test_a_lock_that_its_holder_has_just_removed_is_not_taken_for_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = fcntl.flock
    removed: list[bool] = []

    def remove_first(stream: IO[bytes], mode: int) -> None:
        if not removed:  # the holder's last act, between our opening and locking its file
            (tmp_path / ".run.lock").unlink()
            removed.append(True)
        take(stream, mode)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    told = pytest.raises(StorageError, match="in use")
    with hold_path(tmp_path / "run"), told, hold_path(tmp_path / "run"):
        pytest.fail("two hold it")


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"), hold_path(tmp_path / "file/run"):
        pytest.fail("it is held")
