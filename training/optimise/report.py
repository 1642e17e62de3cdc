"""What an optimisation says of its result: report.json, report.html, and the pictures in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from marwright.storage import write_file

from .comparison import compare
from .gates import Decision, Gates, Preference, judge
from .machine import describe_machine
from .page import render_page
from .plots import draw_pareto, draw_sensitivity
from .result import BATCHES, Result
from .units import format_bytes

__all__ = ["list_rows", "SCHEMA", "write_report"]

SCHEMA = 1
"""Version of report.json: it rises when a key goes or changes its meaning."""
REPORT_NAME = "report.json"
PAGE_NAME = "report.html"
PARETO_NAME = "pareto.png"
SENSITIVITY_NAME = "sensitivity.png"


def write_report(
    folder: Path,
    *,
    results: Sequence[Result],
    baseline: Result,
    gates: Gates,
    decision: Decision,
    prefer: Preference = "balance",
    threads: int = 1,
    scan: Mapping[str, Mapping[float, float]] | None = None,
    subject: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Write report.json, report.html and pareto.png, and return what report.json holds.

    `scan` is the sensitivity by layer and share kept, drawn as sensitivity.png; `subject` says
    what was optimised ("run", "data"); `notes` are sentences for the foot of the page.

    Raises:
        StorageError: the folder cannot be written.
    """
    others = [result for result in results if result.variant != baseline.variant]
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "subject": dict(subject or {}),
        "machine": describe_machine(threads),
        "gates": asdict(gates),
        "prefer": prefer,
        "items": len(baseline.correct),
        "baseline": baseline.variant.name,
        "decision": {
            "chosen": decision.chosen.variant.name if decision.chosen else None,
            "line": decision.line,
            "others": decision.others,
        },
        "results": [_describe(result, baseline, gates, decision) for result in (baseline, *others)],
        "sensitivity": None
        if scan is None
        else {
            layer: {str(share): left[share] for share in sorted(left)}
            for layer, left in scan.items()
        },
        "notes": list(notes),
    }
    refused = [each["variant"]["name"] for each in report["results"] if each["reasons"]]
    chosen = report["decision"]["chosen"] or ""
    draw_pareto((baseline, *others), folder / PARETO_NAME, chosen=chosen, refused=refused)
    pictures = {"pareto": (folder / PARETO_NAME).read_bytes()}
    if scan:
        draw_sensitivity(scan, folder / SENSITIVITY_NAME)
        pictures["sensitivity"] = (folder / SENSITIVITY_NAME).read_bytes()
    _write(folder / PAGE_NAME, render_page(report, pictures))
    _write(folder / REPORT_NAME, json.dumps(report, indent=2, allow_nan=False) + "\n")
    return report


def list_rows(report: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return headers and one row of text by variant from what report.json holds.

    Cells hold what was measured as a person reads it, a dash where there is nothing; the last says
    why a variant is the chosen one or is not.
    """
    headers = (
        "variant",
        "accuracy",
        *(
            cell
            for batch in BATCHES
            for cell in (f"p50 ms, batch {batch}", f"times faster, {batch}")
        ),
        "p99 ms",
        "size",
        "memory",
        "verdict",
    )
    return headers, [_list_cells(each) for each in report["results"]]


def _list_cells(each: Mapping[str, Any]) -> tuple[str, ...]:
    timings = {timing["batch"]: timing for timing in each["timings"]}
    cells = [each["variant"]["name"], "-" if each["failure"] else f"{each['accuracy']:.4f}"]
    for batch in BATCHES:
        times = each["ratios"]["times_faster"].get(str(batch))
        cells.append(f"{timings[batch]['p50_ms']:.3g}" if batch in timings else "-")
        cells.append("-" if times is None else f"{times:.2f}" if times < 10 else f"{times:.1f}")
    cells.append(f"{timings[BATCHES[0]]['p99_ms']:.3g}" if BATCHES[0] in timings else "-")
    cells += [
        format_bytes(each[key]) if each[key] else "-" for key in ("size_bytes", "memory_bytes")
    ]
    return (*cells, each["verdict"])


def _describe(result: Result, baseline: Result, gates: Gates, decision: Decision) -> dict[str, Any]:
    """Return a result with what follows from it beside the baseline."""
    eager = result.variant.backend == "eager"
    comparable = result is not baseline and len(result.correct) == len(baseline.correct) > 0
    verdict = decision.others.get(result.variant.name, "baseline" if eager else "")
    if result == decision.chosen:
        verdict = "chosen"
    elif eager and result.failure:
        verdict = f"not built: {result.failure}"
    return {
        **result.to_json(),
        "description": result.variant.describe(),
        "ratios": _list_ratios(result, baseline),
        "comparison": compare(baseline.correct, result.correct).to_json() if comparable else None,
        "reasons": [] if eager and not result.failure else list(judge(result, baseline, gates)),
        "verdict": verdict,
    }


def _list_ratios(result: Result, baseline: Result) -> dict[str, Any]:
    """Return how many times faster than the baseline, and shares of its size and memory."""
    times = {}
    for timing in result.timings:
        before = baseline.find_timing(timing.batch)
        if before and before.p50_ms > 0 < timing.p50_ms:
            times[str(timing.batch)] = before.p50_ms / timing.p50_ms

    def share(part: int, whole: int) -> float | None:
        return part / whole if part and whole else None

    return {
        "times_faster": times,
        "size": share(result.size_bytes, baseline.size_bytes),
        "memory": share(result.memory_bytes, baseline.memory_bytes),
    }


def _write(path: Path, text: str) -> None:
    with write_file(path) as file:
        file.write(text.encode())
