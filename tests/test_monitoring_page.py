"""docs/monitoring.md: what it says of deploy.yaml and of the prediction log can be used."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from marwright.monitor.feedback import Label
from marwright.monitor.predictions import PredictionLog
from marwright.server.deployment import Deployment


@pytest.fixture
def page(root: Path) -> str:
    return (root / "docs/monitoring.md").read_text("utf-8")


def find_block(page: str, language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
    return str(found)


def test_its_example_of_deploy_yaml_is_understood(page: str) -> None:
    settings = Deployment.model_validate(yaml.safe_load(find_block(page, "yaml"))).monitoring
    assert settings.predictions is not None
    assert settings.predictions.redact == ["digest"]
    assert settings.targets.p99_seconds == 0.25


def test_its_code_reads_the_predictions_and_nothing_else(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = PredictionLog(tmp_path / "predictions")
    spool = tmp_path / "predictions/spool"
    spool.mkdir(parents=True)
    lines = [
        {"time": 1.79e9, "request": f"r{i}", "item": 0, "model": "cnn", "version": "1.0"}
        for i in range(3)
    ]
    text = "".join(json.dumps({**line, "status": 200}) + "\n" for line in lines)
    (spool / "cnn-1.0-1-1.jsonl").write_text(text, encoding="utf-8")
    log.keep_days = 3650
    assert log.collect().rows == 3
    log.add_labels([Label("r0", "7")])
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(find_block(page, "python"), names)
    assert names["table"].num_rows == 3  # type: ignore[attr-defined]
