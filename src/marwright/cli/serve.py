"""`marwright serve`: a TorchServe in the foreground, until Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marwright.cli.options import Json, Store
from marwright.cli.output import print_table, say
from marwright.errors import UsageError

if TYPE_CHECKING:
    from marwright.server import TorchServe

__all__ = ["serve"]

OVERRIDDEN = {
    "load_models": "name the archives on the command line",
    "model_store": "pass --store",
    "workflow_store": "an empty private folder is used",
}
"""Keys of a config.properties that the command line decides."""


def serve(
    archives: Annotated[
        list[str] | None,
        typer.Argument(help="Archives in the store to load; all of them where none is named."),
    ] = None,
    store: Store = Path("model_store"),
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
        Path | None, typer.Option(help="Folder for the server's log; kept when it stops.")
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
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds until every model must be READY.")
    ] = 120.0,
    as_json: Json = False,
) -> None:
    """Serve archives in the foreground, until Ctrl-C.

    Ctrl-C or SIGTERM stops the server and everything it started. Of several versions of a model
    the lowest is the default, unless archives are named: then the first.
    """
    from marwright.archive.policy import Policy
    from marwright.server import Ports, TorchServe
    from marwright.server.properties import DEFAULTS, read_properties
    from marwright.server.registry import announce, check_name
    from marwright.server.torchserve import list_archives

    if config is None and Path("config.properties").is_file():
        config = Path("config.properties")
    given = read_properties(config) if config else {}
    properties = {**DEFAULTS, **given}
    if name is not None:
        check_name(name)
    names = [_find_in_store(archive, store) for archive in archives or ()] or list_archives(store)
    server = TorchServe(
        store,
        models=names,
        properties=properties,
        ports=None if free_ports else Ports.from_properties(properties),
        policy=Policy.read(policy) if policy else None,
        eager_batches=not wait_for_batches,
        timeout=timeout,
        logs=logs,
    )
    for key in sorted(given.keys() & set(OVERRIDDEN)):
        say(f"note: {key} of {config} is not used: {OVERRIDDEN[key]}")
    for key, value in Ports.from_properties(properties).to_properties().items():
        if key.endswith("_address") and given.get(key, value) != value:
            say(f"note: {key} of {config} is not used: the server listens on loopback, at {value}")
    say(f"starting TorchServe with {', '.join(names) or 'no models'}")
    with server:
        name = name or server.endpoint.inference_url.rsplit(":", 1)[1]
        with announce(name, server.run_folder):
            _print_ready(server, name, as_json=as_json)
            try:
                status = server.wait()
            except (KeyboardInterrupt, SystemExit):  # Ctrl-C and SIGTERM: how it is meant to end
                say("stopping")
                return
            raise server.describe_death(status)


def _find_in_store(archive: str, store: Path) -> str:
    """Return an archive's file name in the store; it may be given as a name or as a path."""
    path = Path(archive)
    if path.parent != Path() and path.parent.resolve() != store.resolve():
        raise UsageError(
            f"{archive} is not in the store {store}",
            remedy=f"pass --store {path.parent}, or register it with the running server",
        )
    return path.name


def _print_ready(server: TorchServe, name: str, *, as_json: bool) -> None:
    endpoint = server.endpoint
    facts = {
        "server": name,
        "inference": endpoint.inference_url,
        "management": endpoint.management_url,
        "metrics": endpoint.metrics_url,
        "key_file": endpoint.key_file,
        "log": server.log_file,
        "policy": endpoint.policy or "none",
        "ready_seconds": round(server.ready_seconds, 2),
    }
    if as_json:
        print(json.dumps(facts, default=str), flush=True)
        return
    print_table(["", ""], [[key.replace("_", " "), value] for key, value in facts.items()])
    models = server.client.models
    defaults = {model.name: models.describe(model.name).version for model in models.list()}
    versions = [
        [name, item.version, "yes" if item.version == default else "", item.ready_workers]
        for name, default in defaults.items()
        for item in models.versions(name)
    ]
    print_table(["model", "version", "default", "ready workers"], versions)
    say("serving; Ctrl-C or SIGTERM stops")
