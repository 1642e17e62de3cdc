from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from marwright.archive.admission import POLICY_NAME
from marwright.archive.document import Document
from marwright.errors import ConfigurationError
from marwright.server import examination
from marwright.server.deployment import Deployment
from marwright.server.examination import examine, examine_rest


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """A store with two archives, whatever else other tests put into the session's."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("cnn.mar", "cnn-2.0.mar"):
        shutil.copy(store / name, folder)
    return folder


def deploy(store: Path, **values: object) -> Deployment:
    return Deployment.model_validate({"store": store, **values})


def test_a_sound_deployment_has_no_problem(two: Path) -> None:
    assert examine(deploy(two)) == []


def test_problems_have_no_line_where_there_is_no_file(store: Path) -> None:
    (problem,) = examine(deploy(store, models=["gone.mar"]))
    assert (problem.line, problem.where) == (None, "models.0.archive")


def test_trusted_archives_are_not_judged_again(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[str] = []
    monkeypatch.setattr(examination, "admit", lambda path, policy: judged.append(path.name))
    examine(deploy(two), trusted=["cnn.mar"])
    assert judged == ["cnn-2.0.mar"]


def test_a_broken_policy_is_a_problem_and_not_the_only_one(tmp_path: Path, store: Path) -> None:
    (tmp_path / "cnn.mar").write_bytes(b"no archive")
    (tmp_path / POLICY_NAME).write_text("require: 5\n")
    found = examine(deploy(tmp_path))
    assert [problem.where for problem in found] == ["policy", "models.0.archive"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"\xff", "cannot be read: it is no text"),
        (b"\n", "does not hold one token of letters, digits and -._~+/="),
        (b"first\nsecond\n", "does not hold one token of letters, digits and -._~+/="),
    ],
)
def test_a_gateway_s_key_that_cannot_be_used_is_a_problem(
    tmp_path: Path, two: Path, content: bytes | None, text: str
) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    (problem,) = examine(deploy(two, access={"gateway_key": path}))
    assert (problem.where, problem.found) == ("access.gateway_key", f"{path} {text}")
    path.write_text("a-key_of~letters==\n")
    assert examine(deploy(two, access={"gateway_key": path})) == []


def test_taken_ports_are_asked_for_only_before_a_start(two: Path, taken_port: int) -> None:
    deployment = deploy(two, ports={"health": taken_port})
    assert examine(deployment) == []
    wheres = [problem.where for problem in examine(deployment, starting=True)]
    assert "ports.health" in wheres


def test_entries_keep_their_lines_where_others_are_wrong(tmp_path: Path, store: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(f"store: {store}\nmodels:\n- 7\n- [a]\n- gone.mar\n- cnn.mar\n- cnn.mar\n")
    document = Document.read(path, error=ConfigurationError)
    found = examine_rest(document, [], starting=False)
    assert [(problem.line, problem.where) for problem in found] == [
        (5, "models.2.archive"),
        (7, "models.4.archive"),
    ]
