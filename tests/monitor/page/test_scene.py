from __future__ import annotations

from typing import Any

from tests.monitor.page.conftest import make_model

from marwright.monitor.looks import Look
from marwright.monitor.page.scene import (
    Scene,
    describe_changes,
    describe_server,
    group_versions,
    list_differences,
    list_problems,
    list_states,
)


def look(*models: dict[str, Any], problem: str = "", **status: Any) -> Look:
    return Look(1.0, {"models": list(models), "phase": "serving", **status}, problem=problem)


def test_a_server_that_is_away_is_shown_as_it_was() -> None:
    scene = Scene([look(make_model()), look(problem="gone"), look(problem="gone")])
    assert scene.problem == "gone"
    [group] = group_versions(scene)
    assert group.rows[0].values[:3] == ("bad", "unknown: no answer", "0 of 2")
    assert describe_server(scene) == ("bad", "no answer")
    assert list_problems(scene) == ["The server does not answer: gone"]
    assert list_states(scene) == {"The server": "no answer"}


def test_before_the_first_look_nothing_is_claimed() -> None:
    scene = Scene([])
    assert scene.problem == "nobody has looked yet"
    assert group_versions(scene) == []


def test_versions_are_sorted_as_numbers_and_models_by_name() -> None:
    names = [("b", "9.0"), ("b", "10.0"), ("b", "10.0-rc"), ("A", "1"), ("b", "x"), ("b", "²")]
    groups = group_versions(Scene([look(*(make_model(*pair) for pair in names))]))
    assert [group.name for group in groups] == ["A", "b"]
    versions = [row.version for row in groups[1].rows]
    assert versions == ["10.0-rc", "10.0", "9.0", "²", "x"]


def test_each_state_has_a_word_and_a_mood() -> None:
    models = [
        make_model(version="4"),
        make_model(version="3", problem="it has ended"),
        make_model(version="2", problem="its sample is not answered yet"),
        make_model(version="1", workers=0),
    ]
    [group] = group_versions(Scene([look(*models)]))
    assert [row.values[:2] for row in group.rows] == [
        ("good", "ready"),
        ("bad", "not ready: it has ended"),
        ("waiting", "starting"),
        ("off", "no workers"),
    ]
    assert group.ready == 2


def test_many_versions_are_folded_but_for_those_that_are_not_well() -> None:
    models = [make_model(f"m{n}", str(v)) for n in range(3) for v in range(10)]
    models[4] = make_model("m0", "4", problem="it has ended")
    groups = group_versions(Scene([look(*models)]))
    assert [group.is_open for group in groups] == [True, False, False]
    assert [group.is_open for group in group_versions(Scene([look(*models[10:20])]))] == [True]


def test_differences_are_no_problems() -> None:
    scene = Scene([look(make_model(), differences=["cnn 2.0 is not wanted"])])
    assert list_problems(scene) == []
    assert list_differences(scene) == ["cnn 2.0 is not wanted"]


def test_a_replicas_problem_is_named_with_it() -> None:
    replicas = [{"name": "a.1", "problem": "hung"}, {"name": "a.2", "problem": ""}]
    assert list_problems(Scene([look(make_model(), replicas=replicas)])) == ["replica a.1: hung"]


def test_changes_are_told_in_sentences_and_not_too_many() -> None:
    before = {"The server": "serving, ready", "a 1": "ready", "b 1": "ready"}
    assert describe_changes(before, before) == []
    now = {"The server": "serving, ready", "a 1": "starting", "c 1": "ready"}
    assert describe_changes(before, now) == ["a 1: starting.", "c 1: ready.", "b 1 is gone."]
    assert describe_changes(before, {"The server": "no answer"}) == ["The server: no answer."]
    many = {**before, **{f"m {n}": "ready" for n in range(200)}}
    told = describe_changes(before, many)
    assert len(told) == 5
    assert told[-1] == "And 196 more changes."
