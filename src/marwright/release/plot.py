"""A release drawn: the share of traffic, errors and p95 of both versions over its time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from marwright.gateway.accesses import Access
from marwright.release.history import Line
from marwright.storage import write_file

__all__ = ["draw_release"]

ARMS = {"stable": "#4c72b0", "candidate": "#dd8452"}
MARGIN_SECONDS = 3
"""What is shown before a release begins and after its end."""
BAD = {"failed", "returned", "rolled back"}


@dataclass
class Second:
    """What both versions answered within one second."""

    answers: dict[str, list[tuple[bool, float]]] = field(
        default_factory=lambda: {arm: [] for arm in ARMS}
    )
    """Whether each failed, and the seconds that it took, by arm."""

    def measure(self, arm: str) -> tuple[float, float, float]:
        """Return percent of all answers, percent of errors, and p95 in milliseconds."""
        own, every = self.answers[arm], sum(map(len, self.answers.values()))
        if not own:
            return 0.0, math.nan, math.nan
        errors = 100 * sum(failed for failed, _ in own) / len(own)
        p95 = 1e3 * float(np.quantile([seconds for _, seconds in own], 0.95))
        return 100 * len(own) / every, errors, p95


def draw_release(lines: Sequence[Line], accesses: Sequence[Access], path: Path) -> None:
    """Draw one release from its lines and from the gateway's log of its time, as a PNG.

    A request that the candidate failed and the stable version answered counts for both.

    Raises:
        StorageError: the picture cannot be written.
    """
    seconds = _count(lines, accesses)
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots(3, sharex=True)
    versions = {"stable": lines[0].before, "candidate": lines[0].version}
    for arm, colour in ARMS.items():
        times = [number + 0.5 for number in seconds]
        columns = zip(*(second.measure(arm) for second in seconds.values()), strict=True)
        for axis, values in zip(axes, columns, strict=False):
            label = f"{lines[0].model} {versions[arm]}"
            axis.plot(times, values, color=colour, label=label, marker=".", linewidth=1.3)
    for axis, label in zip(axes, ("share of answers (%)", "errors (%)", "p95 (ms)"), strict=True):
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
    axes[1].set_ylim(top=max(1, axes[1].get_ylim()[1]))
    axes[0].legend(loc="center right", frameon=False)
    axes[-1].set_xlabel("seconds since the release began")
    _mark_steps(axes, lines)
    last = lines[-1]
    title = f"{last.model} {versions['stable']} to {versions['candidate']}: {last.event}"
    figure.suptitle(f"{title}\n{last.reason}" if last.reason else title, fontsize=10, wrap=True)
    with write_file(path) as stream:
        figure.savefig(stream, format="png", dpi=100)


def _count(lines: Sequence[Line], accesses: Sequence[Access]) -> dict[int, Second]:
    """Return what was answered in each second of the release and a little around it."""
    began, ended = _read_time(lines[0]), _read_time(lines[-1])
    first, last = -MARGIN_SECONDS, math.ceil(ended - began) + MARGIN_SECONDS
    seconds = {number: Second() for number in range(first, last)}
    moved = _find_moved(lines)
    for access in accesses:
        second = seconds.get(math.floor(access.time - began))
        if second is None or access.model != lines[0].model or access.asked:
            continue
        for arm, failed, took in _list_answers(access, moved):
            second.answers[arm].append((failed, took))
    return seconds


def _list_answers(access: Access, moved: tuple[float, float]) -> Iterator[tuple[str, bool, float]]:
    """Yield whose answers there were; without a split the default's, whichever that was then."""
    for item in access.tries:
        arm: str = item.arm
        if arm == "none":
            arm = "candidate" if moved[0] <= access.time < moved[1] else "stable"
        yield arm, item.failed, item.seconds


def _find_moved(lines: Sequence[Line]) -> tuple[float, float]:
    """Return from when until when the candidate was the default."""
    start = end = math.inf
    for line in lines:
        if (line.event, line.step) == ("passed", "default"):
            start = _read_time(line)
        elif line.event in {"returned", "rolled back"}:
            end = _read_time(line)
    return start, end


def _mark_steps(axes: Any, lines: Sequence[Line]) -> None:
    """Draw a line where each step begins, and name those above that begin together."""
    began = _read_time(lines[0])
    near = (_read_time(lines[-1]) - began) / 40
    names: dict[float, list[str]] = {}
    last = -math.inf
    for line in lines:
        if line.event in {"begun", "passed"}:
            continue
        moment = _read_time(line) - began
        for axis in axes:
            colour = "#c44e52" if line.event in BAD else "#999999"
            axis.axvline(moment, color=colour, linewidth=0.8)
        last = moment if moment - last > near else last
        names.setdefault(last, []).append(line.step if line.event == "step" else line.event)
    for moment, together in names.items():
        place = (moment, 1.02)
        options = {"xycoords": ("data", "axes fraction"), "rotation": 40, "fontsize": 7}
        axes[0].annotate(", ".join(together), place, **options)


def _read_time(line: Line) -> float:
    """Return a line's moment in seconds since the epoch."""
    return datetime.fromisoformat(line.time.replace("Z", "+00:00")).timestamp()
