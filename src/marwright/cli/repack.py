"""`marwright repack`: an archive with some of it changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from marwright.cli.options import Json, Samples, Trial, TrialSeconds
from marwright.cli.output import print_json, print_table, say
from marwright.errors import UsageError

__all__ = ["repack"]


def repack(
    archive: Annotated[Path, typer.Argument(help="A .mar or .tar.gz file.")],
    handler: Annotated[
        str | None, typer.Option(help="A handler file, or the name of one of ours.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting, such as batchSize=8 or handler.top_k=3; no value takes it away.",
        ),
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH[=NAME]", help="A file to add, or to replace one of that name."),
    ] = None,
    remove: Annotated[list[str] | None, typer.Option(help="A file to leave out.")] = None,
    version: Annotated[str | None, typer.Option(help="Another model version.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write; the archive's own place if not given.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Replace what is there; needed without --out.")
    ] = False,
    preflight: Trial = True,
    sample: Samples = None,
    timeout: TrialSeconds = 120.0,
    as_json: Json = False,
) -> None:
    """Write an archive again with a new handler, other settings, other files.

    Files that do not change are copied as they are, not compressed again. --set, --add and
    --remove may be repeated. The old archive stays until the new one is whole.
    """
    from marwright.archive.pack import Preflight
    from marwright.archive.repack import Changes
    from marwright.archive.repack import repack as write_again

    changes = Changes(
        handler=handler,
        settings=dict(map(_parse_setting, setting or ())),
        add=dict(map(_parse_file, add or ())),
        remove=tuple(remove or ()),
        version=version,
    )
    trial = Preflight(samples=tuple(sample or ()), timeout=timeout) if preflight else None
    packed = write_again(archive, changes, out=out, force=force, preflight=trial)
    if as_json:
        print_json(packed.to_json())
        return
    for finding in packed.findings:
        say(str(finding))
    headers = ["archive", "model", "version", "bytes", "root digest"]
    facts = [packed.path, packed.name, packed.version, f"{packed.size_bytes:,}", packed.root_digest]
    print_table(headers, [facts])


def _parse_setting(text: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError("--set takes KEY=VALUE", found=repr(text))
    try:
        return key, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise UsageError(f"the value of {key} is no YAML", found=repr(value)) from exc


def _parse_file(text: str) -> tuple[str, Path]:
    """Return (name inside, file) of `PATH=NAME`, or of a path alone."""
    path, equals, name = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text).name, Path(text)
    if not path or not name:
        raise UsageError("--add takes PATH or PATH=NAME", found=repr(text))
    return name, Path(path)
