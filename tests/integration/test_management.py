from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from marwright.archive import Run, pack_run
from marwright.errors import ConflictError, ModelNotFoundError, OverloadedError
from marwright.server import TorchServe, register


@pytest.fixture
def both(server: TorchServe, store: Path) -> Iterator[TorchServe]:
    """The session's server with 2.0 beside 1.0; back to 1.0 alone afterwards."""
    register(server.client, store / "cnn-2.0.mar")
    yield server
    server.client.models.set_default("cnn", "1.0")
    server.client.models.unregister("cnn", "2.0")


def test_two_versions_answer_side_by_side(both: TorchServe, scan: bytes) -> None:
    models = both.client.models
    assert [version.version for version in models.versions("cnn")] == ["1.0", "2.0"]
    answers = [both.client.predict("cnn", scan, version=version) for version in ("1.0", "2.0")]
    assert answers[0].json() == answers[1].json()


def test_the_default_switches_and_goes_back(both: TorchServe) -> None:
    models = both.client.models
    for version in ("2.0", "1.0"):
        models.set_default("cnn", version)
        assert models.describe("cnn").version == version


def test_the_default_version_cannot_be_unregistered(both: TorchServe) -> None:
    with pytest.raises(ConflictError):
        both.client.models.unregister("cnn", "1.0")
    assert both.client.models.describe("cnn", "1.0").ready


def test_a_version_without_workers_does_not_become_the_default(both: TorchServe) -> None:
    both.client.models.scale("cnn", 0, version="2.0")
    with pytest.raises(OverloadedError, match="no READY worker"):
        both.client.models.set_default("cnn", "2.0")
    assert both.client.models.describe("cnn").version == "1.0"


def test_workers_scale_up_and_down(server: TorchServe) -> None:
    models = server.client.models
    assert models.scale("cnn", 2).ready_workers == 2
    assert models.scale("cnn", 1).ready_workers == 1


def test_registering_twice_is_a_conflict(server: TorchServe, store: Path) -> None:
    with pytest.raises(ConflictError, match="already registered"):
        register(server.client, store / "cnn.mar")
    assert server.client.models.describe("cnn").ready


def test_an_archive_stays_in_the_store_when_unregistered(
    server: TorchServe, run: Run, tmp_path: Path, store: Path
) -> None:
    packed = pack_run(run, out=tmp_path / "cnn-3.0.mar", version="3.0", preflight=None)
    assert register(server.client, packed.path).version == "3.0"
    server.client.models.unregister("cnn", "3.0")
    assert (store / "cnn-3.0.mar").read_bytes() == packed.path.read_bytes()


def test_unknown_names_are_named(server: TorchServe) -> None:
    for call in (server.client.models.describe, server.client.models.versions):
        with pytest.raises(ModelNotFoundError, match="nobody"):
            call("nobody")
