"""A run: the folder that one training leaves, and the names of the files in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marwright.errors import RunError

__all__ = [
    "CLASSES_NAME",
    "CONFIG_NAME",
    "METRICS_NAME",
    "MODEL_NAME",
    "REPORT_NAME",
    "Run",
    "Sample",
    "SAMPLES_NAME",
]

CONFIG_NAME = "config.json"
METRICS_NAME = "metrics.jsonl"
MODEL_NAME = "model.pt"
CLASSES_NAME = "classes.json"
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
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model takes."""
        height, width = self.config["image_size"]
        return int(height), int(width)

    @classmethod
    def open(cls, path: Path) -> Run:
        """Read a run folder.

        Raises:
            RunError: the folder or some of its files are missing or broken; all are named at once.
        """
        if not path.is_dir():
            raise RunError(
                f"there is no run folder {path}", remedy=f"train one: marwright train --out {path}"
            )
        problems: list[str] = []
        config = _read_json(path / CONFIG_NAME, dict, problems)
        classes = _read_json(path / CLASSES_NAME, list, problems)
        report = _read_json(path / REPORT_NAME, dict, problems)
        samples = _read_json(path / SAMPLES_NAME, list, problems)
        if not (path / MODEL_NAME).is_file():
            problems.append(f"{MODEL_NAME} is missing")
        if not problems:
            problems += _check_content(config, classes)
        if problems:
            raise RunError(
                f"{path} is not a whole run",
                expected=f"{CONFIG_NAME}, {MODEL_NAME}, {CLASSES_NAME}, {REPORT_NAME}, samples/",
                found="; ".join(problems),
                remedy="train again, or pass another run",
            )
        folder = (path / SAMPLES_NAME).parent
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


def _read_json(path: Path, kind: type, problems: list[str]) -> Any:
    name = path.relative_to(path.parents[1] if path.parent.name == "samples" else path.parent)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{name} is missing")
    except (OSError, ValueError) as exc:
        problems.append(f"{name} is not JSON: {exc}")
    else:
        if isinstance(value, kind):
            return value
        problems.append(f"{name} holds {type(value).__name__}, not {kind.__name__}")
    return kind()


def _check_content(config: dict[str, Any], classes: list[Any]) -> list[str]:
    problems = []
    size = config.get("image_size")
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) for n in size)):
        problems.append(f"{CONFIG_NAME} has image_size {size!r}, not [height, width]")
    if not classes or not all(isinstance(label, str) for label in classes):
        problems.append(f"{CLASSES_NAME} holds no list of labels")
    elif len(set(classes)) != len(classes):
        problems.append(f"{CLASSES_NAME} holds a label twice")
    return problems
