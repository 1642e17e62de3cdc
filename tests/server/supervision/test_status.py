from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from marwright.client import ModelVersion
from marwright.client.results import Worker
from marwright.errors import ArchiveError, MarwrightError, ModelLoadError
from marwright.server.deployment import Deployment, ModelEntry
from marwright.server.state import State
from marwright.server.supervision.probe import Probe
from marwright.server.supervision.status import (
    UNANSWERED,
    RestartStatus,
    Status,
    VersionStatus,
    describe_versions,
    forget_versions,
    list_restart_reasons,
    list_start_reasons,
)
from marwright.server.wanted import Wanted

FAILURE = ModelLoadError("KeyError: 'labels'", detail="Traceback: one\ntwo")
BROKEN = ArchiveError("cnn-1.0.mar is refused", detail="S110")


def want(version: str = "1.0", workers: int = 1) -> Wanted:
    file = f"cnn-{version}.mar"
    settings = {"minWorkers": workers, "maxWorkers": max(1, workers)}
    return Wanted("cnn", version, Path(file), ModelEntry(archive=file), {}, settings)


def show(version: str = "1.0", *, states: tuple[str, ...] = ("READY",)) -> ModelVersion:
    workers = tuple(Worker(str(n), state, 100 + n, 0) for n, state in enumerate(states))
    return ModelVersion("cnn", version, f"cnn-{version}.mar", 1, 1, 8, 1, False, workers)


def describe(
    wanted: list[Wanted],
    *live: ModelVersion,
    answer: str | None = "",
    default: str = "1.0",
    failures: Mapping[tuple[str, str], MarwrightError] | None = None,
    refused: Mapping[str, MarwrightError] | None = None,
) -> tuple[VersionStatus, ...]:
    return describe_versions(
        wanted,
        State({(item.name, item.version): item for item in live}, {"cnn": default}),
        failures=failures or {},
        refused=refused or {},
        probe=cast(Probe, SimpleNamespace(read=lambda key: answer)),
        memory={100: 5, 101: 7},
    )


def test_a_version_with_its_workers_and_a_right_answer_has_no_problem() -> None:
    (row,) = describe([want(workers=2)], show(states=("READY", "READY")))
    assert row == VersionStatus("cnn", "1.0", True, 2, 2, memory_bytes=12)
    assert Status(phase="serving", models=(row,)).not_ready == []


@pytest.mark.parametrize("answer", ["sample 1.png: label is 3, not 4", None])
def test_a_wrong_answer_and_one_that_is_not_there_yet_are_not_ready(answer: str | None) -> None:
    (row,) = describe([want()], show(), answer=answer)
    problem = UNANSWERED if answer is None else answer
    assert row.problem == problem
    assert Status(phase="serving", models=(row,)).not_ready == [f"cnn 1.0: {problem}"]


def test_an_idle_version_is_not_asked_for_its_sample() -> None:
    (row,) = describe([want(workers=0)], show(states=()), answer=None)
    assert row.problem == ""


def test_workers_that_are_missing_are_told_with_what_ended_them() -> None:
    live = show(states=("READY", "UNLOADING"))
    (row,) = describe([want(workers=2)], live)
    assert (row.problem, row.detail) == ("1 of 2 workers are READY", "")
    (row,) = describe([want(workers=2)], live, failures={("cnn", "1.0"): FAILURE})
    assert row.problem == f"1 of 2 workers are READY: {FAILURE}"
    assert row.detail == "Traceback: one\ntwo"


def test_a_failure_that_is_over_is_not_told() -> None:
    (row,) = describe([want()], show(), failures={("cnn", "1.0"): FAILURE})
    assert (row.problem, row.detail) == ("", "")


def test_a_version_that_the_server_does_not_have_is_told_with_its_reason() -> None:
    (row,) = describe([want()])
    assert (row.problem, row.ready_workers, row.memory_bytes) == ("it is not registered", 0, 0)
    (row,) = describe([want()], refused={"cnn-1.0.mar": BROKEN})
    assert (row.problem, row.detail) == (str(BROKEN), "S110")


def test_an_archive_that_could_not_be_read_has_a_row_by_its_files_name() -> None:
    good, bad = describe([want()], show(), refused={"other.mar": BROKEN})
    assert good.problem == ""
    assert (bad.name, bad.version, bad.problem) == ("other", "?", str(BROKEN))
    assert Status(phase="serving", models=(good, bad)).not_ready == [f"other ?: {BROKEN}"]


def test_the_default_is_the_servers_word() -> None:
    rows = describe([want(), want("2.0")], show(), show("2.0"), default="2.0")
    assert [row.default for row in rows] == [False, True]


@pytest.mark.parametrize(
    ("phase", "live", "ready"),
    [
        ("starting", True, False),
        ("serving", True, True),
        ("restarting", False, False),
        ("stopping", False, False),
        ("hung", False, False),
        ("abandoned", False, False),
    ],
)
def test_each_phase_is_live_and_ready_or_not(phase: Any, live: bool, ready: bool) -> None:
    found = Status(phase=phase)
    assert (not found.not_live, not found.not_ready) == (live, ready)
    shown = found.to_json()
    assert (shown["live"], shown["ready"]) == (live, ready)


def test_a_problem_of_the_server_is_one_in_every_phase() -> None:
    found = Status(phase="serving", problems=("it hangs",))
    assert found.not_live == found.not_ready == ["it hangs"]


def test_differences_alone_do_not_stop_it_from_being_ready() -> None:
    assert Status(phase="serving", differences=("cnn: the default is 2.0",)).not_ready == []


def test_all_of_a_status_can_be_written_as_json() -> None:
    found = Status(
        phase="serving", models=describe([want()], show()), restart=RestartStatus(1, "done", 2.5)
    )
    shown = json.loads(json.dumps(found.to_json()))
    names = {item.name for item in dataclasses.fields(Status)}
    assert set(shown) == names | {"endpoint", "live", "ready"}
    assert shown["models"][0]["memory_bytes"] == 5
    assert shown["restart"]["seconds"] == 2.5


def test_what_anybody_may_know_has_no_traceback_and_no_path() -> None:
    rows = describe([want()], failures={("cnn", "1.0"): FAILURE})
    found = Status(config="/home/me/deploy.yaml", log="/home/me/logs", models=rows)
    assert found.models[0].detail
    shown = found.to_public_json()
    assert "/home/me" not in json.dumps(shown)
    assert "Traceback" not in json.dumps(shown)
    kept = {key: value for key, value in found.to_json().items() if key not in {"config", "log"}}
    kept["models"][0]["detail"] = ""
    assert kept.items() <= shown.items()


def test_of_a_server_that_has_ended_no_worker_is_known() -> None:
    broken = VersionStatus("other", "?", False, 0, problem=str(BROKEN), detail="S110")
    rows = (*describe([want(workers=2)], show(states=("READY", "READY"))), broken)
    forgotten, same = forget_versions(rows)
    assert (forgotten.workers, forgotten.ready_workers, forgotten.memory_bytes) == (2, 0, 0)
    assert forgotten.problem == UNANSWERED
    assert same == broken


def test_models_and_supervision_take_no_restart_and_all_else_does(tmp_path: Path) -> None:
    running = Deployment(store=tmp_path)

    def change(**values: Any) -> list[str]:
        return list_restart_reasons(
            running, Deployment.model_validate({"store": tmp_path, **values})
        )

    assert change() == []
    assert change(models=["cnn.mar"], supervision={"restarts": 1}, name="other") == []
    assert change(limits={"queue": 7}, eager_batches=False) == ["limits", "eager_batches"]
    assert change(store=tmp_path / "other") == ["store"]
    assert change(ports={"health": 9001}) == []
    assert change(ports={"inference": 9001}) == ["ports"]
    assert change(ports="free") == ["ports"]
    assert change(gateway=True, replicas=2) == []  # for another supervisor, not another server


def test_the_name_and_the_health_endpoints_take_another_supervisor(tmp_path: Path) -> None:
    begun = Deployment(store=tmp_path)

    def change(**values: Any) -> list[str]:
        return list_start_reasons(begun, Deployment.model_validate({"store": tmp_path, **values}))

    assert change(models=["cnn.mar"], ports={"inference": 9001}, limits={"queue": 7}) == []
    assert change(name="other", ports={"health": 9001}) == ["name", "ports.health"]
    assert change(ports="free") == ["ports.health"]
    assert change(gateway=True) == ["gateway"]
