from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, Any]:
    text = (root / "benchmarks/results/federated.json").read_text(encoding="utf-8")
    measured: dict[str, Any] = json.loads(text)
    return measured


@pytest.mark.parametrize("mark", ["federated", "private", "longest"])
def test_the_page_holds_what_was_measured(root: Path, results: dict[str, Any], mark: str) -> None:
    write = {"federated": write_federated, "private": write_private, "longest": write_longest}
    path = root / "docs/federated.md"
    text = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {mark} -->).*?(<!-- /{mark} -->)", re.DOTALL)
    assert pattern.search(text), f"{path} has no place for its numbers"
    written = pattern.sub(lambda found: found[1] + write[mark](results) + found[2], text)
    if os.environ.get("WRITE_TABLE"):
        path.write_text(written, encoding="utf-8")
    assert written == text or os.environ.get("WRITE_TABLE"), "WRITE_TABLE=1 writes it anew"


def test_bad_clients_stay_within_3_points_and_unchecked_ones_do_not(
    results: dict[str, Any],
) -> None:
    central = results["central"]["accuracy"]
    for name, facts in results["federated"].items():
        near = facts["accuracy"] >= central - 0.03
        assert near != name.endswith("unchecked"), name


def write_federated(results: dict[str, Any]) -> str:
    """Write a row for each way of training."""
    last = results["rounds"]
    shown = [1, 5, 10, last]
    lines = [
        f"| | {' | '.join(f'round {number}' for number in shown)} | best by validation | seconds |",
        f"|---|{'---|' * (len(shown) + 2)}",
    ]
    central = results["central"]
    lines.append(
        f"| central, {last * results['local_epochs']} epochs |{' |' * len(shown)}"
        f" {central['accuracy']:.3f} | {central['seconds']:.0f} |"
    )
    for name, facts in results["federated"].items():
        rounds = " | ".join(f"{facts['by_round'][number - 1]:.3f}" for number in shown)
        row = f"| {name} | {rounds} | {facts['accuracy']:.3f} | {facts['seconds']:.0f} |"
        lines.append(row)
    return "\n" + "\n".join(lines) + "\n"


def write_private(results: dict[str, Any]) -> str:
    """Write a row for each noise multiplier."""
    lines = ["| noise multiplier | epsilon at 1e-05 | test accuracy |", "|---|---|---|"]
    without = results["federated"]["FedAvg"]["accuracy"]
    lines.append(f"| none | infinite | {without:.3f} |")
    for noise, facts in results["private"].items():
        lines.append(f"| {noise} | {facts['epsilon']:.1f} | {facts['accuracy']:.3f} |")
    return "\n" + "\n".join(lines) + "\n"


def write_longest(results: dict[str, Any]) -> str:
    """Write the largest honest update, in medians of its round."""
    found = [facts["longest_honest_update"] for facts in results["federated"].values()]
    return f"{max(length for length in found if length):.1f}"
