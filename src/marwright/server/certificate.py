"""Certificates for https and gRPC: one made for development, and a look at those of others.

TorchServe 0.12.0 takes RSA keys alone, as PEM without a password, and speaks TLS 1.2 with the two
ciphers TLS_ECDHE_RSA_WITH_AES_128_{GCM_SHA256,CBC_SHA} (ConfigManager.getSslContext).
"""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from marwright.errors import UsageError
from marwright.storage import translate_os_errors

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

__all__ = ["Certificate", "check_certificate", "make_certificate", "warn_of_expiry"]

HOSTS = ("127.0.0.1", "localhost")
DAYS = 30
"""How long a certificate for development is good."""
WARNING_DAYS = 14
RSA_BITS = 2048


@dataclass(frozen=True)
class Certificate:
    """The two files that https needs."""

    certificate: Path
    """PEM; for certificate_file, and for clients to trust."""
    key: Path
    """PEM, mode 0600; for private_key_file."""


def make_certificate(folder: Path, hosts: Sequence[str] = HOSTS) -> Certificate:
    """Write a self-made certificate for development and its key, good for 30 days.

    `hosts` are names and addresses; a client that trusts the file reaches the server under these
    alone. Files of an earlier call are replaced.

    Raises:
        UsageError: the extra `tls` is missing, or there is no host.
        StorageError: the folder cannot be written.
    """
    _require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    if not hosts:
        raise UsageError("a certificate needs a host", remedy="pass one, such as localhost")
    made = Certificate(folder / "certificate.pem", folder / "key.pem")
    key = rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    certificate = _sign(key, hosts).public_bytes(serialization.Encoding.PEM)
    with translate_os_errors(f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        _write_private(made.key, pem)
        made.certificate.write_bytes(certificate)
    return made


def _sign(key: rsa.RSAPrivateKey, hosts: Sequence[str]) -> x509.Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "marwright for development")])
    now = datetime.now(timezone.utc)
    names = [_name_host(host) for host in hosts]
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + timedelta(days=DAYS))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        # Not an authority: who trusts it trusts these hosts alone, whoever gets hold of the key.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return builder.sign(key, hashes.SHA256())


def _name_host(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_private(path: Path, content: bytes) -> None:
    """Write a file that nobody else could read at any time."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)


def check_certificate(
    certificate: Path,
    key: Path,
    *,
    now: datetime | None = None,
    hosts: Sequence[str] = HOSTS,
) -> list[str]:
    """Return what keeps a server from using the files, or clients from trusting it; none is good.

    `now` is a time with a zone; the present one where None. `warn_of_expiry` says what is near.

    Raises:
        UsageError: the extra `tls` is missing.
    """
    _require_cryptography()
    problems = _check_mode(key)
    try:
        chain = _read_chain(certificate)
    except (OSError, ValueError) as exc:
        return [*problems, f"{certificate} cannot be read: {_say(exc)}"]
    problems += _check_key(certificate, chain[0], key)
    return (
        problems
        + _check_dates(certificate, chain, now or datetime.now(timezone.utc))
        + _check_hosts(certificate, chain[0], hosts)
    )


def warn_of_expiry(certificate: Path, *, now: datetime | None = None) -> str:
    """Return a warning where a certificate is good for less than 14 more days, else "".

    Raises:
        UsageError: the extra `tls` is missing.
    """
    _require_cryptography()
    now = now or datetime.now(timezone.utc)
    try:
        end = min(item.not_valid_after_utc for item in _read_chain(certificate))
    except (OSError, ValueError):
        return ""  # check_certificate says why
    if not now < end < now + timedelta(days=WARNING_DAYS):
        return ""
    return f"{certificate} expires on {end:%Y-%m-%d %H:%M} UTC, in {(end - now).days} days"


def _read_chain(path: Path) -> list[x509.Certificate]:
    from cryptography import x509

    return x509.load_pem_x509_certificates(path.read_bytes())


def _check_mode(key: Path) -> list[str]:
    try:
        mode = stat.S_IMODE(key.stat().st_mode)
    except OSError:
        return []  # _check_key says so
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        return [f"others may read {key} (mode {mode:04o}); chmod 600 {key}"]
    return []


def _check_key(certificate: Path, leaf: x509.Certificate, path: Path) -> list[str]:
    """Say whether TorchServe could load the key, and whether it is the certificate's."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    try:
        key = _read_key(path)
    except TypeError:  # what cryptography raises for a missing password
        return [f"{path} is encrypted, which TorchServe cannot read; remove its password"]
    except (OSError, ValueError) as exc:
        return [f"{path} cannot be read: {_say(exc)}"]
    if not isinstance(key, rsa.RSAPrivateKey):
        return [f"{path} is no RSA key, and TorchServe 0.12 takes no other"]
    if key.public_key() != leaf.public_key():
        return [f"{path} is not the key of {certificate}"]
    return []


def _read_key(path: Path) -> PrivateKeyTypes:
    from cryptography.hazmat.primitives import serialization

    return serialization.load_pem_private_key(path.read_bytes(), password=None)


def _check_dates(path: Path, chain: Sequence[x509.Certificate], now: datetime) -> list[str]:
    begin = max(item.not_valid_before_utc for item in chain)
    end = min(item.not_valid_after_utc for item in chain)
    if now < begin:
        return [f"{path} is not valid before {begin:%Y-%m-%d %H:%M} UTC"]
    if now >= end:
        return [f"{path} expired on {end:%Y-%m-%d %H:%M} UTC"]
    return []


def _check_hosts(path: Path, leaf: x509.Certificate, hosts: Sequence[str]) -> list[str]:
    from cryptography import x509

    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return [f"{path} names no hosts (subject alternative names), which clients require"]
    addresses = names.get_values_for_type(x509.IPAddress)
    patterns = [name.lower() for name in names.get_values_for_type(x509.DNSName)]
    absent = [host for host in hosts if not _is_named(host.lower(), addresses, patterns)]
    known = ", ".join([*map(str, addresses), *patterns]) or "none"
    return [f"{path} is not for {host}; it is for {known}" for host in absent]


def _is_named(host: str, addresses: Sequence[object], patterns: Sequence[str]) -> bool:
    """Return whether a host is among the names; `*.` stands for one label, as in RFC 6125."""
    try:
        return ipaddress.ip_address(host) in addresses
    except ValueError:
        return host in patterns or f"*.{host.partition('.')[2]}" in patterns


def _say(exc: Exception) -> str:
    """Return a reason in one line."""
    if isinstance(exc, OSError):
        return exc.strerror or str(exc)
    return "it is not PEM of the right kind"


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401 - asked for, not used
    except ImportError as exc:
        raise UsageError(
            "certificates need the package cryptography", remedy="pip install 'marwright[tls]'"
        ) from exc
