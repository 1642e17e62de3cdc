"""README's table of faults and docs/operations.md's figures are those of the last measurement.

WRITE_TABLE=1 writes them.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any


def read_results(root: Path, name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(
        (root / f"benchmarks/results/{name}.json").read_text("utf-8")
    )
    return result


def make_fault_lines(root: Path) -> list[str]:
    lines = [
        "| fault | sent | answered | refused | lost | with marwright's client: sent | lost |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in read_results(root, "faults")["faults"]:
        counts = [row[key] for key in ("sent", "answered", "refused", "lost")]
        client = row["client"]
        cells = [row["fault"], *counts, client["sent"], client["lost"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def make_operation_lines(root: Path) -> list[str]:
    result = read_results(root, "operations")
    many = result["versions"]
    rows = [
        (
            "`apply` on a server that is already so, beyond Python's start",
            show(result["apply"]["beyond"]),
            "under 0.3 s",
        ),
        (
            f"{result['restart']['archives']} archives from the start to READY, beside plain"
            " `torchserve`",
            f"{result['restart']['ratio']} times ({show(result['restart']['marwright'])} against"
            f" {show(result['restart']['torchserve'])})",
            "at most 1.2 times",
        ),
        (
            "`Client.predict` beside a bare `requests.Session`",
            show_ratio(result["client"]),
            "at most 1.15 times",
        ),
        *(
            (
                f"`AsyncClient`, 64 in flight, beside wrk, {name}",
                f"{show_ratio(result['async_client'][key])}, of"
                f" {result['async_client'][key]['wrk_requests_per_second']:,.0f} answers/s",
                "at least 0.8 times",
            )
            for key, name in (("scan", "a PNG of 120 bytes"), ("large", "a JPEG of 640x480"))
        ),
        (f"{many['registered']} versions: list", show(many["list"]), "under 1 s"),
        (f"{many['registered']} versions: describe all", show(many["describe_all"]), "under 1 s"),
        (
            f"{many['registered']} versions: `apply`, beyond Python's start",
            show(many["apply"]["beyond"]),
            "under 1 s",
        ),
        (
            "Java's memory for an idle version",
            f"{many['bytes_per_idle_version'] / 1024:,.0f} KiB",
            "stated",
        ),
    ]
    table = [f"| {what} | {found} | {wanted} |" for what, found, wanted in rows]
    return ["| what | measured | wanted |", "|---|---|---|", *table]


def show(spread: dict[str, float]) -> str:
    least, most = spread["min_seconds"], spread["max_seconds"]
    return f"{spread['median_seconds']} s ({least}-{most})"


def show_ratio(result: dict[str, float]) -> str:
    return f"{result['ratio']} times ({result['ratio_min']}-{result['ratio_max']})"


def check(page: Path, name: str, lines: list[str]) -> None:
    text = page.read_text("utf-8")
    block = f"<!-- {name} -->\n" + "\n".join(lines) + f"\n<!-- /{name} -->"
    pattern = rf"<!-- {name} -->\n.*?<!-- /{name} -->"
    assert re.search(pattern, text, re.DOTALL)
    if os.environ.get("WRITE_TABLE"):
        page.write_text(re.sub(pattern, lambda _: block, text, flags=re.DOTALL), "utf-8")
    else:
        assert block in text


def test_the_readmes_faults_are_those_of_the_last_measurement(root: Path) -> None:
    check(root / "README.md", "faults", make_fault_lines(root))


def test_the_figures_of_operations_are_those_of_the_last_measurement(root: Path) -> None:
    check(root / "docs/operations.md", "operations", make_operation_lines(root))


def test_of_every_fault_the_client_loses_nothing(root: Path) -> None:
    faults = read_results(root, "faults")["faults"]
    assert len(faults) > 10
    assert not [row["fault"] for row in faults if row["client"]["lost"]]
