"""What a training leaves: the files of a run folder."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from marwright.archive.run import (
    CLASSES_NAME,
    CONFIG_NAME,
    METRICS_NAME,
    MODEL_NAME,
    REFERENCE_NAME,
    SAMPLES_NAME,
    WEIGHTS_NAME,
)

from .attribution import attribute_classes
from .calibration import Bin, compute_ece, count_bins, fit_temperature
from .data import DataSet, Split, scale
from .forms import export_model
from .loop import Fit, compute_logits, measure
from .models import Exported
from .plots import (
    draw_attributions,
    draw_calibration,
    draw_confusion,
    draw_curves,
    draw_mistakes,
)
from .predict import predict_inputs
from .recipe import Recipe
from .reference import make_reference, write_reference
from .report import count_confusion, count_parameters, list_versions, measure_classes
from .settings import Settings

__all__ = ["Trained", "write_json", "write_run"]

SAMPLES_PER_CLASS = 1
MOST_MISTAKES = 12


@dataclass(frozen=True)
class Trained:
    """What one training holds until it is written."""

    data: DataSet
    split: Split
    model: Exported
    fit: Fit
    recipe: Recipe
    settings: Settings


def write_run(folder: Path, trained: Trained, facts: dict[str, Any]) -> dict[str, Any]:
    """Write everything but the report, and return that; `facts` go into it."""
    data, test = trained.data, trained.split.test
    trained.model.cpu().eval()
    logits = compute_logits(trained.model, data.inputs[trained.split.validation])
    temperature = fit_temperature(logits, data.labels[trained.split.validation])
    before = torch.softmax(compute_logits(trained.model, data.inputs[test]), dim=1)
    trained.model.temperature.fill_(temperature)
    _write_config(folder, trained)
    _write_model(folder, trained)
    # From the file that will be served.
    probabilities = predict_inputs(folder / MODEL_NAME, data.inputs[test])
    bins = [count_bins(item, data.labels[test]) for item in (before, probabilities)]
    report = _make_report(trained, probabilities, temperature, bins)
    _draw(folder, trained, probabilities, bins)
    _write_samples(folder, trained, probabilities)
    reference = make_reference(data, test, compute_logits(trained.model, data.inputs[test]))
    write_reference(folder / REFERENCE_NAME, reference)
    return {**report, **facts, "model_bytes": (folder / MODEL_NAME).stat().st_size}


def _write_config(folder: Path, trained: Trained) -> None:
    data, split, recipe = trained.data, trained.split, trained.recipe
    shape: dict[str, Any] = (
        {"columns": list(data.columns)}
        if data.is_table
        else {"image_size": list(data.inputs.shape[2:])}
    )
    config = {
        "dataset": data.name,
        "data_digest": data.digest,
        "model": recipe.model,
        **shape,
        **{
            name: value
            for name, value in asdict(recipe).items()
            if name not in ("dataset", "model", "height", "width", "download") and value
        },
        **asdict(trained.settings),
        "items": {part.name: len(getattr(split, part.name)) for part in fields(split)},
    }
    write_json(folder / CONFIG_NAME, config)
    write_json(folder / CLASSES_NAME, list(data.classes))
    lines = [json.dumps(asdict(epoch)) for epoch in trained.fit.epochs]
    (folder / METRICS_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_model(folder: Path, trained: Trained) -> None:
    example = scale(trained.data.inputs[trained.split.validation[:2]])
    export_model(trained.model, "torchscript", folder / MODEL_NAME, example)
    buffer = io.BytesIO()
    torch.save(
        {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}, buffer
    )
    (folder / WEIGHTS_NAME).write_bytes(buffer.getvalue())


def _make_report(
    trained: Trained, probabilities: torch.Tensor, temperature: float, bins: Sequence[list[Bin]]
) -> dict[str, Any]:
    data, split = trained.data, trained.split
    labels = data.labels[split.test]
    predicted = probabilities.argmax(1)
    return {
        "accuracy": (predicted == labels).double().mean().item(),
        "validation_accuracy": trained.fit.best.validation_accuracy,
        "train_accuracy": measure(
            trained.model, (data.inputs[split.train], data.labels[split.train])
        )[1],
        "best_epoch": trained.fit.best.epoch,
        "epochs": len(trained.fit.epochs),
        "classes": measure_classes(
            count_confusion(predicted, labels, len(data.classes)), data.classes
        ),
        "calibration": {
            "temperature": temperature,
            "ece_as_trained": compute_ece(bins[0]),
            "ece": compute_ece(bins[1]),
        },
        "parameters": count_parameters(trained.model),
        "train_seconds": round(trained.fit.seconds, 3),
        "items_per_second": round(trained.fit.items_per_second, 1),
        "seed": trained.settings.seed,
        "data_digest": data.digest,
        "unreadable": list(data.unreadable),
        "threads": torch.get_num_threads(),
        "versions": list_versions(),
    }


def _draw(
    folder: Path, trained: Trained, probabilities: torch.Tensor, bins: Sequence[list[Bin]]
) -> None:
    data, test = trained.data, trained.split.test
    labels = data.labels[test]
    draw_curves(trained.fit, folder / "curves.png")
    confusion = count_confusion(probabilities.argmax(1), labels, len(data.classes))
    draw_confusion(confusion, data.classes, folder / "confusion.png")
    draw_calibration(bins[0], bins[1], folder / "calibration.png")
    attributions, means = attribute_classes(
        trained.model, data.inputs[test], labels, len(data.classes)
    )
    draw_attributions(attributions, means, data.classes, data.columns, folder / "attributions.png")
    sure, predicted = probabilities.max(1)
    wrong = (predicted != labels).nonzero().flatten()
    worst = wrong[sure[wrong].argsort(descending=True)][:MOST_MISTAKES]
    mistakes = [
        {
            "index": int(test[row]),
            "label": data.classes[int(labels[row])],
            "prediction": data.classes[int(predicted[row])],
            "probability": round(sure[row].item(), 6),
        }
        for row in worst.tolist()
    ]
    write_json(folder / "mistakes.json", mistakes)
    if mistakes and not data.is_table:
        captions = [
            f"{item['label']} read as\n{item['prediction']}, {item['probability']:.0%}"
            for item in mistakes
        ]
        draw_mistakes(scale(data.inputs[test[worst]]), captions, folder / "mistakes.png")


def _write_samples(folder: Path, trained: Trained, probabilities: torch.Tensor) -> None:
    """Write test items, one a class, with the answers the model gave for them."""
    (folder / SAMPLES_NAME).parent.mkdir()
    data = trained.data
    seen = dict.fromkeys(range(len(data.classes)), 0)
    samples = []
    for row, index in enumerate(trained.split.test.tolist()):
        label = int(data.labels[index])
        if seen[label] >= SAMPLES_PER_CLASS:
            continue
        seen[label] += 1
        probability, best = probabilities[row].max(0)
        samples.append(
            {
                "file": _write_sample((folder / SAMPLES_NAME).parent, data, label, index),
                "label": data.classes[label],
                "prediction": data.classes[int(best)],
                "probability": round(probability.item(), 6),
            }
        )
    samples.sort(key=lambda sample: str(sample["file"]))
    write_json(folder / SAMPLES_NAME, samples)


def _write_sample(folder: Path, data: DataSet, label: int, index: int) -> str:
    """Write one item as a request carries it, and return the file's name."""
    # A class may be named by a folder or a table's cell: anything.
    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in data.classes[label])[:60]
    if data.open_sample is None:
        name = f"{safe}-{index}.json"
        write_json(folder / name, data.inputs[index].tolist())
    else:
        name = f"{safe}-{index}.png"
        data.open_sample(index).save(folder / name)
    return name


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
