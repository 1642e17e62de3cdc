from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from marwright.archive.admission import POLICY_NAME
from marwright.archive.document import Document
from marwright.errors import ConfigurationError
from marwright.server import examination, nginx
from marwright.server.deployment import Deployment
from marwright.server.examination import examine, examine_rest
from marwright.server.sections import PortSettings


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


def test_a_default_health_port_gives_way_and_is_no_problem(two: Path, taken_port: int) -> None:
    ports = PortSettings.model_construct(_fields_set=set(), health=taken_port)
    wheres = [problem.where for problem in examine(deploy(two, ports=ports), starting=True)]
    assert "ports.health" not in wheres


@pytest.mark.parametrize(
    ("archive", "told"),
    [("cnn-2.0", "did you mean cnn-2.0.mar?"), ("zebra", "the store holds cnn-2.0.mar, cnn.mar")],
)
def test_a_missing_archive_is_told_with_what_may_have_been_meant(
    two: Path, archive: str, told: str
) -> None:
    (problem,) = examine(deploy(two, models=[archive]))
    assert problem.found == f"there is no archive {two / archive}; {told}"


def test_of_a_large_store_some_archives_are_named(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}.mar").touch()
    (problem,) = examine(deploy(tmp_path, models=["zebra"]))
    assert problem.found.endswith("; the store holds 0.mar, 1.mar, 2.mar, 3.mar, 4.mar and 2 more")


GIB = 1 << 30


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"supervision": {"memory_limit": 3 * GIB}}, None),  # two models, a worker each
        ({"supervision": {"memory_limit": 5 * GIB}}, "supervision.memory_limit"),
        (
            {
                "models": [
                    {"archive": "cnn.mar", "workers": 2},
                    {"archive": "cnn-2.0.mar", "workers": 2, "memory_limit": 3 * GIB},
                ],
                "supervision": {"memory_limit": 2 * GIB},
            },
            "models.1.memory_limit",
        ),
        ({"models": [{"archive": "cnn.mar", "workers": 200}]}, None),  # no limit is said
        (
            {
                "models": [{"archive": "cnn.mar", "memory_limit": 3 * GIB}],
                "gateway": True,
                "replicas": 3,
            },
            "models.0.memory_limit",
        ),
    ],
)
def test_workers_may_not_take_more_memory_together_than_there_is(
    two: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, object], where: str | None
) -> None:
    monkeypatch.setattr(examination, "read_memory", lambda: 8 * GIB)
    monkeypatch.setattr(examination, "find_nginx", lambda: None)
    found = examine(deploy(two, **values))
    assert [problem.where for problem in found] == ([where] if where else [])
    assert all("8,589,934,592 bytes" in problem.found for problem in found)


@pytest.mark.parametrize(
    ("lines", "line", "where", "text"),
    [
        ("replicas: 2", 2, "replicas", "more than one take a gateway in front: gateway: true"),
        ("gateway:\n  tokens: gone", 3, "gateway.tokens", "cannot be read: No such file"),
        ("gateway:\n  tokens: spaced", 3, "gateway.tokens", "does not hold tokens of letters"),
        ("gateway:\n  tokens: none", 3, "gateway.tokens", "does not hold tokens of letters"),
        ("gateway:\n  tokens: two", None, "", ""),
        ("gateway:\n  control: gone", 3, "gateway.control", "cannot be read: No such file"),
        ("gateway:\n  control: two", 3, "gateway.control", "could be guessed"),
        ("gateway: {tokens: long, control: long}", 2, "gateway.control", "of the clients"),
        ("gateway: {host: 10.0.0.1, control: long}", 2, "gateway.control", "it takes tls"),
        ("gateway: {tokens: gone, control: two}", 2, "gateway.tokens", "cannot be read"),
        ("gateway: {control: long}", None, "", ""),
    ],
)
def test_what_no_gateway_can_be_is_a_problem_with_its_line(
    tmp_path: Path, two: Path, lines: str, line: int | None, where: str, text: str
) -> None:
    files = {"spaced": "one two\n", "none": "\n", "two": "one\n\ntwo\n", "long": "a" * 20}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "deploy.yaml").write_text(f"store: {two}\n{lines}\n")
    deployment, document = Deployment.parse(tmp_path / "deploy.yaml")
    found = examine(deployment, document)
    if not text:
        assert found == []
        return
    assert [(problem.line, problem.where) for problem in found] == [(line, where)]
    assert text in found[0].found


ONE = "{url: 'https://10.0.0.1:8000', token: long}"


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (f"servers: [{ONE}]", {}),
        ("servers: [{url: 'http://127.0.0.1:8000', token: long}]", {}),
        ("servers: []", {"servers": "names none"}),
        (
            "servers: [{url: 'http://10.0.0.1:8000', token: gone, authority: gone}]",
            {
                "servers.0.url": "https, or loopback",
                "servers.0.token": "cannot be read: No such file",
                "servers.0.authority": "there is no file",
            },
        ),
        (f"servers: [{ONE}, {ONE}]", {"servers.1.url": "is the server 0 too"}),
        (
            f"servers: [{ONE}]\nmodels: [cnn.mar]\nreplicas: 2",
            {"models": "not beside servers", "replicas": "each server's own deploy.yaml"},
        ),
    ],
)
def test_what_no_fleet_can_be_is_said_all_at_once(
    tmp_path: Path, lines: str, found: dict[str, str]
) -> None:
    """It needs no store and no archives here."""
    (tmp_path / "long").write_text("a" * 20)
    (tmp_path / "deploy.yaml").write_text(f"{lines}\n")
    deployment, document = Deployment.parse(tmp_path / "deploy.yaml")
    problems = {problem.where: problem for problem in examine(deployment, document)}
    assert set(problems) == set(found)
    for where, text in found.items():
        assert text in problems[where].found
        assert problems[where].line


def test_a_gateway_needs_nginx_and_a_port_that_is_free(
    tmp_path: Path, two: Path, taken_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nginx, "FOLDERS", ())
    (tmp_path / "deploy.yaml").write_text(f"store: {two}\ngateway:\n  port: {taken_port}\n")
    deployment, document = Deployment.parse(tmp_path / "deploy.yaml")
    (missing,) = examine(deployment, document)
    assert (missing.line, missing.where) == (2, "gateway")
    assert "nginx" in missing.found
    found = examine(deployment, document, starting=True)
    assert (3, "gateway.port", f"port {taken_port} is taken") in [
        (problem.line, problem.where, problem.found) for problem in found
    ]


def test_entries_keep_their_lines_where_others_are_wrong(tmp_path: Path, store: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(f"store: {store}\nmodels:\n- 7\n- [a]\n- gone.mar\n- cnn.mar\n- cnn.mar\n")
    document = Document.read(path, error=ConfigurationError)
    found = examine_rest(document, [], starting=False)
    assert [(problem.line, problem.where) for problem in found] == [
        (5, "models.2.archive"),
        (7, "models.4.archive"),
    ]
