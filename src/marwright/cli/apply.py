"""`marwright apply`: a running server made as its deploy.yaml says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marwright.cli.options import Json, with_client
from marwright.cli.output import print_json, print_table, say
from marwright.errors import MarwrightError
from marwright.server.registry import DEPLOYMENT_NAME

if TYPE_CHECKING:
    from marwright.client import Client
    from marwright.client.endpoint import Endpoint
    from marwright.server.change import Change
    from marwright.server.plan import Step
    from marwright.server.registry import Record

__all__ = ["apply"]

NOTHING = "nothing to do"
SITE_SECONDS = 1800.0
"""How long a site may take: its replicas start workers one after the other."""


def _ask(
    endpoint: Endpoint, file: Path | None, dry_run: bool, as_json: bool, **others: object
) -> bool:
    """Have the supervisor do it, where it can; return whether that is all.

    It has everything loaded that judging takes: where there is nothing to do, asking it halves the
    time of this command. A site changes its replicas itself.
    """
    from marwright.server.registry import list_replicas
    from marwright.server.supervision.inspection import is_current

    record = _find_file(file, endpoint)[1]
    if record is None:
        return False
    if is_current(record):
        _print_plan([], [], as_json=as_json)
    elif list_replicas(record):
        _apply_site(record, dry_run=dry_run, as_json=as_json)
    else:
        return False
    return True


def _apply_site(record: Record, *, dry_run: bool, as_json: bool) -> None:
    """Have a site change its gateway and its replicas, one after the other."""
    from marwright.server.supervision.inspection import ask_supervisor

    rows = ask_supervisor(record, "/apply", {"dry_run": True}, timeout=SITE_SECONDS)
    _print_rows(rows, as_json=as_json)
    if dry_run:
        return
    ask_supervisor(record, "/apply", {}, timeout=SITE_SECONDS)
    for row in rows:
        if row["plan"] or row.get("taken"):
            say(f"done: {row['server']}")
    _look_anew(record)
    if any(row["restart"] for row in rows):
        say("needs: marwright restart")
        raise typer.Exit(1)


def _print_rows(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """Print what a site does: each replica's part, or once what they have in common."""
    *replicas, gateway = rows
    if as_json:
        plan = [{"server": row["server"], **step} for row in replicas for step in row["plan"]]
        restart = list(dict.fromkeys(key for row in replicas for key in row["restart"]))
        print_json({"plan": plan, "restart": restart, "gateway": gateway["taken"]})
        return
    for line in gateway["taken"]:
        print(f"the gateway takes {line}")
    parts = [(row["plan"], row["restart"]) for row in replicas]
    if all(part == parts[0] for part in parts):
        if any(parts[0]):
            print(f"each of {', '.join(row['server'] for row in replicas)}:")
            _print_plan(*parts[0], as_json=False)
        return
    for row in replicas:
        print(f"{row['server']}:")
        _print_plan(row["plan"], row["restart"], as_json=False)


def _find_file(file: Path | None, endpoint: Endpoint) -> tuple[Path, Record | None]:
    """Return the deploy.yaml that is meant, and the supervisor where it is one of ours.

    Raises:
        UsageError: there is none, or the server was not started from it.
    """
    from marwright.errors import UsageError
    from marwright.server.supervision.inspection import find_supervisor

    record = find_supervisor(endpoint)
    if file is None and Path(DEPLOYMENT_NAME).is_file():
        file = Path(DEPLOYMENT_NAME)
    if file is None and record is not None and record.config:
        file = Path(record.config)
    if file is None:
        raise UsageError(
            f"there is no {DEPLOYMENT_NAME} here", remedy="name one: marwright apply FILE"
        )
    if record is not None and record.config != str(file.resolve()):
        raise UsageError(
            f"the server {record.name} was not started from {file}",
            found=record.config or "a server that was started without a file",
            remedy=f"apply that one, or start another: marwright serve --deploy {file}",
        )
    return file, record


@partial(with_client, unless=_ask)
def apply(
    client: Client,
    file: Annotated[
        Path | None,
        typer.Argument(help="A deploy.yaml; ./deploy.yaml, or the server's own, if not given."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, and change nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a running server serve what a deploy.yaml says; do nothing where it does already.

    The plan is printed first. New versions get their workers before defaults move to them, and
    what is not in the file goes last. What cannot change while the server runs is named, and the
    exit status is then 1.
    """
    from marwright.server.change import hold_server, make_change, prepare_change

    path, record = _find_file(file, client.endpoint)
    if dry_run:
        _print_change(prepare_change(path, client), as_json=as_json)
        return
    with hold_server(client):
        change = prepare_change(path, client)
        _print_change(change, as_json=as_json)
        done: list[Step] = []

        def report(step: Step) -> None:
            done.append(step)
            say(f"done: {step.describe()}")

        try:
            make_change(change, client, report=report)
        except MarwrightError:
            for step in change.plan.steps[len(done) :]:
                say(f"not done: {step.describe()}")
            raise
    if record is not None:
        _look_anew(record)
    if change.restart:
        say("needs: marwright restart")
        raise typer.Exit(1)


def _look_anew(record: Record) -> None:
    """Have the supervisor see what was changed; say why the server is not ready, if it is not."""
    from marwright.server.supervision.inspection import look_anew

    try:
        status = look_anew(record)
    except MarwrightError as exc:  # the change itself is made
        say(f"not looked at yet: {exc}")
        return
    if not status["ready"]:
        lacking = [m for m in status["models"] if m["problem"]]
        reasons = [f"{m['name']} {m['version']}: {m['problem']}" for m in lacking]
        reasons = [*status["problems"], *reasons] or [f"the server is {status['phase']}"]
        say(f"not ready yet: {'; '.join(reasons)}")


def _print_change(change: Change, *, as_json: bool) -> None:
    _print_plan([step.to_json() for step in change.plan.steps], change.restart, as_json=as_json)


def _print_plan(plan: Sequence[dict[str, Any]], restart: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        print_json({"plan": list(plan), "restart": list(restart)})
        return
    if plan:
        print_table(
            ["step", "model", "version", "from", "to", "interrupts"],
            [
                [
                    step["kind"],
                    step["name"],
                    step["version"],
                    step["before"],
                    step["after"]
                    + (f"; meanwhile {step['meanwhile']}" if step["meanwhile"] else ""),
                    "yes" if step["interrupts"] else "",
                ]
                for step in plan
            ],
        )
    elif not restart:
        print(NOTHING)
    if restart:
        print("cannot change while the server runs:")
        for line in restart:
            print(f"  {line}")
