"""`marwright store`: archives that are kept under the names of their content."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marwright.cli.options import Json
from marwright.cli.options import Store as StoreOption
from marwright.cli.output import print_json, print_table, say
from marwright.errors import ClientError

if TYPE_CHECKING:
    from marwright.archive.store import Stored

__all__ = ["app"]

app = typer.Typer(
    help="Keep archives under names that say their content; list, add, remove, tidy up.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

MODEL_STORE = Path("model_store")


@app.command("list")
def list_archives(
    store: StoreOption = MODEL_STORE,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every archive, and tell which are damaged.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List what is stored, the newest of each model first.

    `names` are the plain names with the same content; `served by` the servers of `marwright serve`
    that have this version. Exit 1 where --verify finds a damaged archive.
    """
    from marwright.archive.store import Store

    opened = Store(store)
    try:
        served = _find_served(store)
    except ClientError as exc:
        say(f"note: a server of this store does not answer: {exc}")
        served = {}
    rows = []
    for item in opened.list():
        state = {"state": "whole" if item.is_whole() else "damaged"} if verify else {}
        servers = served.get((item.model, item.version), [])
        rows.append(_describe(item, served_by=servers, **state))
    _print(rows, as_json=as_json)
    for name, copy in opened.list_plain().items():
        if copy is None:
            say(f"note: {name} is not stored: marwright store add {store / name}")
    if any(row.get("state") == "damaged" for row in rows):
        raise typer.Exit(1)


@app.command("add")
def add_archive(
    archive: Annotated[
        str, typer.Argument(help="A .mar or .tar.gz file; or what is stored, to go back to it.")
    ],
    name: Annotated[
        str | None, typer.Option("--as", help="Plain name in the store; MODEL.mar if not given.")
    ] = None,
    store: StoreOption = MODEL_STORE,
    force: Annotated[
        bool, typer.Option("--force", help="Also over another model's plain name.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Store an archive, and let its plain name be a copy of it.

    What had that name before is stored too. With the key of what is stored, such as 0123456789ab,
    the plain name goes back to that.
    """
    from marwright.archive.store import Store

    opened = Store(store)
    path = Path(archive)
    if path.parent == Path() and not path.exists():
        path = opened.find(archive).path
    _print([_describe(opened.add(path, name=name, force=force))], as_json=as_json)


@app.command("remove")
def remove_archive(
    key: Annotated[
        str,
        typer.Argument(help="File name, MODEL-VERSION or key of what is stored; or a plain name."),
    ],
    store: StoreOption = MODEL_STORE,
    force: Annotated[
        bool, typer.Option("--force", help="Also the last of its model, or what is in use.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove an archive, or a plain name whose content is stored.

    Refused for what a plain name has the content of, the last archive of a model, and what a
    server of `marwright serve` has registered.
    """
    from marwright.archive.store import Store

    in_use = {} if force else _find_served(store)
    removed = Store(store).remove(key, in_use=in_use, force=force)
    if as_json:
        print_json({"removed": removed})
    else:
        print_table(["removed"], [[removed]])


@app.command("gc")
def collect_garbage(
    keep: Annotated[int, typer.Option(min=1, help="Archives of each model to keep.")],
    store: StoreOption = MODEL_STORE,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be removed, and leave it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove all but the newest archives of each model; print what is gone.

    What a plain name has the content of stays, and so does every version that a server of
    `marwright serve` has registered.
    """
    from marwright.archive.store import Store

    surplus = Store(store).gc(keep=keep, in_use=_find_served(store), dry_run=dry_run)
    _print([_describe(item) for item in surplus], as_json=as_json)


def _find_served(store: Path) -> dict[tuple[str, str], list[str]]:
    """Return the running servers of a store by the (model, version) that they have.

    Raises:
        ClientError: one does not answer.
    """
    from marwright.client import Client
    from marwright.server.registry import list_servers

    served: dict[tuple[str, str], list[str]] = {}
    for name, endpoint in list_servers().items():
        if endpoint.model_store is None or endpoint.model_store.resolve() != store.resolve():
            continue
        with Client(endpoint) as client:
            for model in client.models.list():
                for version in client.models.versions(model.name):
                    served.setdefault((version.name, version.version), []).append(name)
    return served


def _describe(item: Stored, **more: Any) -> dict[str, Any]:
    return {**item.to_json(), **more}


def _print(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    headers = ["model", "version", "key", "bytes", "added", "names", "signed"]
    optional = [key for key in ("served_by", "state") if any(row.get(key) for row in rows)]
    print_table(
        [*headers, *(key.replace("_", " ") for key in optional)],
        [
            [
                row["model"],
                row["version"],
                row["key"],
                f"{row['size_bytes']:,}",
                datetime.fromtimestamp(row["added"]).strftime("%Y-%m-%d %H:%M"),
                _join(row["names"]),
                "yes" if row["signed"] else "",
                *(_join(row[key]) for key in optional),
            ]
            for row in rows
        ],
    )


def _join(value: Any) -> str:
    return value if isinstance(value, str) else ", ".join(value)
