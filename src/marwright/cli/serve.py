"""`marwright serve`: a TorchServe and its supervisor, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marwright.cli.options import Json
from marwright.cli.output import print_json, print_table, say
from marwright.errors import UsageError

if TYPE_CHECKING:
    from marwright.server import TorchServe
    from marwright.server.deployment import Deployment

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
    path = _find_deploy(deploy, bool(archives), config)
    changes = {
        "name": name,
        "store": store and store.resolve(),
        "models": [{"archive": _find_in_store(item, store)} for item in archives or ()] or None,
        "ports": "free" if free_ports else None,
        "logging.folder": logs and logs.resolve(),
        "policy": policy and policy.resolve(),
        "eager_batches": False if wait_for_batches else None,
        "tls": "development" if tls else None,
        "supervision.start_timeout": timeout,
    }
    config = config or (Path("config.properties") if not path else None)

    def reread() -> Deployment:
        return _read_deployment(path, config, changes, strict=True)

    deployment = _read_deployment(path, config, changes, say_note=say, strict=bool(archives))
    if check:
        _check(deployment, as_json=as_json)
        return
    if detach:
        from marwright.cli.detach import start_detached

        start_detached(as_json=as_json, timeout=deployment.supervision.start_timeout + 60)
        return
    _run(deployment, path, reread, as_json=as_json)


def _run(
    deployment: Deployment, path: Path | None, reread: Callable[[], Deployment], *, as_json: bool
) -> None:
    """Supervise in this process."""
    from marwright.server.process import hide_environment
    from marwright.server.supervisor import Supervisor

    hide_environment()

    def show(server: TorchServe, name: str, adopted: bool) -> None:
        _print_ready(server, name, adopted=adopted, as_json=as_json)

    supervisor = Supervisor(
        deployment, path, reread=reread, tell=None if as_json else say, serving=show
    )
    say("starting TorchServe")
    try:
        supervisor.run()
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C and SIGTERM: how it is meant to end
        say("stopped")


def _find_deploy(deploy: Path | None, named: bool, config: Path | None) -> Path | None:
    """Return the deploy.yaml that is meant, if any."""
    from marwright.server.deployment import DEPLOYMENT_NAME

    if deploy is not None:
        if config is not None:
            raise UsageError(
                "--deploy and --config exclude each other",
                remedy="import it once: marwright config import config.properties",
            )
        return deploy
    here = Path(DEPLOYMENT_NAME)
    return here if here.is_file() and not named and config is None else None


def _read_deployment(
    path: Path | None,
    config: Path | None,
    changes: dict[str, Any],
    *,
    say_note: Callable[[str], None] = lambda text: None,
    strict: bool,
) -> Deployment:
    """Return what is to be served: a file, and over it what the command line says.

    Unless `strict`, an archive that is missing or broken is no reason not to serve the others: the
    supervisor names it.
    """
    from marwright.server.deployment import Deployment
    from marwright.server.wanted import list_wanted

    if path is not None:
        deployment = Deployment.read(path) if strict else _read_sound(path)
    elif config is not None and config.is_file():
        deployment = _read_properties(config, say_note)
    elif config is not None and config != Path("config.properties"):
        raise UsageError(f"there is no {config}", remedy="check --config")
    else:
        deployment = Deployment(store=Path("model_store").resolve())
    given = {key: value for key, value in changes.items() if value is not None}
    if given:
        deployment = _change(deployment, given)
    if strict and path is None:
        list_wanted(deployment)
    return deployment


def _read_sound(path: Path) -> Deployment:
    """Return a deploy.yaml in which nothing but single archives may be wrong."""
    from marwright.server.deployment import REMEDY, Deployment
    from marwright.server.examination import examine

    deployment, document = Deployment.parse(path)
    problems = examine(deployment, document)
    document.refuse(
        [problem for problem in problems if not problem.where.startswith("models")], remedy=REMEDY
    )
    return deployment


def _change(deployment: Deployment, changes: dict[str, Any]) -> Deployment:
    """Return the deployment with some values in place of its own, by dotted keys."""
    values = deployment.model_dump(mode="json", exclude_unset=True)
    values["store"] = str(deployment.store)  # where unsaid, it starts in the file's folder too
    for key, value in changes.items():
        section, _, field = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[field] = value
    return type(deployment).model_validate(values)


def _read_properties(config: Path, say_note: Callable[[str], None]) -> Deployment:
    """Return what a config.properties amounts to here; say what of it is not used."""
    from marwright.server.conversion import import_properties
    from marwright.server.properties import read_properties

    deployment, notes = import_properties(config)
    given = read_properties(config)
    for key in sorted(given.keys() & set(OVERRIDDEN)):
        say_note(f"note: {key} of {config} is not used: {OVERRIDDEN[key]}")
    for note in notes:
        say_note(f"note: {config}: {note}")
    return deployment.model_copy(update={"store": Path("model_store").resolve(), "models": None})


def _check(deployment: Deployment, *, as_json: bool) -> None:
    """Print what would keep the server from starting; exit 1 where anything would."""
    from marwright.server.examination import examine
    from marwright.server.java import find_java

    find_java()
    problems = examine(deployment, starting=True)
    if as_json:
        print_json([{"where": item.where, "problem": item.found} for item in problems])
    else:
        for item in problems:
            say(str(item))
        say("it could start" if not problems else f"{len(problems)} problems")
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


def _print_ready(server: TorchServe, name: str, *, adopted: bool, as_json: bool) -> None:
    endpoint = server.endpoint
    facts = {
        "server": name,
        "inference": endpoint.inference_url,
        "management": endpoint.management_url,
        "metrics": endpoint.metrics_url,
        "health": server.health_url,
        "key_file": endpoint.key_file,
        "log": server.log_file,
        "policy": endpoint.policy or "none",
        "adopted": adopted,
        "ready_seconds": round(server.ready_seconds, 2),
    }
    if as_json:
        print(json.dumps(facts, default=str), flush=True)
        return
    shown = {key: value for key, value in facts.items() if key != "adopted"}
    print_table(["", ""], [[key.replace("_", " "), value] for key, value in shown.items()])
    models = server.client.models
    defaults = {model.name: models.describe(model.name).version for model in models.list()}
    versions = [
        [name, item.version, "yes" if item.version == default else "", item.ready_workers]
        for name, default in defaults.items()
        for item in models.versions(name)
    ]
    print_table(["model", "version", "default", "ready workers"], versions)
    say(f"{'adopted; ' if adopted else ''}serving; Ctrl-C or SIGTERM stops")
