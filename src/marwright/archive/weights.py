"""Weights: whether a TorchScript file loads, asked before a worker has to."""

from __future__ import annotations

import warnings
from pathlib import Path

from marwright.errors import ArchiveError

__all__ = ["check_torchscript"]


def check_torchscript(path: Path) -> None:
    """Load a TorchScript file once; imports torch.

    Raises:
        ArchiveError: the file is missing, truncated, or no TorchScript.
    """
    import torch  # here, not above: marwright must start without it

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit: TorchServe's format
            torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError, OSError) as exc:
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise ArchiveError(
            f"the weights {path} do not load",
            expected="a TorchScript file (torch.jit.save)",
            found=reason.split(". ")[0][:200],
            remedy="train again, or export the model with torch.jit.script",
        ) from exc
