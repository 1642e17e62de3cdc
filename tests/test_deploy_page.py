"""docs/deploy.md lists every key of deploy.yaml; WRITE_TABLE=1 writes the table anew."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

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


def test_the_page_s_example_can_be_used(root: Path, tmp_path: Path, store: Path) -> None:
    page = (root / "docs/deploy.md").read_text("utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    shutil.copytree(store, tmp_path / "model_store")
    (tmp_path / "deploy.yaml").write_text(example, encoding="utf-8")
    deployment = Deployment.read(tmp_path / "deploy.yaml")
    assert deployment.limits.request_bytes == 2 << 20
