"""docs/deploy.md lists every key of deploy.yaml; WRITE_TABLE=1 writes the table anew."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from marwright.server import TorchServe
from marwright.server.change import prepare_change
from marwright.server.deployment import Deployment
from marwright.server.explanation import list_explanations

HEAD = "| key | takes | default | what |\n|---|---|---|---|\n"


def render() -> str:
    models = [{"archive": "x.mar"}]
    deployment = Deployment.model_validate({"store": "none", "models": models})
    rows = [
        (item.key.replace("models.0.", "models[]."), item) for item in list_explanations(deployment)
    ]
    return HEAD + "".join(
        f"| `{key}` | {item.takes} | {item.default or '-'} |"
        f" {item.does.removesuffix(' Of x.mar.')} |\n"
        for key, item in rows
    )


def test_the_page_lists_every_key(root: Path) -> None:
    path = root / "docs/deploy.md"
    head, marker, table = path.read_text("utf-8").partition(HEAD)
    if os.environ.get("WRITE_TABLE"):
        path.write_text(head + render(), encoding="utf-8")
        return
    assert marker + table == render()


@pytest.fixture
def example(root: Path, tmp_path: Path, store: Path) -> Path:
    """The page's deploy.yaml, with the archives that it names."""
    page = (root / "docs/deploy.md").read_text("utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    shutil.copytree(store, tmp_path / "model_store")
    (tmp_path / "deploy.yaml").write_text(text, encoding="utf-8")
    return tmp_path / "deploy.yaml"


def test_the_page_s_example_can_be_used(example: Path) -> None:
    assert Deployment.read(example).limits.request_bytes == 2 << 20


@pytest.mark.server
def test_the_plan_shown_is_that_of_the_example(
    root: Path, example: Path, server: TorchServe, store: Path
) -> None:
    page = (root / "docs/deploy.md").read_text("utf-8")
    (shown,) = re.findall(r"```\n step .*?\n ─+\n(.*?)```", page, re.DOTALL)
    models, _, _ = example.read_text("utf-8").partition("limits:")
    models = models.replace("store: model_store", f"store: {store}")  # the server's
    example.write_text(models, encoding="utf-8")
    steps = prepare_change(example, server.client).plan.steps
    rows = [
        (s.kind, s.name, s.version, s.before, s.after, "yes" if s.interrupts else "") for s in steps
    ]
    assert [re.split(r"\s{2,}", line.strip()) for line in shown.splitlines()] == [
        [cell for cell in row if cell] for row in rows
    ]
