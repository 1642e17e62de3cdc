from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")

from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest  # type: ignore[import-untyped]
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from marwright.monitor.feedback import Label
from marwright.monitor.parts import Part
from marwright.monitor.predictions import PredictionLog
from marwright.monitor.quality import estimate_share, measure_quality

Make = Callable[..., dict[str, Any]]
Write = Callable[..., Path]


@pytest.fixture
def log(tmp_path: Path) -> PredictionLog:
    return PredictionLog(tmp_path / "predictions")


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(max_examples=200, deadline=None)
def test_intervals_are_wilsons(counts: tuple[int, int]) -> None:
    count, total = counts
    found = estimate_share(count, total)
    expected = binomtest(count, total).proportion_ci(method="wilson")
    assert found.value == count / total
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_of_nothing_nothing_is_known() -> None:
    found = estimate_share(0, 0)
    assert math.isnan(found.value)
    assert (found.low, found.high, found.n) == (0, 1, 0)
    assert found.to_json()["value"] is None


def test_intervals_hold_the_true_share_as_often_as_they_say() -> None:
    chance = random.Random(0)
    inside = 0
    for _ in range(2000):
        found = estimate_share(sum(chance.random() < 0.9 for _ in range(200)), 200)
        inside += found.low <= 0.9 <= found.high
    assert 0.93 < inside / 2000 < 0.97


def test_classes_and_confusion_are_those_of_sklearn(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    chance = random.Random(0)
    names = ["0", "1", 'a "b"\nc', "never predicted"]
    truth = [chance.choices(names, [60, 30, 20, 5])[0] for _ in range(600)]
    said = [label if chance.random() < 0.8 else chance.choice(names[:3]) for label in truth]
    rows = [spool_record(f"r{n}", prediction=name) for n, name in enumerate(said)]
    spool_write(log.folder, rows[:400])
    log.collect()
    spool_write(log.folder, rows[400:])
    log.add_labels([Label(f"r{n}", name) for n, name in enumerate(truth)])
    quality = measure_quality(log, "cnn", "1.0")
    right = sum(a == b for a, b in zip(truth, said, strict=True))
    assert (quality.accuracy.n, quality.accuracy.value) == (600, right / 600)
    precision, recall, _, support = precision_recall_fscore_support(
        truth, said, labels=names, zero_division=0
    )
    for place, name in enumerate(names):
        found = quality.classes[name]
        assert found.support == support[place]
        assert found.recall.value == pytest.approx(recall[place])
        assert found.is_few == (support[place] < 30)
        if name in said:
            assert found.precision.value == pytest.approx(precision[place])
        else:
            assert found.precision.n == 0
    matrix = confusion_matrix(truth, said, labels=names)
    expected = {
        (names[i], names[j]): matrix[i][j] for i in range(4) for j in range(4) if matrix[i][j]
    }
    assert quality.confusion == expected
    assert list(quality.confusion.values()) == sorted(expected.values(), reverse=True)


def test_confidence_is_compared_with_accuracy(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    rows = [spool_record(f"a{n}", confidence=0.95, prediction="7") for n in range(10)]
    rows += [spool_record(f"b{n}", confidence=0.5, prediction="7") for n in range(10)]
    rows += [spool_record(f"c{n}", confidence=None, prediction="7") for n in range(10)]
    spool_write(log.folder, rows)
    assert measure_quality(log, "cnn", "1.0").calibration_error is None
    # Of the sure ones 8 are right, of the unsure ones 5: off by 0.15 and by nothing.
    labels = [Label(f"a{n}", "7" if n < 8 else "1") for n in range(10)]
    labels += [Label(f"b{n}", "7" if n < 5 else "1") for n in range(10)]
    labels += [Label(f"c{n}", "1") for n in range(10)]
    log.add_labels(labels)
    error = measure_quality(log, "cnn", "1.0").calibration_error
    assert error == pytest.approx(0.075, abs=1e-6)


def test_versions_are_measured_apart_and_a_request_sent_again_counts_once(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    now = time.time()
    rows = [
        spool_record("shared", prediction="7", time=now),
        spool_record("shared", prediction="1", version="2.0"),
        spool_record("shared", prediction="7", model="mlp"),
        spool_record("again", prediction="1", time=now - 5),
        spool_record("again", prediction="7", time=now - 1),
        spool_record("failed", prediction=None, status=500),
        spool_record("unlabelled"),
        spool_record("redacted", prediction=None),
    ]
    spool_write(log.folder, rows)
    log.add_labels([Label(name, "7") for name in ("shared", "again", "failed", "redacted")])
    found = {pair: measure_quality(log, *pair).accuracy for pair in log.list_versions()}
    assert {pair: (item.value, item.n) for pair, item in found.items()} == {
        ("cnn", "1.0"): (1.0, 2),
        ("cnn", "2.0"): (0.0, 1),
        ("mlp", "1.0"): (1.0, 1),
    }


def test_items_of_one_request_have_labels_of_their_own(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    log.add_labels([Label("r", "9")])  # before anybody knows that it has two
    spool_write(log.folder, [spool_record("r", item=n, prediction=str(n)) for n in range(3)])
    log.add_labels([Label("r", "0", 0), Label("r", "9", 1)])
    quality = measure_quality(log, "cnn", "1.0")
    assert quality.confusion == {("0", "0"): 1, ("9", "1"): 1}


def test_a_window_leaves_out_what_was_before_it(
    log: PredictionLog, spool_record: Make, spool_write: Write
) -> None:
    now = time.time()
    spool_write(log.folder, [spool_record(f"r{n}", time=now - n * 3600) for n in range(10)])
    log.add_labels([Label(f"r{n}", "7") for n in range(10)])
    assert measure_quality(log, "cnn", "1.0", since=now - 3 * 3600 - 1).accuracy.n == 4
    assert measure_quality(log, "cnn", "1.0").accuracy.n == 10


def test_a_version_without_labels_has_no_accuracy(log: PredictionLog) -> None:
    quality = measure_quality(log, "cnn", "1.0")
    assert quality.accuracy.n == 0
    assert quality.classes == {}
    assert quality.to_json()["accuracy"] == {"value": None, "low": 0.0, "high": 1.0, "n": 0}


def test_without_labels_no_prediction_is_read(
    log: PredictionLog, spool_record: Make, spool_write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool_write(log.folder, [spool_record()])
    log.collect()
    read: list[int] = []
    monkeypatch.setattr(Part, "read", lambda part, number, columns: read.append(number))
    assert measure_quality(log, "cnn", "1.0").accuracy.n == 0
    assert not read
