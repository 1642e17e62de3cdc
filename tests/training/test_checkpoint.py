from __future__ import annotations

import pickle
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from marwright.errors import RunError, StorageError
from marwright.training.checkpoint import find_checkpoint, read_checkpoint, write_checkpoint


class _Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@contextmanager
def limit_files(size_bytes: int) -> Iterator[None]:
    """Let no file of this process grow further: as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_it_lies_beside_the_run_folder() -> None:
    assert find_checkpoint(Path("runs/digits")) == Path("runs/digits.checkpoint")


def test_what_was_written_is_read(tmp_path: Path) -> None:
    state = {"a": torch.rand(3), "b": [1, 2.5, {"c": "text"}], "d": None}
    write_checkpoint(tmp_path / "deep/er/x", state)
    read = read_checkpoint(tmp_path / "deep/er/x")
    assert torch.equal(read.pop("a"), state.pop("a"))  # type: ignore[arg-type]
    assert read == state
    assert [path.name for path in (tmp_path / "deep/er").iterdir()] == ["x"]


def test_none_is_told_with_how_to_have_one(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no checkpoint .*--checkpoint-steps N"):
        read_checkpoint(tmp_path / "x")


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04", b"\x80\x02K\x05."])
def test_a_broken_one_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(RunError, match="x is no checkpoint") as caught:
        read_checkpoint(tmp_path / "x")
    assert "\n" not in str(caught.value)


def test_half_a_checkpoint_is_told(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x", {"a": torch.rand(1000)})
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match="x is no checkpoint"):
        read_checkpoint(tmp_path / "x")


def test_a_list_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save([1], tmp_path / "x")
    with pytest.raises(RunError, match="x is no checkpoint: found list"):
        read_checkpoint(tmp_path / "x")


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    torch.save({"a": _Trap(tmp_path / "ran")}, tmp_path / "x")
    (tmp_path / "y").write_bytes(pickle.dumps({"a": _Trap(tmp_path / "ran")}))
    for name in ("x", "y"):
        with pytest.raises(RunError, match="is no checkpoint"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x", {"step": 1})
    with limit_files(5_000), pytest.raises(StorageError, match="cannot write"):
        write_checkpoint(tmp_path / "x", {"step": 2, "weights": torch.rand(10_000)})
    assert read_checkpoint(tmp_path / "x") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
