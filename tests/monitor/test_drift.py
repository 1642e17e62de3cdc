from __future__ import annotations

import logging
import math
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from marwright.archive import Archive, Packed
from marwright.archive.run import REFERENCE_NAME
from marwright.errors import StorageError
from marwright.monitor import drift
from marwright.monitor.drift import Drift, Row, compare, compare_past, evaluate, render_metrics
from marwright.monitor.drift_plot import draw_drift
from marwright.monitor.reference import Reference
from marwright.monitor.spool import SCHEMA
from marwright.server.metrics.exposition import read_lines
from marwright.server.metrics.families import LABEL_LIMIT
from marwright.server.sections import DriftSettings

RATE = 0.01
NAMES = tuple(f"f{number}" for number in range(6))
MIXING = np.random.default_rng(99).normal(size=(6, 6)) + 2 * np.eye(6)
CLASSES = np.array(["0", "1", "2", "three"])


def draw_rows(random: np.random.Generator, rows: int) -> dict[str, Any]:
    """Return what a model might log: features that go together, and logits."""
    logits = random.normal(size=(rows, 4)) * 2
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return {
        "features": random.normal(size=(rows, 6)) @ MIXING,
        "prediction": CLASSES[logits.argmax(1)],
        "confidence": shares.max(1),
        "embedding": logits,
    }


def make_reference(random: np.random.Generator, rows: int = 800) -> Reference:
    drawn = draw_rows(random, rows)
    narrow = {key: drawn[key].astype(np.float32) for key in ("features", "confidence", "embedding")}
    return Reference(feature_names=NAMES, prediction=drawn["prediction"], **narrow)


def make_table(drawn: dict[str, Any], names: tuple[str, ...] = NAMES, **more: Any) -> Any:
    """Return a window in the log's own schema."""
    rows = len(drawn["features"])
    columns: dict[str, Any] = {
        "time": [datetime(2026, 11, 28, tzinfo=timezone.utc)] * rows,
        "model": ["cnn"] * rows,
        "version": ["1.0"] * rows,
        "features": [
            None if row is None else list(zip(names, map(float, row), strict=True))
            for row in drawn["features"]
        ],
        "prediction": list(drawn["prediction"]),
        "confidence": list(drawn["confidence"]),
        "embedding": [None if row is None else list(map(float, row)) for row in drawn["embedding"]],
        **more,
    }
    filled = {name: columns.get(name, [None] * rows) for name in SCHEMA.names}
    return pyarrow.table(filled, schema=SCHEMA)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return make_reference(np.random.default_rng(0))


def draw_window(rows: int = 500, seed: int = 1) -> dict[str, Any]:
    return draw_rows(np.random.default_rng(seed), rows)


def find_shifted(found: Drift) -> set[str]:
    return {row.subject for row in found.rows if row.shifted}


def test_a_window_like_the_reference_has_not_shifted(reference: Reference) -> None:
    found = compare(reference, make_table(draw_window()), error_rate=RATE)
    assert not found.shifted
    assert found.reason == ""
    assert found.notes == ()
    assert found.window_rows == 500
    tests = [(row.test, row.subject) for row in found.rows]
    assert sorted(tests) == sorted(
        [(test, f"features.{name}") for test in ("psi", "ks") for name in NAMES]
        + [("psi", "confidence"), ("ks", "confidence")]
        + [("chi_square", "prediction"), ("mmd", "embedding")]
    )
    corrected = [row.p_corrected for row in found.rows]
    assert corrected == sorted(corrected)


def test_one_feature_that_moves_is_named(reference: Reference) -> None:
    drawn = draw_window()
    drawn["features"][:, 2] += 2.5
    found = compare(reference, make_table(drawn), error_rate=RATE)
    assert found.shifted
    assert find_shifted(found) == {"features.f2"}
    assert {row.test for row in found.rows if row.shifted} == {"psi", "ks"}


def test_predicted_classes_that_change_are_seen(reference: Reference) -> None:
    drawn = draw_window()
    drawn["prediction"][:150] = "0"
    found = compare(reference, make_table(drawn), error_rate=RATE)
    assert find_shifted(found) == {"prediction"}


def test_less_confidence_is_seen(reference: Reference) -> None:
    drawn = draw_window()
    drawn["confidence"] = drawn["confidence"] ** 1.6
    found = compare(reference, make_table(drawn), error_rate=RATE)
    assert find_shifted(found) == {"confidence"}


def test_embeddings_that_move_are_seen(reference: Reference) -> None:
    drawn = draw_window()
    drawn["embedding"] = drawn["embedding"] + 1
    found = compare(reference, make_table(drawn), error_rate=RATE)
    assert find_shifted(found) == {"embedding"}


def test_the_correction_is_over_all_comparisons_and_gives_each_kind_its_part(
    reference: Reference,
) -> None:
    found = compare(reference, make_table(draw_window()), error_rate=RATE)
    least = found.rows[0]
    weights = {"features": 1 / 12, "confidence": 1 / 2, "prediction": 1, "embedding": 1}
    total = sum(weights[row.subject.split(".")[0]] for row in found.rows)
    assert total == pytest.approx(4)
    first = min(found.rows, key=lambda row: row.p / weights[row.subject.split(".")[0]])
    expected = min(1, 2 * first.p / weights[first.subject.split(".")[0]] * 4)
    assert least.p_corrected == pytest.approx(expected)


def test_windows_without_a_shift_are_called_one_at_most_as_often_as_stated() -> None:
    """200 windows, each with a reference of its own: the promise is over both."""
    random = np.random.default_rng(5)
    least = []
    for number in range(200):
        known = make_reference(random, 400)
        window = make_table(draw_rows(random, 200))
        least.append(compare(known, window, error_rate=RATE, seed=number).rows[0].p_corrected)
    for rate in (0.01, 0.05):
        assert sum(p < rate for p in least) <= rate * 200


def test_the_same_window_gives_the_same_result(reference: Reference) -> None:
    table = make_table(draw_window(1200))
    first, second = (compare(reference, table, error_rate=RATE) for _ in range(2))
    assert first.rows == second.rows


def test_a_window_of_few_rows_says_nothing(reference: Reference) -> None:
    found = compare(reference, make_table(draw_window(49)), error_rate=RATE)
    assert (found.rows, found.shifted) == ((), False)
    assert "49 predictions" in found.reason
    empty = compare(reference, SCHEMA.empty_table(), error_rate=RATE)
    assert "0 predictions" in empty.reason


def test_a_reference_of_few_rows_says_nothing() -> None:
    few = make_reference(np.random.default_rng(0), 20)
    found = compare(few, make_table(draw_window()), error_rate=RATE)
    assert not found.rows
    assert "nothing to compare" in found.reason
    assert "too few rows in the reference" in found.notes[0]


def test_redacted_columns_are_left_out_and_said(reference: Reference) -> None:
    rows = 300
    nothing = [None] * rows
    drawn = draw_window(rows)
    drawn["features"] = drawn["features"][:, :5]
    table = make_table(drawn, NAMES[:5], prediction=nothing, confidence=nothing, embedding=nothing)
    found = compare(reference, table, error_rate=RATE)
    assert {row.subject for row in found.rows} == {f"features.{name}" for name in NAMES[:5]}
    [note] = found.notes
    assert "not in the log" in note
    for subject in ("features.f5", "confidence", "prediction", "embedding"):
        assert subject in note


def test_rows_without_a_value_are_left_out_and_counted(reference: Reference) -> None:
    drawn = draw_window(300)
    rows: dict[str, list[Any]] = {key: list(value) for key, value in drawn.items()}
    for number in range(60):
        for column in rows.values():
            column[number] = None
    rows["embedding"][100] = [math.nan] * 4
    rows["embedding"][101] = [1.0] * 7
    found = compare(reference, make_table(rows), error_rate=RATE)
    assert not found.shifted
    assert len(found.rows) == 16
    assert any("60 of 300 rows without a value, left out: features.f0" in n for n in found.notes)
    assert any("61 of 300" in note and "embedding" in note for note in found.notes)


def test_too_many_rows_without_a_value_are_no_window(reference: Reference) -> None:
    drawn = draw_window(300)
    confidence = [None] * 260 + list(drawn["confidence"][260:])
    found = compare(reference, make_table({**drawn, "confidence": confidence}), error_rate=RATE)
    assert "confidence" not in {row.subject for row in found.rows}
    assert "260 of 300 rows without a value, too many, not compared: confidence" in found.notes


def test_a_table_of_other_columns_and_hostile_values_is_read(reference: Reference) -> None:
    """Unknown features, huge numbers, a column that is absent: no error, and no false rows."""
    drawn = draw_window(100)
    wide = np.concatenate([drawn["features"], np.full((100, 1), 3e38)], axis=1)
    wide[:, 0] = math.inf
    table = make_table({**drawn, "features": wide}, (*NAMES, 'x"\n')).drop_columns("embedding")
    found = compare(reference, table, error_rate=RATE)
    subjects = {row.subject for row in found.rows}
    assert "embedding" not in subjects
    assert "features.f0" not in subjects
    assert "features.f1" in subjects


def test_chunks_and_slices_of_a_log_are_read_like_one_table(reference: Reference) -> None:
    drawn = draw_window(400)
    drawn["features"] = [
        None if number % 7 == 0 else row for number, row in enumerate(drawn["features"])
    ]
    whole = make_table(drawn)
    pieces = pyarrow.concat_tables([whole.slice(0, 33), whole.slice(33, 1), whole.slice(34)])
    cut = pyarrow.concat_tables([make_table(draw_window(50, 3)), pieces]).slice(50)
    expected = compare(reference, whole, error_rate=RATE)
    for table in (pieces, cut):
        assert compare(reference, table, error_rate=RATE).rows == expected.rows
    assert np.array_equal(
        drift.read_subject(reference, cut, "features.f3"),
        np.array([math.nan if row is None else row[3] for row in drawn["features"]], np.float32),
        equal_nan=True,
    )


@pytest.mark.parametrize("kind", ["softmax", "energy"])
def test_requests_stranger_than_those_of_the_training_are_counted(
    reference: Reference, kind: str
) -> None:
    drawn = draw_window(500)
    drawn["embedding"][:100] *= 0.01  # nothing speaks for any class
    shares = np.exp(drawn["embedding"]) / np.exp(drawn["embedding"]).sum(1, keepdims=True)
    drawn["confidence"] = shares.max(1)
    energy = -np.log(np.exp(drawn["embedding"]).sum(1))
    score = 1 - drawn["confidence"] if kind == "softmax" else energy
    found = compare(reference, make_table(drawn, score=list(score)), error_rate=RATE)
    assert found.outlying is not None
    least = 0.19 if kind == "softmax" else 0.0
    assert least <= found.outlying < 0.25
    normal = draw_window(500)
    own = (
        1 - normal["confidence"]
        if kind == "softmax"
        else -np.log(np.exp(normal["embedding"]).sum(1))
    )
    quiet = compare(reference, make_table(normal, score=list(own)), error_rate=RATE)
    assert quiet.outlying is not None
    assert quiet.outlying < 0.04
    assert compare(reference, make_table(normal), error_rate=RATE).outlying is None
    unknown = make_table(normal, score=list(own + 5))
    assert compare(reference, unknown, error_rate=RATE).outlying is None


def test_scores_of_embeddings_that_are_not_logged_are_left_out(reference: Reference) -> None:
    drawn = draw_window(100)
    energy = -np.log(np.exp(drawn["embedding"]).sum(1))
    redacted = make_table({**drawn, "embedding": [None] * 100}, score=list(energy))
    found = compare(reference, redacted, error_rate=RATE)
    assert found.outlying is None
    assert {row.subject for row in found.rows} >= {"confidence", "prediction"}
    assert drift.read_subject(reference, redacted, "embedding").shape == (0, 4)


def test_past_windows_end_where_the_log_ends(reference: Reference) -> None:
    table = make_table(draw_window(370))
    past = compare_past(reference, table, window=100, error_rate=RATE)
    assert [part.num_rows for part, _ in past] == [100, 100, 100]
    last = past[-1][0]
    assert last["confidence"].to_pylist() == table["confidence"].to_pylist()[-100:]
    [(part, found)] = compare_past(reference, table.slice(0, 20), window=100, error_rate=RATE)
    assert part.num_rows == 20
    assert found.reason


class Log:
    """A prediction log of one table."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def read_window(self, model: str, version: str, rows: int) -> Any:
        if model == "broken":
            raise StorageError("the disk is gone")
        if model == "odd":
            raise ZeroDivisionError("nobody thought of it")
        return self.table.slice(max(0, self.table.num_rows - rows))


def test_every_version_is_evaluated_whatever_is_wrong_with_another(
    packed: Packed, tmp_path: Path
) -> None:
    table = make_table(draw_window(200))
    with Archive.open(packed.path) as archive:
        bare, bad = (archive.extract(tmp_path / name) for name in ("bare", "bad"))
    (bare / REFERENCE_NAME).unlink(missing_ok=True)
    (bad / REFERENCE_NAME).write_bytes(b"no reference")
    archives = {
        ("cnn", "1.0"): packed.path,
        ("bare", "1.0"): bare,
        ("bad", "1.0"): bad,
        ("gone", "1.0"): tmp_path / "gone.mar",
        ("odd", "1.0"): packed.path,
        ("broken", "1.0"): packed.path,
    }
    found = evaluate(Log(table), archives, DriftSettings(window=100))  # type: ignore[arg-type]
    assert set(found) == set(archives)
    assert found["cnn", "1.0"].window_rows == 100
    assert {row.subject for row in found["cnn", "1.0"].rows} == {"confidence", "prediction"}
    assert "no reference" in found["bare", "1.0"].reason
    assert "is no reference" in found["bad", "1.0"].reason
    assert found["gone", "1.0"].reason
    assert "the disk is gone" in found["broken", "1.0"].reason
    assert "nobody thought of it" in found["odd", "1.0"].reason
    assert not any(one.shifted for key, one in found.items() if key[0] != "cnn")


def test_metrics_are_those_of_the_table_with_every_label_escaped() -> None:
    row = Row("ks", 'features.a"b\\c\nd', 0.25, 1e-5, 1e-4, True)
    made = Drift((row,), True, 500, 1_764_313_200.5)
    text = render_metrics({('m"\n', "1.0"): made, ("other", "2"): Drift((), False, 3, 1.0, "few")})
    samples, failed = read_lines(text)
    assert failed == 0
    found = {(one.name, dict(one.labels).get("model")): one for one in samples}
    hostile = 'm\\"\\n'
    assert found["marwright_drift_score", hostile].value == "0.25"
    assert float(found["marwright_drift_p_value", hostile].value) == 1e-4
    assert found["marwright_drift_detected", hostile].value == "1"
    assert found["marwright_drift_window_rows", "other"].value == "3"
    assert ("marwright_drift_detected", "other") not in found
    subject = dict(found["marwright_drift_score", hostile].labels)["subject"]
    assert subject == 'features.a\\"b\\\\c\\nd'
    assert "nan" not in text.lower()


def test_the_worst_subjects_are_written_and_the_rest_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = tuple(
        Row(test, f"features.f{number}", 0.1, number / 1000, number / 1000, False)
        for number in range(LABEL_LIMIT + 20)
        for test in ("psi", "ks")
    )
    with caplog.at_level(logging.WARNING):
        text = render_metrics({("cnn", "1.0"): Drift(rows, False, 500, 1.0)})
    scores = [line for line in text.splitlines() if line.startswith("marwright_drift_score{")]
    assert len(scores) == 2 * LABEL_LIMIT
    assert 'subject="features.f0"' in text
    assert f'subject="features.f{LABEL_LIMIT}"' not in text
    assert "20 of 220 subjects" in caplog.text


@pytest.mark.parametrize("worst", ["features.f1", "confidence", "prediction", "embedding", ""])
def test_a_picture_is_drawn_of_every_kind_of_worst_subject(
    reference: Reference, tmp_path: Path, worst: str
) -> None:
    drawn = draw_window(300)
    if worst == "features.f1":
        drawn["features"][200:, 1] += 20
    elif worst == "confidence":
        drawn["confidence"][200:] *= 0.1
    elif worst == "prediction":
        drawn["prediction"][200:] = "$three_{"
    elif worst:
        drawn["embedding"][200:] += 5
    past = compare_past(reference, make_table(drawn), window=100, error_rate=RATE)
    if worst:
        assert past[-1][1].rows[0].subject == worst
    path = tmp_path / "drift.png"
    draw_drift(reference, past, path, title="cnn $1.0\n")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_nothing_says_why(reference: Reference, tmp_path: Path) -> None:
    past = compare_past(reference, make_table(draw_window(9)), window=100, error_rate=RATE)
    draw_drift(reference, past, tmp_path / "drift.png", title="cnn")
    assert (tmp_path / "drift.png").stat().st_size > 1000


def test_a_window_of_10_000_rows_and_64_features_takes_little_memory() -> None:
    """200 MB beside what the imports take; the time is for `make bench WHAT=drift`."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "benchmarks/drift.py", "--measure-window"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, size = map(float, done.stdout.split())
    assert seconds < 30
    assert size < 200e6
