"""Line plots as SVG, drawn on the server: no script and no library is needed to see them.

Each has a title, a description in words, and its numbers as a table for who does not see it. Lines
differ in their dashes too, not in colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

__all__ = ["DASH", "draw_plot", "Line", "Plot", "show_number", "show_seconds"]

WIDTH, HEIGHT = 360, 150
LEFT, RIGHT, TOP, BOTTOM = 52, 6, 8, 20
POINTS = 120
"""Most of one line: more than that no screen shows."""
ROWS = 8
"""Of the table."""
DASH = "\N{EN DASH}"
"""Where there is nothing to tell."""

Values = Sequence[float | None]
"""None where nothing was measured: the line has a gap there."""


@dataclass(frozen=True)
class Line:
    """One line of a plot."""

    label: str
    values: Values


@dataclass(frozen=True)
class Plot:
    """A plot, drawn; the parts that change while somebody looks are of their own."""

    id: str
    title: str
    labels: tuple[str, ...]
    description: str
    drawing: Markup
    """What stands inside the <svg>."""
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """The table: the latest moment first."""
    width: int = WIDTH
    height: int = HEIGHT

    @property
    def body(self) -> Markup:
        """The rows of the table as HTML."""
        cells = (Markup("").join(map(Markup("<td>{}</td>").format, row)) for row in self.rows)
        return Markup("").join(map(Markup("<tr>{}</tr>").format, cells))


def draw_plot(
    id: str,
    title: str,
    times: Sequence[float],
    lines: Sequence[Line],
    *,
    show: Callable[[float | None], str],
    read_clock: Callable[[float], str],
) -> Plot:
    """Draw lines over moments, which are seconds since the epoch, oldest first.

    `show` writes a value for people, `read_clock` a moment.
    """
    kept, moments = _thin(times)
    thinned = [Line(line.label, [_join(line.values[a:b]) for a, b in kept]) for line in lines]
    top = _round_up(max((v for line in thinned for v in line.values if v is not None), default=0.0))
    description = _describe(thinned, times, show)
    parts = [
        Markup("<title>{}</title><desc>{}</desc>").format(title, description),
        *_draw_grid(top, moments, show, read_clock),
        *(
            Markup('<polyline class="line line{}" points="{}"/>').format(number, points)
            for number, line in enumerate(thinned, 1)
            for points in _list_runs(line.values, moments, top)
        ),
    ]
    rows = tuple(
        (read_clock(moments[n]), *(show(line.values[n]) for line in thinned))
        for n in range(len(moments) - 1, -1, -max(1, len(moments) // ROWS))
    )
    labels = tuple(line.label for line in lines)
    drawing = Markup("").join(parts)
    return Plot(id, title, labels, description, drawing, ("time", *labels), rows)


def _thin(times: Sequence[float]) -> tuple[list[tuple[int, int]], list[float]]:
    """Return the spans of values that share a point, and the moment of each."""
    step = max(1, math.ceil(len(times) / POINTS))
    # Counted from the end, so that the latest value is always a point of its own span.
    ends = sorted(range(len(times), 0, -step))
    spans = [(max(0, end - step), end) for end in ends]
    return spans, [times[end - 1] for end in ends]


def _join(values: Values) -> float | None:
    """Return the highest of what shares a point: a short peak must not be smoothed away."""
    return max((value for value in values if value is not None), default=None)


def _round_up(value: float) -> float:
    """Return the next of 1, 2, 5 times a power of ten: where the scale ends."""
    if value <= 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((k * power for k in (1, 2, 5, 10) if value <= k * power * 1.0001), 10 * power)


def _place(moment: float, moments: Sequence[float]) -> float:
    span = moments[-1] - moments[0]
    share = (moment - moments[0]) / span if span > 0 else 1.0
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _list_runs(values: Values, moments: Sequence[float], top: float) -> Iterator[str]:
    """Yield the corners of each stretch without a gap; one point alone is a short dash."""
    run: list[str] = []
    for value, moment in zip([*values, None], [*moments, 0.0], strict=True):
        if value is None:
            if run:
                yield " ".join(run if len(run) > 1 else [run[0], _shift(run[0])])
            run = []
            continue
        height = HEIGHT - TOP - BOTTOM
        y = TOP + height * (1 - min(value / top, 1.0))
        run.append(f"{_place(moment, moments):.1f},{y:.1f}")


def _shift(corner: str) -> str:
    x, _, y = corner.partition(",")
    return f"{float(x) - 2:.1f},{y}"


def _draw_grid(
    top: float,
    moments: Sequence[float],
    show: Callable[[float | None], str],
    read_clock: Callable[[float], str],
) -> Iterator[Markup]:
    for share in (0.0, 0.5, 1.0):
        y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)
        yield Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
            LEFT, WIDTH - RIGHT, y, y
        )
        yield Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
            LEFT - 4, y + 3, show(top * share)
        )
    if moments:
        yield Markup('<text x="{}" y="{}">{}</text>').format(
            LEFT, HEIGHT - 5, read_clock(moments[0])
        )
        yield Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(
            WIDTH - RIGHT, HEIGHT - 5, read_clock(moments[-1])
        )


def _describe(
    lines: Sequence[Line], times: Sequence[float], show: Callable[[float | None], str]
) -> str:
    """Return in words what the plot shows."""
    if not times:
        return "Nothing was measured yet."
    minutes = (times[-1] - times[0]) / 60
    texts = []
    for line in lines:
        known = [value for value in line.values if value is not None]
        if known:
            texts.append(f"{line.label} now {show(line.values[-1])}, highest {show(max(known))}")
    return f"The last {minutes:.0f} minutes: {'; '.join(texts) or 'nothing measured'}."


def show_number(value: float | None) -> str:
    """Write a number with as many digits as matter; a dash for None."""
    if value is None:
        return DASH
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def show_seconds(value: float | None) -> str:
    """Write a time in seconds, or in milliseconds below one; a dash for None."""
    if value is None:
        return DASH
    if not value:
        return "0"
    if value >= 1:
        return f"{value:.2f} s"
    milliseconds = value * 1000
    return f"{milliseconds:.{0 if milliseconds >= 100 else 1 if milliseconds >= 10 else 2}f} ms"
