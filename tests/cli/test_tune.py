from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from marwright.archive import Packed
from marwright.cli.tune import parse_duration, tune
from marwright.errors import ArchiveError, UsageError
from marwright.server.deployment import Deployment
from marwright.tuning.search import Candidate, Measurement, Trial
from marwright.tuning.tuning import Plan, Tuning, make_plan

app = typer.Typer()
app.command()(tune)

PACKED = Candidate(1, 2, 8, 1)
BEST = Candidate(2, 1, 16, 1)


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def place(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder whose store holds one archive, cnn.mar."""
    (tmp_path / "model_store").mkdir()
    shutil.copy(packed.path, tmp_path / "model_store/cnn.mar")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command was to measure; the figures are made up, and 20 ms the best p99."""
    asked: dict[str, Any] = {}

    def make_up(archive: Path, *, bound_ms: float, on_plan: Any, on_trial: Any, **rest: Any) -> Any:
        asked.update(rest, archive=archive, bound_ms=bound_ms)
        made = Tuning(archive, "cnn", "1.0", bound_ms, 2, rest["eager_batches"], PACKED)
        for candidate, stage, rate, p99 in (
            (PACKED, "packed", 100.0, 30.0),
            (BEST, "search", 300.0, 20.0),
            (BEST, "confirmation", 310.0, 21.0),
            (BEST, "confirmation", 290.0, 19.0),
            (PACKED, "confirmation", 110.0, 31.0),
        ):
            load = Measurement(16, rate, p99 / 2, p99, p99, 500, 0)
            made.trials.append(Trial(candidate, stage, (load,), 1.5))
        on_plan(make_plan(120, load_seconds=1.5, seconds=1, warm_up=0.5), made.trials[0])
        on_trial(made.trials[1])
        made.is_interrupted = asked.get("interrupt", False)
        return made

    monkeypatch.setattr("marwright.tuning.tuning.tune", make_up)
    return asked


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("50ms", 50), ("0.05s", 50), ("50", 50), ("1.5 S", 1500), ("500us", 0.5), ("1m", 60_000)],
)
def test_durations(text: str, milliseconds: float) -> None:
    assert parse_duration(text) == pytest.approx(milliseconds)


@pytest.mark.parametrize("text", ["", "0ms", "-5ms", "5 hours", "ms", "nan", "1e3"])
def test_bad_durations_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"such as 50ms or 0\.05s"):
        parse_duration(text)


def test_the_best_is_printed_drawn_and_written(place: Path, measured: dict[str, Any]) -> None:
    result = invoke("cnn.mar", "--p99", "50ms")
    assert result.exit_code == 0, result.output
    assert measured["archive"] == Path("model_store/cnn.mar")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[2][:6] == ["chosen", "2", "1", "16", "1", "us"]
    assert "300 (290 to 310)" in result.stdout
    assert "20.0 (19.0 to 21.0)" in result.stdout
    assert rows[3][:2] == ["as", "packed"]
    assert re.search(r"up to \d+ settings of \d+ s each", result.stderr)
    kept = json.loads((place / "tuning/cnn-1.0.json").read_text())
    assert len(kept["trials"]) == 5
    assert (place / "tuning/cnn-1.0.png").read_bytes().startswith(b"\x89PNG")
    (entry,) = Deployment.read(place / "deploy.yaml").models or []
    assert (entry.workers, entry.threads, entry.batch_size, entry.batch_delay_ms) == (2, 1, 16, 1)


def test_the_result_as_json_names_the_choice(place: Path, measured: dict[str, Any]) -> None:
    shown = json.loads(invoke("cnn.mar", "--p99", "50ms", "--json").stdout)
    assert shown["p99_bound_ms"] == 50
    assert shown["chosen"]["workers"] == 2
    assert shown["chosen"]["throughput"] == {"median": 300, "least": 290, "most": 310}
    assert shown["machine"]["cores"] == 2


def test_where_nothing_is_within_the_bound_the_nearest_is_named(
    place: Path, measured: dict[str, Any]
) -> None:
    result = invoke("cnn.mar", "--p99", "5ms")
    assert "found 20.0 ms at best, 16 connections on 2 x 1 threads" in str(result.exception)
    assert result.exit_code == 1
    assert (place / "tuning/cnn-1.0.json").exists()
    assert not (place / "deploy.yaml").exists()


def test_after_ctrl_c_what_was_measured_is_kept_and_nothing_written(
    place: Path, measured: dict[str, Any]
) -> None:
    measured["interrupt"] = True
    result = invoke("cnn.mar", "--p99", "50ms")
    assert result.exit_code == 130
    assert "interrupted; trials kept: 5" in result.stderr
    assert json.loads((place / "tuning/cnn-1.0.json").read_text())["interrupted"] is True
    assert not (place / "deploy.yaml").exists()


def test_measuring_only_writes_no_deployment(place: Path, measured: dict[str, Any]) -> None:
    assert invoke("cnn.mar", "--p99", "50ms", "--no-write").exit_code == 0
    assert not (place / "deploy.yaml").exists()


def test_the_server_waits_for_batches_where_deploy_yaml_says_so(
    place: Path, measured: dict[str, Any]
) -> None:
    (place / "deploy.yaml").write_text("eager_batches: false\n")
    result = invoke("cnn.mar", "--p99", "50ms")
    assert measured["eager_batches"] is False
    assert "1 ms" in result.stdout
    (place / "deploy.yaml").write_text("eager_batches: false\nstore: elsewhere\n")
    measured.clear()
    assert invoke("model_store/cnn.mar", "--p99", "50ms", "--no-write").exit_code == 0
    assert measured["eager_batches"] is False


@pytest.mark.parametrize(
    ("deployment", "error"),
    [("store: nowhere\n", "there is no folder"), ("store: other\n", "is not in the store")],
)
def test_a_deployment_that_cannot_be_written_is_refused_first(
    place: Path, measured: dict[str, Any], deployment: str, error: str
) -> None:
    (place / "other").mkdir()
    (place / "deploy.yaml").write_text(deployment)
    result = invoke("model_store/cnn.mar", "--p99", "50ms")
    assert error in f"{result.exception} {getattr(result.exception, 'detail', '')}"
    assert not measured


def test_an_archive_that_is_not_there_is_refused(place: Path) -> None:
    result = invoke("absent.mar", "--p99", "50ms")
    assert isinstance(result.exception, ArchiveError)


@pytest.mark.parametrize("left", [0, 10, 60, 170, 600, 36_000])
def test_a_plan_fits_into_the_time(left: float) -> None:
    plan = make_plan(left, load_seconds=4, seconds=1, warm_up=0.5)
    assert plan.total_seconds <= left
    assert plan.trials <= 60
    assert plan.rounds == 0 or plan.rounds >= 2  # one round has no spread


def test_a_plan_says_what_there_is_no_time_for() -> None:
    short = make_plan(25, load_seconds=4, seconds=1, warm_up=0.5)
    assert (short.trials, short.rounds) == (2, 0)
    assert "none confirmed" in short.describe()
    assert "nothing but the archive as packed" in Plan(0, 0, 0, 1, 1, 9, 9).describe()


@pytest.mark.server
def test_a_short_tuning_of_a_real_server(place: Path) -> None:
    """The bound is one that any machine keeps; the search stops when its time is up."""
    program = "import typer; from marwright.cli.tune import tune; typer.run(tune)"
    command = [sys.executable, "-c", program, "cnn.mar", "--p99", "60s", "--minutes", "0.25"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert told.returncode == 0, told.stderr
    kept = json.loads((place / "tuning/cnn-1.0.json").read_text())
    assert [item["connections"] for item in kept["trials"][0]["measurements"]] == [1, 4, 16, 64]
    assert kept["trials"][0]["measurements"][0]["requests"] > 0
    assert not any(item["errors"] for item in kept["trials"][0]["measurements"])
    assert kept["trials"][0]["candidate"]["batch_size"] == 8
    (entry,) = Deployment.read(place / "deploy.yaml").models or []
    assert entry.workers == kept["chosen"]["workers"]


@pytest.mark.server
@pytest.mark.slow
def test_ctrl_c_ends_the_server_and_keeps_the_trials(place: Path) -> None:
    program = "import typer; from marwright.cli.tune import tune; typer.run(tune)"
    temporary = place / "t"
    temporary.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", program, "cnn.mar", "--p99", "60s", "--minutes", "1"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(temporary)},
        text=True,
    ) as process:
        assert process.stderr is not None
        line = ""
        while "settings of" not in line:  # the archive as packed is measured by then
            line = process.stderr.readline()
            assert line, "it ended before"
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130, rest
    assert "interrupted; trials kept: 1" in rest
    assert json.loads((place / "tuning/cnn-1.0.json").read_text())["trials"][0]["stage"] == "packed"
    assert not list(temporary.iterdir())
