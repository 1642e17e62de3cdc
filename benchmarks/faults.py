"""What each fault costs: the tests that are marked `fault`, and a row for each fault.

Run as `make bench WHAT=faults`; writes benchmarks/results/faults.json. Two loads of 60 requests a
second come from processes of their own while a real server under its supervisor, or several behind
a gateway, meet the fault: plain requests, which show what the server loses, and marwright's client,
which sends again what is safe to send again. `refused` are answers of 429 and 503, `lost` is
everything else but an answer. A row is the sum of all tests of its fault, as of each step of a
release.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results/faults.json"
TESTS = ("tests/faults", "tests/gateway", "tests/release")
SUMS = ("sent", "answered", "refused", "lost")


def main() -> None:
    """Run the tests, gather their rows, write the result."""
    with tempfile.TemporaryDirectory(prefix="marwright-bench-") as name:
        rows = Path(name) / "rows.jsonl"
        tests = subprocess.run(
            [sys.executable, "-m", "pytest", *TESTS, "-m", "fault", "-q"],
            cwd=ROOT,
            env={**os.environ, "MARWRIGHT_FAULTS": str(rows)},
            check=False,
        )
        lines = rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []
    faults = sum_rows([json.loads(line) for line in lines])
    result = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {p: version(p) for p in ("marwright", "torch", "torchserve")},
        "python": platform.python_version(),
        "faults": faults,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for row in faults:
        counts = ", ".join(f"{key} {row[key]}" for key in SUMS)
        print(f"{row['fault']}: {counts}; with marwright's client lost {row['client']['lost']}")
    sys.exit(tests.returncode)


def sum_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each fault, in the order of their first tests."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if one := found.get(row["fault"]):
            one.update(add_counts(one, row), tests=one["tests"] + 1)
            one["client"] = add_counts(one["client"], row["client"])
        else:
            found[row["fault"]] = {**row, "tests": 1}
    return list(found.values())


def add_counts(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the counts of two loads as one; the rate is the lower, the silence the longer."""
    return {
        **{key: one[key] + other[key] for key in SUMS},
        "why": dict(Counter(one["why"]) + Counter(other["why"])),
        "rate": min(one["rate"], other["rate"]),
        "longest_silence": max(one["longest_silence"], other["longest_silence"]),
    }


if __name__ == "__main__":
    main()
