from __future__ import annotations

from marwright.monitor.page.measures import Measures, read_measures
from marwright.server.metrics.exposition import Exposition, escape_label, unescape_label


def measure(model: str = "cnn") -> Measures:
    exposition = Exposition()
    version = {"model": model, "version": "1.0"}
    for name, value in (
        ("marwright_drift_window_rows", 500),
        ("marwright_drift_detected", 1),
        ("marwright_quality_accuracy_ratio", 0.9),
        ("marwright_quality_accuracy_lower_ratio", 0.85),
        ("marwright_quality_accuracy_upper_ratio", 0.94),
        ("marwright_quality_labels", 1234),
    ):
        exposition.add(name, value, **version)
    for test, subject, score, p in (("ks", "features.ink", 0.31, 1e-6), ("psi", "a", 0.02, 0.8)):
        row = {**version, "test": test, "subject": subject}
        exposition.add("marwright_drift_score", score, **row)
        exposition.add("marwright_drift_p_value", p, **row)
    exposition.add(
        "marwright_drift_score", 9.0, **{**version, "version": "2.0"}, test="x", subject="y"
    )
    return read_measures(exposition.list_samples(), model, "1.0")


def test_drift_is_a_table_the_least_likely_first() -> None:
    found = measure()
    assert found.drift == (("ks", "features.ink", "0.31", "1e-06"), ("psi", "a", "0.02", "0.8"))
    assert found.is_shifted
    assert found.drift_summary == "The last window of 500 predictions is shifted."


def test_quality_is_told_with_its_interval() -> None:
    assert measure().quality == "90.0% right, 85.0% to 94.0% (95 %), of 1,234 with a true label"


def test_without_metrics_nothing_is_claimed() -> None:
    found = read_measures([], "cnn", "1.0")
    assert found == Measures((), "", False, "", ())


def test_names_with_quotes_and_newlines_are_found() -> None:
    name = 'a"b\\n\nc\\'
    assert unescape_label(escape_label(name)) == name
    assert measure(name).is_shifted
