from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from marwright.cli.config import app
from marwright.errors import ConfigurationError, UsageError
from marwright.server.deployment import Deployment
from marwright.server.explanation import explain, list_explanations
from marwright.server.keys import KEYS
from marwright.server.properties import read_properties

TEXT = """\
store: store
models:
  - {archive: cnn.mar, batch_size: 4}
  - cnn-2.0.mar
limits:
  queue: 7
properties:
  io_ratio: 60
"""
Config = Callable[..., Result]


@pytest.fixture
def config(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Return `marwright config`, in a folder with a deploy.yaml."""
    (tmp_path / "store").symlink_to(store)
    (tmp_path / "deploy.yaml").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_a_sound_file_is_shown_as_what_it_serves(config: Config) -> None:
    rows = json.loads(config("check", "--json").stdout)
    assert [(row["archive"], row["default"]) for row in rows] == [
        ("cnn.mar", "yes"),
        ("cnn-2.0.mar", ""),
    ]
    assert "can be used" in config("check").stderr


def test_a_bad_file_is_refused(config: Config, tmp_path: Path) -> None:
    (tmp_path / "deploy.yaml").write_text("stoer: store\nlimits: {queue: 0}\n")
    error = config("check").exception
    assert isinstance(error, ConfigurationError)
    assert error.exit_status == 1
    assert "did you mean store?" in error.detail
    assert "limits.queue" in error.detail


@pytest.mark.parametrize(
    ("key", "value", "origin", "becomes"),
    [
        ("limits.queue", "7", "deploy.yaml:6", "job_queue_size=7"),
        ("limits.connections", "2000", "default", "-Dmarwright.max.connections=2000"),
        ("models.0.batch_size", "4", "deploy.yaml:3", "batchSize: 4"),
        ("models.cnn.mar.batch_size", "4", "deploy.yaml:3", "batchSize: 4"),
        (
            "models.cnn-2.0.mar.batch_size",
            "8",
            "model-config.yaml of cnn-2.0.mar",
            "batchSize: 8",
        ),
        ("models.1.archive", "cnn-2.0.mar", "deploy.yaml:4", None),
        ("ports.metrics", "8082", "default", "metrics_address=http://127.0.0.1:8082"),
        ("io_ratio", "60", "deploy.yaml:8", "io_ratio=60"),
        ("job_queue_size", "7", "limits.queue of deploy.yaml", "job_queue_size=7"),
        ("netty_client_threads", "0", "default", None),
        ("allowed_urls", "none", "marwright", "allowed_urls=none"),
    ],
)
def test_a_key_is_explained(
    config: Config, key: str, value: str, origin: str, becomes: str | None
) -> None:
    found = json.loads(config("explain", key, "--json").stdout)
    assert (found["value"], found["origin"]) == (value, origin)
    assert found["becomes"] == ([becomes] if becomes else [])
    assert found["does"]
    assert found["takes"]


def test_what_is_computed_says_so(config: Config) -> None:
    text = config("explain", "jvm.heap").stdout
    assert "computed" in text
    assert "-Xmx" in text


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("limits.queues", "limits.queue"),
        ("jobqueue_size", "job_queue_size"),
        ("models.cnn.mar.batchsize", "models[].batch_size"),
        ("workers", "models[].workers?"),
        ("heap", "jvm.heap?"),
    ],
)
def test_an_unknown_key_names_the_nearest(config: Config, key: str, near: str) -> None:
    error = config("explain", key).exception
    assert isinstance(error, UsageError)
    assert f"did you mean {near}" in error.remedy


@pytest.mark.parametrize("key", ["models[].batch_size", "models.batch_size"])
def test_a_key_of_every_entry_is_explained_with_what_each_says(config: Config, key: str) -> None:
    found = json.loads(config("explain", key, "--json").stdout)
    assert found["key"] == "models[].batch_size"
    assert found["value"] == "models.0: 4, models.1: 8"
    assert found["origin"] == "deploy.yaml:3, model-config.yaml of cnn-2.0.mar"
    assert found["becomes"] == ["batchSize"]
    assert not found["does"].endswith(".mar.")


def test_every_key_can_be_explained() -> None:
    deployment = Deployment()
    for item in list_explanations(deployment):
        assert item.does, item.key
        assert item.takes, item.key
        assert explain(item.key, deployment) == item
    for key in KEYS:
        assert explain(key, deployment).does


def test_all_values_are_shown_with_their_origin(config: Config) -> None:
    rows = {row["key"]: row for row in json.loads(config("show", "--json").stdout)}
    assert rows["limits.queue"]["origin"] == "deploy.yaml:6"
    assert rows["access.tokens"]["value"] == "true"
    assert "limits.queue" in config("show").stdout


def test_what_is_rendered_is_what_torchserve_reads(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "config.properties"
    path.write_text(config("render").stdout, encoding="utf-8")
    properties = read_properties(path)
    assert properties["job_queue_size"] == "7"
    assert properties["load_models"] == "cnn.mar,cnn-2.0.mar"
    assert json.loads(properties["models"])["cnn"]["1.0"]["batchSize"] == 4


def test_a_config_properties_is_imported(config: Config, tmp_path: Path) -> None:
    (tmp_path / "old.properties").write_text("job_queue_size=9\nwhat_is_this=1\n")
    assert isinstance(config("import", "old.properties").exception, UsageError)  # it would replace
    result = config("import", "old.properties", "--out", "new.yaml")
    assert result.stdout == "new.yaml\n"
    assert "what_is_this is no key of TorchServe's" in result.stderr
    assert (tmp_path / "new.yaml").read_text() == "limits:\n  queue: 9\n"


def test_without_a_file_the_defaults_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["explain", "limits.queue", "--json"])
    assert json.loads(result.stdout)["origin"] == "default"
