"""How fast a model is served: marwright beside plain TorchServe, five other servers, and no server.

Run as `make bench WHAT=serving`; writes benchmarks/results/serving.json and docs/pictures/
serving.png. Needs wrk, and once `ARGS=--setup`, which makes a virtual environment for each peer
below benchmarks/.venvs (contestants/servers.py says how; some 900 MB). `ARGS="--soak 30"` loads
marwright alone for that many minutes and watches its memory.

All contestants serve one TorchScript CNN for the same bytes of two JPEGs, on the cores that wrk has
too, one server at a time. In each round every one is booted, has its answers checked, and is loaded
with 1, 16 and 64 connections; the order is shuffled. A claim is a ratio within a round, given as
the median over the rounds with least and most. Latencies are wrk's, which corrects for requests
that it could not send while it waited. `cores` tells who had the processor, this machine's other
work included.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import tempfile
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import requests
from contestants.load import LIMITS, Cell, Key, measure_contestant, wait_for_quiet
from contestants.materials import ContestantError, Materials, make_materials
from contestants.plots import draw_serving
from contestants.servers import CONTESTANTS, PEERS, end_processes, find_venv, make_venvs
from contestants.soak import soak

from marwright.errors import MarwrightError
from marwright.server.java import find_java

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PICTURES = HERE.parent / "docs/pictures"
SEED = 0
"""Of the order within each round."""

Table = dict[Key, dict[int, Cell]]
"""Cells by round."""


def main() -> None:
    """Measure what the arguments ask for."""
    options = parse_arguments()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans become ours to end
    try:
        if options.setup:
            make_venvs()
            return
        if shutil.which("wrk") is None:
            raise SystemExit("wrk is missing: apt-get install wrk")
        with tempfile.TemporaryDirectory(prefix="marwright-bench-") as name:
            materials = make_materials(Path(name), find_venv, optimized=options.optimized_peers)
            if options.soak:
                soak(materials, options.soak, RESULTS / "soak.json", PICTURES / "soak.png")
            else:
                compare(materials, options)
    except ContestantError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        end_processes()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Load servers; see the top of this file.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4, help="of each load")
    parser.add_argument(
        "--patience", type=float, default=60, help="seconds to wait for a quiet machine, each time"
    )
    parser.add_argument("--only", default="", help="NAME,...; prints, and writes no file")
    parser.add_argument("--setup", action="store_true", help="make the peers' environments")
    parser.add_argument(
        "--soak", type=float, metavar="MINUTES", help="load marwright, watch memory"
    )
    parser.add_argument(
        "--optimized-peers",
        action="store_true",
        help="give the peers' model torch's optimize_for_inference; prints, and writes no file",
    )
    options = parser.parse_args()
    if min(options.rounds, options.seconds) < 1:
        parser.error("--rounds and --seconds are 1 at least")
    if unknown := set(filter(None, options.only.split(","))) - {*CONTESTANTS, *LIMITS}:
        parser.error(f"no such contestant: {', '.join(sorted(unknown))}")
    return options


def compare(materials: Materials, options: argparse.Namespace) -> None:
    """Measure all contestants in turns, and write or print what came out."""
    names = options.only.split(",") if options.only else [*CONTESTANTS, *LIMITS]
    table: Table = {}
    failures: dict[str, str] = {}
    order = random.Random(SEED)
    for number in range(options.rounds):
        order.shuffle(names)
        for name in [name for name in names if name not in failures]:
            wait_for_quiet(options.patience)
            try:
                for key, cell in measure_contestant(name, materials, options.seconds):
                    table.setdefault(key, {})[number] = cell
                    print(f"round {number + 1}  {describe_cell(key, cell)}", flush=True)
            except (ContestantError, MarwrightError, requests.RequestException, OSError) as error:
                failures[name] = " ".join(str(error).split())[:300]
                print(f"{name}: {failures[name]}", flush=True)
    rows = make_rows(table)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": list_versions(),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "bytes": {picture.name: picture.path.stat().st_size for picture in materials.pictures},
        "accuracy": materials.accuracy,
        "others_cores": median_others(table),
        "failures": failures,
        "ratios": make_ratios(table),
        "rows": rows,
    }
    print_result(result)
    if not options.only and not options.optimized_peers:
        (RESULTS / "serving.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        draw_serving(rows, PICTURES / "serving.png")


def make_rows(table: Table) -> list[dict[str, Any]]:
    """Return medians over the rounds, with the rounds."""
    rows = []
    for (contestant, workload, connections), cells in sorted(
        table.items(), key=lambda item: (item[0][1] != "small", str(item[0][0]), item[0][2] or 0)
    ):
        rates = [cell.requests_per_second for cell in cells.values()]
        row: dict[str, Any] = {
            "contestant": contestant,
            "workload": workload,
            "connections": connections,
        }
        row["requests_per_second"] = round(statistics.median(rates), 1)
        for key in ("p50_ms", "p99_ms"):
            values = [getattr(cell, key) for cell in cells.values()]
            row[key] = None if None in values else round(statistics.median(values), 3)
        row["errors"] = sum(cell.errors for cell in cells.values())
        row["spread"] = [min(rates), max(rates)]
        row["rounds"] = [asdict(cell) for cell in cells.values()]
        rows.append(row)
    return rows


def make_ratios(table: Table) -> dict[str, dict[str, Any] | None]:
    """Return the claims; None where a contestant is missing."""

    def compare_rates(
        name: str, other: str, workload: str, connections: int, at: int | None = -1
    ) -> dict[str, Any] | None:
        theirs = (other, workload, connections if at == -1 else at)
        return divide(table, (name, workload, connections), theirs)

    def beat_peers(name: str, workload: str, connections: int) -> dict[str, Any] | None:
        peers = [peer for peer in PEERS if (peer, workload, connections) in table]
        if not peers:
            return None
        best = max(peers, key=lambda peer: median_rate(table[peer, workload, connections]))
        return compare_rates(name, best, workload, connections)

    lone: Key = ("marwright", "small", 1)
    rival: Key = ("torchserve_one_thread", "small", 1)
    return {
        "over_torchserve_defaults": compare_rates("marwright", "torchserve_defaults", "small", 64),
        "over_torchserve_one_thread": compare_rates(
            "marwright", "torchserve_one_thread", "small", 64
        ),
        "over_best_peer": beat_peers("marwright", "small", 64),
        "over_in_process": compare_rates("marwright", "in_process", "small", 64, at=None),
        "over_in_process_optimized": compare_rates(
            "marwright", "in_process_optimized", "small", 64, at=None
        ),
        "lone_p50_over_torchserve_one_thread": divide(table, lone, rival, "p50_ms"),
        "lone_p99_over_p50": divide(table, lone, lone, "p99_ms", "p50_ms"),
        "large_over_best_peer_16": beat_peers("marwright", "large", 16),
        "large_over_best_peer_64": beat_peers("marwright", "large", 64),
        "scaled_large_over_best_peer_16": beat_peers("marwright_scaled", "large", 16),
        "scaled_large_over_best_peer_64": beat_peers("marwright_scaled", "large", 64),
        "onnx_over_pillow": compare_rates("marwright_onnx", "marwright_pillow", "small", 64),
        "int8_over_pillow": compare_rates("marwright_int8", "marwright_pillow", "small", 64),
        "onnx_over_marwright": compare_rates("marwright_onnx", "marwright", "small", 64),
        "int8_over_marwright": compare_rates("marwright_int8", "marwright", "small", 64),
    }


def divide(
    table: Table, mine: Key, other: Key, field: str = "requests_per_second", under: str = ""
) -> dict[str, Any] | None:
    """Divide one cell's figure by another's, round by round."""
    ours, theirs = table.get(mine, {}), table.get(other, {})
    values = [
        getattr(ours[number], field) / getattr(theirs[number], under or field)
        for number in sorted(ours.keys() & theirs.keys())
    ]
    if not values:
        return None
    return {
        "value": round(statistics.median(values), 3),
        "spread": [round(min(values), 3), round(max(values), 3)],
        "of": mine[0],
        "over": other[0],
    }


def median_rate(cells: dict[int, Cell]) -> float:
    """Return the rounds' median of requests a second."""
    return statistics.median(cell.requests_per_second for cell in cells.values())


def median_others(table: Table) -> float:
    """Return how much of the processor other work of this machine had; little, or measure again."""
    cores = [cell.cores for cells in table.values() for cell in cells.values() if cell.cores]
    return round(statistics.median(item.get("others", 0.0) for item in cores), 2) if cores else 0.0


def list_versions() -> dict[str, str]:
    """Return what was measured, the peers' as they are pinned."""
    versions = {name: version(name) for name in ("marwright", "torch", "torchserve", "pillow")}
    versions["python"] = platform.python_version()
    with contextlib.suppress(MarwrightError):
        versions["java"] = find_java().version
    for requirements in sorted((HERE / "contestants").glob("*.txt")):
        pins = requirements.read_text(encoding="utf-8").splitlines()
        name, _, pinned = pins[0].partition("==")
        versions[name] = pinned
    return versions


def describe_cell(key: Key, cell: Cell) -> str:
    """Return one line about a load, as it is done."""
    contestant, workload, connections = key
    line = (
        f"{contestant:22} {workload:6} {connections or '-':>3} {cell.requests_per_second:9,.1f}/s"
    )
    if cell.p50_ms is not None:
        line += f"  p50 {cell.p50_ms:8.2f} ms  p99 {cell.p99_ms:8.2f} ms  errors {cell.errors}"
    if cell.cores:
        busy = (f"{name} {cores}" for name, cores in cell.cores.items() if cores >= 0.05)
        line += f"  cores: {', '.join(busy)}"
    return line + ("  ONE-SIDED" if cell.one_sided else "")


def print_result(result: dict[str, Any]) -> None:
    """Print the rows as a table, then the ratios and who did not take part."""
    head = ("contestant", "image", "conn.", "requests/s", "p50 ms", "p99 ms", "errors", "spread")
    lines = [head, ("---",) * 3 + ("---:",) * 4 + ("---",)]
    for row in result["rows"]:
        latencies = ["-" if row[k] is None else f"{row[k]:,.2f}" for k in ("p50_ms", "p99_ms")]
        lines.append(
            (
                *(row["contestant"], row["workload"], str(row["connections"] or "-")),
                *(f"{row['requests_per_second']:,.0f}", *latencies, str(row["errors"])),
                "{:,.0f}-{:,.0f}".format(*row["spread"]),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        cells = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        print(f"| {' | '.join(cells)} |")
    print()
    for name, ratio in result["ratios"].items():
        text = "not measured"
        if ratio:
            low, high = ratio["spread"]
            text = f"{ratio['value']} ({low}-{high}), {ratio['of']} / {ratio['over']}"
        print(f"{name}: {text}")
    for name, reason in result["failures"].items():
        print(f"{name}: {reason}")
    print(f"cores that other work of this machine had: {result['others_cores']}")


if __name__ == "__main__":
    main()
