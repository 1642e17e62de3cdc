"""Signatures: who vouches for an archive's bytes, in a file beside it.

The format is that of OpenSSF model signing: a Sigstore bundle around an in-toto statement, which
names the archive's SHA-256 (docs/decisions/0007-signing.md). The package `model-signing`, which
comes with `pip install 'marwright[sign]'`, does all cryptography; its own command line verifies
what is signed here, and the other way round.
"""

from __future__ import annotations

import base64
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from marwright.archive.digests import digest_stream
from marwright.archive.keys import (
    check_dates,
    explain_missing_extra,
    fingerprint,
    read_certificates,
    read_public_key,
)
from marwright.errors import ArchiveError, MarwrightError
from marwright.storage import translate_os_errors

if TYPE_CHECKING:
    from model_signing.verifying import Config

__all__ = [
    "Identity",
    "Signature",
    "signature_path",
    "translate_sigstore_errors",
    "Trust",
    "verify_signature",
]

MAX_SIGNATURE_BYTES = 4 << 20
PREDICATE = "https://model_signing/signature/v1.0"


def signature_path(archive: Path) -> Path:
    """Return where an archive's signature stands: `cnn.mar.sig` beside `cnn.mar`."""
    return archive.with_name(f"{archive.name}.sig")


@dataclass(frozen=True)
class Identity:
    """Whom Sigstore must have known: a name, and the provider that vouched for it."""

    identity: str
    provider: str


@dataclass(frozen=True)
class Trust:
    """Whose signatures count; any one of them is enough."""

    keys: tuple[Path, ...] = ()
    """Public keys, PEM."""
    certificates: tuple[Path, ...] = ()
    """Root certificates, PEM; also the ones between, where signatures do not carry them."""
    identities: tuple[Identity, ...] = ()

    def __bool__(self) -> bool:
        """Return whether anybody is trusted."""
        return bool(self.keys or self.certificates or self.identities)

    def __str__(self) -> str:
        """Return the names, as errors list them."""
        names = [
            *(f"the key {path}" for path in self.keys),
            *(f"the certificate {path}" for path in self.certificates),
            *(f"{identity.identity} ({identity.provider})" for identity in self.identities),
        ]
        return " or ".join(names) or "nobody"


@dataclass(frozen=True)
class Signature:
    """What a signature file says of itself; verify_signature tells whether it is so."""

    path: Path
    kind: Literal["key", "certificate", "sigstore"]
    model: str
    """The archive's file name when it was signed."""
    digests: Mapping[str, str]
    """What was signed: `sha256:<hex>` by name; an archive file is called "." here."""
    key: str = ""
    """Fingerprint of the public key, where a key signed."""
    certificates: tuple[bytes, ...] = ()
    """The signer's own, then those that lead to a root; DER."""

    @classmethod
    def read(cls, path: Path) -> Signature:
        """Read a signature file; nothing is verified.

        Raises:
            ArchiveError: it is no signature of a model.
            StorageError: it cannot be read.
        """
        with translate_os_errors(f"read {path}"), path.open("rb") as stream:
            content = stream.read(MAX_SIGNATURE_BYTES + 1)
        try:
            if len(content) > MAX_SIGNATURE_BYTES:
                raise ValueError(f"more than {MAX_SIGNATURE_BYTES:,} bytes")
            return cls(path, **_parse_bundle(json.loads(content)))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as exc:
            found = f"no {exc}" if isinstance(exc, KeyError) else str(exc)
            raise ArchiveError(
                f"{path} is no signature of a model",
                expected="a Sigstore bundle, as model signing writes it",
                found=found[:200] or type(exc).__name__,
                remedy="sign the archive again: marwright sign",
            ) from exc

    @property
    def signer(self) -> str:
        """Who signed, by the file's own word; needs `cryptography` to name a subject."""
        if self.kind == "key":
            return f"the key {self.key[:16]}" if self.key else "a key without a name"
        kind = "Sigstore certificate" if self.kind == "sigstore" else "certificate"
        with contextlib.suppress(ImportError, ValueError):
            return f"the {kind} of {_name_subject(self.certificates[0])}"
        return f"a {kind}"

    def check_bytes(self, archive: Path) -> None:
        """Refuse an archive file that is another than was signed; the signer remains unproved.

        Raises:
            ArchiveError: its SHA-256 is another.
            StorageError: it cannot be read.
        """
        signed = self.digests.get(".", "")
        if not signed.startswith("sha256:") or not archive.is_file():
            return
        with translate_os_errors(f"read {archive}"), archive.open("rb") as stream:
            found = f"sha256:{digest_stream(stream)}"
        if found != signed:
            raise ArchiveError(
                f"{archive.name} is not what was signed",
                expected=f"{signed[:23]} of {self.model}",
                found=found[:23],
                remedy="get the archive again, with its own signature",
            )


def verify_signature(archive: Path, trust: Trust, *, path: Path | None = None) -> Signature:
    """Verify an archive's bytes against its signature; `path` where that is not beside it.

    Raises:
        ArchiveError: no signature, one of another archive, one of nobody in `trust`, or a
            certificate that is not valid today.
        UsageError: something in `trust` is no public key or certificate, or the extra `sign` is
            not installed.
        StorageError: a file cannot be read.
    """
    path = path or signature_path(archive)
    if not path.exists():
        raise ArchiveError(
            f"{archive} is not signed",
            expected=f"a signature {path}",
            remedy=f"sign it: marwright sign {archive} --key private.pem",
        )
    signature = Signature.read(path)
    failure: Exception | None = None
    for verifier in _find_verifiers(signature, trust):
        try:
            # It prints a warning where an old signature does not name its key.
            with contextlib.redirect_stdout(sys.stderr):
                verifier.verify(archive.resolve(), path)
        except Exception as exc:  # OSError, ValueError, InvalidSignature, OpenSSL's, sigstore's
            failure = exc
        else:
            return signature
    _refuse(archive, signature, trust, failure)


@contextlib.contextmanager
def translate_sigstore_errors() -> Iterator[None]:
    """Raise ArchiveError for what sigstore raises: TUF's, requests' and its own errors."""
    try:
        yield
    except MarwrightError:
        raise
    except Exception as exc:  # there is no common family
        raise ArchiveError(
            "Sigstore cannot be used",
            expected="sigstore.dev to be reached, and an identity token that it accepts",
            found=" ".join(_list_causes(exc).split())[:300] or type(exc).__name__,
            remedy="without a network use a key or a certificate",
        ) from exc


def _list_causes(exc: BaseException) -> str:
    """Return what an error says, and what the first of its causes said."""
    texts = [str(exc)]
    while (cause := exc.__cause__ or exc.__context__) is not None:
        exc = cause
        texts.append(str(exc))
    said = [text for text in texts if text]
    return ": ".join(dict.fromkeys([*said[:1], *said[-1:]]))


def _find_verifiers(signature: Signature, trust: Trust) -> Iterator[Config]:
    """Yield a verifier for everybody in `trust` who may have made the signature."""
    with explain_missing_extra():
        from model_signing.verifying import Config
    if not signature.digests:  # else a signature over nothing would suit every archive
        return
    if signature.kind == "key":
        for path in trust.keys:
            if signature.key in ("", fingerprint(read_public_key(path))):  # old ones name none
                yield Config().use_elliptic_key_verifier(public_key=path)
    elif signature.kind == "certificate" and trust.certificates:
        _check_certificates(signature)
        for path in trust.certificates:
            read_certificates(path)
        # Without any, it would trust the public roots of the web.
        yield Config().use_certificate_verifier(certificate_chain=trust.certificates)
    elif signature.kind == "sigstore":
        for identity in trust.identities:
            with translate_sigstore_errors():
                verifier = Config().use_sigstore_verifier(
                    identity=identity.identity, oidc_issuer=identity.provider
                )
            yield verifier


def _check_certificates(signature: Signature) -> None:
    """Refuse certificates that are not valid today: no clock we trust says when they signed.

    model-signing takes the day on which the signer's certificate began, so that none expires.
    """
    from cryptography.x509 import load_der_x509_certificate

    for content in signature.certificates:
        try:
            certificate = load_der_x509_certificate(content)
        except ValueError as exc:
            raise ArchiveError(f"{signature.path} holds a damaged certificate") from exc
        check_dates(certificate, source=signature.path)


def _refuse(
    archive: Path, signature: Signature, trust: Trust, failure: Exception | None
) -> NoReturn:
    """Raise the error for a signature that was not accepted."""
    if failure is None:
        raise ArchiveError(
            f"{archive.name} is not signed by anybody who is trusted",
            expected=f"a signature by {trust}",
            found=f"one by {signature.signer}" if signature.digests else "one over nothing",
            remedy="get it from somebody who is trusted, or trust the signer",
        )
    signature.check_bytes(archive)
    raise ArchiveError(
        f"{signature.path.name} does not hold",
        expected=f"a signature by {trust}",
        found=" ".join(str(failure).split())[:200] or "one that was altered",
        remedy="get the archive again, with its own signature",
    ) from failure


def _parse_bundle(bundle: Any) -> dict[str, Any]:
    """Return Signature's fields of a Sigstore bundle's JSON."""
    material = bundle["verificationMaterial"]
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    if statement["predicateType"] != PREDICATE:
        raise ValueError(f"a statement of type {statement['predicateType']}")
    fields = {
        "model": str(statement["subject"][0]["name"]),
        "digests": {
            str(resource["name"]): f"{resource['algorithm']}:{resource['digest']}"
            for resource in statement["predicate"]["resources"]
        },
    }
    if "publicKey" in material:
        return {**fields, "kind": "key", "key": str(material["publicKey"].get("hint") or "")}
    if "certificate" in material:
        kind, certificates = "sigstore", [material["certificate"]]
    else:
        # Sigstore's certificates live for minutes: its log of signatures vouches for the time.
        kind = "sigstore" if material.get("tlogEntries") else "certificate"
        certificates = material["x509CertificateChain"]["certificates"]
    chain = tuple(base64.b64decode(certificate["rawBytes"]) for certificate in certificates)
    if not chain:
        raise ValueError("no certificate")
    return {**fields, "kind": kind, "certificates": chain}


def _name_subject(content: bytes) -> str:
    """Return a certificate's subject, or the name it stands for where it has none."""
    from cryptography import x509

    certificate = x509.load_der_x509_certificate(content)
    if subject := certificate.subject.rfc4514_string():
        return subject
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return "without a name"
    return ", ".join(str(name.value) for name in names.value)
