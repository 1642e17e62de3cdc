"""Prometheus' files for one server: what it reads, how often, and which rules it follows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from marwright.monitor.program import Program, check_file, write_private
from marwright.monitor.rules import Times, render_rules, show_span
from marwright.server.deployment import Deployment
from marwright.server.ports import HOST

__all__ = [
    "CONFIGURATION",
    "check_configuration",
    "make_prometheus",
    "render_files",
    "render_targets",
    "RULES",
    "TARGETS",
]

CONFIGURATION = "prometheus.yml"
RULES = "rules.yml"
TARGETS = "targets.json"
BODY_BYTES = 16 << 20
"""What one read may bring: a server of 200 versions says some 3 MB."""


def render_files(
    deployment: Deployment, name: str, health_url: str, *, key: str = "", scale: float = 1.0
) -> dict[str, str]:
    """Return the files by name; `key` is what Alertmanager's address begins with."""
    return {
        CONFIGURATION: _render_configuration(deployment, Times(scale), key),
        RULES: render_rules(deployment, scale=scale),
        TARGETS: render_targets(name, health_url),
    }


def render_targets(name: str, health_url: str) -> str:
    """Return the file that says where the server is; Prometheus notices a change of it."""
    address = urlsplit(health_url).netloc
    return json.dumps([{"targets": [address] if address else [], "labels": {"server": name}}])


def check_configuration(folder: Path) -> None:
    """Let promtool look at the files in a folder, the rules first.

    Raises:
        ConfigurationError: it refuses one.
        ServerError: there is no promtool.
    """
    check_file(["promtool", "check", "rules"], folder / RULES)
    check_file(["promtool", "check", "config"], folder / CONFIGURATION)


def make_prometheus(
    deployment: Deployment, files: Mapping[str, str], *, key: str, data: Path
) -> Program:
    """Return a Prometheus that can be started, with its files where promtool has no complaint."""
    settings = deployment.monitoring
    program = Program(
        "prometheus",
        "monitoring.prometheus",
        settings.prometheus,
        key=key,
        files=files,
        arguments=[
            f"--config.file={CONFIGURATION}",
            f"--storage.tsdb.path={data}",
            f"--storage.tsdb.retention.time={settings.keep_days}d",
            "--web.cors.origin=none",  # its default lets every web page read it
        ],
    )
    try:
        check_configuration(program.folder)
    except BaseException:
        program.end()
        raise
    return program


def write_targets(program: Program, name: str, health_url: str) -> None:
    """Let a running Prometheus read the server where it is now."""
    write_private(program.folder / TARGETS, render_targets(name, health_url))


def _render_configuration(deployment: Deployment, times: Times, key: str) -> str:
    interval = show_span(times.scrape_seconds)
    alertmanager = f"{HOST}:{deployment.monitoring.alertmanager}"
    scrape: dict[str, Any] = {
        "job_name": "marwright",
        "follow_redirects": False,
        "body_size_limit": f"{BODY_BYTES}B",
        "file_sd_configs": [{"files": [TARGETS], "refresh_interval": interval}],
        # The server's name stays, whatever port it is moved to.
        "relabel_configs": [{"source_labels": ["server"], "target_label": "instance"}],
    }
    configuration = {
        "global": {
            "scrape_interval": interval,
            "scrape_timeout": interval,
            "evaluation_interval": interval,
        },
        "rule_files": [RULES],
        "alerting": {
            "alertmanagers": [
                {
                    "path_prefix": f"/{key}",
                    "static_configs": [{"targets": [alertmanager]}],
                }
            ]
        },
        "scrape_configs": [scrape],
    }
    return yaml.safe_dump(configuration, sort_keys=False)
