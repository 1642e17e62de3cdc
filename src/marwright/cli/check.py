"""`marwright check`: whether an archive is what it should be, before a server boots it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marwright.cli.options import Json
from marwright.cli.output import escape, print_json, print_section, print_table, say

if TYPE_CHECKING:
    from marwright.archive.checks.report import CheckReport

__all__ = ["check"]


def check(
    archive: Annotated[Path, typer.Argument(help="A .mar or .tar.gz file, or a folder.")],
    sample: Annotated[
        list[Path] | None,
        typer.Option(help="A request that the model must be able to answer; may be repeated."),
    ] = None,
    no_preflight: Annotated[
        bool, typer.Option("--no-preflight", "--no-run", help="Look only; run nothing of it.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds for loading and answering, all together.")
    ] = 120.0,
    sarif: Annotated[
        Path | None, typer.Option(help="A file that gets the findings as SARIF 2.1.0.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check any archive, also one that torch-model-archiver made, and try its model.

    Exit 0 where nothing of severity error or danger was found, 1 otherwise.
    """
    from marwright.archive.checks.report import run_checks

    report = run_checks(archive, samples=sample or (), preflight=not no_preflight, timeout=timeout)
    if sarif is not None:
        _write_sarif(sarif, report)
    if as_json:
        print_json(report.to_json())
    else:
        _print_report(report)
    if not report.is_good:
        raise typer.Exit(1)


def _print_report(report: CheckReport) -> None:
    if report.findings:
        print_table(
            ["severity", "id", "place", "found", "remedy"],
            [
                [item.severity, item.rule.id, item.place, item.found, item.remedy]
                for item in report.findings
            ],
        )
    for item in report.findings:
        if item.detail:
            print(f"\n{item.rule.id} {escape(item.place)}".rstrip())
            for line in item.detail.splitlines():
                print(f"    {escape(line.expandtabs())}".rstrip())
    print_section("", ["figure", "value"], _list_figures(report.figures))
    say(f"{report.path}: {'good' if report.is_good else 'not to be served'}")


def _list_figures(figures: dict[str, Any]) -> list[tuple[str, str]]:
    if not figures:
        return []
    rows = [
        ("load", f"{figures['load_seconds']:.2f} s"),
        ("of it import", f"{figures['import_seconds']:.2f} s"),
        ("of it initialize", f"{figures['initialize_seconds']:.2f} s"),
        ("peak memory", f"{figures['peak_memory_bytes'] / 1e6:.0f} MB"),
    ]
    return rows + [
        (f"a request, batch size {size}", f"{seconds * 1000:.2f} ms")
        for size, seconds in figures["seconds_per_request"].items()
    ]


def _write_sarif(path: Path, report: CheckReport) -> None:
    from marwright.archive.checks.sarif import to_sarif
    from marwright.storage import write_file

    with write_file(path) as stream:
        stream.write(json.dumps(to_sarif(report.path, report.findings), indent=2).encode())
