"""`marwright release`, `rollback` and `releases`: versions moved, moved back, and who did it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marwright.cli.options import Json
from marwright.cli.output import print_json, print_table, say
from marwright.errors import ReleaseError

if TYPE_CHECKING:
    from marwright.release.history import History, Line, Standing
    from marwright.release.target import Target

__all__ = ["release", "releases", "rollback"]

To = Annotated[
    str | None,
    typer.Option(
        "--to",
        help="A deploy.yaml, of one server or of several, a server's name, or the management"
        " address of another TorchServe; ./deploy.yaml, or the only server, if not given.",
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
    lease: Annotated[
        float | None,
        typer.Option(
            hidden=True, help="Led from elsewhere, by words on standard input: release/lead.py."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make an archive's version the default, gate by gate; go back by itself where one fails.

    Register, warm up, samples answered as recorded, shadow, canary, default, drain. The version
    before stays registered. An interrupted release is finished by the same command, and taken back
    by marwright rollback.
    """
    from marwright.release.candidate import digest_file, examine, find_archive
    from marwright.release.fleet import find_fleet
    from marwright.release.history import History
    from marwright.release.lead import Lead
    from marwright.release.release import Release

    if (fleet := find_fleet(to)) is not None:
        _release_fleet(fleet, archive, check=check, as_json=as_json)
        return
    options: dict[str, Any] = {"inference_url": inference_url, "key_file": key_file, "store": store}
    with _open(to, options) as target, target.history.hold():
        path = find_archive(archive, target)
        standing = _find_standing(target.history, digest_file(path))
        candidate = examine(path, target, begun=standing.begun if standing else None)
        if check:
            _print_check([candidate.to_json()], as_json=as_json)
            return
        if standing is not None:
            say(f"{standing.describe()}; going on")
        begun, lead = standing.begun if standing else None, None
        if lease is not None:
            lead = Lead(sys.stdin, lease=lease)
            target = replace(target, history=History(target.history.path, _print_line))
        made = Release(target, candidate, tell=say, begun=begun, lead=lead)
        made.run()
        if lead is None:
            _print_released(target.history, made.begun, as_json=as_json)


def _release_fleet(path: Path, archive: Path, *, check: bool, as_json: bool) -> None:
    """Release an archive to the servers that a deploy.yaml names."""
    from marwright.release.fleet import FleetRelease, open_fleet, roll_back_fleet

    with open_fleet(path) as fleet, fleet.history.hold():
        made = FleetRelease(fleet, archive, tell=say)
        if check:
            _print_check(made.check(), as_json=as_json)
            return
        standing = _find_standing(fleet.history, made.digest)
        if standing is not None:
            say(f"{standing.describe()}; it is taken back first")
            roll_back_fleet(fleet, standing.begun.model, reason="it was cut off", tell=say)
        _print_released(fleet.history, made.run(), as_json=as_json)


def _print_check(candidates: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json(candidates[0] if len(candidates) == 1 else candidates)
    else:
        say("it can be released")


def _print_released(history: History, begun: Line, *, as_json: bool) -> None:
    if as_json:
        lines = history.read(begun.model)
        print_json([asdict(line) for line in lines if line.release == begun.release])
    else:
        print(f"{begun.model} {begun.version} is released")


def _print_line(line: Line) -> None:
    """Print a decision for who leads the release."""
    print(json.dumps(asdict(line)), flush=True)


def rollback(
    model: Annotated[
        str | None, typer.Argument(help="Which model; not needed where one was released.")
    ] = None,
    to: To = None,
    inference_url: InferenceUrl = "",
    key_file: KeyFile = None,
    store: Store = None,
    reason: Reason = "asked for",
    digest: Annotated[
        str | None,
        typer.Option(hidden=True, help="Only a release of the archive with this SHA-256."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Return to the version that was the default before the last release, at once.

    A release that was interrupted is taken back from wherever it stands.
    """
    from marwright.release.fleet import find_fleet, open_fleet, roll_back_fleet
    from marwright.release.rollback import roll_back

    if (path := find_fleet(to)) is not None:
        with open_fleet(path) as fleet, fleet.history.hold():
            model = model or _find_model(fleet.history)
            _print_back(roll_back_fleet(fleet, model, reason=reason, tell=say), as_json=as_json)
        return
    options: dict[str, Any] = {"inference_url": inference_url, "key_file": key_file, "store": store}
    with _open(to, options) as target, target.history.hold():
        model = model or _find_model(target.history)
        _print_back(
            roll_back(target, model, reason=reason, tell=say, digest=digest), as_json=as_json
        )


def _print_back(line: Line | None, *, as_json: bool) -> None:
    if as_json:
        print_json(line and asdict(line))
    elif line is not None:
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
    from marwright.release.fleet import find_fleet
    from marwright.release.history import HISTORY_NAME, History

    if history is None and (path := find_fleet(to)) is not None:
        history = path.with_name(HISTORY_NAME)
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


def _find_standing(history: History, digest: str) -> Standing | None:
    """Return the interrupted release of an archive.

    Raises:
        ReleaseError: one of another archive stands open.
    """
    open_ones = [item for item in history.list_standings() if item.is_open]
    for standing in open_ones:
        begun = standing.begun
        if begun.digest != digest:
            raise ReleaseError(
                standing.describe(),
                remedy=f"finish it: marwright release {begun.archive};"
                f" or take it back: marwright rollback {begun.model}",
            )
    return open_ones[-1] if open_ones else None


def _find_model(history: History) -> str:
    """Return the one model that was ever released there."""
    models = sorted({standing.begun.model for standing in history.list_standings()})
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
