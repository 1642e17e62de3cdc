from __future__ import annotations

import pytest

from marwright.monitor.looks import Look, Rates
from marwright.monitor.page.traffic import pick_rates, plot_rates, sum_rates

ONE, TWO = ("cnn", "1.0"), ("cnn", "2.0")
LOOK = Look(
    1.0,
    {},
    {ONE: Rates(10.0, 1.0, 0.01, 0.02, 0.03), TWO: Rates(5.0, 0.5, 0.02, 0.02, None)},
)
AWAY = Look(2.0, {}, problem="gone")


def test_a_server_has_the_traffic_of_all_and_the_latency_of_its_slowest() -> None:
    assert sum_rates(LOOK) == (15.0, 1.5, 0.02, 0.02, 0.03)
    assert sum_rates(Look(1.0, {})) == (0, 0, None, None, None)


def test_a_version_has_its_own() -> None:
    assert pick_rates(LOOK, TWO) == (5.0, 0.5, 0.02, 0.02, None)
    assert pick_rates(LOOK, ("cnn", "3.0")) == (None,) * 5


def test_a_server_that_is_away_is_a_gap_and_no_zero() -> None:
    assert sum_rates(AWAY) == pick_rates(AWAY, ONE) == (None,) * 5


@pytest.mark.parametrize("count", [0, 1, 450])
def test_traffic_latency_and_errors_are_drawn(count: int) -> None:
    times = [float(n) for n in range(count)]
    plots = plot_rates(times, [sum_rates(LOOK)] * count, slowest=True)
    assert [plot.id for plot in plots] == ["traffic", "latency", "errors"]
    assert plots[1].labels == ("p50", "p95", "p99")
    assert ("polyline" in plots[0].drawing) is (count > 0)
