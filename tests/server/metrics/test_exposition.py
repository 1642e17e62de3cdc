"""Samples read from text, gathered by family, and written as text again."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from marwright.server.metrics import exposition as forms
from marwright.server.metrics.exposition import Exposition, LineReader, read_lines, unescape_label
from marwright.server.metrics.families import FAMILIES, LABEL_LIMIT, Family

CNN = {"model": "cnn", "version": "1.0"}


def fill(family: Family, exposition: Exposition) -> None:
    """Add two series of a family, or the one that it has without labels."""
    for number in (1, 2) if family.labels else (1,):
        labels = {label: f"{label}{number}" for label in family.labels}
        if family.kind != "histogram":
            exposition.add(family.name, number, **labels)
            continue
        base = ",".join(f'{label}="{value}"' for label, value in labels.items())
        comma = "," if base else ""
        for edge, count in (("+Inf", 9), ("10", 9), ("0.5", 4), ("0.0001", 1)):
            line = f'{family.name}_bucket{{{base}{comma}le="{edge}"}} {count}\n'
            exposition.take(read_lines(line)[0])
        exposition.take(read_lines(f"{family.name}_sum{{{base}}} 4.5\n")[0])
        exposition.take(read_lines(f"{family.name}_count{{{base}}} 9\n")[0])


@pytest.fixture
def full() -> Exposition:
    """Every metric there is."""
    exposition = Exposition()
    for family in FAMILIES:
        fill(family, exposition)
    return exposition


def test_every_metric_passes_promtool(full: Exposition) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is missing: apt-get install prometheus")
    command = [promtool, "check", "metrics"]
    done = subprocess.run(command, input=full.render(), capture_output=True, check=False)
    assert (done.returncode, done.stderr.decode()) == (0, "")


def test_both_forms_say_the_same_to_other_readers(full: Exposition) -> None:
    def gather(families: object) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        return {
            (sample.name, frozenset({**sample.labels, "le": ""}.items())): sample.value
            for family in families  # type: ignore[attr-defined]
            for sample in family.samples
            if not sample.name.endswith("_bucket")
        }

    text = gather(read_text(full.render().decode()))
    assert text == gather(read_openmetrics(full.render(openmetrics=True).decode()))
    assert len(text) >= 2 * len(FAMILIES) - 6  # some have no labels, and so one series


@given(st.text())
def test_a_label_of_any_text_comes_back(text: str) -> None:
    exposition = Exposition()
    exposition.add("marwright_model_ready", 1, model=text, version="1.0")
    rendered = exposition.render().decode("utf-8", "surrogatepass")
    (family,) = read_text(rendered)
    assert family.samples[0].labels["model"] == text
    samples, failed = read_lines(rendered)
    assert failed == 0
    assert unescape_label(samples[0].labels[0][1]) == text
    again = Exposition()
    again.take(samples)
    assert again.render() == exposition.render()


@given(st.text())
def test_no_text_makes_reading_fail(text: str) -> None:
    Exposition().take(read_lines(text)[0])


def test_half_a_line_is_counted_and_not_taken() -> None:
    samples, failed = read_lines('marwright_server_up 1\nmarwright_server_ready{a="b')
    assert [sample.name for sample in samples] == ["marwright_server_up"]
    assert failed == 1


@pytest.mark.parametrize(
    "line", ["marwright_server_up", "marwright_server_up one", 'marwright_server_up{a="b} 1', "{}"]
)
def test_a_line_that_says_nothing_is_counted(line: str) -> None:
    assert read_lines(line + "\n") == ([], 1)


def test_a_million_values_of_a_label_are_bounded_and_that_is_said() -> None:
    exposition = Exposition()
    lines = "".join(
        f'marwright_drift_score{{model="cnn",version="1.0",test="ks",subject="s{i}"}} 1\n'
        for i in range(100_000)
    )
    exposition.take(read_lines(lines)[0])
    assert len(list(exposition.list_samples())) == LABEL_LIMIT
    assert exposition.dropped == {"marwright_drift_score": 100_000 - LABEL_LIMIT}


def test_the_bound_holds_for_each_version_by_itself() -> None:
    exposition = Exposition()
    for version in ("1.0", "2.0"):
        exposition.take(
            read_lines(
                "".join(
                    f'marwright_requests_total{{model="cnn",version="{version}",status="{i}"}} 1\n'
                    for i in range(LABEL_LIMIT)
                )
            )[0]
        )
    assert not exposition.dropped


def test_what_is_no_metric_of_ours_is_left_out_and_counted() -> None:
    exposition = Exposition()
    exposition.take(read_lines("python_gc_objects 5\n")[0])
    assert exposition.render() == b""
    assert exposition.dropped == {"unknown": 1}


def test_a_second_text_of_the_same_series_is_read_like_the_first() -> None:
    lines = (
        'marwright_queue_length{model="a b",version="1.0"} 5\n'
        "marwright_server_up  1\n"
        "marwright_server_ready\t1\n"
        "marwright_server_restarts_total 7 1700000000000\n"
    )
    reader = LineReader()
    first, failed = reader.read(lines)
    assert [sample.value for sample in first] == ["5", "1", "1", "7"]
    assert reader.read(lines) == (first, failed) == (first, 0)
    again, failed = reader.read(lines.replace("} 5", "} 6").replace("up  1", "up  x"))
    assert ([sample.value for sample in again], failed) == (["6", "1", "7"], 1)


def test_what_a_reader_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "MOST_SERIES", 10)
    reader = LineReader()
    for start in range(0, 100, 7):
        lines = "".join(f"a{number} {number}\n" for number in range(start, start + 7))
        assert [sample.value for sample in reader.read(lines)[0]] == [
            str(number) for number in range(start, start + 7)
        ]
        assert len(reader._known) <= 10


def test_an_edge_that_is_no_number_stops_no_scrape() -> None:
    text = 'marwright_stage_seconds_bucket{model="m",version="1",stage="infer",le="x"} 5\n'
    found = Exposition()
    found.take(read_lines(text)[0])
    assert text.encode() in found.render()


def test_only_metrics_of_the_table_can_be_added() -> None:
    with pytest.raises(KeyError):
        Exposition().add("marwright_guess", 1)
    with pytest.raises(KeyError):
        Exposition().add("marwright_model_ready", 1, model="cnn")


def test_buckets_rise_whatever_the_order_they_came_in(full: Exposition) -> None:
    lines = full.render().decode().splitlines()
    edges = [
        float(line.split('le="')[1].split('"')[0])
        for line in lines
        if line.startswith('marwright_stage_seconds_bucket{model="model1"')
    ]
    assert edges == sorted(edges)
    assert len(edges) == 4


def test_names_follow_prometheus() -> None:
    for family in FAMILIES:
        assert family.name.startswith("marwright_")
        assert family.name.endswith("_total") == (family.kind == "counter")
        assert family.help.endswith(".")
