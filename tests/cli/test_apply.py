from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from marwright.cli.apply import apply
from marwright.client import Client
from marwright.errors import ConfigurationError, StorageError, UsageError
from marwright.server import TorchServe, examination
from marwright.server.change import hold_server, prepare_change
from marwright.server.deployment import Deployment
from marwright.server.registry import announce

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
