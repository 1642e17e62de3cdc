from __future__ import annotations

import re
import xml.etree.ElementTree as xml

import pytest

from marwright.monitor.page.plots import (
    DASH,
    POINTS,
    Line,
    Plot,
    draw_plot,
    show_number,
    show_seconds,
)


def draw(*lines: Line, times: list[float] | None = None) -> Plot:
    count = len(lines[0].values) if lines else 0
    moments = times if times is not None else [float(2 * n) for n in range(count)]
    return draw_plot("x", "A title", moments, lines, show=show_number, read_clock=str)


def list_runs(plot: Plot) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in points.split())]
        for points in re.findall(r'points="([^"]*)"', plot.drawing)
    ]


def test_a_line_rises_where_its_values_do() -> None:
    [run] = list_runs(draw(Line("a", [0.0, 5.0, 10.0])))
    assert [x for x, _ in run] == sorted(x for x, _ in run)
    assert run[0][1] > run[1][1] > run[2][1]
    assert run[1][1] == pytest.approx((run[0][1] + run[2][1]) / 2, abs=0.1)


def test_a_line_has_a_gap_where_nothing_was_measured() -> None:
    runs = list_runs(draw(Line("a", [1.0, 2.0, None, 3.0, None, 4.0, 5.0])))
    assert [len(run) for run in runs] == [2, 2, 2]


def test_a_short_peak_is_not_thinned_away() -> None:
    values: list[float | None] = [1.0] * 1000
    values[501] = 9.0
    [run] = list_runs(draw(Line("a", values)))
    assert len(run) <= POINTS
    assert min(y for _, y in run) < 30


def test_it_is_told_in_words_and_as_a_table() -> None:
    plot = draw(Line("p50", [1.0, 2.0]), Line("p99", [4.0, 3.0]))
    assert plot.description == ("The last 0 minutes: p50 now 2, highest 2; p99 now 3, highest 4.")
    assert plot.header == ("time", "p50", "p99")
    assert plot.rows == (("2.0", "2", "3"), ("0.0", "1", "4"))
    assert "<title>A title</title><desc>The last" in plot.drawing
    assert plot.body.startswith("<tr><td>2.0</td>")


def test_the_table_is_short_and_begins_with_the_latest() -> None:
    plot = draw(Line("a", [float(n) for n in range(100)]))
    assert 8 <= len(plot.rows) <= 12
    assert plot.rows[0][1] == "99"


@pytest.mark.parametrize("values", [[], [None], [None, None], [0.0], [3.0], [0.0, 0.0]])
def test_little_is_drawn_without_a_fault(values: list[float | None]) -> None:
    plot = draw(Line("a", values), Line("b", values))
    xml.fromstring(f"<svg>{plot.drawing}</svg>")
    assert "nan" not in plot.drawing


def test_a_hostile_label_is_escaped() -> None:
    plot = draw_plot(
        "x",
        "<script>'\"",
        [0.0],
        [Line("<b>&", [1.0])],
        show=show_number,
        read_clock=lambda t: "<i>",
    )
    root = xml.fromstring(f"<svg>{plot.drawing}</svg>")
    assert root.findtext("title") == "<script>'\""
    assert {node.tag for node in root} == {"title", "desc", "line", "text", "polyline"}
    assert "<i>" not in plot.body


@pytest.mark.parametrize(
    ("value", "number", "seconds"),
    [
        (None, DASH, DASH),
        (0.0, "0", "0"),
        (0.25, "0.25", "250 ms"),
        (0.0042, "0.00", "4.20 ms"),
        (0.9999, "1.00", "1000 ms"),
        (12.34, "12.3", "12.34 s"),
        (1234.5, "1,234", "1234.50 s"),
    ],
)
def test_numbers_have_as_many_digits_as_matter(
    value: float | None, number: str, seconds: str
) -> None:
    assert (show_number(value), show_seconds(value)) == (number, seconds)
