"""What the page says of an archive: its contents, whether they are as packed, and who signed it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from marwright.archive import Archive
from marwright.archive.admission import find_policy
from marwright.archive.checks.findings import Finding, Severity, worst
from marwright.archive.checks.integrity import check_signature, verify_digests
from marwright.archive.signature import Trust
from marwright.archive.summary import Summary
from marwright.storage import translate_os_errors

if TYPE_CHECKING:
    from marwright.archive.policy import Policy

__all__ = ["Archives", "Contents"]

LARGEST = 256 << 20
"""Bytes of an archive above which nobody waits for its digests."""
KEPT = 32


@dataclass(frozen=True)
class Contents:
    """An archive, looked at."""

    summary: Summary
    digests: str
    """Whether its members are those that were packed, in a few words."""
    signature: str
    """Who signed it, and whether that holds."""
    is_sound: bool
    """Whether nothing is wrong with either."""


class Archives:
    """Looks at archives, and remembers what it saw until they change; threads may share it."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[object, ...], Contents] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path) -> Contents:
        """Return what is in an archive; raises what Summary.read raises."""
        with translate_os_errors(f"read {path}"):
            stat = path.stat()
        signed = path.with_name(f"{path.name}.sig")
        beside = signed.stat().st_mtime_ns if signed.exists() else None
        key = (path, stat.st_mtime_ns, stat.st_size, beside)
        with self._lock:
            if key in self._kept:
                return self._kept[key]
        contents = look_into(path, verify=stat.st_size <= LARGEST)
        with self._lock:
            self._kept[key] = contents
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return contents


def look_into(path: Path, *, verify: bool) -> Contents:
    """Read an archive's summary, and verify what `marwright verify` verifies."""
    summary = Summary.read(path)
    if not verify:
        text = f"not computed, it is large: marwright verify {path}"
        return Contents(summary, text, summary.signer or "none", is_sound=True)
    policy: Policy | None = find_policy(path.parent)
    trust = policy.trust if policy and policy.require == "signature" else Trust()
    with Archive.open(path) as archive:
        digests = verify_digests(archive)
    signature = check_signature(path, trust)
    good = f"as packed, {len(summary.members)} files"
    known = f"by {summary.signer}, trusted by the store's policy" if summary.is_signed else "none"
    return Contents(
        summary,
        _describe(digests, good),
        _describe(signature, known),
        is_sound=(worst([*digests, *signature]) or Severity.NOTE) < Severity.ERROR,
    )


def _describe(findings: Sequence[Finding], otherwise: str) -> str:
    """Return what was found, all of it, or else what is true where nothing was."""
    texts = [
        f"{item.rule.title}: {item.found}" + (f" ({item.member})" if item.member else "")
        for item in findings
    ]
    more = f"; and {len(texts) - 3} more" if len(texts) > 3 else ""
    return "; ".join(texts[:3]) + more if texts else otherwise
