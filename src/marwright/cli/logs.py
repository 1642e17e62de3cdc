"""`marwright logs`: what a server and its workers said."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from marwright.cli.options import Server
from marwright.cli.output import escape

if TYPE_CHECKING:
    from marwright.server.log import LogLine

__all__ = ["show_logs"]


def show_logs(
    *,
    model: Annotated[str | None, typer.Option(help="Only what this model's workers said.")] = None,
    version: Annotated[str | None, typer.Option(help="Only of this version.")] = None,
    level: Annotated[
        Literal["debug", "info", "warning", "error", "critical"],
        typer.Option(help="Only lines as important as this."),
    ] = "info",
    request: Annotated[
        str | None, typer.Option("--request", help="Only about this request, by its x-request-id.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what is still to come.")
    ] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=0, help="How many of the last lines.")
    ] = 100,
    server: Server = None,
    file: Annotated[Path | None, typer.Option(help="A log, instead of a running server's.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line instead of text.")
    ] = False,
) -> None:
    """Show the last lines of a server's log, its workers' and its supervisor's among them."""
    from marwright.server.log import LEVELS, read_logs

    least = LEVELS.index(level)

    def is_wanted(line: LogLine) -> bool:
        return (
            LEVELS.index(line.level) >= least
            and model in (None, line.model)
            and version in (None, line.version)
            and request in (None, line.request_id)
        )

    paths = _find_logs(server, file)
    for line in read_logs(paths, follow=follow, is_wanted=is_wanted, last=lines):
        print(_render_json(line) if as_json else _render_text(line), flush=follow)


def _find_logs(server: str | None, file: Path | None) -> list[Path]:
    """Return the file that is named; else a running server's log, and its supervisor's."""
    from marwright.errors import NoServerError, UsageError
    from marwright.server.registry import find_endpoint

    if file is not None:
        if server is not None:
            raise UsageError("--server and --file exclude each other", remedy="pass one of them")
        return [file]
    log = find_endpoint(server).log_file
    if log is None:
        raise NoServerError("the server says of no log where it is", remedy="pass --file PATH")
    supervisor = log.with_name("supervisor.log")
    return [log, supervisor] if supervisor.exists() else [log]


def _render_json(line: LogLine) -> str:
    return json.dumps({**asdict(line), "time": line.time.isoformat(timespec="milliseconds")})


def _render_text(line: LogLine) -> str:
    """Return when, how important, who and what, in one line."""
    clock = line.time.strftime("%Y-%m-%d %H:%M:%S.") + f"{line.time.microsecond // 1000:03d}"
    if line.model:
        port = "" if line.worker is None else f" {line.worker}"
        who = f"{line.model} {line.version}{port}"
    else:
        who = line.logger.rpartition(".")[2]
    # An exception's own line says most; its trace stands in --json.
    exception = line.exception.strip().partition("\n")[0]
    said = ": ".join(part for part in (line.message.strip(), exception) if part)
    return escape(f"{clock} {line.level:<8} {who or '-'}: {said}")
