"""One long load on marwright: whether memory grows, and whether an answer is missing."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from contestants.load import finish_wrk, settle, start_wrk
from contestants.materials import Materials
from contestants.plots import draw_soak
from contestants.servers import CONTESTANTS, list_processes

__all__ = ["soak"]

CONNECTIONS = 64
WARM_SECONDS = 60.0
KEPT = 600
"""Samples of each process that the result keeps."""


def soak(materials: Materials, minutes: float, results: Path, picture: Path) -> None:
    """Load for some minutes, sample every process' resident memory each second, and write both."""
    name = "marwright"
    times: list[float] = []
    memory: dict[str, list[float]] = {}
    with CONTESTANTS[name].start(materials) as url:
        settle()
        labels = label_processes()
        wrk = start_wrk(
            url,
            materials.pictures[0].make_request(in_envelope=False),
            CONNECTIONS,
            math.ceil(60 * minutes),
        )
        started = time.monotonic()
        while wrk.poll() is None:
            now = read_memory(labels)
            times.append(round(time.monotonic() - started, 2))
            now["all"] = sum(now.values())
            for label in sorted({*memory, *now}):
                past = memory.setdefault(label, [0.0] * (len(times) - 1))
                past.append(round(now.get(label, 0.0), 2))
            time.sleep(max(0.0, started + len(times) - time.monotonic()))
        outcome = finish_wrk(wrk)
        replaced = [labels[pid] for pid in labels.keys() - label_processes().keys()]
    slopes = {label: fit_slope(times, values) for label, values in memory.items()}
    step = math.ceil(len(times) / KEPT)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "contestant": name,
        "connections": CONNECTIONS,
        "minutes": minutes,
        "requests": outcome["requests"],
        "requests_per_second": round(outcome["requests"] / outcome["seconds"], 1),
        "p50_ms": outcome["p50_ms"],
        "p99_ms": outcome["p99_ms"],
        "errors": outcome["refused"] + outcome["broken"],
        "processes_replaced": replaced,
        "slope_mb_per_hour": slopes,
        "seconds": times[::step],
        "memory_mb": {label: values[::step] for label, values in memory.items()},
    }
    results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    slope, error = slopes["all"]["slope"], slopes["all"]["standard_error"]
    title = f"{outcome['requests']:,} requests, {result['errors']} errors; "
    title += f"after the first minute {slope:+.1f} ± {error:.1f} MB an hour"
    draw_soak(times, memory, title, picture)
    print(title)
    for label, fit in slopes.items():
        print(
            f"{label}: {fit['slope']:+.2f} MB an hour, standard error {fit['standard_error']:.2f}"
        )


def label_processes() -> dict[int, str]:
    """Name the server's processes by what they do, with their ids."""
    labels: dict[int, str] = {}
    for process in list_processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            words = " ".join(process.cmdline())
            role = "worker" if "model_service_worker" in words else process.name()
            role = "guard" if "guard.py" in words else role
            number = sum(label.startswith(role) for label in labels.values()) + 1
            labels[process.pid] = f"{role} {number}" if role == "worker" else role
    return labels


def read_memory(labels: dict[int, str]) -> dict[str, float]:
    """Return the resident memory of the server's processes, in MB."""
    memory = {}
    for process in list_processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() != "wrk":
                label = labels.get(process.pid, f"new {process.pid}")
                memory[label] = process.memory_info().rss / 1e6
    return memory


def fit_slope(times: Sequence[float], values: Sequence[float]) -> dict[str, Any]:
    """Fit a line after the first minute; MB an hour, with its standard error."""
    skip = min(WARM_SECONDS, times[-1] / 3)
    x = np.array([t for t in times if t >= skip]) / 3600
    y = np.array(values)[-len(x) :]
    slope, start = np.polyfit(x, y, 1)
    rest = y - (slope * x + start)
    error = math.sqrt(float(rest @ rest) / max(1, len(x) - 2) / float(((x - x.mean()) ** 2).sum()))
    return {"slope": round(float(slope), 3), "standard_error": round(error, 3)}
