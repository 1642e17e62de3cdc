"""docs/findings.md lists every rule; WRITE_TABLE=1 writes it anew."""

from __future__ import annotations

import os
from pathlib import Path

from marwright.archive.checks import ALL_RULES

HEAD = """# Findings

What `marwright pack`, `check`, `repack` and any registration may find, each with its remedy.
`error` and `danger` keep an archive from being written, registered or loaded. An id never changes
its meaning; its letter says which check it was: S structure, P pickles, H handler source, C
configuration, W a worker's run, I integrity. `marwright check FILE.mar --json` and `--sarif FILE`
carry the same ids.

| id | severity | what | what to do |
|---|---|---|---|
"""


def render() -> str:
    rows = [
        f"| {rule.id} | {rule.severity} | {rule.title} | {rule.remedy} |".replace("\n", " ")
        for rule in sorted(ALL_RULES, key=lambda rule: rule.id)
    ]
    return HEAD + "\n".join(rows) + "\n"


def test_the_docs_list_every_finding(root: Path) -> None:
    path = root / "docs/findings.md"
    if os.environ.get("WRITE_TABLE"):
        path.write_text(render(), encoding="utf-8")
    assert path.read_text("utf-8") == render()


def test_ids_are_unique_and_rules_are_whole() -> None:
    ids = [rule.id for rule in ALL_RULES]
    assert len(set(ids)) == len(ids) > 40
    for rule in ALL_RULES:
        assert rule.id[0] in "SPHCWI"
        assert rule.id[1:].isdigit()
        assert rule.title
        assert rule.remedy
        assert "|" not in rule.title + rule.remedy
