"""`marwright config`: what a deploy.yaml says, means and becomes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marwright.cli.options import Json
from marwright.cli.output import print_json, print_table, say
from marwright.errors import UsageError
from marwright.server.registry import DEPLOYMENT_NAME

if TYPE_CHECKING:
    from marwright.archive.document import Document
    from marwright.server.deployment import Deployment

__all__ = ["app"]

app = typer.Typer(
    help="Check, explain, render and import the configuration of a server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Deploy = Annotated[
    Path | None,
    typer.Option(help="A deploy.yaml; ./deploy.yaml where there is one, else the defaults."),
]


@app.command("check")
def check_file(
    file: Annotated[Path, typer.Argument(help="A deploy.yaml.")] = Path("deploy.yaml"),
    starting: Annotated[
        bool, typer.Option("--starting", help="Also whether its ports are free.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Name everything that is wrong in a deploy.yaml at once; start and change nothing."""
    from marwright.server.deployment import Deployment
    from marwright.server.wanted import list_wanted

    deployment = Deployment.read(file, starting=starting)
    wanted = list_wanted(deployment)
    rows = [
        [item.name, item.version, "yes" if item.default else "", item.workers, item.path.name]
        for item in wanted
    ]
    headers = ["model", "version", "default", "workers", "archive"]
    if as_json:
        print_json([dict(zip(headers, row, strict=True)) for row in rows])
        return
    print_table(headers, rows)
    say(f"{file} can be used")


@app.command("explain")
def explain_key(
    key: Annotated[
        str,
        typer.Argument(
            help="limits.queue, models[].workers, models.cnn.mar.workers ..., or a key of"
            " config.properties."
        ),
    ],
    deploy: Deploy = None,
    as_json: Json = False,
) -> None:
    """Say what a key does, which value it has, and where that came from."""
    from marwright.server.explanation import explain

    found = explain(key, *_read(deploy))
    if as_json:
        print_json(asdict(found))
        return
    facts = {
        "key": found.key,
        "does": found.does,
        "takes": found.takes,
        "default": found.default or "nothing",
        "value": found.value or "nothing",
        "comes from": found.origin,
        "becomes": "; ".join(found.becomes) or "nothing of TorchServe's",
    }
    print_table(["", ""], [[name, value] for name, value in facts.items()])


@app.command("show")
def show_values(deploy: Deploy = None, as_json: Json = False) -> None:
    """Print every key with its value, and where that came from."""
    from marwright.server.explanation import list_explanations

    found = list_explanations(*_read(deploy))
    if as_json:
        print_json([asdict(item) for item in found])
        return
    print_table(
        ["key", "value", "comes from"], [[item.key, item.value, item.origin] for item in found]
    )


@app.command("render")
def render_file(deploy: Deploy = None) -> None:
    """Print the config.properties that TorchServe gets; only a start adds its own folders."""
    from marwright.server.properties import render_properties
    from marwright.server.rendering import render_deployment, render_models
    from marwright.server.wanted import list_wanted

    deployment, _ = _read(deploy)
    wanted = list_wanted(deployment) if deployment.store.is_dir() else []
    files = {item.key: item.path.name for item in wanted}
    properties = {**render_deployment(deployment), **render_models(wanted, files)}
    print(render_properties(properties), end="")


@app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(help="A config.properties.")],
    out: Annotated[Path, typer.Option(help="Where the deploy.yaml goes.")] = Path("deploy.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write the deploy.yaml that a config.properties amounts to, and say what is not kept."""
    from marwright.server.conversion import import_properties

    if out.exists() and not force:
        raise UsageError(f"{out} exists", remedy="pass --out, or --force to replace it")
    deployment, notes = import_properties(file)
    deployment.write(out)
    for note in notes:
        say(f"note: {note}")
    print(out)


def _read(path: Path | None) -> tuple[Deployment, Document | None]:
    """Return the deployment of a file, or that of none, and the file's lines."""
    from marwright.server.deployment import Deployment

    if path is None and not Path(DEPLOYMENT_NAME).is_file():
        return Deployment(), None
    return Deployment.parse(path or Path(DEPLOYMENT_NAME))
