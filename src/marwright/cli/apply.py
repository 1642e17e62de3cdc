"""`marwright apply`: a running server made as its deploy.yaml says."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marwright.cli.options import DEPLOYMENT_NAME, Json, with_client
from marwright.cli.output import print_json, print_table, say
from marwright.errors import MarwrightError

if TYPE_CHECKING:
    from marwright.client import Client
    from marwright.client.endpoint import Endpoint
    from marwright.server.change import Change
    from marwright.server.plan import Step
    from marwright.server.registry import Record

__all__ = ["apply"]

NOTHING = "nothing to do"


def _is_so(endpoint: Endpoint, file: Path | None, as_json: bool, **others: object) -> bool:
    """Say that there is nothing to do, where the supervisor knows it.

    It has everything loaded that judging takes: asking it halves the time of this command.
    """
    from marwright.server.supervision.inspection import is_current

    record = _find_file(file, endpoint)[1]
    if record is None or not is_current(record):
        return False
    if as_json:
        print_json({"plan": [], "restart": []})
    else:
        print(NOTHING)
    return True


def _find_file(file: Path | None, endpoint: Endpoint) -> tuple[Path, Record | None]:
    """Return the deploy.yaml that is meant, and the supervisor where it is one of ours.

    Raises:
        UsageError: there is none, or the server was not started from it.
    """
    from marwright.errors import UsageError
    from marwright.server.registry import list_records

    folder = str(endpoint.staging.parent) if endpoint.staging else None
    record = next((item for item in list_records().values() if item.run_folder == folder), None)
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


@partial(with_client, unless=_is_so)
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

    path, _ = _find_file(file, client.endpoint)
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
    if change.restart:
        say("needs: marwright restart")
        raise typer.Exit(1)


def _print_change(change: Change, *, as_json: bool) -> None:
    if as_json:
        steps = [step.to_json() for step in change.plan.steps]
        print_json({"plan": steps, "restart": list(change.restart)})
        return
    if change.plan:
        print_table(
            ["step", "model", "version", "from", "to", "interrupts"],
            [
                [
                    step.kind,
                    step.name,
                    step.version,
                    step.before,
                    step.after + (f"; meanwhile {step.meanwhile}" if step.meanwhile else ""),
                    "yes" if step.interrupts else "",
                ]
                for step in change.plan.steps
            ],
        )
    elif not change.restart:
        print(NOTHING)
    if change.restart:
        print("cannot change while the server runs:")
        for line in change.restart:
            print(f"  {line}")
