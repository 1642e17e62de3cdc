"""docs/releases.md: what it says of deploy.yaml can be used."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from marwright.server.deployment import Deployment


def test_its_examples_of_deploy_yaml_are_understood(root: Path) -> None:
    page = (root / "docs/releases.md").read_text("utf-8")
    fleet, site = (
        Deployment.model_validate(yaml.safe_load(text))
        for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    )
    assert [server.url for server in fleet.servers or ()] == [
        "https://10.0.0.11:8000",
        "https://10.0.0.12:8000",
    ]
    assert fleet.releases.order == "one by one"
    assert site.gateway is not None
    assert site.gateway.control == Path("control.tokens")
