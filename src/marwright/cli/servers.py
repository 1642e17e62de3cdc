"""`marwright status`, `marwright stop`, `marwright restart`: the servers that run here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marwright.cli.options import Json
from marwright.cli.output import print_json, print_section, print_table, say

if TYPE_CHECKING:
    from marwright.server.registry import Record

__all__ = ["restart", "status", "stop"]

Name = Annotated[
    str | None, typer.Argument(help="The server's name; not needed where only one runs.")
]


def status(
    name: Annotated[
        str | None, typer.Argument(help="A server's name; all of them if not given.")
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Exit 0 where supervisor and Java run, 1 otherwise.")
    ] = False,
    ready: Annotated[
        bool,
        typer.Option(
            "--ready", help="Exit 0 where every wanted version has its workers and answers."
        ),
    ] = False,
    started: Annotated[
        bool, typer.Option("--started", help="Exit 0 where it was ready at least once.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the servers that run here: models, workers, memory, and what is wrong.

    Exit status 1 where none runs, a supervisor does not answer, or a question's answer is no.
    """
    from marwright.server.registry import find_record, hide_replicas, list_records
    from marwright.server.supervision.inspection import inspect_server

    records = [find_record(name)] if name else list(hide_replicas(list_records()).values())
    if not records:
        find_record()  # raises, and says what to do
    found = [_add_files(inspect_server(record)) for record in records]
    if as_json:
        print_json(found)
    else:
        for item in found:
            _print_server(item, several=len(found) > 1)
    asked = [key for key, on in (("live", live), ("ready", ready), ("started", started)) if on]
    lost = any(item["phase"] in {"abandoned", "hung"} for item in found)
    if lost or not all(item[key] for item in found for key in asked):
        raise typer.Exit(1)


def stop(
    name: Name = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that it may take.")] = 60.0,
) -> None:
    """Stop a server in order: it answers what it holds, and its processes and run folder go."""
    from marwright.server.supervision.inspection import stop_server

    record = _find(name)
    stop_server(record, timeout=timeout)
    say(f"stopped {record.name}")


def restart(
    name: Name = None,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds until every model must be ready again.")
    ] = 180.0,
) -> None:
    """Start a server again, with its configuration as it is now; return once it is ready.

    Of replicas behind a gateway one after the other; a server alone answers nobody meanwhile. What
    can change without that: marwright apply.
    """
    from marwright.server.deployment import Deployment
    from marwright.server.registry import list_replicas
    from marwright.server.supervision.inspection import restart_server

    record = _find(name)
    if record.config:
        Deployment.parse(Path(record.config))  # a mistake in it is said before anything is done
    seconds = restart_server(record, timeout=timeout)
    if replicas := len(list_replicas(record)):
        say(f"restarted {record.name}, {replicas} replicas in turn; it took {seconds:.1f} s")
    else:
        say(f"restarted {record.name}; it was away for {seconds:.1f} s")


def _find(name: str | None) -> Record:
    from marwright.server.registry import find_record

    return find_record(name)


def _add_files(item: dict[str, Any]) -> dict[str, Any]:
    """Add where the endpoint file is, and the key file that it names; also of an abandoned one."""
    from marwright.client import Endpoint
    from marwright.errors import NoServerError
    from marwright.server.registry import announce_folder

    link = announce_folder() / f"{item['name']}.json"
    try:
        key_file = Endpoint.read(link).key_file
    except NoServerError:  # it has none yet
        return item
    return {**item, "endpoint": str(link), "key_file": str(key_file or "")}


def _print_server(item: dict[str, Any], *, several: bool) -> None:
    if several:
        print(f"\n{item['name']}:")
    facts = {
        "server": item["name"],
        "state": item["phase"] + (", ready" if item["ready"] else ", not ready"),
        "supervisor": f"process {item['pid']}, since {item['since']}",
        "address": item.get("address") or "none yet",
        "endpoint": item.get("endpoint") or "none yet",
        "key file": item.get("key_file") or "none",
        "health": item["health_url"] or "none yet",
        "restarts": item.get("restarts", 0),
        "configuration": item["config"] or "the command line",
        "log": item.get("log") or "none yet",
    }
    print_table(["", ""], [[key, value] for key, value in facts.items()])
    rows = [
        [
            model["name"],
            model["version"],
            "yes" if model["default"] else "",
            f"{model['ready_workers']} of {model['workers']}",
            f"{model['memory_bytes'] >> 20} MiB",
            model["problem"] or "ready",
        ]
        for model in item["models"]
    ]
    headers = ["model", "version", "default", "workers", "memory", "state"]
    print_section("", headers, rows)
    _print_replicas(item.get("replicas", ()))
    for text in item["problems"]:
        say(f"problem: {text}")
    for text in item.get("differences", ()):
        say(f"difference: {text}")
    for model in item["models"]:
        if model["detail"]:
            say(f"{model['name']} {model['version']}:")
            say("\n".join(f"    {line}" for line in model["detail"].splitlines()))


def _print_replicas(replicas: Sequence[dict[str, Any]]) -> None:
    """Print the servers behind a site's gateway; nothing where it is no site."""
    if replicas:
        rows = [
            [one["name"], one["address"], one["restarts"], one["problem"] or "ready"]
            for one in replicas
        ]
        print_section("", ["replica", "address", "restarts", "state"], rows)
