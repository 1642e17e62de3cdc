"""The way back: a release taken back from wherever it stands, and the last one undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from marwright.errors import MarwrightError, ReleaseError
from marwright.release.history import Line, make_line
from marwright.release.target import Target, find_version, list_files
from marwright.server.revision import find_entry, remove_entry, revise, set_default

__all__ = ["roll_back", "take_back"]

Tell = Callable[[str], None]


def take_back(target: Target, begun: Line, *, reason: str, tell: Tell) -> None:
    """Bring everything to where it was before a release, from wherever it stands.

    Raises:
        ReleaseError: some of it could not be brought back; says what.
    """
    problems = [*_undo(target, begun)]
    if problems:
        raise ReleaseError(
            f"the release of {begun.model} {begun.version} could not be taken back whole",
            found=problems[0],
            remedy=f"mend that, and repeat: marwright rollback {begun.model}",
            detail="\n".join(problems) if len(problems) > 1 else "",
        )
    line = target.history.add(make_line(begun, "returned", version=begun.before, reason=reason))
    tell(line.describe())


def _undo(target: Target, begun: Line) -> Iterator[str]:
    """Do all that can be done, and yield what went wrong."""
    for undo in (_return_default, _end_split, _unregister, _restore_entries):
        try:
            undo(target, begun)
        except MarwrightError as exc:
            yield str(exc)


def _return_default(target: Target, begun: Line) -> None:
    for client in target.clients:
        if client.models.describe(begun.model).version != begun.before:
            client.models.set_default(begun.model, begun.before)


def _end_split(target: Target, begun: Line) -> None:
    target.direct(model=begun.model)


def _unregister(target: Target, begun: Line) -> None:
    for client in target.clients:
        if find_version(client, begun.model, begun.version) is not None:
            client.models.unregister(begun.model, begun.version)


def _restore_entries(target: Target, begun: Line) -> None:
    """Take the candidate out of deploy.yaml, where it got there, and give the default back."""
    if target.path is None:
        return
    files = list_files(target.clients[0], begun.model)

    def change(document: dict[str, Any]) -> None:
        if find_entry(document, begun.archive) is not None:
            remove_entry(document, begun.archive)
            if begun.before in files:
                set_default(document, files[begun.before], list(files.values()))

    revise(target.path, change)
    target.apply()


def roll_back(target: Target, model: str, *, reason: str, tell: Tell) -> Line:
    """Return to the version that was the default before the last release; quick, no gates.

    Raises:
        ReleaseError: there is nothing to return to.
    """
    standings = target.history.list_standings(model)
    open_ones = [item for item in standings if item.is_open]
    if open_ones:
        take_back(target, open_ones[-1].begun, reason=reason, tell=tell)
        return open_ones[-1].begun
    now = target.clients[0].models.describe(model).version
    done = [s for s in standings if s.last.event == "released" and s.begun.version == now]
    if not done:
        raise ReleaseError(
            f"there is no release of {model} {now} to take back",
            remedy="see what was released: marwright releases",
        )
    begun = done[-1].begun
    for client in target.clients:
        if find_version(client, model, begun.before) is None:
            raise ReleaseError(
                f"{model} {begun.before} is not registered any more",
                remedy=f"release it again: marwright release {begun.before}",
            )
    _return_default(target, begun)
    line = target.history.add(make_line(begun, "rolled back", version=begun.before, reason=reason))
    tell(line.describe())
    _write_default(target, begun)
    return line


def _write_default(target: Target, begun: Line) -> None:
    """Say in deploy.yaml what is the default again."""
    files = list_files(target.clients[0], begun.model)

    def change(document: dict[str, Any]) -> None:
        set_default(document, files[begun.before], list(files.values()))

    if target.path is not None:
        revise(target.path, change)
        target.apply()
