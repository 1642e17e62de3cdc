"""`marwright monitor`: files for a Prometheus of one's own, and a look at them."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from marwright.monitor.rules import Times, list_alerts
from marwright.server.deployment import Deployment

Marwright = Callable[..., subprocess.CompletedProcess[str]]
needs_programs = pytest.mark.skipif(
    not all(map(shutil.which, ("promtool", "amtool"))),
    reason="needs Debian's prometheus and prometheus-alertmanager",
)


@pytest.fixture
def deploy(tmp_path: Path) -> Path:
    path = tmp_path / "deploy.yaml"
    (tmp_path / "webhook").write_text("http://127.0.0.1:9/a-secret\n")
    path.write_text(
        "name: main\nports: {health: 18083}\n"
        "monitoring: {webhook: webhook, alertmanager: 19093, targets: {p99_seconds: 0.25}}\n"
    )
    return path


def test_render_writes_all_files_and_guards_the_webhook(
    marwright: Marwright, deploy: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out/files"
    done = marwright("monitor", "render", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {"alertmanager.yml", "prometheus.yml", "rules.yml", "targets.json"}
    assert {path.name for path in out.iterdir()} == names
    assert stat.S_IMODE((out / "alertmanager.yml").stat().st_mode) == 0o600
    assert "a-secret" in (out / "alertmanager.yml").read_text()
    assert not any("a-secret" in (out / name).read_text() for name in names - {"alertmanager.yml"})
    (target,) = json.loads((out / "targets.json").read_text())
    assert target == {"targets": ["127.0.0.1:18083"], "labels": {"server": "main"}}
    prometheus = yaml.safe_load((out / "prometheus.yml").read_text())
    (alertmanager,) = prometheus["alerting"]["alertmanagers"]
    assert alertmanager["static_configs"] == [{"targets": ["127.0.0.1:19093"]}]
    assert "p99_5m >= 0.25" in (out / "rules.yml").read_text()
    assert marwright("monitor", "render", out, cwd=tmp_path).returncode == 0  # again, in its place


@needs_programs
def test_check_lists_the_alerts_that_both_programs_take(
    marwright: Marwright, deploy: Path, tmp_path: Path
) -> None:
    done = marwright("monitor", "check", "--deploy", deploy, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = [alert.name for alert in list_alerts(Deployment(), Times())]
    assert [row["alert"] for row in json.loads(done.stdout)] == names
    shown = marwright("monitor", "check", "--deploy", deploy, cwd=tmp_path)
    assert all(name in shown.stdout for name in names)
    assert "secret" not in done.stdout + done.stderr + shown.stdout + shown.stderr


def test_a_webhook_that_is_no_url_is_said_and_not_shown(
    marwright: Marwright, deploy: Path, tmp_path: Path
) -> None:
    (tmp_path / "webhook").write_text("a-secret\n")
    done = marwright("monitor", "check", "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert json.loads(done.stderr)["error"] == "ConfigurationError"
    assert "a-secret" not in done.stderr


def test_a_missing_promtool_is_named_with_its_package(
    marwright: Marwright, deploy: Path, tmp_path: Path
) -> None:
    done = marwright("monitor", "check", cwd=tmp_path, env={"PATH": "/nowhere"})
    assert done.returncode == 1
    assert "apt-get install prometheus prometheus-alertmanager" in done.stderr


def test_a_broken_deploy_yaml_is_named_with_its_line(marwright: Marwright, tmp_path: Path) -> None:
    (tmp_path / "deploy.yaml").write_text("monitoring:\n  prometheus: none\n")
    done = marwright("monitor", "render", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "monitoring.prometheus" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_dashboard_is_printed_or_written(marwright: Marwright, tmp_path: Path) -> None:
    printed = marwright("monitor", "grafana", cwd=tmp_path)
    assert json.loads(printed.stdout)["title"]
    done = marwright("monitor", "grafana", "--out", tmp_path / "board.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "board.json").read_text()) == json.loads(printed.stdout)
