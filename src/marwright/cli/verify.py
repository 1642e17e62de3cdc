"""`marwright verify`: whether an archive is what was packed, and who signed it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marwright.cli.options import Json
from marwright.cli.output import print_json, print_table

if TYPE_CHECKING:
    from marwright.archive.checks.findings import Finding
    from marwright.archive.signature import Identity

__all__ = ["verify"]


def verify(
    archive: Annotated[Path, typer.Argument(help="A .mar or .tar.gz file, or a folder.")],
    key: Annotated[
        list[Path] | None, typer.Option(help="A public key that is trusted; may be repeated.")
    ] = None,
    certificate_chain: Annotated[
        list[Path] | None,
        typer.Option(help="A root certificate that is trusted; may be repeated."),
    ] = None,
    identity: Annotated[
        str | None, typer.Option(help="A Sigstore identity that is trusted: an e-mail, a CI job.")
    ] = None,
    identity_provider: Annotated[
        str | None, typer.Option(help="The provider that vouched for it: an https address.")
    ] = None,
    signature: Annotated[
        Path | None, typer.Option(help="The signature, where it is not beside the archive.")
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(help="A policy file; the one in the archive's folder where there is one."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compute an archive's digests again, verify its signature, and judge it by the policy.

    Exit 0 where all that was asked holds, 1 otherwise.
    """
    from marwright.archive import Archive
    from marwright.archive.admission import POLICY_NAME, find_policy
    from marwright.archive.checks.findings import refuse
    from marwright.archive.checks.integrity import check_signature, verify_digests
    from marwright.archive.policy import Policy
    from marwright.archive.signature import Signature, Trust, signature_path

    trust = Trust(
        tuple(key or ()), tuple(certificate_chain or ()), _pair(identity, identity_provider)
    )
    rules = Policy.read(policy) if policy else find_policy(archive.parent)
    with Archive.open(archive) as opened:
        digests = verify_digests(opened)
        members = f"{len(opened.names)} members"
    if not trust and rules and rules.require == "signature":
        trust = rules.trust
    signed = check_signature(archive, trust, path=signature)
    beside = signature or signature_path(archive)
    signer = Signature.read(beside).signer if beside.exists() and not signed else ""
    checks = [_row("digests", digests, members), _row("signature", signed, signer)]
    judged = rules.judge(archive) if rules else []
    if rules:
        checks.append(_row("policy", judged, str(policy or archive.parent / POLICY_NAME)))
    if as_json:
        print_json({"archive": archive, "checks": checks})
    else:
        columns = ["check", "result", "found"]
        print_table(columns, [[check[column] for column in columns] for check in checks])
    refuse([*digests, *signed, *judged], archive)


def _row(check: str, findings: Sequence[Finding], subject: str) -> dict[str, Any]:
    """Return what is printed of a check; `subject` is what it was done on, if there was any."""
    from marwright.archive.checks.findings import Severity, worst

    failed = (worst(findings) or Severity.NOTE) >= Severity.ERROR
    return {
        "check": check,
        "result": "FAILED" if failed else "ok" if subject and not findings else "-",
        "found": "; ".join(finding.found for finding in findings) or subject or "none",
        "findings": [finding.to_json() for finding in findings],
    }


def _pair(identity: str | None, provider: str | None) -> tuple[Identity, ...]:
    from marwright.archive.signature import Identity
    from marwright.errors import UsageError

    if identity is None and provider is None:
        return ()
    if not identity or not provider:
        raise UsageError("--identity and --identity-provider go together, and neither is empty")
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # each try without a network
    return (Identity(identity, provider),)
