"""What deploy.yaml says of a candidate: what it says of the version that is the default."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Pack = Callable[..., Path]


@pytest.mark.server
def test_a_candidate_is_served_as_the_stable_version_is(
    plain: Any, pack: Pack, tmp_path: Path
) -> None:
    text = plain.text.replace(
        "workers: 1 ", "batch_size: 4\n    response_timeout: 33\n    workers: 1 "
    )
    plain.deploy.write_text(text, encoding="utf-8")
    assert plain.run("apply", plain.deploy).returncode == 0
    released = plain.run("release", pack(tmp_path / "echo-2.0.mar", "2.0"))
    assert released.returncode == 0, released.stderr
    with plain.client as client:
        version = client.models.describe("echo", "2.0")
    assert (version.batch_size, version.response_timeout) == (4, 33)
    entry = plain.deploy.read_text("utf-8").partition("archive: echo-2.0.mar")[2]
    assert "batch_size: 4" in entry
    assert "response_timeout: 33" in entry
    assert "nothing to do" in plain.run("apply", plain.deploy).stdout
