from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

pytest.importorskip("pyarrow")

from marwright.cli.feedback import feedback
from marwright.errors import DataError, NoServerError
from marwright.monitor.predictions import PredictionLog

app = typer.Typer()
app.command()(feedback)


def call(*words: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.chdir(tmp_path)
    spool = tmp_path / "predictions/spool"
    spool.mkdir(parents=True)
    facts: dict[str, Any] = {"time": time.time(), "model": "cnn", "version": "1.0"}
    lines = [
        {**facts, "request": request, "item": item, "prediction": "7"}
        for request, item in (("a", 0), ("b", 0), ("b", 1))
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (spool / "cnn-1.0-1-1.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_labels_are_kept_and_all_that_is_odd_is_shown(folder: Path) -> None:
    rows = 'request,label,item\na,7,\na,3,\nb,7,\nb,7,1\nc,"<b>\n\x1b[31m",\n'
    result = call(write(folder / "labels.csv", rows), "--folder", folder / "predictions")
    assert result.exit_code == 1  # a row was not kept
    for text in (
        " labels   matched   unmatched   doubled   changed   ambiguous   unknown",
        " 5        3         1           0         1         1           2",
        " 4      b         7",
        " 3      a         0      7        3          3",
        r"<b>\n\x1b[31m",
    ):
        assert text in result.stdout
    labels = PredictionLog(folder / "predictions").gather_labels().to_pylist()
    assert {(row["request"], row["item"], row["label"]) for row in labels} == {
        *(("a", 0, "3"), ("b", 1, "7"), ("c", None, "<b>\n\x1b[31m"))
    }


def test_json_has_all_of_it(folder: Path) -> None:
    path = write(folder / "labels.csv", "request,label,item\na,7,\nb,7,0\nx,1,\n")
    result = call(path, "--folder", folder / "predictions", "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (
        0,
        {
            "labels": 3,
            "matched": 2,
            "unmatched": 1,
            "doubled": 0,
            "changed": [],
            "ambiguous": [],
            "unknown": {"1": 1},
        },
    )


def test_a_malformed_row_keeps_all_of_the_file_out(folder: Path) -> None:
    path = write(folder / "labels.csv", "request,label\na,7\nb\n,7\n")
    with pytest.raises(DataError, match="2 rows") as caught:
        call(path, "--folder", folder / "predictions")
    assert caught.value.detail.startswith("line 3: ")
    assert not (folder / "predictions/labels").exists()


def test_the_folder_is_the_one_of_deploy_yaml(folder: Path) -> None:
    path = write(folder / "labels.csv", "request,label\na,7\n")
    with pytest.raises(NoServerError):
        call(path)
    values = {"store": "store", "monitoring": {"predictions": True}}
    write(folder / "deploy.yaml", yaml.safe_dump(values))
    assert call(path).exit_code == 0
    assert PredictionLog(folder / "predictions").gather_labels().num_rows == 1
