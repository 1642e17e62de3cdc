from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

MARKS = {"docs/optimising.md": "optimising", "README.md": "chosen", "docs/training.md": "training"}


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, Any]:
    text = (root / "benchmarks/results/optimise.json").read_text(encoding="utf-8")
    measured: dict[str, Any] = json.loads(text)
    return measured


@pytest.mark.parametrize("page", MARKS)
def test_the_tables_hold_what_was_measured(root: Path, results: dict[str, Any], page: str) -> None:
    mark = MARKS[page]
    write = {"optimising": write_variants, "chosen": write_chosen, "training": write_training}
    table = write[mark](results)
    path = root / page
    text = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(\n<!-- /{mark} -->)", re.DOTALL)
    assert pattern.search(text), f"{page} has no place for its table"
    written = pattern.sub(lambda found: found[1] + table + found[2], text)
    if os.environ.get("WRITE_TABLE"):
        path.write_text(written, encoding="utf-8")
    assert written == text or os.environ.get("WRITE_TABLE"), "WRITE_TABLE=1 writes it anew"


def write_variants(results: dict[str, Any]) -> str:
    """Write the table of all variants: one for each data set."""
    tables = []
    for data, facts in results["data"].items():
        lines = [
            f"**{data}**: {facts['chosen']} was chosen; "
            f"{facts['optimise_seconds']:.0f} s with the default plan.",
            "",
            "| variant | accuracy (validation) | bytes | batch 1, ms | times eager | batch 32, ms "
            "| times eager | load, s | build, s |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        rows = [row for row in results["rows"] if row["data"] == data]
        for one in (row for row in rows if row["batch"] == 1):
            many = next(
                row for row in rows if row["variant"] == one["variant"] and row["batch"] == 32
            )
            name = f"**{one['variant']}**" if one["chosen"] else one["variant"]
            lines.append(
                f"| {name} | {one['accuracy']:.4f} ({one['validation_accuracy']:.4f}) "
                f"| {one['size_bytes']:,} | {show(one)} | {one['ratio_to_eager']:.2f} "
                f"| {show(many)} | {many['ratio_to_eager']:.2f} | {one['load_seconds']:.2f} "
                f"| {one['build_seconds']:.1f} |"
            )
        lines += [f"| {name} | {why} |||||||| " for name, why in facts["failures"].items()]
        tables.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(tables)


def show(row: dict[str, Any]) -> str:
    return f"{row['p50_ms']:.3f} ({row['lowest_ms']:.3f}-{row['highest_ms']:.3f})"


def write_chosen(results: dict[str, Any]) -> str:
    """Write the short table: what was chosen, beside eager and what others try first."""
    lines = [
        "| variant | "
        + " | ".join(f"{d}: accuracy, bytes, times faster at 1 / 32" for d in results["data"])
        + " |",
        "|---|" + "---:|" * len(results["data"]),
    ]
    names = list(dict.fromkeys(row["variant"] for row in results["rows"]))
    for name in names:
        cells = []
        for data, facts in results["data"].items():
            rows = {
                row["batch"]: row
                for row in results["rows"]
                if row["data"] == data and row["variant"] == name
            }
            cell = (
                f"{rows[1]['accuracy']:.4f}, {rows[1]['size_bytes']:,}, "
                f"{rows[1]['ratio_to_eager']:.1f} / {rows[32]['ratio_to_eager']:.1f}"
                if rows
                else "-"
            )
            cells.append(f"**{cell}**" if facts["chosen"] == name else cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_training(results: dict[str, Any]) -> str:
    """Write what training's speed is beside others."""
    lines = ["| images/s, one thread each | | | ratio | wanted |", "|---|---:|---:|---:|---:|"]
    for key, names in (
        ("training", {"tutorial": "a loop as in PyTorch's tutorials", "marwright": "marwright"}),
        ("processes", {"1": "one process", "2": "two"}),
    ):
        found = results[key]
        ratio = found["ratio"]
        cells = [
            f"{words} {found['images_per_second'][name]:,.0f}" for name, words in names.items()
        ]
        lines.append(
            f"| {'the loop' if key == 'training' else 'processes'} | {' | '.join(cells)} "
            f"| {ratio['median']:.2f} ({ratio['lowest']:.2f}-{ratio['highest']:.2f}) "
            f"| {found['wanted']:.1f} |"
        )
    return "\n".join(lines)


def test_a_variant_that_lost_accuracy_was_not_chosen(results: dict[str, Any]) -> None:
    for facts in results["data"].values():
        accuracy = facts["validation_accuracy"]
        assert accuracy["eager"] - accuracy["chosen"] <= 0.01 + 1e-9
