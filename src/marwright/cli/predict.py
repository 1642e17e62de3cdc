"""`marwright predict`: inputs to a model, answers to the screen or into a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marwright.cli.answers import decode_body, render_answer
from marwright.cli.options import Json, with_client
from marwright.cli.output import make_progress, print_json, print_table

if TYPE_CHECKING:
    from marwright.client import Answer, Client
    from marwright.errors import MarwrightError

__all__ = ["predict"]

Row = dict[str, Any]


@with_client
def predict(
    client: Client,
    model: Annotated[str, typer.Argument(help="Model name.")],
    inputs: Annotated[list[Path], typer.Argument(help="Files to send, one request each.")],
    version: Annotated[
        str | None, typer.Option(help="Version; the default one if not given.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File of JSON lines for the answers; run again, it is gone on with."),
    ] = None,
    in_flight: Annotated[
        int, typer.Option(min=1, max=1000, help="Requests at a time, at most.")
    ] = 16,
    as_json: Json = False,
) -> None:
    """Send files to a model and print its answers, or write them into a file.

    Exits 1 where an input was refused, after the others were answered.
    """

    def ask(paths: Iterable[Path]) -> Iterator[tuple[Path, Answer | MarwrightError]]:
        return client.predict_many(model, paths, in_flight=in_flight, version=version)

    asked = {"model": model} if version is None else {"model": model, "version": version}
    if out is None:
        failed = _print(ask, inputs, as_json)
    else:
        failed = _write(ask, inputs, out, asked, as_json)
    if failed:
        raise typer.Exit(1)


Ask = Callable[[Iterable[Path]], Iterator[tuple[Path, Any]]]


def _print(ask: Ask, inputs: list[Path], as_json: bool) -> bool:
    """Print the answers in the order of the inputs; return whether one was refused."""
    found = dict(_collect(ask, dict.fromkeys(inputs)))
    rows = [found[path] for path in inputs]
    if as_json:
        print_json(rows)
    else:
        print_table(
            ["input", "answer"],
            [[row["input"], row.get("error") or render_answer(row)] for row in rows],
        )
    return any("error" in row for row in rows)


def _write(ask: Ask, inputs: list[Path], out: Path, asked: dict[str, str], as_json: bool) -> bool:
    """Write the answers as they come, but for those that are there; return as _print does.

    `asked` is the model, with the version where one is named: another one's answers do not count.
    """
    from marwright.client.answers import open_answers

    with open_answers(out) as answers, make_progress() as progress:
        wanted = dict.fromkeys(inputs)
        answered = _list_answered(out, asked) if answers.answered else set()
        waiting = [path for path in wanted if str(path) not in answered]
        skipped = len(wanted) - len(waiting)
        refused = 0
        task = progress.add_task("predict", total=len(wanted), completed=skipped, facts="")
        for _, row in _collect(ask, waiting):
            # A line of such a file has one of answer and error: see client/answers.py.
            kept = {"answer": None} if "body_base64" in row else {}
            answers.write({"input": row["input"], **asked, **kept, **row})
            refused += "error" in row
            progress.update(task, advance=1, facts=f"{refused} refused" if refused else "")
    counts = {"answered": len(waiting) - refused, "refused": refused, "there before": skipped}
    if as_json:
        print_json({"file": str(out), **{key.replace(" ", "_"): n for key, n in counts.items()}})
    else:
        print_table(["file", *counts], [[out, *counts.values()]])
    return refused > 0


def _list_answered(out: Path, asked: dict[str, str]) -> set[str]:
    """Return the inputs that this model has answered in a file, all of whose lines are whole."""
    from marwright.storage import translate_os_errors

    with translate_os_errors(f"read {out}"), out.open("rb") as stream:
        rows = map(json.loads, stream)
        return {
            row["input"]
            for row in rows
            if {key: row[key] for key in ("model", "version") if key in row} == asked
        }


def _collect(ask: Ask, paths: Iterable[Path]) -> Iterator[tuple[Path, Row]]:
    """Yield each input with its row, as they finish.

    An error that is not about the input ends the run: what is in flight is waited for, nothing
    more is sent, and the error is raised.
    """
    from marwright.errors import InputRejectedError, MarwrightError, StorageError

    ends: list[MarwrightError] = []

    def feed() -> Iterator[Path]:
        for path in paths:
            if ends:
                return
            yield path

    for path, result in ask(feed()):
        if isinstance(result, (InputRejectedError, StorageError)):
            yield path, {"input": str(path), "error": str(result)}
        elif isinstance(result, MarwrightError):
            ends.append(result)
        else:
            yield path, {"input": str(path), **decode_body(result.body, result.content_type)}
    if ends:
        raise ends[0]
