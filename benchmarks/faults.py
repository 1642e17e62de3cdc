"""What each fault costs: the tests of tests/faults, and a row for each.

Run as `make bench WHAT=faults`; writes benchmarks/results/faults.json. Two loads of 60 requests a
second come from processes of their own while a real server under its supervisor meets the fault:
plain requests, which show what the server loses, and marwright's client, which sends again what is
safe to send again. `refused` are answers of 429 and 503, `lost` is everything else but an answer.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results/faults.json"


def main() -> None:
    """Run the tests, gather their rows, write the result."""
    with tempfile.TemporaryDirectory(prefix="marwright-bench-") as name:
        rows = Path(name) / "rows.jsonl"
        tests = subprocess.run(
            [sys.executable, "-m", "pytest", "tests/faults", "-m", "slow or not slow", "-q"],
            cwd=ROOT,
            env={**os.environ, "MARWRIGHT_FAULTS": str(rows)},
            check=False,
        )
        lines = rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []
    faults = [json.loads(line) for line in lines]
    result = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {p: version(p) for p in ("marwright", "torch", "torchserve")},
        "python": platform.python_version(),
        "faults": faults,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for row in faults:
        counts = ", ".join(f"{key} {row[key]}" for key in ("sent", "answered", "refused", "lost"))
        print(f"{row['fault']}: {counts}; with marwright's client lost {row['client']['lost']}")
    sys.exit(tests.returncode)


if __name__ == "__main__":
    main()
