"""Findings as SARIF 2.1.0, which code hosts and editors show beside the file.

https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from marwright import __version__
from marwright.archive.checks.findings import Finding, Rule, Severity

__all__ = ["to_sarif"]

_LEVELS = {
    Severity.NOTE: "note",
    Severity.WARNING: "warning",
    Severity.ERROR: "error",
    Severity.DANGER: "error",
}
# What GitHub sorts by; from 9 on it says "critical".
_SCORES = {
    Severity.NOTE: "1.0",
    Severity.WARNING: "4.0",
    Severity.ERROR: "6.0",
    Severity.DANGER: "9.5",
}


def to_sarif(path: Path, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the findings of one archive as a SARIF log, ready for json.dump.

    The archive is an artifact, and each member with a finding is one nested in it (3.24.3).
    """
    rules = {finding.rule.id: finding.rule for finding in findings}
    members = dict.fromkeys(finding.member for finding in findings if finding.member)
    uris = [quote(os.fsencode(path.as_posix())), *(f"/{_quote(member)}" for member in members)]
    driver = {
        "name": "marwright",
        "version": __version__,
        "rules": [_describe_rule(rule) for rule in rules.values()],
    }
    nested = [{"location": {"uri": uri}, "parentIndex": 0} for uri in uris[1:]]
    run = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "artifacts": [{"location": {"uri": uris[0]}}, *nested],
        "results": [
            _describe(
                finding,
                rule_index=list(rules).index(finding.rule.id),
                artifact=[None, *members].index(finding.member or None),
                uris=uris,
            )
            for finding in findings
        ],
    }
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [run],
    }


def _quote(member: str) -> str:
    return quote(member.encode("utf-8", "backslashreplace"))


def _describe_rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.id,
        "shortDescription": {"text": f"{rule.title}."},
        "help": {"text": f"{rule.remedy}."},
        "defaultConfiguration": {"level": _LEVELS[rule.severity]},
        "properties": {"security-severity": _SCORES[rule.severity], "tags": ["security"]},
    }


def _describe(
    finding: Finding, *, rule_index: int, artifact: int, uris: Sequence[str]
) -> dict[str, Any]:
    location: dict[str, Any] = {"artifactLocation": {"uri": uris[artifact], "index": artifact}}
    if finding.line:
        location["region"] = {"startLine": finding.line}
    properties = {"severity": str(finding.severity), "remedy": finding.remedy}
    if finding.detail:
        properties["detail"] = finding.detail
    return {
        "ruleId": finding.rule.id,
        "ruleIndex": rule_index,
        "level": _LEVELS[finding.severity],
        "message": {"text": f"{finding.rule.title}: {finding.found}; {finding.remedy}"},
        "locations": [{"physicalLocation": location}],
        "properties": properties,
    }
