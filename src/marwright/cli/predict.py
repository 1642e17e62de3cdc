"""`marwright predict`: inputs to a model, answers to the screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marwright.cli.options import Json, with_client
from marwright.cli.output import print_json, print_table

if TYPE_CHECKING:
    from marwright.client import Answer, Client

__all__ = ["predict"]


@with_client
def predict(
    client: Client,
    model: Annotated[str, typer.Argument(help="Model name.")],
    inputs: Annotated[list[Path], typer.Argument(help="Files to send, one request each.")],
    version: Annotated[
        str | None, typer.Option(help="Version; the default one if not given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Send files to a model and print its answers.

    Exits 1 where an input was refused, after the others were answered.
    """
    from marwright.errors import InputRejectedError, StorageError

    rows: list[dict[str, Any]] = []
    failed = False
    for path in inputs:
        try:
            answer = client.predict(model, path, version=version)
            rows.append({"input": str(path), "answer": _decode(answer)})
        except (InputRejectedError, StorageError) as exc:
            rows.append({"input": str(path), "error": str(exc)})
            failed = True
    if as_json:
        print_json(rows)
    else:
        print_table(
            ["input", "answer"],
            [[row["input"], row.get("error") or _render(row["answer"])] for row in rows],
        )
    if failed:
        raise typer.Exit(1)


def _decode(answer: Answer) -> Any:
    if "json" in answer.content_type:
        return answer.json()
    return answer.body.decode("utf-8", "replace")


def _render(answer: Any) -> str:
    """Return labels with their probabilities in a line; anything else as it came."""
    if isinstance(answer, dict) and all(isinstance(value, float) for value in answer.values()):
        return "  ".join(f"{label} {value:.4f}" for label, value in answer.items())
    return str(answer)
