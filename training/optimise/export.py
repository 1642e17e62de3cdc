"""A run's model in another form, checked once it is written."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from marwright.archive.run import Run
from marwright.errors import StorageError, UsageError

from ..forms import SUFFIXES, export_model
from .optimise import Prepared, prepare_run
from .parity import check_parity
from .result import Parity
from .trials import open_trial

__all__ = ["Checked", "export_run", "FORMS"]

FORMS = (*SUFFIXES, "savedmodel", "tflite")
"""What a run's model can be written as; each file is loaded by what its users load it with."""


@dataclass(frozen=True)
class Checked:
    """A file that answers as the network does."""

    path: Path
    form: str
    size_bytes: int
    accuracy: float
    """The file's on the validation part."""
    accuracy_before: float
    """The network's."""
    parity: Parity

    def to_json(self) -> dict[str, Any]:
        """Return the facts as `--json` prints them."""
        return {**asdict(self), "path": str(self.path)}


def export_run(
    run: Run, form: str, *, out: Path | None = None, data_root: str = "", force: bool = False
) -> Checked:
    """Write a run's model in a form, load it in a fresh process, and compare the answers.

    `out` is a file, or a folder for savedmodel; RUN/exported/NAME where not given. What does not
    answer as the network does, on the validation part, is taken away again.

    Raises:
        UsageError: no such form, or what it needs is not installed.
        ExportError: the form lacks an operator, named with its layer, or answers otherwise.
        StorageError: `out` exists and `force` is false, or cannot be written.
    """
    if form not in FORMS:
        raise UsageError(f"there is no form {form!r}", expected=f"one of {', '.join(FORMS)}")
    path = out or run.path / "exported" / f"{run.path.resolve().name}{_suffix(form)}"
    if path.exists() and not force:
        raise StorageError(f"{path} exists", remedy="pass another --out, or --force to replace it")
    prepared = prepare_run(run, data_root=data_root)
    _write(prepared, form, path)
    try:
        return _check(prepared, form, path)
    except BaseException:
        _remove(path)
        raise


def _suffix(form: str) -> str:
    return {**SUFFIXES, "savedmodel": "", "tflite": ".tflite"}[form]


def _write(prepared: Prepared, form: str, path: Path) -> None:
    example, _ = prepared.take(prepared.split.validation[:2])
    if form in SUFFIXES:
        export_model(prepared.model, form, path, example)
        return
    from . import tensorflow  # only here: it says what to install where TensorFlow is missing

    if path.exists():
        _remove(path)
    if form == "savedmodel":
        tensorflow.export_saved_model(prepared.model, example, path, classes=prepared.run.classes)
    else:
        tensorflow.export_tflite(prepared.model, example, path)


def _check(prepared: Prepared, form: str, path: Path) -> Checked:
    inputs, labels = prepared.take(prepared.split.validation)
    with torch.inference_mode():
        reference = prepared.model.eval()(inputs)
    with open_trial(form, path) as trial:
        answers = trial.answer(inputs)
    parity = check_parity(reference, answers, labels, quantised=False)
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    if form == "openvino":
        files.append(path.with_suffix(".bin"))
    before, after = (
        (logits.argmax(1) == labels).double().mean().item() for logits in (reference, answers)
    )
    size = sum(file.stat().st_size for file in files)
    return Checked(path, form, size, after, before, parity)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if path.suffix == ".xml":
        path.with_suffix(".bin").unlink(missing_ok=True)
