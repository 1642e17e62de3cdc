"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from marwright.client import Client

__all__ = ["Json", "Store", "with_client"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Store = Annotated[Path, typer.Option(help="Folder of archives.")]


def with_client(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that name a server, and call it with a client of that server.

    The command takes the client as its first parameter; Typer sees the options in its place.
    """
    _client, *own = _list_parameters(command)
    connection = _list_parameters(_connect)
    arguments = [parameter for parameter in own if parameter.name != "as_json"]
    last = [parameter for parameter in own if parameter.name == "as_json"]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        choice = {parameter.name: values.pop(parameter.name) for parameter in connection}
        with _connect(**choice) as client:
            command(client, **values)

    parameters = [*arguments, *connection, *last]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by Typer
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__  # Typer would look through it
    return run


def _list_parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return a function's parameters with their annotations evaluated, as Typer needs them."""
    hints = get_type_hints(function, localns={"Client": Any}, include_extras=True)
    return [
        parameter.replace(annotation=hints[parameter.name], kind=parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(function).parameters.values()
    ]


def _connect(
    *,
    server: Annotated[
        str | None,
        typer.Option(
            envvar="MARWRIGHT_SERVER",
            help="Name of a server started by `marwright serve`; not needed where only one runs.",
        ),
    ] = None,
    inference_url: Annotated[
        str | None,
        typer.Option(help="Address of another TorchServe, such as http://127.0.0.1:8080."),
    ] = None,
    management_url: Annotated[
        str | None, typer.Option(help="Its management address, such as http://127.0.0.1:8081.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="Its key_file.json, where tokens are on.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for an answer.")] = 30.0,
) -> Client:
    """Return a client of the server that the options name, or of the only one that runs here."""
    from marwright.client import Client, Endpoint
    from marwright.errors import UsageError
    from marwright.server.registry import find_endpoint

    if inference_url is None and management_url is None:
        if key_file is not None:
            raise UsageError("--key-file goes with --inference-url or --management-url")
        return Client(find_endpoint(server), timeout=timeout)
    if server is not None:
        raise UsageError("--server and addresses exclude each other", remedy="pass one of them")
    endpoint = Endpoint(
        inference_url=inference_url or "http://127.0.0.1:8080",
        management_url=management_url or "http://127.0.0.1:8081",
        key_file=key_file,
    )
    return Client(endpoint, timeout=timeout)
