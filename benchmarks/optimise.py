"""What optimising gains and costs on two data sets, and how fast training is.

Run as `make bench WHAT=optimise` (some 15 minutes); writes benchmarks/results/optimise.json and the
pictures of docs/training.md and docs/optimising.md. Every claim is a ratio within one run, rounds
interleaved.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from marwright.archive import Run
from marwright.training.data import scale
from marwright.training.loop import Training
from marwright.training.models import CNN, Exported
from marwright.training.optimise.gates import Gates
from marwright.training.optimise.machine import describe_machine
from marwright.training.optimise.optimise import Optimised, optimise_run
from marwright.training.recipe import Recipe
from marwright.training.settings import Settings
from marwright.training.train import prepare_data, train_run

DATA = ("digits", "shapes")
EPOCHS = 40
"""Twice the default, so that the baseline is no network that had only to be trained longer."""
ROUNDS = 5
PROCESS_ROUNDS = 3
PROCESS_EPOCHS = 8
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/optimise.json"
PICTURES = ROOT / "docs/pictures"
RUN_PICTURES = ("curves", "confusion", "calibration", "attributions")
"""Taken from the first data set's run."""


def main() -> None:
    """Measure everything and write the result."""
    with tempfile.TemporaryDirectory(prefix="marwright-bench-") as name:
        folder = Path(name)
        result: dict[str, Any] = {
            "date": date.today().isoformat(),
            "machine": describe_machine(1),
            "python": platform.python_version(),
            "versions": {p: version(p) for p in ("marwright", "torch", "onnxruntime", "torchao")},
            "training": compare_with_tutorial(),
            "processes": compare_processes(folder),
        }
        optimised = [optimise(folder / data, data) for data in DATA]
        result["rows"] = [row for _, rows in optimised for row in rows]
        result["data"] = {data: facts for data, (facts, _) in zip(DATA, optimised, strict=True)}
        keep_pictures(folder)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("training", "processes", "data")}, indent=2))


def compare_with_tutorial() -> dict[str, Any]:
    """Train two epochs by our loop and by one as PyTorch's tutorials have it, in turns."""
    data, split = prepare_data(Recipe(), seed=0)
    train = data.inputs[split.train], data.labels[split.train]
    validation = data.inputs[split.validation], data.labels[split.validation]
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {"marwright": [], "tutorial": []}
    for _ in range(ROUNDS):
        model = Exported(CNN())
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stubs
        settings = Settings(epochs=2)
        rates["marwright"].append(
            Training(model, train, validation, settings).run().items_per_second
        )
        inputs = scale(train[0]).contiguous()
        started = time.perf_counter()
        train_as_tutorial(inputs, train[1], epochs=2)
        rates["tutorial"].append(2 * len(inputs) / (time.perf_counter() - started))
    ratios = [a / b for a, b in zip(rates["marwright"], rates["tutorial"], strict=True)]
    return {
        "images_per_second": {name: statistics.median(found) for name, found in rates.items()},
        "ratio": describe(ratios),
        "wanted": 1.0,
    }


def train_as_tutorial(inputs: torch.Tensor, labels: torch.Tensor, *, epochs: int) -> None:
    """Train as the quickstart of pytorch.org/tutorials does: DataLoader, SGD, one step a batch."""
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=32, shuffle=True)
    model = Exported(CNN())
    loss_of = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(epochs):
        model.train()
        for batch, truth in loader:
            loss = loss_of(model(batch), truth)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def compare_processes(folder: Path) -> dict[str, Any]:
    """Train the shapes with one process and with two, one thread each, in turns."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(PROCESS_ROUNDS):
        for processes, found in rates.items():
            out = folder / f"processes-{processes}-{number}"
            command = [sys.executable, "-m", "marwright", "train", "--dataset", "shapes"]
            command += ["--epochs", str(PROCESS_EPOCHS), "--batch-size", "128"]
            command += ["--processes", str(processes), "--out", str(out)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, capture_output=True, env=environment)
            found.append(Run.open(out).report["items_per_second"])
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    return {
        "images_per_second": {str(n): statistics.median(found) for n, found in rates.items()},
        "ratio": describe(ratios),
        "wanted": 1.6,
    }


def optimise(out: Path, data: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train, optimise with the default plan, and return facts and a row a variant and batch."""
    print(f"train and optimise {data}", file=sys.stderr)
    run = train_run(out, recipe=Recipe(dataset=data), settings=Settings(epochs=EPOCHS))
    started = time.perf_counter()
    result = optimise_run(run, gates=Gates())
    seconds = time.perf_counter() - started
    rows = [
        row for entry in result.report["results"] for row in list_rows(data, entry, result, out)
    ]
    return summarise(result, rows, seconds, run), rows


def list_rows(
    data: str, entry: dict[str, Any], result: Optimised, out: Path
) -> list[dict[str, Any]]:
    """Return a row for every batch size of a variant."""
    name = entry["variant"]["name"]
    return [
        {
            "data": data,
            "variant": name,
            "accuracy": result.report["test_accuracy"].get(name),
            "validation_accuracy": entry["accuracy"],
            "size_bytes": entry["size_bytes"],
            "memory_bytes": entry["memory_bytes"],
            "load_seconds": round(entry["load_seconds"], 3),
            "build_seconds": round(entry["build_seconds"], 2),
            "batch": timing["batch"],
            "p50_ms": timing["p50_ms"],
            "p99_ms": timing["p99_ms"],
            "lowest_ms": timing["lowest_ms"],
            "highest_ms": timing["highest_ms"],
            "ratio_to_eager": entry["ratios"]["times_faster"][str(timing["batch"])],
            "chosen": result.report["decision"]["chosen"] == name,
            "failure": entry["failure"],
        }
        for timing in entry["timings"]
    ]


def summarise(
    result: Optimised, rows: list[dict[str, Any]], seconds: float, run: Run
) -> dict[str, Any]:
    """Return what the tool's own choice is worth."""
    chosen = [row for row in rows if row["chosen"]]
    eager = next(row for row in rows if row["variant"] == "eager")
    last = [row for row in rows if row["variant"] == "eager-channels-last"]
    return {
        "chosen": result.report["decision"]["chosen"],
        "line": result.report["decision"]["line"],
        "optimise_seconds": round(seconds, 1),
        "speed": {str(row["batch"]): row["ratio_to_eager"] for row in chosen},
        "speed_beside_channels_last": {
            str(row["batch"]): other["p50_ms"] / row["p50_ms"]
            for row, other in zip(chosen, last, strict=True)
        },
        "size_share": chosen[0]["size_bytes"] / run.report["model_bytes"],
        "accuracy": {"eager": eager["accuracy"], "chosen": chosen[0]["accuracy"]},
        "validation_accuracy": {
            "eager": eager["validation_accuracy"],
            "chosen": chosen[0]["validation_accuracy"],
        },
        "failures": {
            entry["variant"]["name"]: entry["failure"]
            for entry in result.report["results"]
            if entry["failure"]
        },
    }


def describe(ratios: list[float]) -> dict[str, float]:
    """Return the median of ratios with their spread."""
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def keep_pictures(folder: Path) -> None:
    """Copy what the pages show."""
    shutil.copy(folder / DATA[1] / "mistakes.png", PICTURES / "mistakes.png")  # it makes more
    for name in RUN_PICTURES:
        shutil.copy(folder / DATA[0] / f"{name}.png", PICTURES / f"{name}.png")
    for name in ("pareto", "sensitivity"):
        shutil.copy(folder / DATA[0] / "optimised" / f"{name}.png", PICTURES / f"{name}.png")


if __name__ == "__main__":
    main()
