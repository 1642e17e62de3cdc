"""Findings: what a check says of an archive, each with a severity, an id and a remedy."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marwright.errors import ArchiveError

__all__ = ["Finding", "refuse", "Rule", "Severity", "worst"]


class Severity(enum.IntEnum):
    """How much a finding matters; from `ERROR` on, no archive is written or served with it."""

    NOTE = 1
    """Worth knowing; nothing has to be done."""
    WARNING = 2
    """It may fail, or fail elsewhere."""
    ERROR = 3
    """A worker would die, or answers would be wrong."""
    DANGER = 4
    """It would run, read or overwrite what it should not."""

    def __str__(self) -> str:
        """Return the name as it is printed."""
        return self.name.lower()


@dataclass(frozen=True)
class Rule:
    """A kind of finding; its id never changes its meaning."""

    id: str
    """A letter for the check that finds it, and a number: `S101`."""
    severity: Severity
    title: str
    """What is wrong, in one line without a full stop."""
    remedy: str
    """What to do about it."""

    def at(
        self,
        found: str,
        *,
        member: str = "",
        line: int | None = None,
        detail: str = "",
        remedy: str = "",
        severity: Severity | None = None,
    ) -> Finding:
        """Return a finding of this kind; `remedy` and `severity` override the rule's own."""
        return Finding(
            rule=self,
            found=found,
            member=member,
            line=line,
            detail=detail,
            remedy=remedy or self.remedy,
            severity=severity or self.severity,
        )


@dataclass(frozen=True)
class Finding:
    """One thing that a check found."""

    rule: Rule
    found: str
    """What was found, in one line."""
    member: str
    """Name inside the archive; empty where the archive as a whole is meant."""
    line: int | None
    """Line of that member, counted from 1."""
    detail: str
    """Several lines that belong to it, such as a traceback."""
    remedy: str
    severity: Severity

    @property
    def place(self) -> str:
        """Where it is: `handler.py:12`, `model.pt`, or nothing."""
        return f"{self.member}:{self.line}" if self.line else self.member

    def __str__(self) -> str:
        """Return one line: severity, id, place, what was found, what to do."""
        place = f"{self.place}: " if self.place else ""
        return f"{self.severity} {self.rule.id} {place}{self.found}; {self.remedy}"

    def to_json(self) -> dict[str, Any]:
        """Return the finding as `--json` prints it."""
        fields = {
            "id": self.rule.id,
            "severity": str(self.severity),
            "title": self.rule.title,
            "member": self.member,
            "line": self.line,
            "found": self.found,
            "remedy": self.remedy,
            "detail": self.detail,
        }
        return {key: value for key, value in fields.items() if value not in ("", None)}


def worst(findings: Iterable[Finding]) -> Severity | None:
    """Return the gravest severity, or None where nothing was found."""
    return max((finding.severity for finding in findings), default=None)


def refuse(findings: Sequence[Finding], path: Path | str) -> None:
    """Raise for findings of severity ERROR or DANGER, all of them at once.

    Raises:
        ArchiveError: its line names the first, its `detail` them all.
    """
    grave = [finding for finding in findings if finding.severity >= Severity.ERROR]
    if not grave:
        return
    grave.sort(key=lambda finding: -finding.severity)
    first = grave[0]
    more = f" (and {len(grave) - 1} more)" if len(grave) > 1 else ""
    blocks = [f"{finding}\n{finding.detail}".rstrip() for finding in grave]
    raise ArchiveError(
        f"{path} is refused: {first.rule.title}",
        found=f"{first.rule.id} {first.place + ': ' if first.place else ''}{first.found}{more}",
        remedy=first.remedy,
        detail="\n".join(blocks) if more or first.detail else "",
    )
