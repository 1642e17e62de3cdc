"""The way back: a release taken back from wherever it stands, and the last one undone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from marwright.archive.signature import signature_path
from marwright.client import Client
from marwright.errors import MarwrightError, ReleaseError
from marwright.release.candidate import digest_file
from marwright.release.drain import drain
from marwright.release.entries import read_entry, restore_default, write_default
from marwright.release.history import Line, Standing, make_line
from marwright.release.target import Target, find_version, list_files, unstage
from marwright.storage import translate_os_errors

__all__ = ["roll_back", "take_back"]

DRAIN_SECONDS = 60.0
"""How long a candidate that is taken back may go on to answer: it may be a slow one."""
LATE_SECONDS = 1.0
"""How long a registration that was cut off may take to show."""
LOOK_SECONDS = 0.1

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
            found=problems[0] if len(problems) == 1 else f"{len(problems)} problems",
            remedy=f"mend that, and repeat: marwright rollback {begun.model}",
            detail="\n".join(problems) if len(problems) > 1 else "",
        )
    tell(target.history.add(make_line(begun, "returned", reason=reason)).describe())


def _undo(target: Target, begun: Line) -> Iterator[str]:
    """Do all that can be done, and yield what went wrong."""
    for undo in (_return_default, _end_split, _restore_entries, _unregister, _remove_archive):
        try:
            undo(target, begun)
        except MarwrightError as exc:
            yield str(exc)


def _return_default(target: Target, begun: Line) -> None:
    """Give the default back; without a gateway let the candidate answer what it holds.

    Behind a gateway the version before answers what the candidate fails to.
    """
    moved = False
    for client in target.clients:
        if client.models.describe(begun.model).version != begun.before:
            client.models.set_default(begun.model, begun.before)
            moved = True
    if moved and target.gateway is None and "servers" not in begun.present:
        time.sleep(target.settings.drain_seconds)


def _end_split(target: Target, begun: Line) -> None:
    """Take the candidate's traffic away, and let it answer what it got before."""
    target.direct(model=begun.model)
    if "servers" not in begun.present:
        drain(target, begun.model, "candidate", most=DRAIN_SECONDS)


def _restore_entries(target: Target, begun: Line) -> None:
    files = list_files(target.clients[0], begun.model)
    restore_default(
        target,
        files[begun.before],
        begun.archive,
        list(files.values()),
        keep="deploy.yaml" in begun.present,
    )


def _unregister(target: Target, begun: Line) -> None:
    """Take the candidate from the servers, also where its registration was cut off and goes on."""
    if "servers" in begun.present:
        return
    deadline = time.monotonic() + LATE_SECONDS
    for client in target.clients:
        unstage(client, begun.archive)
        while (
            find_version(client, begun.model, begun.version) is None and time.monotonic() < deadline
        ):
            time.sleep(LOOK_SECONDS)
    target.unregister(begun.model, begun.version)


def _remove_archive(target: Target, begun: Line) -> None:
    if target.store is None or "store" in begun.present:
        return
    path = target.store / begun.archive
    with translate_os_errors(f"remove {path}"):
        path.unlink(missing_ok=True)
        signature_path(path).unlink(missing_ok=True)


def roll_back(
    target: Target, model: str, *, reason: str, tell: Tell, digest: str | None = None
) -> Line | None:
    """Return to the version that was the default before the last release; quick, no gates.

    `digest`: only where it was a release of that archive, which may be back already: then nothing
    is done, and None returned.

    Raises:
        ReleaseError: there is nothing to return to; or the default is back, and deploy.yaml could
            not be brought to say so.
    """
    standings = target.history.list_standings(model)
    if digest is not None and not _is_last(standings, digest):
        return None
    open_ones = [item for item in standings if item.is_open]
    if open_ones:
        take_back(target, open_ones[-1].begun, reason=reason, tell=tell)
        return open_ones[-1].begun
    begun = _find_released(target, model)
    for client in target.clients:
        if find_version(client, model, begun.before) is None:
            raise ReleaseError(
                f"{model} {begun.before} is not registered any more",
                remedy=f"release it again: marwright release {begun.before_archive}",
            )
    for client in target.clients:
        client.models.set_default(model, begun.before)
    problem = _follow(target, begun, tell)
    line = target.history.add(make_line(begun, "rolled back", reason=reason))
    tell(line.describe())
    if problem is not None:
        raise problem
    return line


def _is_last(standings: Sequence[Standing], digest: str) -> bool:
    """Whether a release of an archive is in force, or stands open.

    Raises:
        ReleaseError: another one came after it.
    """
    own = [n for n, item in enumerate(standings) if item.begun.digest == digest]
    if not own or standings[own[-1]].last.event in {"returned", "rolled back"}:
        return False
    for later in standings[own[-1] + 1 :]:
        if later.is_open or later.last.event == "released":
            raise ReleaseError(
                f"{later.begun.model} {later.begun.version} was released after it",
                remedy="see what was released: marwright releases",
            )
    return True


def _find_released(target: Target, model: str) -> Line:
    """Return how the release began that is to be undone; perhaps it was, all but its end.

    Raises:
        ReleaseError: no release has made the default what it is.
    """
    now = target.clients[0].models.describe(model).version
    standings = target.history.list_standings(model)
    released = [item.begun for item in standings if item.last.event == "released"]
    if released and now in (released[-1].version, released[-1].before):
        return released[-1]
    raise ReleaseError(
        f"there is no release of {model} {now} to take back",
        remedy="see what was released: marwright releases",
    )


def _follow(target: Target, begun: Line, tell: Tell) -> MarwrightError | None:
    """Let the store and deploy.yaml say what is the default again; return why they do not."""
    client = target.clients[0]
    files = list_files(client, begun.model)
    archive = files[begun.before]
    try:
        if target.store is not None and not (target.store / archive).exists():
            _restore_archive(client, target.store, archive, begun.before_digest)
            tell(f"{archive} was missing in the store; put back from what the server reads")
        workers = client.models.describe(begun.model).min_workers
        entry = read_entry(target, archive, like=begun.archive)
        write_default(target, entry, list(files.values()), workers=workers)
    except MarwrightError as exc:
        return exc
    return None


def _restore_archive(client: Client, store: Path, archive: str, digest: str) -> None:
    """Put an archive into the store that only the server still has.

    Raises:
        ReleaseError: the server has none, or a copy with settings of deploy.yaml in it.
    """
    folder = client.endpoint.staging
    if folder is None or not (folder / archive).exists() or digest_file(folder / archive) != digest:
        raise ReleaseError(
            f"the default is moved back, but the store has no {archive}",
            found=str(store),
            remedy="put it back there before a restart, and say in deploy.yaml what is the default",
        )
    for source in (folder / archive, signature_path(folder / archive)):
        target = store / source.name
        if source.exists() and not target.exists():
            with translate_os_errors(f"write {target}"):
                target.hardlink_to(source)
