"""Keys and certificates: PEM files that sign archives, and tell who signed one.

Elliptic curves P-256, P-384 and P-521, as the model signing format has them. Whatever needs
`cryptography` imports it on first use: it comes with `pip install 'marwright[sign]'`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from marwright.errors import ArchiveError, UsageError
from marwright.storage import translate_os_errors, write_folder

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        EllipticCurvePrivateKey,
        EllipticCurvePublicKey,
    )
    from cryptography.x509 import Certificate

__all__ = [
    "check_dates",
    "explain_missing_extra",
    "fingerprint",
    "is_exposed",
    "make_key_pair",
    "read_certificates",
    "read_private_key",
    "read_public_key",
]

MAX_PEM_BYTES = 4 << 20
"""A bundle of every public root certificate has a quarter of a megabyte."""
CURVES = ("secp256r1", "secp384r1", "secp521r1")


@contextlib.contextmanager
def explain_missing_extra() -> Iterator[None]:
    """Raise UsageError where a package is missing that the extra `sign` brings."""
    try:
        yield
    except ImportError as exc:
        raise UsageError(
            "signatures need packages that are not installed",
            found=str(exc),
            remedy="pip install 'marwright[sign]'",
        ) from exc


def read_private_key(path: Path, password: str | None = None) -> EllipticCurvePrivateKey:
    """Read a private key.

    Raises:
        UsageError: something else, another kind of key, or a wrong or missing password.
        StorageError: it cannot be read.
    """
    content = _read_pem(path)
    with explain_missing_extra():
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    if b"PRIVATE KEY-----" not in content:
        raise _wrong_file(path, expected="a private key", found=_describe(content, wanted=""))
    try:
        key = load_pem_private_key(content, password.encode() if password else None)
    except TypeError as exc:  # a password where none is needed, or none where one is
        given = "a password was given" if password else "no password was given"
        remedy = "leave the password out" if password else "set MARWRIGHT_KEY_PASSWORD"
        raise UsageError(f"cannot read {path}", found=f"{exc}, {given}", remedy=remedy) from exc
    except (ValueError, UnsupportedAlgorithm) as exc:
        found = "a wrong password, or damage" if password else "damage"
        raise _wrong_file(path, expected="a private key", found=found) from exc
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in CURVES:
        raise _wrong_curve(path, key)
    return key


def read_public_key(path: Path) -> EllipticCurvePublicKey:
    """Read a public key.

    Raises:
        UsageError: something else, a private key for instance, or another kind of key.
        StorageError: it cannot be read.
    """
    content = _read_pem(path)
    with explain_missing_extra():
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise _wrong_file(
            path, expected="a public key", found=_describe(content, wanted="public key")
        ) from exc
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise _wrong_curve(path, key)
    return key


def read_certificates(path: Path) -> list[Certificate]:
    """Read every certificate of a file.

    Raises:
        UsageError: there is none in it.
        StorageError: it cannot be read.
    """
    content = _read_pem(path)
    with explain_missing_extra():
        from cryptography.x509 import load_pem_x509_certificates
    try:
        return load_pem_x509_certificates(content)
    except ValueError as exc:
        raise _wrong_file(
            path, expected="certificates", found=_describe(content, wanted="certificate")
        ) from exc


def check_dates(certificate: Certificate, *, source: Path) -> None:
    """Refuse a certificate that is no longer valid, or not yet; `source` is where it stands.

    Raises:
        ArchiveError: it says when it was valid.
    """
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    now = datetime.now(timezone.utc)
    if not first <= now <= last:
        raise ArchiveError(
            f"the certificate {certificate.subject.rfc4514_string()} in {source} is not valid now",
            expected=f"a day from {first:%Y-%m-%d} to {last:%Y-%m-%d}",
            found=f"{now:%Y-%m-%d}",
            remedy="sign with a certificate that is valid",
        )


def fingerprint(key: EllipticCurvePublicKey) -> str:
    """Return how a signature names the key that it was made with: SHA-256 of its PEM, in hex."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    content = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(content).hexdigest()


def is_exposed(path: Path) -> bool:
    """Return whether others than the owner may read a private key."""
    with translate_os_errors(f"read {path}"):
        return bool(path.stat().st_mode & 0o077)


def make_key_pair(folder: Path, *, password: str | None = None) -> tuple[Path, Path]:
    """Make a folder with a `private.pem`, for the owner alone, and its `public.pem`; return both.

    Raises:
        StorageError: the folder exists, or cannot be written.
    """
    with explain_missing_extra():
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    key = ec.generate_private_key(ec.SECP256R1())
    encryption = (
        serialization.BestAvailableEncryption(password.encode())
        if password
        else serialization.NoEncryption()
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    with write_folder(folder) as fresh:
        # The mode from the start: not for a moment may others read it.
        descriptor = os.open(fresh / "private.pem", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(private)
        (fresh / "public.pem").write_bytes(public)
    return folder / "private.pem", folder / "public.pem"


def _read_pem(path: Path) -> bytes:
    with translate_os_errors(f"read {path}"), path.open("rb") as stream:
        content = stream.read(MAX_PEM_BYTES + 1)
    if len(content) > MAX_PEM_BYTES:
        raise _wrong_file(path, expected="a PEM file", found=f"more than {MAX_PEM_BYTES:,} bytes")
    return content


def _describe(content: bytes, *, wanted: str) -> str:
    """Return what a PEM file holds, by its own label; what was wanted could not be read."""
    labels = re.findall(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----", content)
    if not labels:
        return "no PEM file"
    label = labels[-1].decode().lower()  # the first may be the curve's parameters
    return f"a damaged {label}" if label == wanted else f"a {label}"


def _wrong_file(path: Path, *, expected: str, found: str) -> UsageError:
    return UsageError(
        f"cannot use {path}",
        expected=expected,
        found=found,
        remedy="marwright sign --new-key FOLDER makes a private.pem and its public.pem",
    )


def _wrong_curve(path: Path, key: object) -> UsageError:
    curve = getattr(getattr(key, "curve", None), "name", None)
    return _wrong_file(
        path,
        expected="an elliptic curve key (P-256, P-384 or P-521)",
        found=f"the curve {curve}" if curve else type(key).__name__.lstrip("_"),
    )
