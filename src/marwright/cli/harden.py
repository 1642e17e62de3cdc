"""`marwright harden`: what a config.properties leaves open, and a copy that leaves less."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from marwright.cli.options import Json
from marwright.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from marwright.server.hardening.audit import Finding

__all__ = ["harden"]

HEADER = "# Hardened by `marwright harden`; comments of the original are not kept."


def harden(
    file: Annotated[Path, typer.Argument(help="A config.properties of any TorchServe 0.12.")],
    write: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Write a copy with all mended that a machine can mend."),
    ] = None,
    fail_on: Annotated[
        Literal["error", "warning"], typer.Option(help="From which severity on to exit 1.")
    ] = "error",
    as_json: Json = False,
) -> None:
    """Audit a configuration of TorchServe's, and say how to close what it leaves open.

    Environment variables count as TorchServe would count them. Exit 0 where nothing of severity
    error or danger was found, 1 otherwise; with --write, what the copy still leaves open decides.
    """
    from marwright.errors import UsageError
    from marwright.server.hardening.audit import Severity, audit
    from marwright.server.properties import read_properties

    properties = read_properties(file)
    findings = audit(properties, path=file, environment=os.environ)
    left = findings
    if write is not None:
        if write.resolve() == file.resolve():
            raise UsageError("--write names the file itself", remedy="name another file")
        left = _write_copy(properties, findings, write)
    if as_json:
        shown = {"file": str(file), "findings": [finding.to_json() for finding in findings]}
        if write is not None:
            shown |= {"written": str(write), "left": [finding.to_json() for finding in left]}
        print_json(shown)
    else:
        _print_findings(findings)
        if write is not None:
            _tell_rest(findings, left, write)
        elif not findings:
            say(f"{file}: nothing found")
    least = Severity.WARNING if fail_on == "warning" else Severity.ERROR
    if any(finding.severity >= least for finding in left):
        raise typer.Exit(1)


def _write_copy(
    properties: dict[str, str], findings: Sequence[Finding], path: Path
) -> list[Finding]:
    """Write the hardened copy, for its owner alone; return what it still leaves open."""
    from marwright.server.hardening.audit import audit, harden
    from marwright.server.properties import render_properties
    from marwright.storage import translate_os_errors, write_file

    hardened = harden(properties, findings)
    lines = render_properties(hardened).splitlines()
    text = "\n".join([HEADER, *(line for line in lines if not line.startswith("#"))])
    with write_file(path) as stream:
        stream.write(f"{text}\n".encode("ascii"))
    with translate_os_errors(f"write {path}"):
        path.chmod(0o600)
    return audit(hardened, path=path, environment=os.environ)


def _print_findings(findings: Sequence[Finding]) -> None:
    if findings:
        print_table(
            ["severity", "id", "setting", "why", "remedy"],
            [
                [
                    finding.severity,
                    finding.id,
                    f"{finding.key}={finding.found}" if finding.key else finding.found,
                    finding.why,
                    finding.remedy,
                ]
                for finding in findings
            ],
        )


def _tell_rest(findings: Sequence[Finding], left: Sequence[Finding], path: Path) -> None:
    """Say what the copy mended and what it could not."""
    open_still = {(finding.id, finding.key) for finding in left}
    mended = [finding for finding in findings if (finding.id, finding.key) not in open_still]
    keys = ", ".join(dict.fromkeys(finding.key for finding in mended if finding.key))
    say(f"{path}: mended {keys}" if mended else f"{path}: nothing was to be mended")
    for finding in left:
        say(f"not mended: {finding}")
