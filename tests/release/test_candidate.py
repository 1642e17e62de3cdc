"""What speaks against a release is said at once, and nothing is moved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marwright.archive.admission import POLICY_NAME
from marwright.archive.keys import make_key_pair
from marwright.errors import ConfigurationError
from marwright.server.deployment import Deployment

Pack = Callable[..., Path]


@pytest.fixture
def refuse(plain: Any) -> Callable[..., str]:
    """Return a function that tries a release, and returns what it says once nothing has moved."""

    def release(*words: Any) -> str:
        before = plain.see()
        refused = plain.run("release", *words)
        assert refused.returncode == 1, refused.stderr
        assert plain.see() == before
        assert plain.history.read() == []
        return str(refused.stderr)

    return release


@pytest.mark.server
@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"name": "other"}, "no model other is served there, but: echo"),
        ({"version": "1.0"}, "echo 1.0 is the default already"),
        ({"samples": 0}, "it carries no sample"),
        ({"recorded": None}, "sample 0.json has no recorded answer"),
    ],
)
def test_an_archive_that_cannot_be_released_is_refused(
    refuse: Callable[..., str], pack: Pack, tmp_path: Path, parts: dict[str, Any], problem: str
) -> None:
    archive = pack(tmp_path / "echo-2.0.mar", **{"version": "2.0", **parts})
    assert problem in refuse(archive)
    assert problem in refuse(archive, "--check")


@pytest.mark.server
def test_all_that_speaks_against_it_is_said_together(
    plain: Any, pack: Pack, tmp_path: Path
) -> None:
    pack(plain.store / "echo-2.0.mar", "2.0")
    archive = pack(tmp_path / "echo-2.0.mar", "2.0", name="other", samples=0)
    text = plain.deploy.read_text("utf-8")
    plain.deploy.write_text(text.replace("workers: 1 ", "workers: 2 "), encoding="utf-8")
    refused = plain.run("release", archive)
    assert "5 problems" in refused.stderr or "4 problems" in refused.stderr
    for problem in (
        "the store holds another echo-2.0.mar",
        "it carries no sample",
        "no model other is served there",
        "deploy.yaml is not applied yet: scale echo 1.0",
    ):
        assert problem in refused.stderr
    assert plain.list_versions() == {"1.0": (1, True)}


@pytest.mark.server
def test_an_unsigned_archive_is_refused_where_signatures_are_asked_for(
    plain: Any, refuse: Callable[..., str], pack: Pack, tmp_path: Path
) -> None:
    archive = pack(tmp_path / "echo-2.0.mar", "2.0")
    _, public = make_key_pair(tmp_path / "release")
    policy = plain.store / POLICY_NAME
    policy.write_text(f"keys: [{public}]", encoding="utf-8")
    try:
        assert "echo-2.0.mar is refused: the archive is not signed" in refuse(archive)
    finally:
        policy.unlink()


@pytest.mark.server
def test_another_servers_tokens_are_refused(plain: Any, pack: Pack, tmp_path: Path) -> None:
    with plain.client as client:
        endpoint = client.endpoint
    keys = tmp_path / "keys.json"
    token = {"key": "another", "expiration time": "2099-01-01T00:00:00Z"}
    keys.write_text(json.dumps(dict.fromkeys(("inference", "management", "API"), token)))
    refused = plain.run(
        "release",
        pack(tmp_path / "echo-2.0.mar", "2.0"),
        *("--to", endpoint.management_url, "--inference-url", endpoint.inference_url),
        *("--key-file", keys, "--store", plain.store),
    )
    assert refused.returncode == 1
    assert "pass the server's key file" in refused.stderr
    assert plain.list_versions() == {"1.0": (1, True)}


@pytest.mark.parametrize(
    ("text", "key", "problem"),
    [
        ("canary: {steps: [25, 5]}", "releases.canary.steps", "must rise"),
        ("canary: {steps: [0, 5]}", "releases.canary.steps", "must rise"),
        ("shadow: {share: 101}", "releases.shadow.share", "100"),
        ("shadow: {share: 0, requests: 5}", "releases.shadow", "never brings the 5 requests"),
        ("error_rate: 0", "releases.error_rate", "more than 0"),
        ("keep: 0", "releases.keep", "1"),
    ],
)
def test_gates_that_can_never_hold_are_named_with_their_line(
    tmp_path: Path, text: str, key: str, problem: str
) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(f"store: .\nreleases:\n  {text}\n", encoding="utf-8")
    with pytest.raises(ConfigurationError) as caught:
        Deployment.parse(path)
    said = f"{caught.value} {caught.value.detail}"
    assert key in said
    assert problem in said
    assert f"line 3: {key}" in said
