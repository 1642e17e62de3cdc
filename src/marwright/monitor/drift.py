"""Drift: a window of logged predictions against what the model saw at its training.

Compared are features and confidences by PSI and by KS, predicted classes by chi-square, and
embeddings by MMD. Features, confidence, prediction and embedding get an equal part of the error
rate each, and their comparisons share it: a model of 64 features is no blinder to its classes than
one of two. PSI and KS of one feature are two comparisons. Holm's correction keeps the chance that a
window without a shift is called one at the error rate at most, however much the comparisons have to
do with each other; half of the rate is held back (MARGIN).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from marwright.errors import MarwrightError
from marwright.monitor.reference import Reference
from marwright.monitor.shifts import (
    MOST_POINTS,
    Comparison,
    compute_psi,
    correct,
    test_chi_square,
    test_ks,
    test_mmd,
)
from marwright.monitor.spool import arrow, compute
from marwright.server.metrics.exposition import Exposition
from marwright.server.metrics.families import LABEL_LIMIT
from marwright.server.wanted import list_wanted

if TYPE_CHECKING:
    from marwright.monitor.predictions import PredictionLog
    from marwright.server.deployment import Deployment
    from marwright.server.sections import DriftSettings

__all__ = [
    "compare",
    "compare_past",
    "Drift",
    "evaluate",
    "evaluate_version",
    "list_archives",
    "read_subject",
    "render_metrics",
    "Row",
]

_log = logging.getLogger(__name__)

FEWEST_ROWS = 50
"""Values of a subject below which nothing is said of it, in the window and in the reference."""
MARGIN = 2
"""By how much corrected p-values are raised. All windows are compared with one reference, which is
itself a sample: with an unlucky one they are called shifted more often than on average."""
ROOM = 10
"""How many times finer than needed the p-value of the permutation test can get."""
PERMUTATIONS = (200, 100_000)
"""Least and most of them. At error rates below 0.00008 the embedding alone shows no shift."""
OUTLYING = 0.99
"""The quantile of the reference's scores beyond which a request is outlying."""
SAME = 1e-3
"""How far a logged score may be from the one that its row's confidence or embedding gives."""
SHOWN = 5
"""Subjects that a note names."""

Key: TypeAlias = tuple[str, str]
Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """One comparison."""

    test: str
    """psi, ks, chi_square or mmd."""
    subject: str
    """features.NAME, confidence, prediction or embedding."""
    score: float
    """In the test's own measure."""
    p: float
    """The chance of such a score without a shift."""
    p_corrected: float
    """For all comparisons of the window, and by MARGIN."""
    shifted: bool


@dataclass(frozen=True)
class Drift:
    """What is said of one window."""

    rows: tuple[Row, ...]
    """The least likely first."""
    shifted: bool
    """Whether any row is."""
    window_rows: int
    time: float
    """When it was compared, in seconds since the epoch."""
    reason: str = ""
    """Why nothing was compared."""
    notes: tuple[str, ...] = ()
    """What was left out, and why."""
    outlying: float | None = None
    """Share of requests with a score beyond the reference's 99 % quantile; no test is made of it:
    without a shift it is about 0.01. None where no score is logged."""

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return asdict(self)


class _Tried(NamedTuple):
    kind: str
    test: str
    subject: str
    found: Comparison


def compare(
    reference: Reference, window: arrow.Table, *, error_rate: float, seed: int = 0
) -> Drift:
    """Compare a window, a table in the schema of the prediction log, with a reference.

    Values that are missing, redacted or not finite are left out of their subject alone. The seed
    is of the permutation test and of the rows that it looks at.
    """
    now = time.time()
    rows = window.num_rows
    if rows < FEWEST_ROWS:
        reason = f"{rows} predictions are logged; {FEWEST_ROWS} are the least that is compared"
        return Drift((), False, rows, now, reason)
    missing = _Missing(rows)
    tried = [
        *_compare_numbers(reference, window, missing),
        *_compare_classes(reference, window, missing),
        *_compare_points(reference, window, missing, error_rate, seed),
    ]
    if not tried:
        reason = "there is nothing to compare: the log and the reference have no subject in common"
        return Drift((), False, rows, now, reason, tuple(missing.describe()))
    made = _correct(tried, error_rate)
    outlying = _measure_outlying(reference, window)
    shifted = any(row.shifted for row in made)
    return Drift(made, shifted, rows, now, "", tuple(missing.describe()), outlying)


def compare_past(
    reference: Reference, table: arrow.Table, *, window: int, error_rate: float
) -> list[tuple[arrow.Table, Drift]]:
    """Return the windows of a longer table and what is said of each, oldest first.

    They end where the table ends and do not overlap; what is left over at its beginning is in none.
    """
    starts = range(table.num_rows - window, -1, -window) or [0]
    parts = [table.slice(start, window) for start in reversed(starts)]
    return [(part, compare(reference, part, error_rate=error_rate)) for part in parts]


def evaluate(
    log: PredictionLog, archives: Mapping[Key, Path], settings: DriftSettings
) -> dict[Key, Drift]:
    """Compare the last window of each version, by model and version, with its archive's reference.

    What cannot be compared has a reason; that never is the other versions' trouble.
    """
    found = {}
    for key, path in archives.items():
        try:
            found[key] = evaluate_version(log, key, path, settings)
        except MarwrightError as exc:
            found[key] = Drift((), False, 0, time.time(), str(exc))
        except Exception as exc:  # a mistake of ours with one version is not the others' trouble
            _log.warning("drift of %s %s cannot be told: %r", *key, exc)
            found[key] = Drift((), False, 0, time.time(), f"it could not be compared: {exc!r}")
    return found


def evaluate_version(log: PredictionLog, key: Key, path: Path, settings: DriftSettings) -> Drift:
    """Compare the last window of one version with its archive's reference.

    Raises:
        MarwrightError: the archive or the log cannot be read.
    """
    window = log.read_window(*key, settings.window)
    reference = Reference.read(path)
    if reference is not None:
        return compare(reference, window, error_rate=settings.error_rate)
    reason = f"{path.name} has no reference: it was packed from a run without one"
    return Drift((), False, window.num_rows, time.time(), reason)


def list_archives(deployment: Deployment) -> dict[Key, Path]:
    """Return the archive of each version that a deployment serves; broken ones are left out."""
    return {item.key: item.path for item in list_wanted(deployment, refused={})}


def render_metrics(drifts: Mapping[Key, Drift]) -> str:
    """Return the samples of marwright_drift_*, as Prometheus reads them.

    Of more than LABEL_LIMIT subjects of a version the worst are written, and the log says so.
    """
    text = Exposition()
    for (model, version), drift in drifts.items():
        labels = {"model": model, "version": version}
        text.add("marwright_drift_window_rows", drift.window_rows, **labels)
        if drift.reason:
            continue
        text.add("marwright_drift_detected", int(drift.shifted), **labels)
        text.add("marwright_drift_timestamp_seconds", drift.time, **labels)
        subjects = list(dict.fromkeys(row.subject for row in drift.rows))
        if len(subjects) > LABEL_LIMIT:
            left = len(subjects) - LABEL_LIMIT
            _log.warning(
                "drift of %s %s: %d of %d subjects are not among the metrics, those with the"
                " highest p-values",
                *(model, version, left, len(subjects)),
            )
        shown = set(subjects[:LABEL_LIMIT])
        for row in drift.rows:
            if row.subject in shown:
                more = {**labels, "test": row.test, "subject": row.subject}
                text.add("marwright_drift_score", row.score, **more)
                text.add("marwright_drift_p_value", row.p_corrected, **more)
    return text.render().decode()


# Comparisons.


def _compare_numbers(
    reference: Reference, window: arrow.Table, missing: _Missing
) -> Iterator[_Tried]:
    tests: dict[str, Callable[[Floats, Floats], Comparison]] = {"psi": compute_psi, "ks": test_ks}
    features = _read_features(window, reference.feature_names)
    columns = [
        (f"features.{name}", reference.features[:, index], features[:, index])
        for index, name in enumerate(reference.feature_names)
    ]
    if reference.confidence.size:
        columns.append(("confidence", reference.confidence, _read_numbers(window, "confidence")))
    for subject, first, second in columns:
        first, second = first[np.isfinite(first)], second[np.isfinite(second)]
        if missing.is_enough(subject, len(first), len(second)):
            for test, run in tests.items():
                yield _Tried(subject.split(".")[0], test, subject, run(first, second))


def _compare_classes(
    reference: Reference, window: arrow.Table, missing: _Missing
) -> Iterator[_Tried]:
    if not reference.prediction.size:
        return
    found = _read_texts(window, "prediction")
    if missing.is_enough("prediction", len(reference.prediction), len(found)):
        result = test_chi_square(map(str, reference.prediction), found)
        yield _Tried("prediction", "chi_square", "prediction", result)


def _compare_points(
    reference: Reference, window: arrow.Table, missing: _Missing, error_rate: float, seed: int
) -> Iterator[_Tried]:
    if not reference.embedding.size:
        return
    length = reference.embedding.shape[1]
    rows = _find_points(window, length)
    if missing.is_enough("embedding", len(reference.embedding), len(rows)):
        if len(rows) > MOST_POINTS:
            rows = np.random.default_rng(seed).choice(rows, MOST_POINTS, replace=False)
        points = _read_points(window, rows, length)
        kinds = bool(reference.feature_names) + bool(reference.confidence.size) + 2
        least, most = PERMUTATIONS
        permutations = min(most, max(least, math.ceil(ROOM * kinds / error_rate)))
        found = test_mmd(reference.embedding, points, permutations=permutations, seed=seed)
        yield _Tried("embedding", "mmd", "embedding", found)


def _correct(tried: Sequence[_Tried], error_rate: float) -> tuple[Row, ...]:
    """Return the rows, the least likely first; each kind of subject has an equal weight."""
    kinds = [item.kind for item in tried]
    weights = [1 / kinds.count(kind) for kind in kinds]
    holm = correct([item.found.p for item in tried], weights=weights)
    corrected = [min(1.0, MARGIN * p) for p in holm]
    rows = [
        Row(item.test, item.subject, *item.found, p, p < error_rate)
        for item, p in zip(tried, corrected, strict=True)
    ]
    return tuple(sorted(rows, key=lambda row: (row.p_corrected, row.p)))


def _measure_outlying(reference: Reference, window: arrow.Table) -> float | None:
    """Return the share of scores beyond what 99 % of the reference's rows have.

    Which score is logged is seen from the rows that have a confidence or an embedding too.
    """
    scores = _read_numbers(window, "score")
    if np.isfinite(scores).sum() < FEWEST_ROWS:
        return None
    confidence = _read_numbers(window, "confidence")
    candidates: list[tuple[Any, Any]] = [(1 - reference.confidence, 1 - confidence)]
    if reference.embedding.size:
        length = reference.embedding.shape[1]
        rows = _find_points(window, length)[-MOST_POINTS:]
        if rows.size:
            own = np.full(window.num_rows, np.nan)
            own[rows] = _measure_energy(_read_points(window, rows, length))
            candidates.append((_measure_energy(reference.embedding), own))
    for known, own in candidates:
        known, apart = known[np.isfinite(known)], np.abs(scores - own)
        apart = apart[np.isfinite(apart)]
        if known.size >= FEWEST_ROWS and apart.size and np.median(apart) < SAME:
            limit = np.quantile(known, OUTLYING)
            return float((scores[np.isfinite(scores)] > limit).mean())
    return None


def _measure_energy(logits: Floats) -> npt.NDArray[np.float64]:
    """Return -log(sum(exp(logits))) of each row, as handlers log it."""
    return np.asarray(-np.logaddexp.reduce(logits.astype(np.float64), axis=1))


# The window's columns.


class _Missing:
    """Which subjects had rows without a value, or too few with one."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._gaps: dict[int, list[str]] = {}
        self._scarce: list[str] = []

    def is_enough(self, subject: str, known: int, found: int) -> bool:
        """Whether a subject is compared, with how many values of the reference and the window."""
        if known < FEWEST_ROWS:
            self._scarce.append(subject)
            return False
        if found < self._rows:
            self._gaps.setdefault(found, []).append(subject)
        return found >= FEWEST_ROWS

    def describe(self) -> Iterator[str]:
        """Yield a line for each number of rows that had no value."""
        if self._scarce:
            yield f"too few rows in the reference, not compared: {_list_some(self._scarce)}"
        for found, subjects in sorted(self._gaps.items()):
            named = _list_some(subjects)
            if not found:
                yield f"not in the log, not compared: {named}"
            else:
                left = "left out" if found >= FEWEST_ROWS else "too many, not compared"
                yield f"{self._rows - found} of {self._rows} rows without a value, {left}: {named}"


def _list_some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def read_subject(reference: Reference, window: arrow.Table, subject: str) -> Any:
    """Return a subject's values in a window: numbers, texts of the prediction, (n, d) points."""
    if subject == "prediction":
        return _read_texts(window, subject)
    if subject == "embedding":
        length = reference.embedding.shape[1]
        return _read_points(window, _find_points(window, length), length)
    if subject.startswith("features."):
        return _read_features(window, (subject.removeprefix("features."),))[:, 0]
    return _read_numbers(window, subject)


def _read_numbers(window: arrow.Table, name: str) -> Floats:
    """Return a column of numbers; not a number where there is none."""
    if name not in window.column_names:
        return np.full(window.num_rows, np.nan, np.float32)
    column = window[name].cast(arrow.float32()).fill_null(math.nan)
    return np.asarray(column.to_numpy(), np.float32)


def _read_texts(window: arrow.Table, name: str) -> list[str]:
    """Return the texts of a column that are there."""
    if name not in window.column_names:
        return []
    found: list[str] = window[name].drop_null().to_pylist()
    return found


def _read_features(window: arrow.Table, names: Sequence[str]) -> Floats:
    """Return (rows, names); not a number where a row has no such feature."""
    found = np.full((window.num_rows, len(names)), np.nan, np.float32)
    if "features" not in window.column_names or not names:
        return found
    wanted = arrow.array(names, arrow.string())
    start = 0
    for chunk in window["features"].chunks:
        ends = chunk.offsets.to_numpy()
        first, length = int(ends[0]), int(ends[-1] - ends[0])
        places = compute.index_in(chunk.keys.slice(first, length), wanted)
        columns = places.fill_null(-1).to_numpy()
        values = chunk.items.slice(first, length).fill_null(math.nan).to_numpy()
        rows = np.repeat(np.arange(start, start + len(chunk)), np.diff(ends))
        known = columns >= 0
        found[rows[known], columns[known]] = values[known]
        start += len(chunk)
    return found


def _find_points(window: arrow.Table, length: int) -> npt.NDArray[np.int64]:
    """Return which rows have an embedding of this length, all of it finite."""
    if "embedding" not in window.column_names:
        return np.zeros(0, np.int64)
    lengths = compute.list_value_length(window["embedding"]).fill_null(-1).to_numpy()
    return np.flatnonzero(lengths == length)


def _read_points(window: arrow.Table, rows: npt.NDArray[np.int64], length: int) -> Floats:
    """Return the embeddings of rows that have one of this length."""
    if not rows.size:
        return np.zeros((0, length), np.float32)
    taken = compute.list_flatten(window["embedding"].take(arrow.array(rows)))
    values = np.asarray(taken.fill_null(math.nan).to_numpy(), np.float32)
    return values.reshape(len(rows), length)
