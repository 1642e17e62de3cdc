from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from marwright.archive import Run, pack_run
from marwright.client import ModelVersion
from marwright.client.results import Worker
from marwright.errors import ConfigurationError, ModelLoadError
from marwright.server import TorchServe
from marwright.server.deployment import Deployment, ModelEntry
from marwright.server.plan import Plan, carry_out, make_plan
from marwright.server.state import State, compare, read_state
from marwright.server.wanted import Wanted, list_wanted

BAD_HANDLER = """
class Handler:
    def initialize(self, context):
        1 / 0
    def handle(self, data, context):
        return data
"""
SETTINGS = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 8, "maxBatchDelay": 1}


class Staged:
    """A staging in which all but some files are as wanted."""

    def __init__(self, *stale: str) -> None:
        self.stale = stale

    def is_current(self, wanted: Wanted, *, besides: object = ()) -> bool:
        return wanted.path.name not in self.stale


def want(version: str, *, default: bool = False, name: str = "cnn", **settings: Any) -> Wanted:
    file = f"{name}-{version}.mar"
    whole = {**SETTINGS, **settings}
    whole["maxWorkers"] = max(whole["maxWorkers"], whole["minWorkers"])
    return Wanted(name, version, Path(file), ModelEntry(archive=file), {}, whole, default)


def show(version: str, *, name: str = "cnn", workers: int = 1, **values: Any) -> ModelVersion:
    found = ModelVersion(
        name, version, f"{name}-{version}.mar", workers, workers, 8, 1, False,
        tuple(Worker(str(number), "READY", 1, 0) for number in range(workers)),
    )  # fmt: skip
    return replace(found, **values)


def state(*versions: ModelVersion, **defaults: str) -> State:
    return State({(item.name, item.version): item for item in versions}, defaults)


def plan(wanted: list[Wanted], live: State, *stale: str) -> list[str]:
    steps = make_plan(wanted, live, Staged(*stale)).steps  # type: ignore[arg-type]  # half of one
    return [f"{step.kind} {step.version}" for step in steps]


def test_every_difference_has_a_line() -> None:
    live = state(
        show("1.0", batch_size=4, response_timeout=9, queue_room=3, queue_length=1, min_workers=2),
        show("3.0"),
        cnn="3.0",
    )
    wanted = [
        want("1.0", default=True, responseTimeout=60, jobQueueSize=100, minWorkers=3),
        want("2.0"),
    ]
    assert compare(wanted, live) == [
        "cnn 1.0: batchSize is 4, wanted 8",
        "cnn 1.0: responseTimeout is 9, wanted 60",
        "cnn 1.0: jobQueueSize is 4, wanted 100",
        "cnn 1.0: minWorkers is 2, wanted 3",
        "cnn 1.0: maxWorkers is 1, wanted 3",
        "cnn 1.0: 1 of 3 workers are READY",
        "cnn: the default is 3.0, wanted 1.0",
        "cnn 2.0 is not registered",
        "cnn 3.0 is registered, not wanted",
    ]


def test_what_is_as_wanted_needs_nothing() -> None:
    live = state(show("1.0"), show("2.0", workers=0), cnn="1.0")
    wanted = [want("1.0", default=True), want("2.0", minWorkers=0)]
    assert compare(wanted, live) == []
    assert plan(wanted, live) == []
    assert Plan(()).describe() == "nothing to do"


def test_new_versions_come_first_and_old_ones_go_last() -> None:
    live = state(show("1.0"), show("2.0"), show("3.0", workers=4), cnn="1.0")
    wanted = [want("4.0", default=True), want("2.0", minWorkers=2), want("3.0")]
    assert plan(wanted, live) == [
        "register 4.0",
        "scale 2.0",
        "default 4.0",
        "scale 3.0",
        "unregister 1.0",
    ]


def test_a_default_version_is_unregistered_last() -> None:
    live = state(show("1.0"), show("2.0"), cnn="1.0")
    assert plan([], live) == ["unregister 2.0", "unregister 1.0"]


def test_a_version_that_stops_being_the_default_is_renewed_after_that() -> None:
    live = state(show("1.0"), show("2.0"), cnn="1.0")
    wanted = [want("2.0", default=True), want("1.0", batchSize=2)]
    assert plan(wanted, live) == ["default 2.0", "re-register 1.0"]
    wanted = [want("2.0", default=True, batchSize=2), want("1.0")]
    assert plan(wanted, live) == ["re-register 2.0", "default 2.0"]


def test_while_the_default_is_renewed_one_with_workers_stands_in() -> None:
    live = state(show("1.0"), show("2.0", workers=0), show("3.0"), cnn="1.0")
    wanted = [want("1.0", default=True, batchSize=2), want("2.0", minWorkers=0), want("3.0")]
    (step,) = make_plan(wanted, live, Staged()).steps  # type: ignore[arg-type]  # half of one
    assert (step.interrupts, step.meanwhile) == (True, "3.0")
    assert step.describe() == (
        "re-register cnn 1.0: batchSize 8 -> batchSize 2 (3.0 is the default meanwhile)"
        " (interrupts it)"
    )


def test_another_archive_or_another_handler_setting_is_a_reason_too() -> None:
    live = state(show("1.0"), cnn="1.0")
    assert plan([want("1.0", default=True)], live, "cnn-1.0.mar") == ["re-register 1.0"]


def test_a_foreign_server_is_told_what_it_cannot_be_given() -> None:
    item = replace(want("1.0", default=True), changes={"minWorkers": 2, "batchSize": 3})
    with pytest.raises(ConfigurationError) as caught:
        make_plan([item], state(), None)
    assert caught.value.detail == "cnn 1.0: batchSize 3"
    item = replace(item, changes={"minWorkers": 2})
    assert [step.kind for step in make_plan([item], state(), None).steps] == ["register"]


# A real server, from here on. Each test begins with what the one before it may have left.


@pytest.fixture(scope="module")
def own_store(tmp_path_factory: pytest.TempPathFactory, store: Path, run: Run) -> Path:
    """A store of its own, with a version 3.0 whose worker dies."""
    folder = tmp_path_factory.mktemp("own")
    for path in store.glob("*.mar"):
        shutil.copy(path, folder)
    source = folder / "bad_handler.py"
    source.write_text(BAD_HANDLER, encoding="utf-8")
    pack_run(run, out=folder / "bad.mar", version="3.0", handler=str(source), preflight=None)
    return folder


@pytest.fixture(scope="module")
def running(own_store: Path) -> Iterator[TorchServe]:
    with TorchServe.deploy(deploy(own_store, "cnn.mar")) as server:
        yield server


def deploy(store: Path, *models: object) -> Deployment:
    values = {"store": store, "models": list(models), "ports": "free"}
    return Deployment.model_validate(values)


def make(server: TorchServe, *models: object) -> list[str]:
    """Bring a server to a state; return the steps that were done."""
    wanted = list_wanted(deploy(server.store, *models))
    done: list[str] = []
    found = make_plan(wanted, read_state(server.client), server.staging)
    carry_out(
        found,
        server.client,
        server.staging,
        report=lambda step: done.append(f"{step.kind} {step.version}"),
    )
    assert compare(wanted, read_state(server.client)) == []
    assert not make_plan(wanted, read_state(server.client), server.staging)
    return done


@pytest.mark.server
def test_a_server_is_brought_from_one_state_to_another(running: TorchServe, scan: bytes) -> None:
    make(running, "cnn.mar")
    idle = {"archive": "cnn-2.0.mar", "workers": 0}
    assert make(running, "cnn.mar", idle) == ["register 2.0"]
    assert make(running, {"archive": "cnn.mar", "batch_size": 4}, idle) == ["re-register 1.0"]
    assert running.client.models.describe("cnn").version == "1.0"
    assert running.client.models.describe("cnn").batch_size == 4
    assert make(running, "cnn-2.0.mar") == ["scale 2.0", "default 2.0", "unregister 1.0"]
    assert running.client.predict("cnn", scan).status == 200


@pytest.mark.server
def test_a_version_that_cannot_be_loaded_leaves_nothing(running: TorchServe) -> None:
    make(running, "cnn-2.0.mar")
    before = read_state(running.client)
    with pytest.raises(ModelLoadError) as caught:
        make(running, {"archive": "bad.mar", "default": True})
    assert "ZeroDivisionError" in caught.value.detail
    after = read_state(running.client)
    assert after == before  # nor was 2.0 unregistered, which the plan had after it
    assert not (running.staging.folder / "bad.mar").exists()


@pytest.mark.server
def test_a_version_that_cannot_be_renewed_goes_on(
    running: TorchServe, own_store: Path, run: Run, scan: bytes
) -> None:
    make(running, "cnn.mar")
    source = own_store / "bad_handler.py"
    sound = (own_store / "cnn.mar").read_bytes()
    pack_run(run, out=own_store / "cnn.mar", handler=str(source), preflight=None, force=True)
    try:
        with pytest.raises(ModelLoadError):
            make(running, "cnn.mar")
    finally:
        (own_store / "cnn.mar").write_bytes(sound)
    assert running.client.predict("cnn", scan).status == 200
    assert (running.staging.folder / "cnn.mar").read_bytes() == sound


@pytest.mark.server
def test_the_last_version_of_a_model_can_go(running: TorchServe, own_store: Path) -> None:
    make(running)
    assert read_state(running.client) == State({}, {})
