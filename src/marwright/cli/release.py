"""`marwright release`, `rollback` and `releases`: versions moved, moved back, and who did it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marwright.cli.options import Json
from marwright.cli.output import print_json, print_table, say
from marwright.errors import ReleaseError

if TYPE_CHECKING:
    from marwright.release.history import Standing
    from marwright.release.target import Target

__all__ = ["release", "releases", "rollback"]

To = Annotated[
    str | None,
    typer.Option(
        "--to",
        help="A deploy.yaml, a server's name, or the management address of another TorchServe;"
        " ./deploy.yaml, or the only server, if not given.",
    ),
]
InferenceUrl = Annotated[
    str, typer.Option(help="Inference address, where --to is a management address.")
]
KeyFile = Annotated[Path | None, typer.Option(help="Its key_file.json, where --to is an address.")]
Store = Annotated[Path | None, typer.Option(help="Its store, where --to is an address.")]
Reason = Annotated[str, typer.Option(help="Why; kept in the history.")]


def release(
    archive: Annotated[Path, typer.Argument(help="What is to be the default version.")],
    to: To = None,
    inference_url: InferenceUrl = "",
    key_file: KeyFile = None,
    store: Store = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only say what speaks against it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make an archive's version the default, gate by gate; go back by itself where one fails.

    Register, warm up, samples answered as recorded, shadow, canary, default, drain. The version
    before stays registered. An interrupted release is finished by the same command, and taken back
    by marwright rollback.
    """
    from marwright.release.candidate import digest_file, examine, find_archive
    from marwright.release.release import Release

    options: dict[str, Any] = {"inference_url": inference_url, "key_file": key_file, "store": store}
    with _open(to, options) as target, target.history.hold():
        path = find_archive(archive, target)
        standing = _find_standing(target, digest_file(path))
        candidate = examine(path, target, begun=standing.begun if standing else None)
        if check:
            say("it can be released")
            return
        if standing is not None:
            say(f"{standing.describe()}; going on")
        made = Release(target, candidate, tell=say, begun=standing.begun if standing else None)
        made.run()
        lines = target.history.read(candidate.model)
        if as_json:
            print_json([asdict(line) for line in lines if line.release == made.begun.release])
        else:
            print(f"{candidate.model} {candidate.version} is released")


def rollback(
    model: Annotated[
        str | None, typer.Argument(help="Which model; not needed where one was released.")
    ] = None,
    to: To = None,
    inference_url: InferenceUrl = "",
    key_file: KeyFile = None,
    store: Store = None,
    reason: Reason = "asked for",
    as_json: Json = False,
) -> None:
    """Return to the version that was the default before the last release, at once.

    A release that was interrupted is taken back from wherever it stands.
    """
    from marwright.release.rollback import roll_back

    options: dict[str, Any] = {"inference_url": inference_url, "key_file": key_file, "store": store}
    with _open(to, options) as target, target.history.hold():
        line = roll_back(target, model or _find_model(target), reason=reason, tell=say)
        if as_json:
            print_json(asdict(line))
        else:
            print(f"{line.model} is back at {line.before}")


def releases(
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    to: To = None,
    history: Annotated[
        Path | None, typer.Option(help="A releases.jsonl, instead of a server's.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the last release into a PNG, as its gateway's log shows it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show who moved which model when, why, and with which figures."""
    from marwright.release.history import History

    if plot is not None:
        with _open(to, {}) as target:
            _draw(target, model, plot)
        return

    with contextlib.ExitStack() as stack:
        past = History(history) if history else stack.enter_context(_open(to, {})).history
        if as_json:
            print_json([asdict(line) for line in past.read(model)])
            return
        rows = [_describe(standing) for standing in past.list_standings(model)]
    print_table(["when", "who", "model", "from", "to", "outcome", "why", "what differs"], rows)


def _draw(target: Target, model: str | None, path: Path) -> None:
    """Draw the last release of a model from what its gateway has logged.

    Raises:
        ReleaseError: there is none, or no gateway.
    """
    from marwright.gateway.accesses import AccessLog
    from marwright.release.plot import draw_release

    standings = target.history.list_standings(model)
    if not standings or target.record is None or target.gateway is None:
        raise ReleaseError(
            "there is no release to be drawn",
            expected="a release behind a gateway that has run since",
            remedy="see what was released: marwright releases",
        )
    last = standings[-1].begun
    lines = [line for line in target.history.read(last.model) if line.release == last.release]
    with AccessLog(Path(target.record.run_folder)) as log:
        draw_release(lines, log.read(), path)
    say(f"wrote {path}")


@contextlib.contextmanager
def _open(to: str | None, options: dict[str, Any]) -> Iterator[Target]:
    from marwright.release.target import open_target

    with open_target(to, **options) as target:
        yield target


def _find_standing(target: Target, digest: str) -> Standing | None:
    """Return the interrupted release of an archive.

    Raises:
        ReleaseError: one of another archive stands open.
    """
    open_ones = [item for item in target.history.list_standings() if item.is_open]
    for standing in open_ones:
        begun = standing.begun
        if begun.digest != digest:
            raise ReleaseError(
                standing.describe(),
                remedy=f"finish it: marwright release {begun.archive};"
                f" or take it back: marwright rollback {begun.model}",
            )
    return open_ones[-1] if open_ones else None


def _find_model(target: Target) -> str:
    """Return the one model that was ever released there."""
    models = sorted({standing.begun.model for standing in target.history.list_standings()})
    if len(models) == 1:
        return models[0]
    raise ReleaseError(
        "it is not clear which model is meant",
        found=", ".join(models) or "no release",
        remedy="name one: marwright rollback MODEL",
    )


def _describe(standing: Standing) -> list[object]:
    begun, last = standing.begun, standing.last
    outcome = f"open: {standing.step}" if standing.is_open else last.event
    row = [begun.time, begun.user, begun.model, begun.before, begun.version]
    differs = f"marwright diff {begun.before_archive} {begun.archive}"
    return [*row, outcome, last.reason, differs]
