"""A run: the folder that one training leaves, and the names of the files in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marwright.errors import RunError
from marwright.storage import translate_os_errors

__all__ = [
    "Choice",
    "CHOSEN_NAME",
    "CLASSES_NAME",
    "CONFIG_NAME",
    "METRICS_NAME",
    "MODEL_NAME",
    "REFERENCE_NAME",
    "REPORT_NAME",
    "Run",
    "Sample",
    "SAMPLES_NAME",
    "WEIGHTS_NAME",
]

CONFIG_NAME = "config.json"
METRICS_NAME = "metrics.jsonl"
MODEL_NAME = "model.pt"
WEIGHTS_NAME = "weights.pt"
"""The state dict of what model.pt is made of: what optimising and further training start from."""
CHOSEN_NAME = "optimised/chosen.json"
"""Which optimised variant `marwright pack` takes."""
CLASSES_NAME = "classes.json"
REFERENCE_NAME = "reference.npz"
"""What live inputs and answers are compared with; older runs have none."""
REPORT_NAME = "report.json"
SAMPLES_NAME = "samples/samples.json"


@dataclass(frozen=True)
class Sample:
    """One input with the answer that the run's model gave for it."""

    path: Path
    label: str
    """The true class."""
    prediction: str
    """The most probable class according to the model."""
    probability: float
    """Its probability."""


@dataclass(frozen=True)
class Choice:
    """The variant that optimising a run chose."""

    name: str
    path: Path
    backend: str
    """As handlers/backend.py names it."""
    why: str = ""
    """The line that told of the choice."""

    @property
    def companions(self) -> tuple[Path, ...]:
        """Files that it is loaded with: OpenVINO's weights."""
        weights = self.path.with_suffix(".bin")
        return (weights,) if self.backend == "openvino" and weights.is_file() else ()


@dataclass(frozen=True)
class Run:
    """A whole run folder, checked when opened."""

    path: Path
    config: dict[str, Any]
    classes: tuple[str, ...]
    report: dict[str, Any]
    samples: tuple[Sample, ...]

    @property
    def model_path(self) -> Path:
        """The TorchScript file."""
        return self.path / MODEL_NAME

    @property
    def is_table(self) -> bool:
        """Whether the model takes rows of numbers instead of images."""
        return "columns" in self.config

    @property
    def columns(self) -> tuple[str, ...]:
        """The features of a table in order; empty for images."""
        return tuple(self.config.get("columns", ()))

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model takes."""
        height, width = self.config["image_size"]
        return int(height), int(width)

    @property
    def weights_path(self) -> Path:
        """The state dict."""
        return self.path / WEIGHTS_NAME

    @property
    def reference_path(self) -> Path | None:
        """What live inputs and answers are compared with; None in older runs."""
        path = self.path / REFERENCE_NAME
        return path if path.is_file() else None

    def read_choice(self) -> Choice | None:
        """Return what optimising chose; None where nothing was.

        Raises:
            RunError: the note of it is broken, or the file it names is gone.
        """
        if not (self.path / CHOSEN_NAME).exists():
            return None
        problems: list[str] = []
        chosen = _read_json(self.path, CHOSEN_NAME, dict, problems) or {}
        values = (chosen.get(key) for key in ("variant", "file", "backend"))
        name, file, backend = (value if isinstance(value, str) else "" for value in values)
        if not (name and file and backend):
            problems.append(f"{CHOSEN_NAME} names no variant, file and backend")
        elif Path(file).name != file or not ((self.path / CHOSEN_NAME).parent / file).is_file():
            problems.append(f"{file} is missing")
        if problems:
            raise RunError(
                f"what was chosen for {self.path} cannot be used",
                found="; ".join(problems),
                remedy="run marwright optimize again, or pack --as-trained",
            )
        path = (self.path / CHOSEN_NAME).parent / file
        return Choice(name, path, backend, str(chosen.get("why", "")))

    @classmethod
    def open(cls, path: Path) -> Run:
        """Read a run folder.

        Raises:
            RunError: the folder or some of its files are missing or broken; all are named at once.
        """
        with translate_os_errors(f"read {path}"):
            found = path.is_dir()
        if not found:
            raise RunError(
                f"there is no run folder {path}", remedy=f"train one: marwright train --out {path}"
            )
        problems: list[str] = []
        config = _read_json(path, CONFIG_NAME, dict, problems)
        classes = _read_json(path, CLASSES_NAME, list, problems)
        report = _read_json(path, REPORT_NAME, dict, problems)
        samples = _read_json(path, SAMPLES_NAME, list, problems)
        if not (path / MODEL_NAME).is_file():
            problems.append(f"{MODEL_NAME} is missing")
        folder = (path / SAMPLES_NAME).parent
        problems += _check_config(config) if config is not None else []
        problems += _check_classes(classes) if classes is not None else []
        problems += _check_samples(samples, folder) if samples is not None else []
        if problems:
            raise RunError(
                f"{path} is not a whole run",
                expected=f"{CONFIG_NAME}, {MODEL_NAME}, {CLASSES_NAME}, {REPORT_NAME}, samples/",
                found="; ".join(problems),
                remedy="train again, or pass another run",
            )
        return cls(
            path=path,
            config=config,
            classes=tuple(classes),
            report=report,
            samples=tuple(
                Sample(
                    folder / item["file"], item["label"], item["prediction"], item["probability"]
                )
                for item in samples
            ),
        )


def _read_json(folder: Path, name: str, kind: type, problems: list[str]) -> Any:
    """Return what a file holds, or None where that is not what it should hold."""
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{name} is missing")
    except (OSError, ValueError, RecursionError) as exc:
        problems.append(f"{name} is not JSON: {exc}")
    else:
        if isinstance(value, kind):
            return value
        problems.append(f"{name} holds {type(value).__name__}, not {kind.__name__}")
    return None


def _check_config(config: dict[str, Any]) -> list[str]:
    columns = config.get("columns")
    if isinstance(columns, list) and columns and all(isinstance(name, str) for name in columns):
        return []
    size = config.get("image_size")
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return []
    return [f"{CONFIG_NAME} has image_size {size!r}, not [height, width]"]


def _check_classes(classes: list[Any]) -> list[str]:
    if not classes or not all(isinstance(label, str) for label in classes):
        return [f"{CLASSES_NAME} holds no list of labels"]
    if len(set(classes)) != len(classes):
        return [f"{CLASSES_NAME} holds a label twice"]
    return []


def _check_samples(samples: list[Any], folder: Path) -> list[str]:
    kinds: dict[str, type | tuple[type, ...]] = {
        "file": str,
        "label": str,
        "prediction": str,
        "probability": (int, float),
    }
    problems = []
    for number, item in enumerate(samples):
        if not isinstance(item, dict) or not all(
            isinstance(item.get(key), kind) for key, kind in kinds.items()
        ):
            problems.append(f"{SAMPLES_NAME} has an entry {number} without {', '.join(kinds)}")
        elif not (folder / item["file"]).is_file():
            problems.append(f"{folder.name}/{item['file']} is missing")
    return problems
