"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from marwright.client.endpoint import Endpoint

__all__ = [
    "check_workers",
    "Json",
    "Samples",
    "Server",
    "Store",
    "Trial",
    "TrialSeconds",
    "with_client",
]

WORKERS_PER_CORE = 4
"""More of them only wait for one another."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Store = Annotated[Path, typer.Option(help="Folder of archives.")]
Trial = Annotated[
    bool,
    typer.Option(
        "--preflight/--no-preflight", help="Try the archive as a worker would, before writing."
    ),
]
Server = Annotated[
    str | None,
    typer.Option(
        envvar="MARWRIGHT_SERVER",
        help="Name of a server started by `marwright serve`; not needed where only one runs.",
    ),
]
Samples = Annotated[
    list[Path] | None, typer.Option("--sample", help="A request to try; may be repeated.")
]
TrialSeconds = Annotated[
    float, typer.Option("--timeout", min=1, help="Seconds until a handler that hangs is a finding.")
]


def with_client(
    command: Callable[..., None], *, unless: Callable[..., bool] = lambda endpoint, **values: False
) -> Callable[..., None]:
    """Give a command the options that name a server, and call it with a client of that server.

    The command takes the client as its first parameter; Typer sees the options in its place.
    `unless` takes the endpoint in its place, and may have done all before a client is made.
    """
    _client, *own = _list_parameters(command)
    connection = _list_parameters(_connect)
    arguments = [parameter for parameter in own if parameter.name != "as_json"]
    last = [parameter for parameter in own if parameter.name == "as_json"]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        choice = {parameter.name: values.pop(parameter.name) for parameter in connection}
        endpoint, timeouts = _connect(**choice)
        if unless(endpoint, **values):
            return
        from marwright.client import Client

        with Client(endpoint, **timeouts) as client:
            command(client, **values)

    parameters = [*arguments, *connection, *last]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by Typer
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__  # Typer would look through it
    return run


def _list_parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return a function's parameters with their annotations evaluated, as Typer needs them."""
    hints = get_type_hints(function, localns={"Client": Any, "Endpoint": Any}, include_extras=True)
    return [
        parameter.replace(annotation=hints[parameter.name], kind=parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(function).parameters.values()
    ]


def _connect(
    *,
    server: Server = None,
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
    timeout: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="Seconds to wait; 30 for an answer, 300 for workers where not given."
        ),
    ] = None,
) -> tuple[Endpoint, dict[str, Any]]:
    """Return the server that the options name, or the only one that runs here, and timeouts."""
    from marwright.client.endpoint import Endpoint
    from marwright.errors import UsageError
    from marwright.server.registry import find_endpoint

    timeouts = {"timeout": timeout or 30.0, "start_timeout": timeout or 300.0}
    if inference_url is None and management_url is None:
        if key_file is not None:
            raise UsageError("--key-file goes with --inference-url or --management-url")
        return find_endpoint(server), timeouts
    if server is not None:
        raise UsageError("--server and addresses exclude each other", remedy="pass one of them")
    endpoint = Endpoint(
        inference_url=_check_url(inference_url),
        management_url=_check_url(management_url),
        key_file=key_file,
        supervisor_key=_find_supervisor_key(key_file),
    )
    return endpoint, timeouts


def _find_supervisor_key(key_file: Path | None) -> Path | None:
    """Return the key that changes of models need; a server of ours has it beside its tokens."""
    from marwright.client.endpoint import SUPERVISOR_KEY_NAME

    path = key_file and key_file.with_name(SUPERVISOR_KEY_NAME)
    return path if path and path.exists() else None


def check_workers(workers: int, *, force: bool) -> None:
    """Refuse a number of workers that would bring this machine down, unless it is meant."""
    from marwright.errors import UsageError

    cores = os.cpu_count() or 1
    if workers > WORKERS_PER_CORE * cores and not force:
        raise UsageError(
            f"{workers} workers would share {cores} cores",
            expected=f"at most {WORKERS_PER_CORE * cores}",
            remedy="pass --force if that is meant; each takes some 200 MB",
        )


def _check_url(url: str | None) -> str:
    """Return an address, or "" where none is given; Transport refuses calls to that API."""
    from marwright.errors import UsageError

    if url is not None and not url.startswith(("http://", "https://")):
        raise UsageError(
            "no such address is possible", expected="http://HOST:PORT", found=repr(url)
        )
    return url or ""
