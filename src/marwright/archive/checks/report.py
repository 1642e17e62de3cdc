"""All checks of one archive, in the order in which each may trust what the ones before found."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marwright.archive.checks import scan
from marwright.archive.checks.configuration import UNREADABLE
from marwright.archive.checks.findings import Finding, Severity, worst
from marwright.archive.checks.integrity import verify_digests
from marwright.archive.checks.preflight import NOT_TRIED, TIMEOUT, run_preflight
from marwright.archive.checks.source import check_source
from marwright.archive.reader import Archive
from marwright.storage import translate_os_errors

__all__ = ["CheckReport", "run_checks"]

SPEC = "MAR-INF/spec.json"
COPIED_BYTES = 1 << 20
"""Larger files of a folder are linked, not copied."""


@dataclass(frozen=True)
class CheckReport:
    """What the checks of an archive found and measured."""

    path: Path
    findings: tuple[Finding, ...]
    """The gravest first."""
    figures: dict[str, Any] = field(default_factory=dict)
    """The preflight's, see PreflightReport; empty where the model was not loaded."""

    @property
    def is_good(self) -> bool:
        """Whether nothing was found that keeps an archive from being served."""
        return (worst(self.findings) or Severity.NOTE) < Severity.ERROR

    def to_json(self) -> dict[str, Any]:
        """Return the report as `--json` prints it."""
        return {
            "path": str(self.path),
            "ok": self.is_good,
            "findings": [finding.to_json() for finding in self.findings],
            "figures": self.figures,
        }


def run_checks(
    path: Path,
    *,
    samples: Sequence[Path] = (),
    preflight: bool = True,
    timeout: float = TIMEOUT,
) -> CheckReport:
    """Check an archive file or folder: structure, pickles, digests, source, settings, a trial.

    Nothing is unpacked where structure or pickles are grave, or a digest differs; nothing is run
    unless `preflight` is true.

    Raises:
        ArchiveError: no archive, or one without a readable manifest; a sample that is no file.
        UsageError: a time limit that is none.
        StorageError: there is no room to unpack it.
    """
    findings = scan(path)
    if _is_grave(findings):
        return _finish(path, [*findings, _not_tried("nothing was unpacked")])
    with Archive.open(path) as archive:
        findings += verify_digests(archive)
        if _is_grave(findings):
            return _finish(path, [*findings, _not_tried("nothing was unpacked")])
        with _unpack(archive) as folder:
            static = check_source(folder, archive.manifest, python=_read_python(folder))
            if not preflight:
                return _finish(path, [*findings, *static])
            if any(finding.rule is UNREADABLE for finding in static):
                return _finish(
                    path, [*findings, *static, _not_tried("its settings are unreadable")]
                )
            report = run_preflight(folder, archive.manifest, samples=samples, timeout=timeout)
    told = [*findings, *_without_repeated(static, report.findings), *report.findings]
    return _finish(path, told, report.figures)


def _is_grave(findings: Sequence[Finding]) -> bool:
    return (worst(findings) or Severity.NOTE) >= Severity.ERROR


def _not_tried(reason: str) -> Finding:
    return NOT_TRIED.at(reason)


def _finish(
    path: Path, findings: Sequence[Finding], figures: dict[str, Any] | None = None
) -> CheckReport:
    ordered = sorted(findings, key=lambda finding: (-finding.severity, finding.rule.id))
    return CheckReport(path, tuple(ordered), figures or {})


def _without_repeated(static: Sequence[Finding], tried: Sequence[Finding]) -> list[Finding]:
    """Leave out what the trial found at the same place, and knows better."""
    places = {finding.place for finding in tried if finding.place}
    return [
        finding
        for finding in static
        if finding.place not in places or finding.severity < Severity.ERROR
    ]


@contextmanager
def _unpack(archive: Archive) -> Iterator[Path]:
    """Yield a folder with the archive's members, which a handler may write to."""
    with (
        translate_os_errors("unpack the archive"),
        tempfile.TemporaryDirectory(
            prefix="marwright-check-", ignore_cleanup_errors=True
        ) as temporary,
    ):
        folder = Path(temporary).resolve() / "model"
        if archive.container.format != "folder":
            yield archive.extract(folder)
            return
        for name in archive.names:
            source, target = archive.path / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.stat().st_size > COPIED_BYTES:
                target.symlink_to(source.resolve())
            else:
                shutil.copyfile(source, target)
        yield folder


def _read_python(folder: Path) -> str | None:
    """Return the version of Python that the archive's own description declares."""
    try:
        spec = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    python = spec.get("python") if isinstance(spec, dict) else None
    return python if isinstance(python, str) else None
