"""Signing: with a key, with a key and its certificate, or through Sigstore."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from marwright.archive.keys import (
    check_dates,
    explain_missing_extra,
    fingerprint,
    read_certificates,
    read_private_key,
)
from marwright.archive.signature import Signature, signature_path, translate_sigstore_errors
from marwright.errors import ArchiveError, UsageError
from marwright.storage import write_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from model_signing.signing import Config

__all__ = ["sign_with_certificate", "sign_with_key", "sign_with_sigstore"]


def sign_with_key(archive: Path, *, key: Path, password: str | None = None) -> Signature:
    """Sign an archive with a private key, and write the signature beside it.

    Raises:
        ArchiveError: the archive cannot be read.
        UsageError: no private key, a wrong password, or the extra `sign` is not installed.
        StorageError: the key cannot be read, or the signature cannot be written.
    """
    config = _configure()
    with _hand_over(read_private_key(key, password)) as handed:
        config.use_elliptic_key_signer(private_key=handed)
    return _sign(config, archive)


def sign_with_certificate(
    archive: Path,
    *,
    key: Path,
    certificate: Path,
    chain: Sequence[Path] = (),
    password: str | None = None,
) -> Signature:
    """Sign with a key and the certificate that names its owner, and write the signature beside.

    `chain` are the certificates between that one and a root; the root itself may be among them.

    Raises:
        ArchiveError: the certificate is not valid today; and as sign_with_key.
        UsageError: key and certificate do not belong together; and as sign_with_key.
        StorageError: a file cannot be read, or the signature cannot be written.
    """
    config = _configure()
    private = read_private_key(key, password)
    own = read_certificates(certificate)[0]
    check_dates(own, source=certificate)
    if own.public_key() != private.public_key():
        raise UsageError(
            f"{certificate} is not the certificate of {key}",
            expected=f"one for the key {fingerprint(private.public_key())[:16]}",
            found="one for another key",
        )
    for path in chain:
        read_certificates(path)
    with _hand_over(private) as handed:
        config.use_certificate_signer(
            private_key=handed,
            signing_certificate=certificate,
            certificate_chain=chain or [certificate],  # an empty chain it fails to read
        )
    return _sign(config, archive)


def sign_with_sigstore(archive: Path, *, identity_token: str | None = None) -> Signature:
    """Sign in one's own name through sigstore.dev, and write the signature beside the archive.

    Without a token it takes that of a CI job, where there is one, or opens a browser.

    Raises:
        ArchiveError: there is no network, or the token is not accepted.
        UsageError: the extra `sign` is not installed.
    """
    config = _configure()
    with translate_sigstore_errors():
        config.use_sigstore_signer(use_ambient_credentials=True, identity_token=identity_token)
        return _sign(config, archive)


def _configure() -> Config:
    with explain_missing_extra():
        from model_signing.signing import Config
    return Config()


def _sign(config: Config, archive: Path) -> Signature:
    """Write the signature beside the archive: whole or not at all."""
    target = signature_path(archive)
    with tempfile.TemporaryDirectory(prefix="marwright-") as folder:
        bundle = Path(folder) / "bundle"
        try:
            config.sign(archive.resolve(), bundle)
        except (OSError, ValueError) as exc:
            raise ArchiveError(f"cannot sign {archive}", found=str(exc)) from exc
        content = bundle.read_bytes()
    with write_file(target) as stream:
        stream.write(content)
    return Signature.read(target)


@contextlib.contextmanager
def _hand_over(key: EllipticCurvePrivateKey) -> Iterator[Path]:
    """Yield a path from which a private key can be read once, and which is no file.

    model-signing takes paths, and no password for the key of a certificate.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    content = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    reader, writer = os.pipe()
    try:
        with os.fdopen(writer, "wb") as stream:
            stream.write(content)  # some 400 bytes, which a pipe holds
        yield Path(f"/dev/fd/{reader}")
    finally:
        os.close(reader)
