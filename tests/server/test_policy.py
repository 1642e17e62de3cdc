"""A server's policy: what it refuses is neither loaded at start nor registered later."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from marwright.archive import Run, pack_run
from marwright.archive.admission import POLICY_NAME
from marwright.archive.keys import make_key_pair
from marwright.archive.policy import Policy
from marwright.archive.signature import signature_path
from marwright.archive.signing import sign_with_key
from marwright.client import Client, Endpoint
from marwright.errors import ArchiveError, UsageError
from marwright.server import TorchServe, register
from marwright.server.registry import announce


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_key_pair(tmp_path_factory.mktemp("keys") / "release")


@pytest.fixture(scope="module")
def strict_store(
    tmp_path_factory: pytest.TempPathFactory, run: Run, pair: tuple[Path, Path]
) -> Path:
    """A store whose policy demands that key's signature, with one archive that has it."""
    store = tmp_path_factory.mktemp("strict")
    (store / POLICY_NAME).write_text(f"keys: [{pair[1]}]\n", encoding="utf-8")
    pack_run(run, out=store / "cnn.mar", preflight=None)
    sign_with_key(store / "cnn.mar", key=pair[0])
    return store


@pytest.fixture(scope="module")
def strict_server(strict_store: Path) -> Iterator[TorchServe]:
    with TorchServe(strict_store, models=["cnn.mar"]) as running:
        yield running


@pytest.fixture
def fresh(tmp_path: Path, run: Run) -> Path:
    """An unsigned archive outside the store, of a version that the server does not have."""
    pack_run(run, out=tmp_path / "cnn-2.0.mar", version="2.0", preflight=None)
    return tmp_path / "cnn-2.0.mar"


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def list_versions(server: TorchServe) -> list[str]:
    return [item.version for item in server.client.models.versions("cnn")]


def test_an_unsigned_archive_is_not_loaded_at_start(fresh: Path, pair: tuple[Path, Path]) -> None:
    server = TorchServe(fresh.parent, models=[fresh.name], policy=Policy(keys=(pair[1],)))
    with pytest.raises(ArchiveError, match="the archive is not signed"):
        server.start()
    assert not server.run_folder.exists()


def test_an_archive_that_is_altered_before_the_start_is_not_loaded(
    fresh: Path, pair: tuple[Path, Path]
) -> None:
    sign_with_key(fresh, key=pair[0])
    server = TorchServe(fresh.parent, models=[fresh.name], policy=Policy(keys=(pair[1],)))
    flip_a_byte(fresh)
    with pytest.raises(ArchiveError, match="is refused"):
        server.start()


def test_a_second_policy_beside_the_stores_own_is_refused(strict_store: Path) -> None:
    with pytest.raises(UsageError, match="two policies"):
        TorchServe(strict_store, policy=Policy(require="nothing"))


def test_serve_obeys_a_policy_file(
    tmp_path: Path,
    fresh: Path,
    pair: tuple[Path, Path],
    marwright: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    (tmp_path / "rules.yaml").write_text(f"keys: [{pair[1]}]\n", encoding="utf-8")
    answer = marwright("serve", "--store", fresh.parent, "--policy", tmp_path / "rules.yaml")
    assert answer.returncode == 1
    assert "error: " in answer.stderr
    assert "I605" in answer.stderr


@pytest.mark.server
def test_what_the_policy_refuses_is_not_registered(
    strict_server: TorchServe, strict_store: Path, fresh: Path, tmp_path: Path
) -> None:
    before = sorted(strict_store.iterdir())
    with pytest.raises(ArchiveError, match=r"cnn-2\.0\.mar is refused: the archive is not signed"):
        register(strict_server.client, fresh)
    stranger, _ = make_key_pair(tmp_path / "stranger")
    sign_with_key(fresh, key=stranger)
    with pytest.raises(ArchiveError, match="not signed by anybody who is trusted"):
        register(strict_server.client, fresh)
    assert list_versions(strict_server) == ["1.0"]
    assert sorted(strict_store.iterdir()) == before


@pytest.mark.server
def test_an_archive_altered_after_signing_is_not_registered(
    strict_server: TorchServe, strict_store: Path, fresh: Path, pair: tuple[Path, Path]
) -> None:
    sign_with_key(fresh, key=pair[0])
    flip_a_byte(fresh)
    with pytest.raises(ArchiveError, match="is refused"):
        register(strict_server.client, fresh)
    assert list_versions(strict_server) == ["1.0"]
    assert not (strict_store / fresh.name).exists()


@pytest.mark.server
def test_the_policy_is_obeyed_from_another_shell_though_the_stores_file_is_gone(
    strict_server: TorchServe,
    strict_store: Path,
    fresh: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    marwright: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    rules = strict_store / POLICY_NAME
    rules.rename(tmp_path / "away.yaml")
    try:
        with announce("strict", strict_server.run_folder):
            answer = marwright("models", "register", fresh, "--server", "strict")
    finally:
        (tmp_path / "away.yaml").rename(rules)
    assert answer.returncode == 1
    assert "I605" in answer.stderr
    assert list_versions(strict_server) == ["1.0"]


@pytest.mark.server
def test_a_signed_archive_is_registered_with_its_signature(
    strict_server: TorchServe, strict_store: Path, fresh: Path, pair: tuple[Path, Path]
) -> None:
    sign_with_key(fresh, key=pair[0])
    with Client(Endpoint.read(strict_server.run_folder / "endpoint.json")) as client:
        registered = register(client, fresh)
        assert registered.ready_workers == 1
        client.models.unregister("cnn", "2.0")
    assert signature_path(strict_store / fresh.name).read_bytes() == (
        signature_path(fresh).read_bytes()
    )


@pytest.mark.server
def test_an_archive_in_the_store_needs_its_signature_too(
    strict_server: TorchServe, strict_store: Path, run: Run
) -> None:
    pack_run(run, out=strict_store / "cnn-3.0.mar", version="3.0", preflight=None)
    with pytest.raises(ArchiveError, match="the archive is not signed"):
        register(strict_server.client, Path("cnn-3.0.mar"))
    assert list_versions(strict_server) == ["1.0"]
