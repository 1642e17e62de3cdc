"""`marwright inspect`: what an archive says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marwright.cli.options import Json
from marwright.cli.output import print_json, print_section, print_table

if TYPE_CHECKING:
    from marwright.archive.summary import Summary

__all__ = ["inspect"]

MAX_DEPTH = 3
"""Of the values shown in the tables; `--json` has them all."""


def inspect(
    archive: Annotated[Path, typer.Argument(help="A .mar or .tar.gz file, or a folder.")],
    as_json: Json = False,
) -> None:
    """Show what is in an archive: files, manifest, settings, schema, origin.

    Nothing is unpacked, run or verified.
    """
    from marwright.archive.summary import Summary

    summary = Summary.read(archive)
    if as_json:
        print_json(summary.to_json())
        return
    print_table(["", ""], list(_list_facts(summary)))
    print_section("files", ["name", "bytes", "packed", "sha256"], list(_list_tree(summary)))
    for title, values in (
        ("settings", summary.settings),
        ("spec", summary.spec),
        ("provenance", summary.provenance),
    ):
        print_section(title, ["", ""], list(_list_values(values)))


def _list_facts(summary: Summary) -> Iterator[list[object]]:
    manifest = summary.manifest
    stated = sum(member.sha256 is not None for member in summary.members)
    yield ["archive", f"{summary.path} ({summary.format}, {summary.size_bytes:,} bytes)"]
    yield ["model", f"{manifest.name} {manifest.version}"]
    for name in ("handler", "serialized_file", "model_file", "requirements_file", "runtime"):
        if value := getattr(manifest, name):
            yield [name.replace("_", " "), value]
    yield ["created", manifest.created_on or "not stated"]
    yield ["digests", f"stated for {stated} of {len(summary.members)} files"]
    yield ["root digest", summary.root_digest or "not stated"]
    signer = f"by {summary.signer}, not verified" if summary.signer else "cannot be read"
    yield ["signature", signer if summary.is_signed else "none"]
    yield ["samples", summary.samples]
    yield ["bill of materials", "yes" if summary.has_bom else "none"]
    for problem in summary.problems:
        yield ["problem", problem]


def _list_tree(summary: Summary) -> Iterator[list[object]]:
    """Yield a row a file, below one for each folder that it lies in."""
    shown: tuple[str, ...] = ()
    for member in summary.members:
        *folders, name = member.name.split("/")
        common = 0
        while common < min(len(folders), len(shown)) and folders[common] == shown[common]:
            common += 1
        for depth in range(common, len(folders)):
            yield [f"{'  ' * depth}{folders[depth]}/", "", "", ""]
        shown = tuple(folders)
        packed = f"{member.compressed_bytes:,}" if member.method else ""
        kind = "" if member.kind == "file" else f" ({member.kind})"
        yield [
            f"{'  ' * len(folders)}{name}{kind}",
            f"{member.size_bytes:,}",
            packed,
            (member.sha256 or "")[:12],
        ]


def _list_values(values: dict[str, Any], prefix: str = "") -> Iterator[list[object]]:
    """Yield a row a value, by its dotted name; what lies deeper is only counted."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and name.count(".") < MAX_DEPTH - 1:
            yield from _list_values(value, f"{name}.")
        elif isinstance(value, dict) and value:
            yield [name, f"{len(value)} values"]
        else:
            yield [name, value]
