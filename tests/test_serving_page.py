from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = {
    "torchserve_defaults": "TorchServe, default settings",
    "torchserve_one_thread": "TorchServe, one thread a worker",
    "marwright": "**marwright**",
    "marwright_pillow": "marwright without simplejpeg",
    "marwright_onnx": "marwright, ONNX Runtime",
    "marwright_int8": "marwright, ONNX Runtime, int8",
    "marwright_scaled": "marwright, scaled decoding (other pixels)",
    "fastapi": "FastAPI and uvicorn, 2 processes",
    "mlserver": "MLServer",
    "bentoml": "BentoML",
    "litserve": "LitServe",
    "ray_serve": "Ray Serve (HAProxy)",
    "in_process": "no server: 2 processes, batches of 32",
    "in_process_optimized": "the same with the model optimised",
}
"""How the page calls the contestants, in its order."""

RATIOS = {
    "over_torchserve_defaults": ("small, 64: over TorchServe's defaults", "40"),
    "over_torchserve_one_thread": ("small, 64: over its one-thread setting", "3"),
    "over_best_peer": ("small, 64: over the best peer", "1.5"),
    "over_in_process": ("small, 64: over the in-process limit", "0.8"),
    "over_in_process_optimized": ("small, 64: over the limit, its model optimised too", "-"),
    "lone_p50_over_torchserve_one_thread": (
        "small, 1: p50 over one-thread TorchServe's",
        "at most 1.1",
    ),
    "lone_p99_over_p50": ("small, 1: p99 over p50", "at most 3"),
    "large_over_best_peer_16": ("large, 16: over the best peer", "1.2"),
    "large_over_best_peer_64": ("large, 64: over the best peer", "1.2"),
    "scaled_large_over_best_peer_16": ("large, 16, scaled decoding: over the best peer", "2"),
    "scaled_large_over_best_peer_64": ("large, 64, scaled decoding: over the best peer", "2"),
    "onnx_over_pillow": ("small, 64: ONNX Runtime over TorchScript with Pillow", "1.4"),
    "int8_over_pillow": ("small, 64: the same in int8", "1.4"),
    "onnx_over_marwright": ("small, 64: ONNX Runtime over TorchScript, both simplejpeg", "-"),
    "int8_over_marwright": ("small, 64: the same in int8", "-"),
}
"""The claims in words, and what was wanted."""

SAVINGS = {
    "without_batches": "batches (with `batchSize: 1`)",
    "with_batches_of_8": "batches of up to 32 (with 8)",
    "with_two_threads": "cores divided by workers (with 2 threads each)",
    "without_eager_batches": "not waiting for a batch to fill (decision 0010)",
    "without_fast_worker": "the worker's shorter path (decision 0011)",
    "without_simplejpeg": "simplejpeg (with Pillow)",
    "without_jvm_settings": "the serial collector (with Java's own choice)",
    "with_one_compiler": "Java's second compiler (with C1 alone)",
}
"""What was taken away, in words."""


def test_the_tables_are_those_of_the_last_measurement(root: Path) -> None:
    page = root / "docs/serving-speed.md"
    text = page.read_text("utf-8")
    for name, lines in make_tables(root):
        block = f"<!-- {name} -->\n" + "\n".join(lines) + "\n<!-- end -->"
        pattern = rf"<!-- {name} -->\n.*?<!-- end -->"
        if os.environ.get("WRITE_TABLE"):
            old = re.search(pattern, text, re.DOTALL)
            assert old, f"the page has no place for the table {name!r}"
            text = text.replace(old.group(), block)
            page.write_text(text, "utf-8")
        assert block in text, f"the table {name!r} is old: WRITE_TABLE=1 writes it"


def make_tables(root: Path) -> Iterator[tuple[str, list[str]]]:
    results = root / "benchmarks/results"
    serving = json.loads((results / "serving.json").read_text("utf-8"))
    yield "serving", list(make_serving(serving))
    yield "ratios", list(make_ratios(serving))
    cost = json.loads((results / "cost.json").read_text("utf-8"))
    yield "savings", list(make_savings(cost))
    yield "threads", list(make_costs(cost, "threads_us"))
    yield "worker", list(make_costs(cost, "worker_us"))


def make_serving(measured: dict[str, Any]) -> Iterator[str]:
    cells = {(r["contestant"], r["workload"], r["connections"]): r for r in measured["rows"]}
    columns = [("small", 1), ("small", 16), ("small", 64), ("large", 16), ("large", 64)]
    heads = [f"{name}, {count}" for name, count in columns]
    yield f"| requests/s (p99 ms) | {' | '.join(heads)} |"
    yield f"|---|{'---:|' * len(columns)}"
    for key, name in NAMES.items():
        row = []
        for workload, count in columns:
            cell = cells.get((key, workload, count))
            if cell is None and count == 64:
                cell = cells.get((key, workload, None))
            row.append(describe(cell))
        yield f"| {name} | {' | '.join(row)} |"


def describe(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    rate = f"{cell['requests_per_second']:,.0f}"
    errors = f", {cell['errors']} errors" if cell["errors"] else ""
    return rate if cell["p99_ms"] is None else f"{rate} ({cell['p99_ms']:,.1f}{errors})"


def make_ratios(measured: dict[str, Any]) -> Iterator[str]:
    yield "| claim | ratio (least to most of the rounds) | wanted |"
    yield "|---|---|---|"
    for key, (name, wanted) in RATIOS.items():
        ratio = measured["ratios"][key]
        low, high = ratio["spread"]
        rival = f", {ratio['over']}" if "best peer" in name else ""
        yield f"| {name}{rival} | {ratio['value']} ({low} to {high}) | {wanted} |"


def make_savings(measured: dict[str, Any]) -> Iterator[str]:
    yield "| what | requests/s at 64, with over without | lone p50, without over with |"
    yield "|---|---|---|"
    for key, name in SAVINGS.items():
        many, lone = (measured["savings"][key][field] for field in ("throughput", "lone_p50"))
        yield (
            f"| {name} | {many['value']} ({many['spread'][0]} to {many['spread'][1]}) "
            f"| {lone['value']} ({lone['spread'][0]} to {lone['spread'][1]}) |"
        )


def make_costs(measured: dict[str, Any], field: str) -> Iterator[str]:
    plain, ours = (measured[name][field] for name in ("torchserve_one_thread", "marwright"))
    yield "| microseconds a request | TorchServe, one thread a worker | marwright |"
    yield "|---|---:|---:|"
    for name in sorted({*plain, *ours}, key=lambda n: (-plain.get(n, 0.0), -ours.get(n, 0.0), n)):
        yield f"| {name} | {plain.get(name, 0.0):,.1f} | {ours.get(name, 0.0):,.1f} |"
    yield f"| all | {sum(plain.values()):,.1f} | {sum(ours.values()):,.1f} |"


def test_the_readmes_figures_are_those_of_the_last_measurement(root: Path) -> None:
    readme = (root / "README.md").read_text("utf-8")
    measured = json.loads((root / "benchmarks/results/serving.json").read_text("utf-8"))
    rows = {(r["contestant"], r["workload"], r["connections"]): r for r in measured["rows"]}
    told = [
        ("TorchServe, default settings", ["torchserve_defaults"]),
        ("TorchServe, one thread a worker", ["torchserve_one_thread"]),
        ("LitServe / BentoML / MLServer", ["litserve", "bentoml", "mlserver"]),
        ("Ray Serve / FastAPI with uvicorn", ["ray_serve", "fastapi"]),
        ("**marwright**", ["marwright"]),
        ("no server at all, two processes", ["in_process"]),
    ]
    for label, names in told:
        cells = []
        for workload, count in (("small", 64), ("large", 16)):
            found = [
                rows.get((name, workload, count)) or rows[name, workload, None] for name in names
            ]
            rates = " / ".join(f"{row['requests_per_second']:,.0f}" for row in found)
            alone = len(names) == 1 and found[0]["p99_ms"] is not None
            text = f"{rates} ({found[0]['p99_ms']:.0f})" if alone else rates
            cells.append(f"**{text}**" if label.startswith("**") else text)
        assert f"| {label} | {' | '.join(cells)} |" in readme
    lone = [
        f"{rows[name, 'small', 1]['p50_ms']:.1f}"
        for name in ("fastapi", "marwright", "torchserve_one_thread")
    ]
    assert (
        "A lone request takes FastAPI {} ms, marwright {}, TorchServe {}.".format(*lone) in readme
    )


def test_metrics_cost_less_than_two_percent(root: Path) -> None:
    cost = json.loads((root / "benchmarks/results/cost.json").read_text("utf-8"))["metrics"]
    percent, error = 100 * (1 - cost["mean"]), 100 * cost["standard_error"]
    told = f"metrics cost {percent:.1f} ± {error:.1f}% of throughput"
    assert told in (root / "docs/serving-speed.md").read_text("utf-8")
    assert percent < 2


def test_every_contestant_took_part(root: Path) -> None:
    measured = json.loads((root / "benchmarks/results/serving.json").read_text("utf-8"))
    assert {row["contestant"] for row in measured["rows"]} == set(NAMES)
    assert measured["failures"] == {}
    assert measured["rounds"] >= 3


@pytest.mark.parametrize("name", ["serving", "soak"])
def test_the_pictures_are_there(root: Path, name: str) -> None:
    assert f"pictures/{name}.png" in (root / "docs/serving-speed.md").read_text("utf-8")
    assert 5_000 < (root / f"docs/pictures/{name}.png").stat().st_size < 300_000


def test_the_soak_had_no_error_and_its_figures_are_told(root: Path) -> None:
    measured = json.loads((root / "benchmarks/results/soak.json").read_text("utf-8"))
    assert (measured["errors"], measured["processes_replaced"]) == (0, [])
    text = (root / "docs/serving-speed.md").read_text("utf-8")
    assert f"{measured['requests']:,} requests" in text
    slope = measured["slope_mb_per_hour"]["all"]
    assert f"{slope['slope']:+.1f} ± {slope['standard_error']:.1f} MB an hour" in text
