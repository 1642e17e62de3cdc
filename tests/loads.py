"""Steady loads on a served model, from processes of their own, and what became of each request."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parent / "faults/load.py"
RATE = 60.0
"""Requests a second of each of the two loads."""
PATIENCE = 90.0
"""Generous: other tests may have the machine."""

Reports = dict[str, dict[str, Any]]
"""What became of the requests of each of the two loads."""


@dataclass
class Load:
    """Two loads at once: plain requests, and marwright's client."""

    processes: dict[str, subprocess.Popen[str]]

    def finish(self) -> Reports:
        """Stop sending, wait for the answers, return the counts of each."""
        time.sleep(1)  # what comes after a fault is counted too
        for process in self.processes.values():
            process.terminate()
        reports = {}
        for name, process in self.processes.items():
            process.wait(PATIENCE)
            assert process.stdout is not None
            reports[name] = json.loads(process.stdout.read())
        return reports


@contextlib.contextmanager
def keep_loads() -> Iterator[Callable[[Path, Path, str], Load]]:
    """Yield a function that begins a load on a model, of which all requests have one body.

    What still runs at the end is killed.
    """
    with contextlib.ExitStack() as stack:

        def begin(endpoint: Path, body: Path, model: str) -> Load:
            processes = {}
            for name, options in {"plain": [], "client": ["--retries"]}.items():
                command = [sys.executable, str(PROGRAM), str(endpoint), str(body)]
                command += ["--model", model, "--rate", str(RATE), "--seconds", "600", *options]
                process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                processes[name] = stack.enter_context(process)
                stack.callback(process.kill)
            deadline = time.monotonic() + PATIENCE
            for name, process in processes.items():
                wait_for_answers(process, name, deadline)
            return Load(processes)

        yield begin


def wait_for_answers(process: subprocess.Popen[str], name: str, deadline: float) -> None:
    """Wait for the line of a load's first answer: before it nothing is in flight to be lost."""
    assert process.stdout is not None
    left = max(0.0, deadline - time.monotonic())
    found = select.select([process.stdout], [], [], left)[0]
    assert found, f"the load {name} got no answer within {PATIENCE:g} s"
    line = process.stdout.readline()
    assert line == "answering\n", f"the load {name} said {line!r}"


def find_unanswered(reports: Reports) -> dict[str, Any]:
    """Return what was lost or refused, and why, of each load that did not get all its answers."""
    return {
        name: {key: report[key] for key in ("lost", "refused", "why")}
        for name, report in reports.items()
        if report["answered"] != report["sent"]
    }
