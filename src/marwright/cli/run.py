"""`marwright run`: what a server would answer, without a server."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marwright.cli.answers import decode_body, render_answer
from marwright.cli.options import Json
from marwright.cli.output import print_error, print_json, print_table, say

if TYPE_CHECKING:
    from marwright.archive import Archive
    from marwright.archive.worker import Answer

__all__ = ["run"]

POLL_SECONDS = 0.2
"""Between two looks at the files of a watched handler."""


def run(
    archive: Annotated[Path, typer.Argument(help="A .mar file, or a folder with an unpacked one.")],
    inputs: Annotated[list[Path], typer.Argument(help="Files to answer, one request each.")],
    batch: Annotated[
        bool, typer.Option("--batch", help="All inputs in one batch, not one after the other.")
    ] = False,
    content_type: Annotated[
        str | None, typer.Option(help="Of every input; application/json for .json if not given.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="As /explanations does: why, instead of what.")
    ] = False,
    handler: Annotated[
        Path | None, typer.Option(help="A handler file to use instead of the archive's own.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Print also where the time goes.")
    ] = False,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Answer again whenever the handler changes, until Ctrl-C."),
    ] = False,
    pdb: Annotated[
        bool, typer.Option("--pdb", help="Debug the handler where it raises an exception.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Answer inputs exactly as TorchServe would, in this process.

    One input: the answer's body as it is. Several, or --json: status, content type and answer of
    each. Exits 1 where an answer is an error. What the handler prints goes to standard error.
    """
    from marwright.archive import Archive

    job = _Job(
        inputs=tuple(inputs),
        batch=batch,
        content_type=content_type or _guess_type(inputs),
        explain=explain,
        handler=handler,
        profile=profile,
        debug=pdb,
        as_json=as_json,
    )
    with Archive.open(archive) as opened:
        if watch:
            _watch(job, opened)
        outcome = _answer(job, opened)
    _print_outcome(job, outcome)
    if any(answer.status >= 400 for answer in outcome.answers):
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Job:
    """What the command line asks for."""

    inputs: tuple[Path, ...]
    batch: bool
    content_type: str | None
    explain: bool
    handler: Path | None
    profile: bool
    debug: bool
    as_json: bool


@dataclass(frozen=True)
class _Outcome:
    answers: list[Answer]
    seconds: dict[str, float]
    """By stage, in order."""
    measured_by: str
    """How the stages inside the handler were told apart."""
    sources: tuple[Path, ...]
    """The handler's files."""


def _answer(job: _Job, source: Archive | Path) -> _Outcome:
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        from marwright.archive.worker import Model, Request
        from marwright.archive.worker.profile import Profile

        imported = time.perf_counter()
        debugger = _debug if job.debug else None
        with Model(source, handler=job.handler, debugger=debugger) as model:
            model.profile = profile = Profile() if job.profile else None
            requests = [
                Request(path, content_type=job.content_type, is_explanation=job.explain)
                for path in job.inputs
            ]
            batches = [requests] if job.batch else [[request] for request in requests]
            answered = [model.predict(batch) for batch in batches]
            seconds = {
                "torch": imported - started,
                "unpack": model.unpack_seconds,
                "import": model.import_seconds,
                "initialize": model.initialize_seconds,
            }
            if profile is not None:
                inside = sum(profile.seconds.values())
                protocol = sum(answers[0].seconds for answers in answered) - inside
                seconds |= {**profile.seconds, "protocol": protocol}
            return _Outcome(
                answers=[answer for answers in answered for answer in answers],
                seconds=seconds,
                measured_by=profile.measured_by if profile else "",
                sources=model.sources,
            )


def _watch(job: _Job, archive: Archive) -> None:
    """Answer, and again after every change of the handler's files; only Ctrl-C ends it."""
    from marwright.errors import ArchiveError, UsageError

    own = archive.manifest.handler_file if archive.container.format == "folder" else None
    if job.handler is None and own is None:
        raise UsageError(
            f"nothing in {archive.path} changes",
            remedy="pass --handler FILE, or a folder with an unpacked archive",
        )
    with _unpacked(archive) as folder:
        handler = job.handler or folder / str(own)
        sources: tuple[Path, ...] = ()
        while True:
            before = _stamp(handler, sources)
            try:
                outcome = _answer(job, folder)
                sources = outcome.sources
                # Of a module that was not known before, what it is now must do.
                now = _stamp(handler, sources)
                before = {path: before.get(path, stamp) for path, stamp in now.items()}
                _print_outcome(job, outcome)
                sys.stdout.flush()
            except ArchiveError as exc:
                print_error(exc, as_json=job.as_json)
            say(f"watching {handler}; Ctrl-C stops")
            while _stamp(handler, sources) == before:
                time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _unpacked(archive: Archive) -> Iterator[Path]:
    if archive.container.format == "folder":
        yield archive.path
    else:
        with tempfile.TemporaryDirectory(prefix="marwright-") as temporary:
            yield archive.extract(Path(temporary) / "model")


def _stamp(handler: Path, sources: tuple[Path, ...]) -> dict[Path, tuple[int, int] | None]:
    """Return what changes with the handler, the files beside it, and those it imported."""
    stamps: dict[Path, tuple[int, int] | None] = {}
    for path in {*handler.resolve().parent.glob("*.py"), *sources}:
        stamps[path] = None
        with contextlib.suppress(OSError):  # between an editor's removing and writing it
            found = path.stat()
            stamps[path] = found.st_mtime_ns, found.st_size
    return stamps


def _debug(trace: TracebackType | None) -> None:
    """Open Python's debugger at a traceback's last frame; commands may come through a pipe."""
    import pdb

    interactive = sys.stdin.isatty() and sys.__stdout__ is not None and sys.__stdout__.isatty()
    with contextlib.redirect_stdout(sys.__stdout__ if interactive else sys.stderr):
        debugger = pdb.Pdb() if interactive else pdb.Pdb(stdin=sys.stdin, stdout=sys.stderr)
        debugger.reset()
        debugger.interaction(None, trace)


def _print_outcome(job: _Job, outcome: _Outcome) -> None:
    rows = [
        _describe(path, answer) for path, answer in zip(job.inputs, outcome.answers, strict=True)
    ]
    if job.as_json:
        profile = {"measured_by": outcome.measured_by, "seconds": outcome.seconds}
        print_json({"answers": rows, "profile": profile} if job.profile else rows)
    elif len(rows) == 1 and not job.profile:
        sys.stdout.buffer.write(outcome.answers[0].body)
        sys.stdout.buffer.flush()
    else:
        print_table(
            ["input", "status", "content type", "answer"],
            [
                [row["input"], row["status"], row["content_type"], render_answer(row)]
                for row in rows
            ],
        )
    if job.profile and not job.as_json:
        _print_profile(outcome)
    _print_failures(outcome.answers)


def _print_profile(outcome: _Outcome) -> None:
    total = sum(outcome.seconds.values())
    print_table(
        ["stage", "seconds", "share"],
        [
            [stage, f"{seconds:.4f}", f"{seconds / total:.1%}"]
            for stage, seconds in [*outcome.seconds.items(), ("total", total)]
        ],
    )
    say(
        {
            "methods": "stages: the handler's methods preprocess, inference, postprocess",
            "torch modules": "infer: calls of torch modules; preprocess: what came before them",
        }.get(outcome.measured_by, "the handler called no torch module: its time is in other")
    )


def _print_failures(answers: list[Answer]) -> None:
    for failure in dict.fromkeys(answer.failure for answer in answers if answer.failure):
        place = f" at {failure.place}" if failure.place else ""
        say(f"error: the handler failed ({failure.kind}): {failure.message}{place}")
        if failure.traceback:
            say("\n".join(f"    {line}" for line in failure.traceback.splitlines()))


def _describe(path: Path, answer: Answer) -> dict[str, Any]:
    row: dict[str, Any] = {
        "input": str(path),
        "status": answer.status,
        "content_type": answer.content_type,
    }
    if answer.failure:
        row["failure"] = asdict(answer.failure)
    return row | decode_body(answer.body, answer.content_type)


def _guess_type(inputs: list[Path]) -> str | None:
    """Return JSON's type for files that are named so: nothing in JSON itself says what it is."""
    return "application/json" if all(path.suffix == ".json" for path in inputs) else None
