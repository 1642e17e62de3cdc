"""docs/runbook.md has a section for each alert and no other; its times are the last measurement's.

WRITE_TABLE=1 writes the table.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from marwright.cli.main import COMMANDS
from marwright.monitor.rules import Times, list_alerts, render_rules
from marwright.server.deployment import Deployment

ALERTS = list_alerts(Deployment(), Times())


@pytest.fixture
def page(root: Path) -> Path:
    return root / "docs/runbook.md"


def find_sections(page: Path) -> dict[str, str]:
    parts = re.split(r"^## (.+)\n", page.read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_alert_has_a_section_and_every_section_an_alert(page: Path) -> None:
    assert list(find_sections(page)) == [alert.name for alert in ALERTS]


def test_every_section_says_what_to_look_at_what_to_do_and_when_not(page: Path) -> None:
    for name, text in find_sections(page).items():
        for word in ("Look: ", "Do: ", "Leave it alone: "):
            assert f"\n\n{word}" in text, f"{name} has no {word}"
        assert "marwright" in text


def test_the_address_that_an_alert_names_is_its_section(page: Path, root: Path) -> None:
    anchors = {
        re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in find_sections(page)
    }
    for group in yaml.safe_load(render_rules(Deployment()))["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                file, _, anchor = rule["annotations"]["runbook_url"].partition("#")
                assert root / file == page
                assert anchor in anchors


def test_a_hold_that_the_page_names_is_the_rules(page: Path) -> None:
    sections = find_sections(page)
    for alert in ALERTS:
        if alert.hold_seconds:
            minutes = f"{alert.hold_seconds / 60:g}"
            shown = {
                f"{minutes} min",
                f"{alert.hold_seconds:g} s",
                *(["a minute"] * (minutes == "1")),
            }
            assert any(span in " ".join(sections[alert.name].split()) for span in shown), alert.name


def test_every_command_that_is_named_is_one(page: Path) -> None:
    texts = [page.read_text("utf-8"), *(alert.summary for alert in ALERTS)]
    named = {word for text in texts for word in re.findall(r"(?<![\w-])marwright ([a-z]+)", text)}
    assert len(named) > 10
    assert named <= set(COMMANDS)


def make_lines(root: Path) -> list[str]:
    result = json.loads((root / "benchmarks/results/alerts.json").read_text("utf-8"))
    lines = ["| fault | alert | seconds | time scale |", "|---|---|---:|---:|"]
    for row in result["alerts"]:
        lines.append(f"| {row['fault']} | {row['alert']} | {row['seconds']} | {row['scale']:g} |")
    return lines


def test_the_times_are_those_of_the_last_measurement(page: Path, root: Path) -> None:
    block = "<!-- alerts -->\n" + "\n".join(make_lines(root)) + "\n<!-- /alerts -->"
    pattern = r"<!-- alerts -->\n.*?<!-- /alerts -->"
    text = page.read_text("utf-8")
    assert re.search(pattern, text, re.DOTALL)
    if os.environ.get("WRITE_TABLE"):
        page.write_text(re.sub(pattern, lambda _: block, text, flags=re.DOTALL), "utf-8")
    else:
        assert block in text


def test_every_fault_that_the_issue_names_was_measured(root: Path) -> None:
    result = json.loads((root / "benchmarks/results/alerts.json").read_text("utf-8"))
    measured = {row["alert"] for row in result["alerts"]}
    assert measured >= {
        "MarwrightCanaryWorse",
        "MarwrightDataStale",
        "MarwrightDown",
        "MarwrightDrift",
        "MarwrightErrorBudgetBurnFast",
        "MarwrightLatencyHigh",
        "MarwrightMemoryGrowing",
        "MarwrightQueueGrowing",
        "MarwrightVersionWithoutWorkers",
        "MarwrightWorkerRestarts",
    }
