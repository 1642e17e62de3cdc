"""`marwright models`: the management API's models and versions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marwright.cli.options import Json, check_workers, with_client
from marwright.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from marwright.client import Client, ModelVersion
    from marwright.client.endpoint import Endpoint

__all__ = ["app"]

app = typer.Typer(
    help="List, show, register, scale, switch and unregister models.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(help="Model name.")]
Version = Annotated[str, typer.Argument(help="Model version.")]


def _refuse_site(endpoint: Endpoint, **others: object) -> bool:
    """Refuse to change one of several replicas alone, where a site is meant."""
    from marwright.errors import UsageError
    from marwright.server.registry import list_replicas
    from marwright.server.supervision.inspection import find_supervisor

    record = find_supervisor(endpoint)
    replicas = list_replicas(record) if record else []
    if record is not None and len(replicas) > 1:
        raise UsageError(
            f"{record.name} has {len(replicas)} replicas, and this would change one of them",
            remedy="change deploy.yaml, and: marwright apply;"
            f" or mean one: --server {replicas[0].name}",
        )
    return False


@app.command("list")
@with_client
def list_models(
    client: Client,
    as_json: Json = False,
) -> None:
    """List models with their versions."""
    models: list[dict[str, Any]] = []
    for summary in client.models.list():
        default = client.models.describe(summary.name)
        versions = client.models.versions(summary.name)
        models.append(
            {
                "model": summary.name,
                "default": default.version,
                "versions": [version.version for version in versions],
                "archives": [version.archive for version in versions],
                "ready_workers": [version.ready_workers for version in versions],
            }
        )
    if as_json:
        print_json(models)
        return
    print_table(
        ["model", "default", "versions", "archives", "ready workers"],
        [
            [
                model["model"],
                model["default"],
                *(
                    ", ".join(str(value) for value in model[key])
                    for key in ("versions", "archives", "ready_workers")
                ),
            ]
            for model in models
        ],
    )


@app.command("show")
@with_client
def show_model(
    client: Client,
    name: Name,
    as_json: Json = False,
) -> None:
    """Show the versions of a model and their workers."""
    default = client.models.describe(name).version
    _print_versions(client.models.versions(name), default, as_json=as_json)


@app.command("register")
@partial(with_client, unless=_refuse_site)
def register_model(
    client: Client,
    archive: Annotated[
        Path, typer.Argument(help="A .mar file, copied into the store; or one that is there.")
    ],
    workers: Annotated[int, typer.Option(min=1, help="Workers to start.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Also more workers than fit.")] = False,
    store: Annotated[
        Path | None, typer.Option(help="The server's store, where the server is not one of ours.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Register an archive that the server's policy admits, and wait for its workers.

    A new version of a known model does not become the default: see `models default`.
    """
    from marwright.server import register

    check_workers(workers, force=force)
    version = register(client, archive, workers=workers, store=store)
    default = client.models.describe(version.name).version
    _print_versions([version], default, as_json=as_json)


@app.command("scale")
@partial(with_client, unless=_refuse_site)
def scale_model(
    client: Client,
    name: Name,
    workers: Annotated[int, typer.Argument(min=0, help="Workers the version shall have.")],
    version: Annotated[str | None, typer.Option(help="Version; the default if not given.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Also more workers than fit.")] = False,
    as_json: Json = False,
) -> None:
    """Set how many workers a version has."""
    check_workers(workers, force=force)
    scaled = client.models.scale(name, workers, version=version)
    default = client.models.describe(name).version
    _print_versions([scaled], default, as_json=as_json)
    _warn_of_deployment(client.endpoint)


@app.command("default")
@partial(with_client, unless=_refuse_site)
def set_default(
    client: Client,
    name: Name,
    version: Version,
    as_json: Json = False,
) -> None:
    """Make a version the one that answers where none is named.

    It must have a READY worker; TorchServe itself does not ask.
    """
    before = client.models.describe(name).version
    client.models.set_default(name, version)
    if as_json:
        print_json({"model": name, "before": before, "default": version})
    else:
        print_table(["model", "before", "default"], [[name, before, version]])
    _warn_of_deployment(client.endpoint)


@app.command("unregister")
@partial(with_client, unless=_refuse_site)
def unregister_model(
    client: Client,
    name: Name,
    version: Version,
    as_json: Json = False,
) -> None:
    """Remove one version; its archive stays in the store."""
    client.models.unregister(name, version)
    if as_json:
        print_json({"model": name, "unregistered": version})
    else:
        print_table(["model", "unregistered"], [[name, version]])
    _warn_of_deployment(client.endpoint)


def _warn_of_deployment(endpoint: Endpoint) -> None:
    """Say where a server is not any more as the deploy.yaml says that it was started from."""
    from marwright.errors import MarwrightError
    from marwright.server.supervision.inspection import find_supervisor, look_anew

    record = find_supervisor(endpoint)
    if record is None or not record.config:
        return
    try:
        status = look_anew(record)
    except MarwrightError as exc:  # what was asked for is done
        say(f"warning: {exc}")
        return
    for difference in status["differences"]:
        say(f"warning: not as {record.config} says: {difference}")
    if status["differences"]:
        lasting = "" if status["ready"] else ", and until then the server is not ready"
        say(f"warning: marwright apply undoes this unless that file is changed{lasting}")


def _print_versions(versions: Sequence[ModelVersion], default: str, *, as_json: bool) -> None:
    if as_json:
        print_json(
            [{**asdict(version), "default": version.version == default} for version in versions]
        )
        return
    print_table(
        ["model", "version", "default", "archive", "batch size", "workers", "ready", "pids"],
        [
            [
                version.name,
                version.version,
                "yes" if version.version == default else "",
                version.archive,
                version.batch_size,
                len(version.workers),
                version.ready_workers,
                ", ".join(str(worker.pid) for worker in version.workers),
            ]
            for version in versions
        ],
    )
