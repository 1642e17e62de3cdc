from __future__ import annotations

from pathlib import Path

import pytest
import torch

from marwright.archive import Run
from marwright.archive.weights import check_torchscript
from marwright.errors import ArchiveError


def test_weights_of_a_run_load(run: Run) -> None:
    check_torchscript(run.model_path)


def test_weights_that_are_absent_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"absent\.pt do not load"):
        check_torchscript(tmp_path / "absent.pt")


@pytest.mark.parametrize("content", [b"", b"these are no weights\n" * 100, b"PK\x03\x04", b"\x80"])
def test_bytes_that_are_no_weights_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="expected a TorchScript file"):
        check_torchscript(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_weights_are_refused(tmp_path: Path, run: Run, share: float) -> None:
    path = tmp_path / "model.pt"
    whole = run.model_path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ArchiveError, match="do not load"):
        check_torchscript(path)


def test_a_state_dict_is_no_torchscript(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "model.pt")
    with pytest.raises(ArchiveError, match="export the model"):
        check_torchscript(tmp_path / "model.pt")


def test_a_folder_is_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="do not load"):
        check_torchscript(tmp_path)
