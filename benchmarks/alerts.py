"""How long it takes from a fault to its alert at a webhook, by tests/monitor/test_alerts.py.

Run as `make bench WHAT=alerts`; writes benchmarks/results/alerts.json, a row {fault, alert,
seconds, scale} for each fault that is caused for real. `scale` divides every window and pause of
the rules; the last test has them as they are, of a server that had no traffic before.
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
RESULTS = Path(__file__).parent / "results/alerts.json"
TESTS = "tests/monitor/test_alerts.py"
PROGRAMS = ("prometheus", "prometheus-alertmanager")


def main() -> None:
    """Run the tests, gather their rows, write the result where all of them passed."""
    with tempfile.TemporaryDirectory(prefix="marwright-bench-") as name:
        rows = Path(name) / "rows.jsonl"
        tests = subprocess.run(
            [sys.executable, "-m", "pytest", TESTS, "-m", "slow or not slow", "-n0", "-q"],
            cwd=ROOT,
            env={**os.environ, "MARWRIGHT_ALERTS": str(rows)},
            check=False,
        )
        lines = rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []
    alerts = [json.loads(line) for line in lines]
    result = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {
            **{p: version(p) for p in ("marwright", "torch", "torchserve")},
            **{p: ask_version(p) for p in PROGRAMS},
        },
        "python": platform.python_version(),
        "alerts": alerts,
    }
    if tests.returncode == 0:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for row in alerts:
        print(f"{row['fault']}: {row['alert']} after {row['seconds']} s, scale {row['scale']:g}")
    sys.exit(tests.returncode)


def ask_version(program: str) -> str:
    """Return a Debian program's version: the third word that it says of itself."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return (done.stdout + done.stderr).split()[2]


if __name__ == "__main__":
    main()
