"""What `marwright release`, `rollback` and `releases` say where there is no server to ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from marwright.cli import release
from marwright.errors import NoServerError, UsageError
from marwright.release.history import History, Line, make_line

app = typer.Typer()
for command in (release.release, release.rollback, release.releases):
    app.command()(command)


def call(*words: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", [("release", "cnn-2.0.mar"), ("rollback",), ("releases",)])
def test_without_a_server_it_is_said_how_to_start_one(folder: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(NoServerError, match="start one: marwright serve"):
        call(*words)
    (folder / "deploy.yaml").write_text("store: .\n", encoding="utf-8")
    with pytest.raises(NoServerError, match=r"marwright serve --deploy deploy\.yaml"):
        call(*words)
    with pytest.raises(UsageError, match=r"there is no other\.yaml"):
        call(*words, "--to", "other.yaml")


def write_history(path: Path, **values: Any) -> Line:
    begun = Line(
        time="2026-01-01T00:00:00.000Z",
        release="cnn-2.0",
        event="begun",
        model="cnn",
        version="2.0",
        before="1.0",
        archive="cnn-2.0.mar",
        before_archive="cnn.mar",
        user="ada",
    )
    history = History(path)
    history.add(begun)
    return history.add(make_line(begun, **values))


@pytest.mark.parametrize(
    ("values", "outcome"),
    [
        ({"event": "step", "step": "canary 5 %"}, "open: canary 5 %"),
        ({"event": "released"}, "released"),
        ({"event": "returned", "reason": "its median is 9.87 times the other's"}, "returned"),
    ],
)
def test_the_history_says_who_moved_what_and_what_became_of_it(
    folder: Path, values: dict[str, Any], outcome: str
) -> None:
    last = write_history(folder / "releases.jsonl", **values)
    table = call("releases", "--history", folder / "releases.jsonl").stdout
    (row,) = (line for line in table.splitlines() if "2026" in line)
    for text in ("ada", "cnn", "1.0", "2.0", outcome, last.reason):
        assert text in row
    assert "marwright diff cnn.mar cnn-2.0.mar" in row
    words = ("releases", "--history", folder / "releases.jsonl", "--json")
    events = [line["event"] for line in json.loads(call(*words).stdout)]
    assert events == ["begun", last.event]
    assert call(*words, "--model", "words").stdout == "[]\n"
