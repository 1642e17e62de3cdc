"""A supervisor that runs as root says so before it starts anything."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from marwright.errors import ServerError
from marwright.server import TorchServe
from marwright.server.deployment import Deployment
from marwright.server.supervision.supervisor import Supervisor


@pytest.mark.parametrize("user", [0, 1000])
def test_a_supervisor_warns_of_root_and_of_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: int
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ServerError("far enough")

    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(TorchServe, "deploy", refuse)
    deployment = Deployment.model_validate(
        {"store": tmp_path, "ports": "free", "logging": {"folder": tmp_path / "logs"}}
    )
    told: list[str] = []
    with pytest.raises(ServerError, match="far enough"):
        Supervisor(deployment, tell=told.append).run()
    text = (tmp_path / "logs/supervisor.log").read_text("utf-8")
    logged = [json.loads(line)["message"] for line in text.splitlines()]
    for lines in (told, logged):
        assert any("running as root" in line for line in lines) is (user == 0)
