"""One training: data in, a run folder out.

Run as `marwright train`, or `python -m marwright.training.train --help`.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from marwright.archive.run import (
    CLASSES_NAME,
    CONFIG_NAME,
    METRICS_NAME,
    MODEL_NAME,
    REPORT_NAME,
    SAMPLES_NAME,
    Run,
)
from marwright.errors import MarwrightError, RunError
from marwright.storage import write_folder

from .data import Images, Split, load_images, make_transform, split_images
from .loop import Fit, Progress, Settings, measure, train_model
from .models import CNN, Exported
from .plots import draw_confusion, draw_curves
from .predict import predict_images
from .report import (
    count_confusion,
    count_parameters,
    describe_commit,
    list_versions,
    measure_classes,
)

__all__ = ["IMAGE_SIZE", "train_run"]

IMAGE_SIZE = (24, 24)
SAMPLES_PER_CLASS = 1


@dataclass(frozen=True)
class _Trained:
    """What one training holds until it is written."""

    images: Images
    split: Split
    tensors: torch.Tensor
    """(N, 3, 24, 24) float32 in [0, 1], every image of the data set."""
    model: nn.Module
    fit: Fit


def train_run(
    out: Path,
    *,
    dataset: str = "digits",
    settings: Settings | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Train the CNN and write its run folder, which appears only when it is whole.

    Raises:
        StorageError: `out` exists and `force` is false, or cannot be written.
        RunError: `out` is a folder that is no run; it is never replaced.
        DataError: no such data set, or the loss stopped being a number.
    """
    settings = settings or Settings()
    started = time.perf_counter()
    _check_replaceable(out)
    commit = describe_commit(Path())  # now: the files may change while the training goes on
    with write_folder(out, replace=force) as folder, _reproducible(settings):
        trained = _train(dataset, settings, progress or (lambda *_: None))
        _write_config(folder, trained, settings)
        _write_model(folder, trained)
        predictions = _predict_test(folder, trained)
        report = _make_report(trained, predictions, settings)
        if commit:
            report["git"] = commit
        draw_curves(trained.fit, folder / "curves.png")
        confusion = count_confusion(
            predictions.argmax(1),
            trained.images.labels[trained.split.test],
            len(trained.images.classes),
        )
        draw_confusion(confusion, trained.images.classes, folder / "confusion.png")
        _write_samples(folder, trained, predictions)
        report["model_bytes"] = (folder / MODEL_NAME).stat().st_size
        report["seconds"] = round(time.perf_counter() - started, 3)
        _write_json(folder / REPORT_NAME, report)
    return Run.open(out)


def _check_replaceable(out: Path) -> None:
    """Refuse to replace what is no run: --force must not cost anybody their files."""
    if not out.exists() or (out / CONFIG_NAME).is_file():
        return
    if not out.is_dir() or any(out.iterdir()):
        raise RunError(
            f"{out} is something else than a run",
            expected="a run folder, an empty folder, or none",
            found=f"a folder without {CONFIG_NAME}" if out.is_dir() else "a file",
            remedy="choose another --out",
        )


@contextmanager
def _reproducible(settings: Settings) -> Iterator[None]:
    """Seed torch and ask it for one order of additions; put its settings back afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    threads = torch.get_num_threads()
    torch.manual_seed(settings.seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(settings.threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.set_num_threads(threads)


def _train(dataset: str, settings: Settings, progress: Progress) -> _Trained:
    images = load_images(dataset)
    split = split_images(images, seed=settings.seed)
    transform = make_transform(IMAGE_SIZE)
    tensors = torch.stack([transform(scan) for scan in images.scans])  # (N, 3, 24, 24)
    # Channels last: on a CPU an epoch takes 0.75 times as long (three interleaved rounds).
    model = Exported(CNN(len(images.classes)))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stubs
    tensors = tensors.contiguous(memory_format=torch.channels_last)
    train, validation = (
        (tensors[part], images.labels[part]) for part in (split.train, split.validation)
    )
    fit = train_model(model, train, validation, settings, progress)
    return _Trained(images, split, tensors, model, fit)


def _write_config(folder: Path, trained: _Trained, settings: Settings) -> None:
    images, split = trained.images, trained.split
    config = {
        "dataset": images.name,
        "data_digest": images.digest,
        "model": "cnn",
        "image_size": list(IMAGE_SIZE),
        **asdict(settings),
        "images": {part.name: len(getattr(split, part.name)) for part in fields(split)},
    }
    _write_json(folder / CONFIG_NAME, config)
    _write_json(folder / CLASSES_NAME, list(images.classes))
    lines = [json.dumps(asdict(epoch)) for epoch in trained.fit.epochs]
    (folder / METRICS_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_model(folder: Path, trained: _Trained) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit, TorchServe's own format
        scripted = torch.jit.script(trained.model.eval())
        # Into memory first: on a full disk torch's own writer ends the process (std::terminate).
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
    (folder / MODEL_NAME).write_bytes(buffer.getvalue())


def _predict_test(folder: Path, trained: _Trained) -> torch.Tensor:
    """Return the test part's (N, C) probabilities, from the file that will be served."""
    scans = [trained.images.scans[index] for index in trained.split.test.tolist()]
    return predict_images(folder / MODEL_NAME, scans, IMAGE_SIZE)


def _make_report(
    trained: _Trained, predictions: torch.Tensor, settings: Settings
) -> dict[str, Any]:
    images, split = trained.images, trained.split
    labels = images.labels[split.test]
    predicted = predictions.argmax(1)
    return {
        "accuracy": (predicted == labels).double().mean().item(),
        "validation_accuracy": trained.fit.best.validation_accuracy,
        "train_accuracy": measure(
            trained.model, (trained.tensors[split.train], images.labels[split.train])
        )[1],
        "best_epoch": trained.fit.best.epoch,
        "classes": measure_classes(
            count_confusion(predicted, labels, len(images.classes)), images.classes
        ),
        "parameters": count_parameters(trained.model),
        "train_seconds": round(trained.fit.seconds, 3),
        "seed": settings.seed,
        "data_digest": images.digest,
        "threads": torch.get_num_threads(),
        "versions": list_versions(),
    }


def _write_samples(folder: Path, trained: _Trained, predictions: torch.Tensor) -> None:
    """Write test scans as PNG, one a class, with the answers the model gave for them."""
    (folder / SAMPLES_NAME).parent.mkdir()
    images, test = trained.images, trained.split.test.tolist()
    seen = dict.fromkeys(range(len(images.classes)), 0)
    samples = []
    for row, index in enumerate(test):
        label = int(images.labels[index])
        if seen[label] >= SAMPLES_PER_CLASS:
            continue
        seen[label] += 1
        name = f"{images.classes[label]}-{index}.png"
        images.scans[index].save((folder / SAMPLES_NAME).parent / name)
        probability, best = predictions[row].max(0)
        samples.append(
            {
                "file": name,
                "label": images.classes[label],
                "prediction": images.classes[int(best)],
                "probability": round(probability.item(), 6),
            }
        )
    samples.sort(key=lambda sample: str(sample["file"]))
    _write_json(folder / SAMPLES_NAME, samples)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Train from the command line, without the toolkit's."""
    parser = argparse.ArgumentParser(prog="python -m marwright.training.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the run folder to write")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--force", action="store_true", help="replace the run folder")
    for field in fields(Settings):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default)
    options = vars(parser.parse_args(argv))
    try:
        settings = Settings(**{field.name: options[field.name] for field in fields(Settings)})
        run = train_run(
            options["out"], dataset=options["dataset"], settings=settings, force=options["force"]
        )
    except MarwrightError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return exc.exit_status
    sys.stdout.write(f"{run.path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
