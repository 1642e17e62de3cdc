"""Integrity: whether an archive's members are those that were packed.

Digests find damage and careless changes. Who alters an archive on purpose writes new digests as
well: against that helps a signature, see marwright.archive.signature.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from marwright.archive.checks.findings import Finding, Rule, Severity
from marwright.archive.container import Container, Entry
from marwright.archive.digests import digest_stream, root_digest
from marwright.archive.reader import Archive
from marwright.archive.signature import Signature, Trust, signature_path, verify_signature
from marwright.errors import ArchiveError

__all__ = ["check_signature", "NO_DIGESTS", "RULES", "UNWANTED", "verify_digests"]

THREADS = 2
"""Hashing and inflating release the lock that Python's threads share."""

ASK_AGAIN = "get the archive again from whoever packed it"

ALTERED = Rule("I601", Severity.ERROR, "a member is not what its digest states", ASK_AGAIN)
UNSTATED = Rule("I602", Severity.ERROR, "a member has no digest, though others have", ASK_AGAIN)
OTHER_MEMBERS = Rule("I603", Severity.ERROR, "members were added or removed", ASK_AGAIN)
NO_DIGESTS = Rule(
    "I604",
    Severity.NOTE,
    "the archive states no digests",
    "pack it with marwright pack, or rewrite it with marwright repack",
)
UNSIGNED = Rule(
    "I605",
    Severity.ERROR,
    "the archive is not signed",
    "sign it: marwright sign ARCHIVE --key private.pem",
)
UNTRUSTED = Rule(
    "I606",
    Severity.ERROR,
    "the signature does not hold",
    "get the archive again, with its signature, from whoever signed it",
)
UNVERIFIED = Rule(
    "I607",
    Severity.NOTE,
    "the archive is signed, and nobody asked by whom",
    "pass --key, --certificate-chain or --identity",
)
UNWANTED = Rule(
    "I608",
    Severity.ERROR,
    "the policy allows no model of this name",
    "pack it under an allowed name, or add the name to the policy's models",
)
RULES = (
    ALTERED,
    UNSTATED,
    OTHER_MEMBERS,
    NO_DIGESTS,
    UNSIGNED,
    UNTRUSTED,
    UNVERIFIED,
    UNWANTED,
)


def verify_digests(archive: Archive) -> list[Finding]:
    """Compute every member's digest and the root digest again; return what differs."""
    container = archive.container
    # A folder has no content; links and devices, which nothing of ours writes, count as files.
    entries = [entry for entry in archive.entries if entry.kind != "folder"]
    if container.root_digest is None and not any(entry.sha256 for entry in entries):
        return [NO_DIGESTS.at(f"{len(entries)} members without digests")]
    return [*_verify_members(container, entries), *_verify_root(container, entries)]


def check_signature(archive: Path, trust: Trust, *, path: Path | None = None) -> list[Finding]:
    """Verify an archive's signature where anybody is trusted; `path` where it is not beside it.

    Without trust, a signature is still compared with the archive's bytes.
    """
    wanted = bool(trust) or path is not None
    path = path or signature_path(archive)
    if not path.exists():
        return [UNSIGNED.at(f"no {path.name}")] if wanted else []
    try:
        if trust:
            verify_signature(archive, trust, path=path)
            return []
        signature = Signature.read(path)
        signature.check_bytes(archive)
    except ArchiveError as exc:
        facts = ArchiveError(exc.message, expected=exc.expected, found=exc.found)
        return [UNTRUSTED.at(str(facts), remedy=exc.remedy)]
    return [UNVERIFIED.at(f"a signature by {signature.signer}")]


def _verify_members(container: Container, entries: Iterable[Entry]) -> list[Finding]:
    def verify(entry: Entry) -> Finding | None:
        return _verify_member(container, entry)

    # A tar file is one stream, read from its beginning to its end.
    threads = 1 if container.format == "tgz" else THREADS
    with ThreadPoolExecutor(threads) as pool:
        return [finding for finding in pool.map(verify, entries) if finding is not None]


def _verify_member(container: Container, entry: Entry) -> Finding | None:
    if entry.sha256 is None:
        return UNSTATED.at(f"{entry.size_bytes:,} bytes", member=entry.name)
    try:
        with container.open(entry) as stream:
            digest = digest_stream(stream)
    except ArchiveError as exc:  # a zip file's own checksum (CRC-32) tells most damage
        return ALTERED.at(exc.found or exc.message, member=entry.name)
    if digest == entry.sha256:
        return None
    return ALTERED.at(f"sha256 {digest[:16]}, stated {entry.sha256[:16]}", member=entry.name)


def _verify_root(container: Container, entries: Iterable[Entry]) -> list[Finding]:
    stated = [(entry.name, entry.sha256) for entry in entries if entry.sha256 is not None]
    counts = Counter(name for name, _ in stated)
    doubles = [
        OTHER_MEMBERS.at("two of one name", member=n) for n, count in counts.items() if count > 1
    ]
    digest, root = root_digest(dict(stated)), container.root_digest
    if doubles or digest == root:
        return doubles
    found = f"digest over all members {digest[:16]}, stated {root[:16] if root else 'none'}"
    return [OTHER_MEMBERS.at(found)]
