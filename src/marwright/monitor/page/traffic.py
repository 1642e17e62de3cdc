"""Rates over the looks at a server, and their plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from marwright.monitor.page.plots import Line, Plot, draw_plot, show_number, show_seconds
from marwright.monitor.page.scene import show_clock

if TYPE_CHECKING:
    from marwright.monitor.looks import Look, Rates

__all__ = ["pick_rates", "plot_rates", "sum_rates"]

Moment = tuple[float | None, ...]
"""Requests, errors, p50, p95 and p99 of one look."""
NOTHING: Moment = (None,) * 5


def sum_rates(look: Look) -> Moment:
    """Return the rates of the whole server; its latencies are those of the slowest version.

    None where the server did not answer, or nobody asked it anything.
    """
    if look.problem:
        return NOTHING
    rates = list(look.rates.values())
    late = (_find_slowest(rates, name) for name in ("p50", "p95", "p99"))
    return (sum(item.requests for item in rates), sum(item.errors for item in rates), *late)


def _find_slowest(rates: Sequence[Rates], name: str) -> float | None:
    values = (getattr(item, name) for item in rates)
    return max((value for value in values if value is not None), default=None)


def pick_rates(look: Look, key: tuple[str, str]) -> Moment:
    """Return the rates of one version; None where it was not seen."""
    found = None if look.problem else look.rates.get(key)
    if found is None:
        return NOTHING
    return (found.requests, found.errors, found.p50, found.p95, found.p99)


def plot_rates(times: Sequence[float], rates: Sequence[Moment], *, slowest: bool) -> list[Plot]:
    """Draw traffic, latency and errors; `slowest`: latencies are of the slowest version."""
    columns: Sequence[Sequence[float | None]] = list(zip(*rates, strict=True)) or [()] * 5
    requests, errors, *late = columns
    latency = [Line(name, values) for name, values in zip(("p50", "p95", "p99"), late, strict=True)]
    title = "Time to answer" + (" of the slowest version" if slowest else "")
    count: dict[str, Any] = {"show": show_number, "read_clock": show_clock}
    seconds = {**count, "show": show_seconds}
    lines = [Line("requests", requests)]
    return [
        draw_plot("traffic", "Requests a second", times, lines, **count),
        draw_plot("latency", title, times, latency, **seconds),
        draw_plot("errors", "Errors a second (5xx)", times, [Line("errors", errors)], **count),
    ]
