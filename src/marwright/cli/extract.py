"""`marwright extract`: an archive's files, in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from marwright.cli.options import Json
from marwright.cli.output import print_json, print_table

__all__ = ["extract"]


def extract(
    archive: Annotated[Path, typer.Argument(help="A .mar or .tar.gz file, or a folder.")],
    to: Annotated[
        Path | None, typer.Option(help="The folder; if not given, the model's name here.")
    ] = None,
    member: Annotated[
        list[str] | None, typer.Option(help="Only this file; may be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace what is there.")] = False,
    as_json: Json = False,
) -> None:
    """Unpack an archive into a new folder, or some of its files into one that may exist.

    Only plain files are written, and never outside of the folder.
    """
    from marwright.archive import Archive

    with Archive.open(archive) as opened:
        folder = to or Path(opened.manifest.name)
        opened.extract(folder, members=tuple(member or ()), force=force)
        names = member or list(opened.names)
    if as_json:
        print_json({"folder": folder, "files": names})
    else:
        print_table(["folder", "files"], [[folder, len(names)]])
