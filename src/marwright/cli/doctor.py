"""`marwright doctor`: what is missing on this machine, and how to mend it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer

from marwright.cli.options import Json, Store
from marwright.cli.output import print_json, print_table
from marwright.server.registry import DEPLOYMENT_NAME

__all__ = ["doctor"]


def doctor(store: Store = Path("model_store"), as_json: Json = False) -> None:
    """Check this machine, and say how to mend what is missing.

    Looks at Python, packages, Java, memory, disk and the ports (those of ./deploy.yaml where there
    is one); exits 1 where something must be mended.
    """
    from marwright.doctor import examine

    findings = list(examine(store, Path(DEPLOYMENT_NAME)))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_table(
            ["check", "state", "found", "what to do"],
            [[item.check, item.state, item.found, item.remedy] for item in findings],
        )
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(1)
