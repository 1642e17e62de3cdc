from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

pytest.importorskip("pyarrow")

from marwright.cli.quality import quality
from marwright.errors import DataError, UsageError
from marwright.monitor.feedback import Label
from marwright.monitor.predictions import PredictionLog

app = typer.Typer()
app.command()(quality)


def call(*words: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A log of a hundred predictions of a cnn, one a quarter of a day, and two of an mlp."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spool").mkdir()
    lines = []
    for number in range(102):
        lines.append(
            {
                "time": time.time() - number * 21600,
                "request": f"r{number}",
                "model": "cnn" if number < 100 else "mlp",
                "version": "1.0",
                "prediction": "7" if number < 60 else "<b>\n1",
                "confidence": 0.9,
            }
        )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "spool/w.jsonl").write_text(text, encoding="utf-8")
    labels = [Label(f"r{number}", "7" if number < 70 else "<b>\n1") for number in range(100)]
    PredictionLog(tmp_path).add_labels(labels)
    return tmp_path


def test_accuracy_and_classes_are_shown_with_their_intervals(folder: Path) -> None:
    result = call("--folder", folder)
    assert result.exit_code == 0
    for text in (
        " cnn     1.0       100        0.9000     0.8256 to 0.9448   0.0000",
        " mlp     1.0       0\n",
        "cnn 1.0: classes",
        " 7        70       1.0000      0.9398 to 1.0000   0.8571   0.7566 to 0.9205",
        r" <b>\n1   30       0.7500      0.5981 to 0.8581   1.0000   0.8865 to 1.0000",
        "cnn 1.0: mistakes",
        r" 7       <b>\n1      10",
    ):
        assert text in result.stdout, text
    assert "mlp 1.0: classes" not in result.stdout


def test_a_window_and_a_version_are_chosen(folder: Path) -> None:
    (found,) = json.loads(call("cnn", "--folder", folder, "--days", "5", "--json").stdout)
    assert (found["model"], found["version"], found["accuracy"]["n"]) == ("cnn", "1.0", 20)
    assert found["classes"][0]["few"] is True
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() - 86400 - 60))
    (found,) = json.loads(call("cnn", "--folder", folder, "--since", since, "--json").stdout)
    assert found["accuracy"]["n"] == 5
    (found,) = json.loads(call("mlp", "--folder", folder, "--version", "1.0", "--json").stdout)
    assert found["accuracy"] == {"value": None, "low": 0.0, "high": 1.0, "n": 0}


def test_without_labels_it_is_said_how_to_give_some(folder: Path) -> None:
    result = call("mlp", "--folder", folder)
    assert "marwright feedback labels.csv" in result.stderr


def test_what_cannot_be_meant_is_told(folder: Path) -> None:
    with pytest.raises(DataError, match=r"expected cnn 3\.0, found cnn 1\.0, mlp 1\.0"):
        call("cnn", "--folder", folder, "--version", "3.0")
    with pytest.raises(UsageError, match="exclude each other"):
        call("--folder", folder, "--days", "1", "--since", "2026-01-01")
    with pytest.raises(UsageError, match="no such time"):
        call("--folder", folder, "--since", "yesterday")
