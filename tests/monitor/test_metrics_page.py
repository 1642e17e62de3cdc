"""docs/metrics.md lists every metric; WRITE_TABLE=1 writes the table anew."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from marwright.server.metrics.families import FAMILIES, LABEL_LIMIT, find_family

BEGIN, END = "<!-- metrics -->\n", "<!-- end of metrics -->\n"
ADDED = {"instance", "replica", "le"}
"""Labels that come besides: of Prometheus, of a gateway, of a histogram."""


def render() -> str:
    head = "| name | kind | labels | from | meaning |\n|---|---|---|---|---|\n"
    return head + "".join(
        f"| `{family.name}` | {family.kind} | {', '.join(family.labels) or '-'} |"
        f" {family.origin} | {family.help} |\n"
        for family in FAMILIES
    )


@pytest.fixture
def page(root: Path) -> str:
    return (root / "docs/metrics.md").read_text("utf-8")


def list_expressions(page: str) -> list[str]:
    _, _, section = page.partition("## What to ask\n")
    return re.findall(r"^\| [^|]+ \| `(.+)` \|$", section, re.MULTILINE)


def test_the_page_lists_every_metric(root: Path, page: str) -> None:
    before, _, rest = page.partition(BEGIN)
    table, _, after = rest.partition(END)
    if os.environ.get("WRITE_TABLE"):
        text = f"{before}{BEGIN}{render()}{END}{after}"
        (root / "docs/metrics.md").write_text(text, encoding="utf-8")
        return
    assert table == render()


def test_the_page_s_origins_are_those_of_the_metrics(page: str) -> None:
    _, _, rest = page.partition("| from | who counts |\n|---|---|\n")
    rows = rest.partition("\n\n")[0].splitlines()
    assert {row.split("|")[1].strip() for row in rows} == {family.origin for family in FAMILIES}


def test_the_page_s_limit_and_labels_are_the_program_s(page: str) -> None:
    _, _, section = page.partition("## How many series there may be\n")
    section = section.partition("\n## ")[0]
    assert re.findall(r"at\s+most (\d+)", section) == [str(LABEL_LIMIT)]
    labels = {label for family in FAMILIES for label in family.labels}
    named = set(re.findall(r"`(\w+)`", section)) - {"marwright_series_dropped_total"}
    assert named == labels - {"marwright", "torchserve", "torch"}  # versions: one series each


def test_the_expressions_name_metrics_and_labels_that_there_are(page: str) -> None:
    expressions = list_expressions(page)
    assert len(expressions) > 10
    for expression in expressions:
        known = set(ADDED)
        for name, _, matchers in re.findall(r"(marwright_\w+)(\{([^}]*)\})?", expression):
            family = find_family(name)
            assert family is not None, name
            assert name in family.series, f"{name} has no such series"
            known |= set(family.labels)
            assert set(re.findall(r"(\w+)[=!]", matchers)) <= {*family.labels, *ADDED}, expression
        for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
            assert set(group.split(", ")) <= known, expression


def test_promtool_can_read_the_expressions(page: str, tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: Debian's package prometheus has it")
    rules = [
        {"record": f"page:{place}", "expr": text}
        for place, text in enumerate(list_expressions(page))
    ]
    path = tmp_path / "rules.yaml"  # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "page", "rules": rules}]}))
    checked = subprocess.run(
        [promtool, "check", "rules", path], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert f"{len(rules)} rules found" in checked.stdout
