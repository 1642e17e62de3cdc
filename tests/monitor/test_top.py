"""What `marwright top` makes of looks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from marwright.monitor.looks import Look, Rates
from marwright.monitor.top import (
    ASCII_BARS,
    Order,
    draw_bars,
    find_releases,
    summarize,
    trace,
)
from marwright.release.history import HISTORY_NAME, History, make_line, start_line
from marwright.server.registry import Record

MODEL = {"default": False, "workers": 1, "ready_workers": 1, "memory_bytes": 1 << 20, "problem": ""}


def make_look(time: float = 1.0, **values: Any) -> Look:
    models = [{**MODEL, "name": "cnn", "version": version} for version in ("1.0", "2.0", "3.0")]
    status = {"name": "shop", "phase": "serving", "ready": True, "models": models, "problems": []}
    status.update(values.pop("status", {}))
    rates = {
        ("cnn", "1.0"): Rates(requests=10, errors=0, p99=0.2),
        ("cnn", "2.0"): Rates(requests=30, errors=1, p50=0.01, p99=0.1, queue=3, batch=2.5),
    }
    return Look(time, status, values.pop("rates", rates), **values)


@pytest.mark.parametrize(
    ("order", "versions"),
    [
        ("traffic", ["2.0", "1.0", "3.0"]),
        ("errors", ["2.0", "1.0", "3.0"]),
        ("p99", ["1.0", "2.0", "3.0"]),
        ("name", ["1.0", "2.0", "3.0"]),
    ],
)
def test_versions_come_in_the_order_that_is_asked_for(order: Order, versions: list[str]) -> None:
    assert [row.version for row in summarize([make_look()], order=order).rows] == versions


def test_errors_come_before_traffic_where_these_are_sorted_by() -> None:
    rates = {("cnn", "1.0"): Rates(requests=9), ("cnn", "3.0"): Rates(requests=2, errors=1)}
    rows = summarize([make_look(rates=rates)], order="errors").rows
    assert [row.version for row in rows] == ["3.0", "1.0", "2.0"]


def test_traffic_of_all_versions_is_added_up() -> None:
    overview = summarize([make_look()])
    assert dataclasses.astuple(overview.total)[:2] == (40, 1)
    assert overview.total.queue == 3


def test_a_version_that_nobody_asked_has_no_rates_and_no_drift() -> None:
    row = summarize([make_look()]).rows[-1]
    assert (row.version, row.rates, row.shift) == ("3.0", Rates(), "")


@pytest.mark.parametrize(("detected", "shift"), [(0.0, "no shift"), (1.0, "shifted")])
def test_drift_is_said_in_words(detected: float, shift: str) -> None:
    look = make_look(drift={("cnn", "2.0"): {"detected": detected, "rows": 500.0, "p_value": 0.1}})
    assert summarize([look]).rows[0].shift == shift


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, "ready"),
        ({"problem": "1 of 2 workers are READY", "workers": 2}, "not ready"),
        ({"problem": "0 of 1 workers are READY", "ready_workers": 0}, "no worker"),
        ({"problem": "it was switched off", "workers": 0, "ready_workers": 0}, "not ready"),
    ],
)
def test_a_version_s_state_is_said_in_few_words(changes: dict[str, Any], state: str) -> None:
    model = {**MODEL, "name": "cnn", "version": "1.0", **changes}
    assert summarize([make_look(status={"models": [model]})]).rows[0].state == state


def test_problems_of_server_replicas_and_versions_are_told() -> None:
    model = {**MODEL, "name": "cnn", "version": "1.0", "problem": "KeyError"}
    replicas = [
        {"name": "shop-1", "ready": True, "problem": ""},
        {"name": "shop-2", "ready": False, "problem": "it is starting"},
    ]
    status = {"models": [model], "replicas": replicas, "problems": ["no disk"], "ready": False}
    overview = summarize([make_look(status=status)])
    assert overview.state == "serving, not ready, 1 of 2 replicas"
    assert overview.problems == ("no disk", "shop-2: it is starting", "cnn 1.0: KeyError")


def test_what_was_seen_last_is_shown_while_a_server_does_not_answer() -> None:
    away = Look(2.0, {"name": "shop", "models": [], "problems": ["hung"]}, problem="hung")
    overview = summarize([make_look(), away, dataclasses.replace(away, time=3.0)])
    assert (overview.time, overview.state, overview.problem) == (3.0, "no answer", "hung")
    assert len(overview.rows) == 3
    assert overview.problems == ()  # told once


def test_a_server_that_never_answered_has_no_versions() -> None:
    away = Look(2.0, {"name": "shop", "problems": ["hung"]}, problem="hung")
    assert summarize([away]).rows == ()


def test_it_can_be_written_as_json() -> None:
    written = json.loads(json.dumps(summarize([make_look()], releases=["cnn 2.0"]).to_json()))
    assert written["time"] == "1970-01-01T00:00:01.000+00:00"
    assert (written["server"], written["requests"], written["releases"]) == (
        "shop",
        40,
        ["cnn 2.0"],
    )
    row = written["versions"][0]
    assert (row["model"], row["version"], row["requests"], row["p50"]) == ("cnn", "2.0", 30, 0.01)
    assert written["versions"][-1]["p99"] is None


def test_traffic_is_traced_for_one_version_and_for_all() -> None:
    looks = [make_look(), make_look(rates={}), make_look()]
    assert trace(looks) == [40, 0, 40]
    assert trace(looks, ("cnn", "1.0")) == [10, 0, 10]
    assert trace(looks, ("cnn", "9")) == [0, 0, 0]


def test_bars_are_as_high_as_their_values() -> None:
    assert draw_bars([0, 1, 7], 3) == "▁▂█"
    assert draw_bars([9, 0, 7, 7], 2) == "██"  # the last ones, and the highest of these
    assert draw_bars([0, 0], 5) == "▁▁"
    assert draw_bars([], 5) == draw_bars([1.0], 0) == ""
    assert draw_bars([0, 1], 2, letters=ASCII_BARS) == "_@"


@pytest.mark.parametrize("is_configured", [True, False])
def test_open_releases_are_found_where_they_are_written_down(
    is_configured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    config = str(tmp_path / "deploy.yaml") if is_configured else ""
    record = Record("shop", 1, "", "today", config=config)
    assert find_releases(record) == []
    path = tmp_path / (HISTORY_NAME if is_configured else "state/marwright/releases/shop.jsonl")
    history = History(path)
    begun = history.add(start_line("cnn", "2.0", before="1.0"))
    history.add(make_line(begun, "step", step="canary 25"))
    (text,) = find_releases(record)
    assert text.startswith("the release of cnn 2.0 (from 1.0) stands at canary 25 since 20")
    history.add(make_line(begun, "released"))
    assert find_releases(record) == []
