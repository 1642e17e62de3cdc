"""Key files: which are taken, what is said of the others, and how new ones are written."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from marwright.archive.keys import (
    is_exposed,
    make_key_pair,
    read_certificates,
    read_private_key,
    read_public_key,
)
from marwright.errors import StorageError, UsageError


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make_key_pair(tmp_path / "keys")


def test_a_new_pair_belongs_together_and_only_the_owner_reads_the_private_one(
    tmp_path: Path, umask: Callable[[int], AbstractContextManager[None]]
) -> None:
    with umask(0):
        private, public = make_key_pair(tmp_path / "keys")
    assert read_private_key(private).public_key() == read_public_key(public)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert not is_exposed(private)
    assert is_exposed(public)


def test_a_folder_that_is_there_is_left_alone(pair: tuple[Path, Path]) -> None:
    before = pair[0].read_bytes()
    with pytest.raises(StorageError, match="exists"):
        make_key_pair(pair[0].parent)
    assert pair[0].read_bytes() == before


def test_a_password_protects_the_private_key(tmp_path: Path) -> None:
    private, _ = make_key_pair(tmp_path / "keys", password="secret")
    read_private_key(private, "secret")
    with pytest.raises(UsageError, match="no password was given; set MARWRIGHT_KEY_PASSWORD"):
        read_private_key(private)
    with pytest.raises(UsageError, match="found a wrong password"):
        read_private_key(private, "guess")


def test_a_password_for_a_key_that_has_none_is_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="leave the password out"):
        read_private_key(pair[0], "secret")


def test_keys_that_openssl_makes_are_read(tmp_path: Path) -> None:
    openssl("ecparam", "-name", "secp384r1", "-genkey", "-out", tmp_path / "key.pem")
    openssl("pkey", "-in", tmp_path / "key.pem", "-pubout", "-out", tmp_path / "key.pub")
    assert (tmp_path / "key.pem").read_text("ascii").startswith("-----BEGIN EC PARAMETERS-----")
    private = read_private_key(tmp_path / "key.pem")
    assert private.public_key() == read_public_key(tmp_path / "key.pub")


def test_a_private_key_is_not_taken_for_a_public_one(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="expected a public key, found a private key"):
        read_public_key(pair[0])


def test_a_public_key_is_not_taken_for_a_private_one(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="expected a private key, found a public key"):
        read_private_key(pair[1])


@pytest.mark.parametrize("algorithm", ["rsa", "ed25519"])
def test_a_key_of_another_kind_is_refused(tmp_path: Path, algorithm: str) -> None:
    openssl("genpkey", "-algorithm", algorithm, "-out", tmp_path / "key.pem")
    openssl("pkey", "-in", tmp_path / "key.pem", "-pubout", "-out", tmp_path / "key.pub")
    with pytest.raises(UsageError, match="expected an elliptic curve key"):
        read_private_key(tmp_path / "key.pem")
    with pytest.raises(UsageError, match="expected an elliptic curve key"):
        read_public_key(tmp_path / "key.pub")


def test_a_curve_that_signatures_do_not_know_is_refused(tmp_path: Path) -> None:
    openssl("ecparam", "-name", "secp256k1", "-genkey", "-noout", "-out", tmp_path / "key.pem")
    with pytest.raises(UsageError, match="found the curve secp256k1"):
        read_private_key(tmp_path / "key.pem")


@pytest.mark.parametrize("read", [read_private_key, read_public_key, read_certificates])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff" * 50,
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    ],
)
def test_a_damaged_file_is_refused(
    tmp_path: Path, read: Callable[[Path], object], content: bytes
) -> None:
    (tmp_path / "key.pem").write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot use .*key\.pem: expected .*, found"):
        read(tmp_path / "key.pem")


@pytest.mark.parametrize("read", [read_private_key, read_public_key, read_certificates])
def test_a_missing_file_or_a_folder_is_said_so(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    for path in (tmp_path / "absent.pem", tmp_path):
        with pytest.raises(StorageError, match="cannot read"):
            read(path)
