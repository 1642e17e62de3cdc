"""`marwright diff`: what differs between two archives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marwright.cli.options import Json
from marwright.cli.output import escape, print_json, print_section

if TYPE_CHECKING:
    from marwright.archive.diff import Difference
    from marwright.archive.tensor_diff import TensorChange, WeightsChange

__all__ = ["diff"]


def diff(
    before: Annotated[Path, typer.Argument(help="A .mar or .tar.gz file, or a folder.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
    text: Annotated[
        bool, typer.Option("--text", help="Show changed texts line by line, the handler's too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what differs between two archives: files, settings, schema, weights by tensor.

    Exit 0 where their content is the same, 1 where it differs. Formats, times and compression do
    not count.
    """
    from marwright.archive.diff import Difference

    difference = Difference.between(before, after)
    if as_json:
        print_json(difference.to_json())
    elif not difference:
        print(escape(f"{before} and {after} hold the same"))
    else:
        _print_tables(difference)
        for change in difference.texts if text else ():
            print("\n" + "\n".join(escape(line.expandtabs()) for line in change.lines))
    if difference:
        raise typer.Exit(1)


def _print_tables(difference: Difference) -> None:
    lines = {change.name: f"+{change.added} -{change.removed} lines" for change in difference.texts}
    print_section(
        "files",
        ["name", "change", "bytes before", "after", ""],
        [
            [
                file.name,
                file.kind,
                _size(file.before_bytes),
                _size(file.after_bytes),
                lines.get(file.name, ""),
            ]
            for file in difference.files
        ],
    )
    for title in ("manifest", "settings", "spec", "provenance"):
        changes = getattr(difference, title)
        rows = [[change.key, _value(change.before), _value(change.after)] for change in changes]
        print_section(title, ["key", "before", "after"], rows)
    for weights in difference.weights:
        print("\n" + escape(f"weights {weights.member}: {_describe(weights)}"))
        headers = ["tensor", "change", "before", "after", "max abs", "max rel", "numbers"]
        print_section("", headers, [_list_cells(tensor) for tensor in weights.tensors])
        print_section("", ["value", "before", "after"], weights.values)


def _size(size_bytes: int | None) -> str:
    return "" if size_bytes is None else f"{size_bytes:,}"


def _value(value: object) -> object:
    return "" if value is None else value


def _describe(weights: WeightsChange) -> str:
    """Return one line: how many tensors are the same, and what else differs."""
    if weights.format == "bytes":
        return f"compared as bytes: {weights.note}"
    facts = [f"{weights.format}, {len(weights.tensors)} tensors differ, {weights.equal} are equal"]
    facts += [f"{part} differs" for part in weights.parts]
    return "; ".join([*facts, *([weights.note] if weights.note else [])])


def _list_cells(tensor: TensorChange) -> list[object]:
    cells: list[object] = [tensor.name, tensor.kind, tensor.before, tensor.after]
    if tensor.max_abs is None:
        return [*cells, "", "", ""]
    numbers = f"{tensor.changed:,} of {tensor.count:,}"
    return [*cells, f"{tensor.max_abs:.3g}", f"{tensor.max_rel:.3g}", numbers]
