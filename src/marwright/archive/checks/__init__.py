"""Checks: what may be wrong with an archive, each thing with an id, a severity and a remedy.

`scan` is for archives from anywhere: it looks and never runs. Whatever is imported here is imported
late: a finding alone, as most of marwright wants it, should cost nothing.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from marwright.archive.checks.findings import Finding, Rule
    from marwright.archive.container import Container

    ALL_RULES: tuple[Rule, ...]
    """Every rule there is, by id."""
    RULES: tuple[Rule, ...]
    """The rules of what `scan` finds."""

__all__ = ["ALL_RULES", "RULES", "scan"]

_SCANNING = ("structure", "pickles")
_OTHERS = ("source", "configuration", "preflight", "integrity")


def scan(source: Path | Container) -> list[Finding]:
    """Look for what an archive could do to whoever unpacks or loads it; nothing of it is run.

    Stored members are not read as a whole: 1 GiB of weights takes milliseconds.

    Raises:
        ArchiveError: no such file, or one that no reader could list.
        StorageError: there is no room for a temporary file.
    """
    from marwright.archive.checks import pickles, structure

    findings = structure.scan_structure(source)
    endless = {structure.BOMB, structure.LONGER, structure.OVERLAP}
    if reasons := sorted({finding.rule.id for finding in findings if finding.rule in endless}):
        return [*findings, pickles.UNSEEN.at(f"not unpacked, because of {', '.join(reasons)}")]
    return findings + pickles.scan_pickles(source)


def __getattr__(name: str) -> tuple[Rule, ...]:
    modules = {"RULES": _SCANNING, "ALL_RULES": (*_SCANNING, *_OTHERS)}.get(name)
    if modules is None:
        raise AttributeError(name)
    rules = {
        rule.id: rule
        for module in modules
        for rule in importlib.import_module(f"{__name__}.{module}").RULES
    }
    return tuple(rules[id] for id in sorted(rules, key=lambda id: id[1:]))
