"""The picture of a tuning: throughput against latency."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from marwright.storage import write_file
from marwright.tuning.search import find_frontier
from marwright.tuning.tuning import Tuning

__all__ = ["draw_tuning"]

OTHERS, PACKED, CHOSEN, BOUND = "#b0b0b0", "#2b3f8c", "#1b7837", "#d98032"


def draw_tuning(tuning: Tuning, path: Path) -> None:
    """Draw every measured load, what nothing beats, the bound and the choice; PNG."""
    figure = Figure(figsize=(8, 4.6), layout="constrained", dpi=110)
    axes = figure.subplots()
    points = []
    for trial in tuning.trials:
        sound = [item for item in trial.measurements if item.requests and not item.errors]
        pairs = [(item.p99_ms, item.throughput) for item in sound]
        points += pairs
        if not pairs or trial.stage == "confirmation":
            continue
        is_packed = trial.stage == "packed"
        axes.plot(
            *zip(*pairs, strict=True),
            marker="o",
            markersize=4,
            linewidth=1.5 if is_packed else 0.7,
            color=PACKED if is_packed else OTHERS,
            label="as packed" if is_packed else None,
            zorder=3 if is_packed else 1,
        )
    if points:
        frontier = zip(*find_frontier(points), strict=True)
        axes.plot(*frontier, drawstyle="steps-post", color="black", linewidth=1, label="frontier")
        axes.set_xscale("log")
        for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            set_formatter(
                FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")
            )
    axes.axvline(
        tuning.bound_ms, color=BOUND, linestyle="--", label=f"bound {tuning.bound_ms:g} ms"
    )
    if (best := tuning.chosen) is not None:
        (middle, low, high), (rate, least, most) = best.p99_ms, best.throughput
        axes.errorbar(
            [middle],
            [rate],
            xerr=([middle - low], [high - middle]),
            yerr=([rate - least], [most - rate]),
            marker="*",
            markersize=14,
            capsize=3,
            color=CHOSEN,
            label=f"chosen: {best.candidate}",
            zorder=4,
        )
    axes.set(xlabel="p99 (ms)", ylabel="answers/s", title=f"{tuning.model} {tuning.version}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    with write_file(path) as stream:
        figure.savefig(stream, format="png")
