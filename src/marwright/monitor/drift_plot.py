"""Drift drawn: every subject over the last windows, and the worst one against the reference."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from marwright.monitor.drift import Drift, Row, read_subject
from marwright.monitor.reference import Reference
from marwright.storage import write_file

__all__ = ["draw_drift"]

COLOURS = {"reference": "#4c72b0", "window": "#dd8452"}
MOST_SUBJECTS = 12
"""Comparisons that are drawn, the worst ones of the last window."""
MOST_CLASSES = 20
BINS = 30
LEAST_P = 1e-6
"""What is less likely is drawn as this."""
LETTERS = 60
"""Of a name that is drawn."""


def draw_drift(
    reference: Reference, windows: Sequence[tuple[Any, Drift]], path: Path, *, title: str
) -> None:
    """Draw windows, oldest first, each with what was said of it, as a PNG.

    Raises:
        StorageError: the picture cannot be written.
    """
    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, height_ratios=(3, 2))
    table, last = windows[-1]
    shown = last.rows[:MOST_SUBJECTS]
    if shown:
        _draw_scores(figure, above, [drift for _, drift in windows], shown)
        _draw_subject(below, reference, table, shown[0])
    else:
        for axis in (above, below):
            axis.set_axis_off()
        above.text(0.5, 0.5, last.reason, ha="center", wrap=True, transform=above.transAxes)
    found = "shifted" if last.shifted else "no shift"
    figure.suptitle(_plain(f"{title}: {last.window_rows} predictions, {found}"), fontsize=10)
    with write_file(path) as stream:
        figure.savefig(stream, format="png", dpi=100)


def _draw_scores(figure: Figure, axis: Any, drifts: Sequence[Drift], shown: Sequence[Row]) -> None:
    """Draw a field for each comparison and window: its colour is the p-value, its text the score.

    Scores of different tests have no scale in common, p-values have.
    """
    keys = [(row.test, row.subject) for row in shown]
    fields = np.full((len(keys), len(drifts)), math.nan)
    for column, drift in enumerate(drifts):
        found = {(row.test, row.subject): row for row in drift.rows}
        for line, key in enumerate(keys):
            if (row := found.get(key)) is None:
                continue
            fields[line, column] = max(row.p_corrected, LEAST_P)
            text = f"{row.score:.2g}" + ("*" if row.shifted else "")
            dark = row.p_corrected < 1e-3
            colour = "white" if dark else "black"
            axis.text(column, line, text, ha="center", va="center", fontsize=7, color=colour)
    picture = axis.imshow(fields, aspect="auto", cmap="magma", norm=LogNorm(LEAST_P, 1))
    figure.colorbar(picture, ax=axis, label="corrected p-value")
    names = [_plain(f"{subject} ({test})") for test, subject in keys]
    axis.set_yticks(range(len(keys)), names, fontsize=7)
    ages = [f"{number - len(drifts) + 1}" for number in range(len(drifts))]
    axis.set_xticks(range(len(drifts)), ages)
    axis.set_xlabel("window, 0 is the last one; numbers are scores, * a shift")


def _draw_subject(axis: Any, reference: Reference, window: Any, worst: Row) -> None:
    """Draw the reference and the window side by side, as shares."""
    if worst.subject == "prediction":
        parts = [
            list(map(str, reference.prediction)),
            read_subject(reference, window, "prediction"),
        ]
        _draw_classes(axis, parts)
    else:
        label, values = _read_values(reference, window, worst.subject)
        both = np.concatenate(values)
        # A picture of nearly all: one value far out would squeeze the rest into one bar.
        edges = np.histogram_bin_edges(both, BINS, tuple(np.quantile(both, (0.001, 0.999))))
        for (name, colour), part in zip(COLOURS.items(), values, strict=True):
            weights = np.full(len(part), 1 / len(part))
            clipped = np.clip(part, edges[0], edges[-1])
            options = {"alpha": 0.6, "label": name, "color": colour}
            axis.hist(clipped, bins=edges, weights=weights, **options)
        axis.set_xlabel(_plain(label))
    axis.set_ylabel("share of rows")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)


def _draw_classes(axis: Any, parts: Sequence[Sequence[str]]) -> None:
    """Draw each class's share, of the commonest ones."""
    counts = [Counter(part) for part in parts]
    classes = [name for name, _ in (counts[0] + counts[1]).most_common(MOST_CLASSES)]
    places = np.arange(len(classes))
    for shift, (name, colour), count in zip((-0.2, 0.2), COLOURS.items(), counts, strict=True):
        shares = [count[one] / max(1, count.total()) for one in classes]
        axis.bar(places + shift, shares, width=0.4, label=name, color=colour)
    axis.set_xticks(places, [_plain(one) for one in classes], fontsize=7)
    axis.set_xlabel("predicted class")


def _read_values(
    reference: Reference, window: Any, subject: str
) -> tuple[str, list[np.ndarray[Any, Any]]]:
    """Return an axis's label, and the finite values of the reference and of the window."""
    if subject == "embedding":
        middle = reference.embedding.mean(0)
        points = [reference.embedding, read_subject(reference, window, subject)]
        label = "embedding: distance from the reference's mean"
        values = [np.linalg.norm(part - middle, axis=1) for part in points]
    elif subject == "confidence":
        label, values = subject, [reference.confidence, read_subject(reference, window, subject)]
    else:
        index = reference.feature_names.index(subject.removeprefix("features."))
        label, values = (
            subject,
            [reference.features[:, index], read_subject(reference, window, subject)],
        )
    return label, [part[np.isfinite(part)] for part in values]


def _plain(text: str) -> str:
    """Return a name as it is drawn: short, and nothing in it is taken for a formula."""
    short = text if len(text) <= LETTERS else f"{text[:LETTERS]}..."
    return "".join(one if one.isprintable() else "?" for one in short).replace("$", r"\$")
