from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from marwright.cli.apply import apply
from marwright.client import Client, Endpoint
from marwright.errors import (
    ConfigurationError,
    MarwrightError,
    ServerError,
    StorageError,
    UsageError,
)
from marwright.server import TorchServe, examination
from marwright.server.change import hold_server, prepare_change
from marwright.server.deployment import Deployment
from marwright.server.launch import RUNNING_NAME
from marwright.server.process import read_start_time
from marwright.server.registry import Record, announce, claim
from marwright.server.supervision.health import Health
from marwright.server.supervision.status import Status

pytestmark = pytest.mark.server

Apply = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """A folder with a store and the deploy.yaml that the server is started from."""
    folder = tmp_path_factory.mktemp("apply")
    shutil.copytree(store, folder / "store")
    (folder / "deploy.yaml").write_text(FIRST, encoding="utf-8")
    return folder


FIRST = "store: store\nports: free\nmodels: [cnn.mar]\n"


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[TorchServe]:
    with TorchServe.deploy(Deployment.read(folder / "deploy.yaml")) as server:
        yield server


@pytest.fixture
def run_apply(
    folder: Path, running: TorchServe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Apply]:
    """Return the command, in the folder of a deploy.yaml, with the server under the name apply."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(folder)
    app = typer.Typer()
    app.command()(apply)

    def run(*arguments: str, text: str = "") -> Result:
        if text:
            (folder / "deploy.yaml").write_text(text, encoding="utf-8")
        return CliRunner().invoke(app, list(arguments))

    with announce("apply", running.run_folder):
        yield run
        (folder / "deploy.yaml").write_text(FIRST, encoding="utf-8")


def list_registered(server: TorchServe) -> list[str]:
    models = server.client.models
    return [item.version for model in models.list() for item in models.versions(model.name)]


def test_a_plan_is_printed_made_and_then_there_is_nothing_to_do(
    run_apply: Apply, running: TorchServe
) -> None:
    text = FIRST.replace("[cnn.mar]", "[cnn-2.0.mar]")
    tried = run_apply("--dry-run", text=text)
    assert tried.exit_code == 0
    rows = [line.split()[:3] for line in tried.stdout.splitlines()[2:]]
    assert rows == [
        ["register", "cnn", "2.0"],
        ["default", "cnn", "2.0"],
        ["unregister", "cnn", "1.0"],
    ]
    assert list_registered(running) == ["1.0"]
    made = run_apply()
    assert made.exit_code == 0
    assert made.stdout == tried.stdout
    assert "done: default cnn 2.0: 1.0 -> 2.0" in made.stderr
    assert list_registered(running) == ["2.0"]
    assert run_apply().stdout == "nothing to do\n"


def test_the_plan_is_there_as_json(run_apply: Apply) -> None:
    run_apply()
    text = FIRST.replace("[cnn.mar]", "[{archive: cnn.mar, workers: 2}]")
    plan = json.loads(run_apply("--dry-run", "--json", text=text).stdout)
    assert plan["restart"] == []
    (step,) = plan["plan"]
    assert (step["kind"], step["before"], step["after"]) == ("scale", "1 worker", "2 workers")
    assert step["interrupts"] is False


def test_what_takes_a_restart_is_named(run_apply: Apply, running: TorchServe) -> None:
    run_apply()
    result = run_apply(text=FIRST + "limits: {queue: 7}\n")
    assert result.exit_code == 1
    assert "limits.queue: 100 -> 7" in result.stdout
    assert "needs: marwright restart" in result.stderr
    assert list_registered(running) == ["1.0"]


def test_bad_files_change_nothing(run_apply: Apply, running: TorchServe, folder: Path) -> None:
    run_apply()
    result = run_apply(text=FIRST.replace("cnn.mar", "gone.mar, 5"))
    assert isinstance(result.exception, ConfigurationError)
    assert "gone.mar" in result.exception.detail
    assert list_registered(running) == ["1.0"]
    other = FIRST.replace("store: store", f"store: {folder}").replace("[cnn.mar]", "[]")
    with pytest.raises(UsageError, match="another store"):
        raise run_apply(text=other).exception or AssertionError


def test_archives_that_did_not_change_are_not_judged_again(
    run_apply: Apply, folder: Path, running: TorchServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_apply()
    judged: list[str] = []
    monkeypatch.setattr(examination, "admit", lambda path, policy: judged.append(path.name))
    prepare_change(folder / "deploy.yaml", running.client)
    assert judged == []
    (folder / "store/cnn.mar").touch()
    prepare_change(folder / "deploy.yaml", running.client)
    assert judged == ["cnn.mar"]


def test_two_changes_do_not_interleave(run_apply: Apply, running: TorchServe) -> None:
    errors: list[BaseException | None] = []
    with hold_server(running.client):
        thread = threading.Thread(target=lambda: errors.append(run_apply().exception))
        thread.start()
        thread.join()
    assert isinstance(errors[0], StorageError)
    assert "in use" in str(errors[0])


def test_a_foreign_server_keeps_its_store(
    run_apply: Apply, running: TorchServe, folder: Path
) -> None:
    run_apply()
    endpoint = running.endpoint
    foreign = type(endpoint)(
        endpoint.inference_url,
        endpoint.management_url,
        key_file=endpoint.key_file,
        supervisor_key=endpoint.supervisor_key,
    )
    path = folder / "foreign.yaml"
    path.write_text(FIRST.replace("[cnn.mar]", "[{archive: cnn.mar, batch_size: 3}]"))
    with Client(foreign) as client:
        with pytest.raises(ConfigurationError, match="keep their settings"):
            prepare_change(path, client)
        path.write_text(FIRST.replace("[cnn.mar]", "[{archive: cnn.mar, workers: 2}]"))
        change = prepare_change(path, client)
        assert [step.kind for step in change.plan.steps] == ["scale"]
        assert change.restart == ()


def test_a_key_that_is_newer_than_the_running_server_counts_as_its_default(
    run_apply: Apply, running: TorchServe, folder: Path
) -> None:
    run_apply()
    path = running.run_folder / RUNNING_NAME
    whole = path.read_text(encoding="utf-8")
    values = json.loads(whole)
    del values["replicas"], values["limits"]["queue"]
    try:
        path.write_text(json.dumps(values), encoding="utf-8")
        assert prepare_change(folder / "deploy.yaml", running.client).restart == ()
        (folder / "deploy.yaml").write_text(FIRST + "limits: {queue: 7}\n", encoding="utf-8")
        restart = prepare_change(folder / "deploy.yaml", running.client).restart
        assert restart == ("limits.queue: 100 -> 7",)
    finally:
        path.write_text(whole, encoding="utf-8")


class FakeSite:
    """Answers as a site's supervisor does; `asked` is what it was asked to do."""

    def __init__(self, replicas: list[dict[str, Any]], taken: list[str]) -> None:
        self.rows: list[dict[str, Any]] = [
            *replicas,
            {"server": "site", "plan": [], "restart": [], "taken": taken},
        ]
        self.asked: list[object] = []
        self.error: MarwrightError | None = None

    def apply(self, asked: object) -> list[dict[str, Any]]:
        self.asked.append(asked)
        if self.error is not None and not asked:
            raise self.error
        return self.rows


STEP: dict[str, Any] = {
    "kind": "scale",
    "name": "cnn",
    "version": "1.0",
    "before": "1",
    "after": "2",
    "interrupts": False,
    "meanwhile": "",
}


@pytest.fixture
def apply_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Return a function that runs the command where a fake site runs, with one replica."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deploy.yaml").write_text("gateway: true\n", encoding="utf-8")
    app = typer.Typer()
    app.command()(apply)
    with contextlib.ExitStack() as stack:

        def run(site: FakeSite, *words: str) -> Result:
            answers = {
                "/apply": site.apply,
                "/look": lambda _: {"ready": True},
                "/current": lambda _: {"current": False},
            }
            health = Health(Status, port=0, key="key", answers=answers)
            url, folder = stack.enter_context(health).url, tmp_path / "run"
            start = read_start_time(os.getpid()) or ""
            record = Record("site", os.getpid(), start, "today", health_url=url, key="key")
            configs = {"site": tmp_path, "site.1": folder / "replica-1"}
            for name, place in configs.items():
                held = claim(name)
                stack.callback(held.release)
                config = str((place / "deploy.yaml").resolve())
                theirs = url if name == "site" else ""
                record = replace(record, name=name, config=config, health_url=theirs)
                held.write(replace(record, run_folder=str(folder)))
            Endpoint(url, url, health_url=url).write(folder / "endpoint.json")
            stack.enter_context(announce("site", folder))
            return CliRunner().invoke(app, list(words))

        yield run


def test_a_site_s_plan_is_printed_before_it_is_made(apply_to: Callable[..., Result]) -> None:
    site = FakeSite([{"server": "site.1", "plan": [STEP], "restart": []}], ["gateway.port: 1 -> 2"])
    result = apply_to(site)
    assert result.exit_code == 0
    assert "the gateway takes gateway.port: 1 -> 2\neach of site.1:\n" in result.stdout
    assert [line.split()[:3] for line in result.stdout.splitlines()[-1:]] == [
        ["scale", "cnn", "1.0"]
    ]
    assert site.asked == [{"dry_run": True}, {}]


def test_a_site_s_plan_is_there_as_json(apply_to: Callable[..., Result]) -> None:
    site = FakeSite([{"server": "site.1", "plan": [STEP], "restart": ["limits.queue: 1 -> 2"]}], [])
    result = apply_to(site, "--dry-run", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "plan": [{"server": "site.1", **STEP}],
        "restart": ["limits.queue: 1 -> 2"],
        "gateway": [],
    }
    assert site.asked == [{"dry_run": True}]


def test_what_a_site_takes_only_by_a_restart_is_exit_status_1(
    apply_to: Callable[..., Result],
) -> None:
    row = {"server": "site.1", "plan": [], "restart": ["limits.queue: 1 -> 2"]}
    result = apply_to(FakeSite([row], []))
    assert result.exit_code == 1
    assert "needs: marwright restart" in result.stderr


def test_what_goes_wrong_in_a_site_is_said_in_its_words(apply_to: Callable[..., Result]) -> None:
    site = FakeSite([{"server": "site.1", "plan": [STEP], "restart": []}], [])
    site.error = ServerError("the worker died", remedy="mend it")
    with pytest.raises(ServerError, match="the worker died"):
        raise apply_to(site).exception or AssertionError
