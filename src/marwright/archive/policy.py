"""Policies: which archives a store takes and a server loads, in a file that a person wrote."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from marwright.archive.checks import integrity, scan
from marwright.archive.checks.findings import Finding, Severity, worst
from marwright.archive.document import Document
from marwright.archive.keys import read_certificates, read_public_key
from marwright.archive.reader import Archive
from marwright.archive.signature import Identity, Trust
from marwright.errors import MarwrightError
from marwright.storage import write_file

__all__ = ["FindingRules", "Policy"]

_STRICT = ConfigDict(extra="forbid", frozen=True)
Text = Annotated[str, Field(min_length=1)]


def _check_id(id: str) -> str:
    from marwright.archive.checks import RULES

    if id not in {rule.id for rule in RULES}:
        raise ValueError("no finding of a scan has this id")
    return id


def _check_key(path: Path, info: ValidationInfo) -> Path:
    return _check_file(path, info, read_public_key)


def _check_certificate(path: Path, info: ValidationInfo) -> Path:
    return _check_file(path, info, read_certificates)


def _check_file(path: Path, info: ValidationInfo, read: Callable[[Path], object]) -> Path:
    """Return the absolute path of a file that `read` can read."""
    absolute: Path = ((info.context or {}).get("folder", Path()) / path).absolute()
    try:
        read(absolute)
    except MarwrightError as exc:
        raise ValueError(str(exc)) from exc
    return absolute


FindingId = Annotated[str, AfterValidator(_check_id)]
KeyFile = Annotated[Path, AfterValidator(_check_key)]
CertificateFile = Annotated[Path, AfterValidator(_check_certificate)]


class FindingRules(BaseModel):
    """Which findings of a scan are borne."""

    model_config = _STRICT

    worst: Literal["note", "warning", "error", "danger"] = "warning"
    """The gravest severity that is borne."""
    allow: tuple[FindingId, ...] = ()
    """Ids that are borne whatever their severity."""
    deny: tuple[FindingId, ...] = ()
    """Ids that are not borne whatever their severity."""


class SigstoreIdentity(BaseModel):
    """Whom Sigstore must have known."""

    model_config = _STRICT

    identity: Text
    """An e-mail address, or a CI job's name."""
    provider: Text
    """Address of who vouched for it."""


class Policy(BaseModel):
    """What an archive must fulfil; paths are relative to the file that names them."""

    model_config = _STRICT

    keys: tuple[KeyFile, ...] = ()
    """Public keys whose signatures count."""
    certificates: tuple[CertificateFile, ...] = ()
    """Root certificates: signatures by certificates that they issued count."""
    identities: tuple[SigstoreIdentity, ...] = ()
    """Sigstore identities whose signatures count; to verify one takes a network."""
    models: tuple[Text, ...] = Field(default=("*",), min_length=1)
    """Model names, with wildcards."""
    findings: FindingRules = FindingRules()
    # After what it is checked against.
    require: Literal["signature", "digests", "nothing"] = Field(
        default="signature", validate_default=True
    )

    @field_validator("require")
    @classmethod
    def _check_signers(cls, require: str, info: ValidationInfo) -> str:
        # A field that is wrong is not in `data`: it has its own error.
        signers = [info.data.get(name, "?") for name in ("keys", "certificates", "identities")]
        if require == "signature" and not any(signers):
            raise ValueError("a signature needs keys, certificates or identities")
        return require

    @classmethod
    def read(cls, path: Path) -> Policy:
        """Read a policy file.

        Raises:
            ArchiveError: it is broken, or a key in it is; every problem at once.
            StorageError: it cannot be read.
        """
        document = Document.read(path)
        policy, problems = document.validate(cls)
        document.refuse(problems, remedy="see docs/archives.md for a policy's keys")
        assert policy is not None  # without problems there is one
        return policy

    def write(self, path: Path) -> None:
        """Write the policy, with absolute paths."""
        with write_file(path) as stream:
            stream.write(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False).encode())

    @property
    def trust(self) -> Trust:
        """Whose signatures count."""
        identities = tuple(Identity(item.identity, item.provider) for item in self.identities)
        return Trust(self.keys, self.certificates, identities)

    def judge(self, path: Path) -> list[Finding]:
        """Return what is found in an archive; ERROR and above is what this policy does not bear.

        Raises:
            ArchiveError: it is no archive at all.
        """
        findings = self._weigh(scan(path))
        if (worst(findings) or Severity.NOTE) >= Severity.ERROR:
            return findings  # what may be a bomb is not read to its end
        with Archive.open(path) as archive:
            name = archive.manifest.name
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.models):
                findings.append(integrity.UNWANTED.at(f"{name}, allowed {', '.join(self.models)}"))
            if self.require == "digests":
                findings += [
                    replace(finding, severity=Severity.ERROR)
                    for finding in integrity.verify_digests(archive)
                ]
        if self.require == "signature":
            findings += integrity.check_signature(path, self.trust)
        return findings

    def _weigh(self, findings: Iterable[Finding]) -> list[Finding]:
        """Return findings with severities as this policy sees them."""
        limit = Severity[self.findings.worst.upper()]

        def weigh(finding: Finding) -> Finding:
            id, severity = finding.rule.id, finding.severity
            borne = id in self.findings.allow or severity <= limit
            if id in self.findings.deny or not borne:
                return replace(finding, severity=max(severity, Severity.ERROR))
            return replace(finding, severity=min(severity, Severity.WARNING))

        return [weigh(finding) for finding in findings]
