"""The state of releases as metrics, from releases.jsonl."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from marwright.release.history import Standing
from marwright.server.metrics.exposition import Exposition

__all__ = ["render_releases"]


def render_releases(standings: Iterable[Standing]) -> str:
    """Return the metrics of the releases that are open, in the text format.

    Of several releases of one version the latest counts.
    """
    exposition = Exposition()
    latest = {(one.begun.model, one.begun.version): one for one in standings}
    for (model, version), standing in latest.items():
        if standing.is_open:
            labels = {"model": model, "version": version}
            exposition.add("marwright_release_open", 1, step=standing.step, **labels)
            begun = _read_time(standing.begun.time)
            if begun is not None:
                exposition.add("marwright_release_begun_timestamp_seconds", begun, **labels)
    return exposition.render().decode()


def _read_time(text: str) -> float | None:
    """Return seconds since the epoch; None where a line of the history has no time."""
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None
