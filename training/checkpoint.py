"""Checkpoints: where a training stands, in one file that is whole or absent."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import torch

from marwright.errors import RunError
from marwright.storage import translate_os_errors, write_file

__all__ = ["CHECKPOINT_SUFFIX", "find_checkpoint", "read_checkpoint", "write_checkpoint"]

CHECKPOINT_SUFFIX = ".checkpoint"


def find_checkpoint(out: Path) -> Path:
    """Return where the checkpoint of a run folder lies while that is not yet there."""
    return out.with_name(out.name + CHECKPOINT_SUFFIX)


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers and text; a kill at any moment leaves the one before."""
    # Into memory first: on a full disk torch's own writer ends the process (std::terminate).
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with translate_os_errors(f"write the checkpoint {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_file(path) as stream:
            stream.write(buffer.getvalue())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; of its pickle nothing but tensors, numbers and text is loaded.

    Raises:
        RunError: there is none, or it is broken.
    """
    if not path.is_file():
        raise RunError(
            f"there is no checkpoint {path}",
            remedy="train without --resume; --checkpoint-steps N writes one every N steps",
        )
    with translate_os_errors(f"read the checkpoint {path}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as exc:  # torch raises whatever its reader came upon
            found = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
            raise RunError(f"{path} is no checkpoint", found=found) from exc
    if not isinstance(state, dict):
        raise RunError(f"{path} is no checkpoint", found=type(state).__name__)
    return state
