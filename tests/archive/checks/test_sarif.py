from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from marwright.archive.checks import ALL_RULES
from marwright.archive.checks.findings import Finding, Severity
from marwright.archive.checks.sarif import to_sarif

PATH = Path("model store/cnn.mar")
FINDINGS = [
    rule.at("found é", member=member, line=line, detail=detail)
    for rule in ALL_RULES
    for member, line, detail in (
        ("", None, ""),
        ("a b/h.py", 3, "one\ntwo"),
        ("model.pt", None, ""),
    )
]


def run_of(findings: list[Finding]) -> dict[str, Any]:
    log = json.loads(json.dumps(to_sarif(PATH, findings)))
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    return dict(run)


def test_every_finding_is_a_result_of_its_rule() -> None:
    run = run_of(FINDINGS)
    rules = run["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == [rule.id for rule in ALL_RULES]
    assert len(run["results"]) == len(FINDINGS)
    for result, finding in zip(run["results"], FINDINGS, strict=True):
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"] == finding.rule.id
        assert finding.found in result["message"]["text"]
        assert finding.remedy in result["message"]["text"]
        assert result["properties"]["severity"] == str(finding.severity)


def test_members_are_artifacts_inside_the_archive() -> None:
    run = run_of(FINDINGS[:3])
    assert run["artifacts"] == [
        {"location": {"uri": "model%20store/cnn.mar"}},
        {"location": {"uri": "/a%20b/h.py"}, "parentIndex": 0},
        {"location": {"uri": "/model.pt"}, "parentIndex": 0},
    ]
    places = [result["locations"][0]["physicalLocation"] for result in run["results"]]
    assert [place["artifactLocation"]["index"] for place in places] == [0, 1, 2]
    assert [place.get("region") for place in places] == [None, {"startLine": 3}, None]
    for place in places:
        location = place["artifactLocation"]
        assert location["uri"] == run["artifacts"][location["index"]]["location"]["uri"]


@pytest.mark.parametrize(
    ("severity", "level"),
    [
        (Severity.NOTE, "note"),
        (Severity.WARNING, "warning"),
        (Severity.ERROR, "error"),
        (Severity.DANGER, "error"),
    ],
)
def test_a_severity_becomes_a_level_of_sarif(severity: Severity, level: str) -> None:
    run = run_of([ALL_RULES[0].at("x", severity=severity)])
    assert run["results"][0]["level"] == level


# What the schema of SARIF 2.1.0 demands of the parts that are used here.
REQUIRED = {
    "tool": {"driver"},
    "driver": {"name"},
    "rules": {"id"},
    "results": {"message"},
    "message": {"text"},
}
KNOWN = {
    "runs": {"tool", "columnKind", "artifacts", "results"},
    "driver": {"name", "version", "rules"},
    "rules": {"id", "shortDescription", "help", "defaultConfiguration", "properties"},
    "artifacts": {"location", "parentIndex"},
    "results": {"ruleId", "ruleIndex", "level", "message", "locations", "properties"},
    "physicalLocation": {"artifactLocation", "region"},
    "artifactLocation": {"uri", "index"},
    "region": {"startLine"},
}


@pytest.mark.parametrize("findings", [[], FINDINGS])
def test_the_log_has_what_the_schema_demands_and_nothing_it_does_not_know(
    findings: list[Finding],
) -> None:
    def visit(name: str, value: Any) -> None:
        if isinstance(value, list):
            for part in value:
                visit(name, part)
        elif isinstance(value, dict):
            assert REQUIRED.get(name, set()) <= set(value), name
            assert set(value) <= KNOWN.get(name, set(value)), name
            for key, part in value.items():
                visit(key, part)

    log = to_sarif(PATH, findings)
    assert set(log) == {"$schema", "version", "runs"}
    visit("runs", log["runs"])


def test_a_name_of_any_bytes_becomes_a_uri() -> None:
    run = run_of([ALL_RULES[0].at("x", member="a\udcff#?")])
    assert run["artifacts"][1]["location"]["uri"] == "/a%5Cudcff%23%3F"
