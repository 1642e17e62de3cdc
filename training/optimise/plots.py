"""The pictures of an optimisation: what accuracy costs, and how much each layer bears."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from marwright.storage import write_file

from .result import Result
from .units import format_bytes

__all__ = ["draw_pareto", "draw_sensitivity", "find_front"]

COLOURS = {
    "eager": "#555555",
    "torchscript": "#d1495b",
    "onnx": "#00798c",
    "exported": "#8f5fbf",
    "aotinductor": "#c77d0a",
    "openvino": "#3a7d44",
}
LARGEST_AREA = 420.0
"""Of a marker, in square points."""
PLACES = tuple(
    (horizontal * distance, vertical * distance)
    for distance in (9, 20, 34, 50, 70)
    for horizontal, vertical in (
        (1.0, 0.0),
        (-1.0, 0.0),
        (0.75, 0.75),
        (0.75, -0.75),
        (-0.75, 0.75),
        (-0.75, -0.75),
        (0.0, 1.0),
        (0.0, -1.0),
    )
)
"""Where a label may stand, in points from its marker; the first are the best."""

Box = tuple[float, float, float, float]


def find_front(results: Sequence[Result]) -> list[Result]:
    """Return the variants than which none is both faster at batch 1 and more accurate."""
    front: list[Result] = []
    for result in sorted(_list_drawable(results), key=lambda one: (_median(one), -one.accuracy)):
        if not front or result.accuracy > front[-1].accuracy:
            front.append(result)
    return front


def draw_pareto(
    results: Sequence[Result], path: Path, *, chosen: str = "", refused: Sequence[str] = ()
) -> None:
    """Draw accuracy against the median at batch 1; a marker's area is the file's size.

    Variants whose names are in `refused` are drawn hollow; those that could not be built or timed
    are left out.
    """
    figure = Figure(figsize=(9.5, 5.6), layout="constrained", dpi=110)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    drawn = _list_drawable(results)
    steps = _list_steps(drawn)
    axes.plot(*zip(*steps, strict=True) if steps else ((), ()), "--", color="#999999", zorder=1)
    largest = max((result.size_bytes for result in drawn), default=0) or 1
    areas = [max(24.0, LARGEST_AREA * result.size_bytes / largest) for result in drawn]
    for result, area in zip(drawn, areas, strict=True):
        colour = COLOURS[result.variant.backend]
        hollow = result.variant.name in refused
        axes.scatter(
            _median(result),
            result.accuracy,
            s=area,
            facecolor="none" if hollow else colour,
            edgecolor=colour,
            alpha=0.75,
            zorder=2,
        )
        if result.variant.name == chosen:
            axes.scatter(
                _median(result),
                result.accuracy,
                s=area + 150,
                facecolor="none",
                edgecolor="black",
                linewidth=1.8,
                zorder=3,
            )
    _dress(axes, drawn, largest)
    canvas.draw()  # fixes the layout, and with it where every marker is
    _label(axes, canvas, drawn, areas, chosen)
    _save(figure, path)


def draw_sensitivity(scan: Mapping[str, Mapping[float, float]], path: Path) -> None:
    """Draw the accuracy that is left when one layer alone keeps a share of its channels.

    `scan` holds accuracies by layer and by the share kept, both in [0, 1].
    """
    figure = Figure(figsize=(8, 4.2), layout="constrained", dpi=110)
    axes = figure.subplots()
    markers = "osD^v<>PX*"
    for number, (layer, accuracies) in enumerate(scan.items()):
        shares = sorted(accuracies)
        axes.plot(
            shares,
            [accuracies[share] for share in shares],
            marker=markers[number % len(markers)],
            markersize=5,
            linestyle=("-", "--", ":")[number // 10 % 3],
            label=layer,
        )
    axes.set(xlabel="share of the layer's channels kept, all others whole", ylabel="accuracy")
    axes.set_xticks(sorted({share for accuracies in scan.values() for share in accuracies}))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    axes.grid(alpha=0.3)
    if scan:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    _save(figure, path)


def _median(result: Result) -> float:
    timing = result.find_timing(1)
    return timing.p50_ms if timing else 0.0


def _list_drawable(results: Sequence[Result]) -> list[Result]:
    return [result for result in results if not result.failure and _median(result) > 0]


def _list_steps(drawn: Sequence[Result]) -> list[tuple[float, float]]:
    """Return the corners of the front: the best accuracy by the milliseconds that one can wait."""
    corners: list[tuple[float, float]] = []
    for result in find_front(drawn):
        corners += [(_median(result), corners[-1][1])] if corners else []
        corners.append((_median(result), result.accuracy))
    if corners:
        corners.append((max(_median(result) for result in drawn), corners[-1][1]))
    return corners


def _dress(axes: Axes, drawn: Sequence[Result], largest: int) -> None:
    """Put scales, grid and legend round the markers, with room for their labels."""
    axes.set(xlabel="median at batch 1, milliseconds", ylabel="accuracy on the validation split")
    axes.set_xscale("log")
    if drawn:
        medians = [_median(result) for result in drawn]
        axes.set_xlim(min(medians) / 1.5, max(medians) * 1.7)
        accuracies = [result.accuracy for result in drawn]
        room = 0.25 * (max(accuracies) - min(accuracies)) + 0.002
        axes.set_ylim(min(accuracies) - room, max(accuracies) + room)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    backends = {result.variant.backend for result in drawn}
    lines = [
        Line2D([], [], marker="o", linestyle="", color=colour, alpha=0.75, label=backend)
        for backend, colour in COLOURS.items()
        if backend in backends
    ]
    lines.append(Line2D([], [], linestyle="--", color="#999999", label="Pareto front"))
    axes.figure.legend(
        handles=lines,
        loc="outside upper left",
        ncols=len(lines),
        frameon=False,
        fontsize=8,
        title=f"area: the file's size, {format_bytes(largest)} at most; ringed: the chosen one; "
        "hollow: stopped by a gate",
        title_fontsize=8,
        alignment="left",
    )


def _label(
    axes: Axes,
    canvas: FigureCanvasAgg,
    drawn: Sequence[Result],
    areas: Sequence[float],
    chosen: str,
) -> None:
    """Write each name where it hides the least of what is there."""
    renderer = canvas.get_renderer()
    pixels = canvas.figure.dpi / 72
    taken: list[Box] = []
    centres = []
    for result, area in zip(drawn, areas, strict=True):
        x, y = axes.transData.transform((_median(result), result.accuracy))
        radius = (area / 3.14) ** 0.5 * pixels
        centres.append((x, y))
        taken.append((x - radius, y - radius, x + radius, y + radius))
    corners = [axes.transData.transform(corner) for corner in _list_steps(drawn)]
    for (x, y), (right, high) in itertools.pairwise(corners):
        taken.append((x - 2, y - 2, right + 2, high + 2))
    frame = axes.get_window_extent(renderer)
    inside = (frame.x0, frame.y0, frame.x1, frame.y1)
    # From the right: of neighbours, the right one takes the place to the right, and no lines cross.
    for number in sorted(range(len(drawn)), key=lambda one: (-centres[one][1], -centres[one][0])):
        (x, y), result = centres[number], drawn[number]
        name = result.variant.name
        font: dict[str, Any] = {"fontsize": 8, "fontweight": "bold" if name == chosen else "normal"}
        probe = axes.text(0.5, 0.5, name, transform=axes.transAxes, **font)
        extent = probe.get_window_extent(renderer)
        probe.remove()
        boxes = list(_list_boxes((x, y), (extent.width, extent.height), pixels))
        costs = [_measure_overlap(box, taken, inside) for box in boxes]
        best = costs.index(min(costs))  # the first of equals, which is the nearest
        taken.append(boxes[best])
        across, up = PLACES[best]
        axes.annotate(
            name,
            (_median(result), result.accuracy),
            xytext=PLACES[best],
            textcoords="offset points",
            ha=_align(across, "left", "right"),
            va=_align(up, "bottom", "top"),
            arrowprops={"arrowstyle": "-", "color": "#777777", "linewidth": 0.6, "shrinkB": 0},
            zorder=4,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            **font,
        )


def _align(offset: float, ahead: str, behind: str) -> str:
    return "center" if not offset else ahead if offset > 0 else behind


def _list_boxes(
    centre: tuple[float, float], size: tuple[float, float], pixels: float
) -> Iterator[Box]:
    """Yield the pixels that a label would take at each of its places."""
    (x, y), (width, height) = centre, size
    for across, up in PLACES:
        left = x + across * pixels - width * (0.5 if not across else 0 if across > 0 else 1)
        low = y + up * pixels - height * (0.5 if not up else 0 if up > 0 else 1)
        yield left, low, left + width, low + height


def _measure_overlap(box: Box, taken: Sequence[Box], inside: Box) -> float:
    """Return the pixels that a box shares with others, and those outside the axes."""

    def share(other: Box) -> float:
        across = min(box[2], other[2]) - max(box[0], other[0])
        up = min(box[3], other[3]) - max(box[1], other[1])
        return max(0.0, across) * max(0.0, up)

    outside = (box[2] - box[0]) * (box[3] - box[1]) - share(inside)
    return round(sum(share(other) for other in taken) + 10 * outside, 1)


def _save(figure: Figure, path: Path) -> None:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    with write_file(path) as file:
        file.write(stream.getvalue())
