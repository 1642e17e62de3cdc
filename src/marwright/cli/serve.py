"""`marwright serve`: a TorchServe and its supervisor, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marwright.cli.configuration import Configuration, find_configuration
from marwright.cli.options import Json
from marwright.cli.output import print_json, print_table, say
from marwright.errors import UsageError

if TYPE_CHECKING:
    from marwright.client.endpoint import Endpoint
    from marwright.server.deployment import Deployment

__all__ = ["print_facts", "serve"]


def serve(
    archives: Annotated[
        list[str] | None,
        typer.Argument(help="Archives in the store to load; all of them where none is named."),
    ] = None,
    deploy: Annotated[
        Path | None,
        typer.Option(
            help="A deploy.yaml; ./deploy.yaml where there is one and no archive is named."
        ),
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Folder of archives; model_store if not given.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A config.properties; ./config.properties where there is one."),
    ] = None,
    free_ports: Annotated[
        bool, typer.Option("--free-ports", help="Choose free ports, not the configured ones.")
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(help="How other commands find it; the inference port if not given."),
    ] = None,
    logs: Annotated[
        Path | None, typer.Option(help="Folder for the server's logs; kept when it stops.")
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            help="Which archives may be loaded; marwright-policy.yaml of the store if any."
        ),
    ] = None,
    wait_for_batches: Annotated[
        bool,
        typer.Option(
            "--wait-for-batches",
            help="Let requests wait maxBatchDelay milliseconds for company, as TorchServe does.",
        ),
    ] = False,
    gateway: Annotated[
        bool,
        typer.Option(
            "--gateway", help="Put nginx in front, which a release can split traffic with."
        ),
    ] = False,
    tls: Annotated[
        bool, typer.Option("--tls", help="Encrypt, with a certificate made for this start.")
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds until every model must be READY; 120 if not given."),
    ] = None,
    detach: Annotated[
        bool,
        typer.Option("--detach", help="Return once it is ready; it goes on in the background."),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only look whether it could start; print why not.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Serve archives, and watch over the server, until Ctrl-C or SIGTERM.

    A server that fails is started again; one whose supervisor was killed is adopted. SIGHUP reads
    the configuration again. Of several versions of a model the lowest is the default, unless
    archives are named: then the first; or deploy.yaml says so.
    """
    from marwright.server.registry import check_form

    if name is not None:
        check_form(name)
    changes = {
        "name": name,
        "store": store and store.resolve(),
        "models": [{"archive": _find_in_store(item, store)} for item in archives or ()] or None,
        "ports": "free" if free_ports else None,
        "logging.folder": logs and logs.resolve(),
        "policy": policy and policy.resolve(),
        "eager_batches": False if wait_for_batches else None,
        "gateway": True if gateway else None,
        "tls": "development" if tls else None,
        "supervision.start_timeout": timeout,
    }
    configuration = find_configuration(deploy, config, changes)
    if check:
        _check(configuration, as_json=as_json)
        return
    deployment = configuration.read(strict=bool(archives), say_note=say)
    if deployment.servers is not None:
        raise UsageError(
            "this deploy.yaml names servers that run elsewhere",
            remedy=f"release to them: marwright release ARCHIVE --to {configuration.deploy}",
        )
    if detach:
        from marwright.cli.detach import start_detached

        start_detached(as_json=as_json, timeout=deployment.supervision.start_timeout + 60)
        return
    _run(deployment, configuration, as_json=as_json)


def _run(deployment: Deployment, configuration: Configuration, *, as_json: bool) -> None:
    """Supervise in this process."""
    from marwright.gateway.site import Site
    from marwright.server.process import hide_environment
    from marwright.server.supervision.supervisor import Supervisor

    hide_environment()

    is_told = True

    def show(endpoint: Endpoint, name: str, seconds: float, adopted: bool) -> None:
        nonlocal is_told
        is_told = not as_json  # a program reads on; what it must know is in the status
        _print_ready(endpoint, name, seconds, adopted=adopted, as_json=as_json)

    def tell(text: str) -> None:
        if is_told:
            say(text)

    supervisor = (Site if deployment.gateway else Supervisor)(
        deployment,
        configuration.deploy,
        reread=lambda: configuration.read(strict=True),
        tell=tell,
        serving=show,
    )
    say("starting nginx and TorchServe" if deployment.gateway else "starting TorchServe")
    try:
        supervisor.run()
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C and SIGTERM: how it is meant to end
        say("stopped")


def _check(configuration: Configuration, *, as_json: bool) -> None:
    """Print what would keep the server from starting; exit 1 where anything would."""
    from marwright.server.java import find_java

    find_java()
    problems = configuration.list_problems(say)
    if as_json:
        print_json(
            [{"line": item.line, "where": item.where, "problem": item.found} for item in problems]
        )
    else:
        for item in problems:
            say(f"{configuration.deploy}:{item.line}: {item}" if item.line else str(item))
        say("it could start" if not problems else f"problems: {len(problems)}")
    if problems:
        raise typer.Exit(1)


def _find_in_store(archive: str, store: Path | None) -> str:
    """Return an archive's file name in the store; it may be given as a name or as a path."""
    path, store = Path(archive), store or Path("model_store")
    if path.parent != Path() and path.parent.resolve() != store.resolve():
        raise UsageError(
            f"{archive} is not in the store {store}",
            remedy=f"pass --store {path.parent}, or register it with the running server",
        )
    return path.name


def print_facts(facts: Mapping[str, object]) -> None:
    """Print where a server that is up listens, and what else belongs to it."""
    shown = {key: value for key, value in facts.items() if key != "adopted"}
    print_table(["", ""], [[key.replace("_", " "), value] for key, value in shown.items()])


def _print_ready(
    endpoint: Endpoint, name: str, seconds: float, *, adopted: bool, as_json: bool
) -> None:
    from marwright.server.registry import announce_folder

    facts = {
        "server": name,
        "endpoint": announce_folder() / f"{name}.json",
        "inference": endpoint.inference_url,
        "management": endpoint.management_url,
        "metrics": endpoint.metrics_url,
        "health": endpoint.health_url,
        "key_file": endpoint.key_file,
        "log": endpoint.log_file,
        "policy": endpoint.policy or "none",
        "adopted": adopted,
        "ready_seconds": round(seconds, 2),
    }
    if as_json:
        print(json.dumps(facts, default=str), flush=True)
        return
    from marwright.client import Client

    print_facts(facts)
    with Client(endpoint) as client:
        models = client.models
        defaults = {model.name: models.describe(model.name).version for model in models.list()}
        versions = [
            [name, item.version, "yes" if item.version == default else "", item.ready_workers]
            for name, default in defaults.items()
            for item in models.versions(name)
        ]
    print_table(["model", "version", "default", "ready workers"], versions)
    say(f"{'adopted; ' if adopted else ''}serving; Ctrl-C or SIGTERM stops")
