"""The two pictures: requests a second by contestant, and memory over a long load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

__all__ = ["draw_serving", "draw_soak"]

COLOURS = {"marwright": "#1b7837", "torchserve": "#7f7f7f", "in_process": "#bdbdbd"}
PEER_COLOUR = "#d98032"


def draw_serving(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw requests a second at the most connections, with the rounds' spread; fewer as marks."""
    figure = Figure(figsize=(10, 4.6), layout="constrained", dpi=100)
    for axes, workload in zip(figure.subplots(1, 2), ("small", "large"), strict=True):
        mine = [row for row in rows if row["workload"] == workload]
        most = max((row["connections"] or 0 for row in mine), default=0)
        bars = [row for row in mine if row["connections"] in (most, None)]
        bars.sort(key=lambda row: row["requests_per_second"])
        names = [row["contestant"] for row in bars]
        values = [row["requests_per_second"] for row in bars]
        low = [row["requests_per_second"] - row["spread"][0] for row in bars]
        high = [row["spread"][1] - row["requests_per_second"] for row in bars]
        axes.barh(names, values, color=[_find_colour(name) for name in names], height=0.7)
        axes.errorbar(values, names, xerr=(low, high), fmt="none", ecolor="black", capsize=2)
        for connections, mark in ((1, "|"), (16, "x")):
            some = [row for row in mine if row["connections"] == connections]
            axes.plot(
                [row["requests_per_second"] for row in some],
                [row["contestant"] for row in some],
                linestyle="none",
                marker=mark,
                color="#2b3f8c",
                label=f"{connections} connection{'s' * (connections > 1)}",
            )
        for name, value in zip(names, values, strict=True):
            end = max(row["spread"][1] for row in mine if row["contestant"] == name)
            axes.annotate(
                f"{value:,.0f}", (end, name), (6, 0), textcoords="offset points", va="center"
            )
        axes.set(title=f"{workload} image, {most} connections", xlabel="requests/s")
        axes.margins(x=0.14)
        axes.set_xlim(left=0)
        axes.legend(frameon=False, loc="lower right", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _find_colour(name: str) -> str:
    return next((c for start, c in COLOURS.items() if name.startswith(start)), PEER_COLOUR)


def draw_soak(
    seconds: Sequence[float], memory: Mapping[str, Sequence[float]], title: str, path: Path
) -> None:
    """Draw each process' resident memory over time, and their sum."""
    figure = Figure(figsize=(8, 3.6), layout="constrained", dpi=100)
    axes = figure.subplots()
    for name, values in memory.items():
        style = {"color": "black", "linewidth": 1.6} if name == "all" else {"linewidth": 1.0}
        axes.plot([second / 60 for second in seconds], values, label=name, **style)
    axes.set(xlabel="minutes", ylabel="resident memory, MB", title=title)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(path)
