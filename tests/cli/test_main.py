from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from marwright.archive import Run
from marwright.server import TorchServe

Command = Callable[..., subprocess.CompletedProcess[str]]


def address(server: TorchServe) -> list[str]:
    """Return the options that name a server."""
    endpoint = server.endpoint
    urls = ["--inference-url", endpoint.inference_url, "--management-url", endpoint.management_url]
    return [*urls, "--key-file", str(endpoint.key_file)]


def test_help_and_import_leave_torch_alone() -> None:
    script = "import sys, marwright, marwright.cli.main; print('torch' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "False\n"


def test_predict_prints_labels_and_fails_for_a_bad_one(
    marwright: Command, server: TorchServe, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    good = run.samples[0]
    options = [*address(server), "--json"]
    answer = marwright("predict", "cnn", good.path, tmp_path / "text.png", *options)
    rows = json.loads(answer.stdout)
    assert answer.returncode == 1
    assert next(iter(rows[0]["answer"])) == good.prediction
    assert "expected a PNG, JPEG, WebP, GIF or BMP image" in rows[1]["error"]


def test_models_are_listed_shown_and_scaled(marwright: Command, server: TorchServe) -> None:
    options = [*address(server), "--json"]
    assert json.loads(marwright("models", "list", *options).stdout)[0]["default"] == "1.0"
    scaled = json.loads(marwright("models", "scale", "cnn", "2", *options).stdout)
    assert len(scaled[0]["workers"]) == 2
    assert marwright("models", "scale", "cnn", "1", *options).returncode == 0
    assert marwright("models", "show", "cnn", *options).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["frobnicate"], 2, "No such command"),
        (["pack"], 2, "pack needs --model-name"),
        (["pack", "absent"], 1, "there is no run folder absent"),
        (["train", "--epochs", "0", "--out", "r"], 2, "epochs 0"),
        (["train", "--dataset", "moon", "--out", "r"], 1, "no data set 'moon'"),
        (["models", "list"], 1, "no server runs here"),
        (["models", "list", "--management-url", "http://127.0.0.1:9"], 1, "no server answers"),
        (["models", "list", "--inference-url", "http://127.0.0.1:9"], 2, "pass --management-url"),
        (["models", "list", "--management-url", "localhost"], 2, "expected http://HOST:PORT"),
        (["serve", "--name", "a/b"], 2, "no such server name"),
        (
            ["models", "scale", "cnn", "500", "--management-url", "http://127.0.0.1:9"],
            2,
            "500 work",
        ),
        (["train", "--force", "--out", "."], 1, "something else than a run"),
        (["serve", "elsewhere/cnn.mar"], 2, "is not in the store"),
        (["serve", "--store", "absent"], 1, "store: there is no folder"),
    ],
)
def test_a_mistake_gets_one_line_and_its_status(
    marwright: Command, tmp_path: Path, arguments: list[str], status: int, text: str
) -> None:
    (tmp_path / "mine.txt").touch()
    answer = marwright(
        *arguments, cwd=tmp_path, env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    )
    assert (answer.returncode, text in answer.stderr) == (status, True), answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "r").exists()
    assert (tmp_path / "mine.txt").exists()


def test_the_demo_goes_the_whole_way_and_leaves_nothing_running(
    marwright: Command, tmp_path: Path
) -> None:
    (tmp_path / "tmp").mkdir()
    answer = marwright(
        "demo", "--json", cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    )
    assert answer.returncode == 0, answer.stderr
    outcome = json.loads(answer.stdout)
    assert outcome["test_accuracy"]["1.0"] >= 0.97
    assert outcome["served_accuracy"] == outcome["in_process_accuracy"]
    assert outcome["requests_answered"] == outcome["requests_sent"] == 360
    assert outcome["version_switch"] == ["1.0", "2.0", "1.0"]
    assert not list((tmp_path / "tmp").glob("marwright-*"))


def test_doctor_finds_this_machine_fit(marwright: Command, tmp_path: Path) -> None:
    answer = marwright("doctor", "--json", cwd=tmp_path)
    checks = {item["check"]: item["state"] for item in json.loads(answer.stdout)}
    assert answer.returncode == 0
    assert checks["Java"] == checks["torch"] == "ok"


def test_the_shell_completes_commands() -> None:
    asked = {
        "_MARWRIGHT_COMPLETE": "complete_bash",
        "COMP_WORDS": "marwright mod",
        "COMP_CWORD": "1",
    }
    command = str(Path(sys.executable).with_name("marwright"))
    answer = subprocess.run(
        [command], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert answer.stdout.split() == ["models"]


def test_what_serve_does_not_take_from_a_configuration_is_told(
    marwright: Command, tmp_path: Path, taken_port: int
) -> None:
    lines = [
        "model_store=/srv",
        "load_models=all",
        f"inference_address=http://0.0.0.0:{taken_port}",
    ]
    (tmp_path / "config.properties").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "model_store").mkdir()
    answer = marwright("serve", cwd=tmp_path)
    assert answer.returncode == 1  # the port is taken: nothing was started
    for key in ("model_store", "load_models"):
        assert f"note: {key} of config.properties is not used" in answer.stderr
    assert "note: config.properties: inference_address listens on 0.0.0.0" in answer.stderr
