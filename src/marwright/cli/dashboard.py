"""`marwright dashboard`: one local web page of what is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from marwright.cli.options import Json
from marwright.cli.output import say

__all__ = ["dashboard"]


def dashboard(
    server: Annotated[
        str | None,
        typer.Argument(
            envvar="MARWRIGHT_SERVER", help="The server's name; not needed where only one runs."
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Where the page listens; 0 for a free port.")
    ] = 8090,
    host: Annotated[
        str, typer.Option(help="The address; of this machine alone if not given.")
    ] = "127.0.0.1",
    token_file: Annotated[
        Path | None,
        typer.Option(help="File of the page's token; made, where there is none, for you alone."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve a page with versions, traffic, drift, releases, failures, and a form to try a model.

    It runs until Ctrl-C, also while the server is away. The address that is printed signs in once;
    later, or from another browser, sign in with the token.
    """
    from marwright.errors import UsageError
    from marwright.server.registry import find_record

    record = find_record(server)
    try:
        from marwright.monitor.page.service import Service, warn_of_host
    except ModuleNotFoundError as exc:
        raise UsageError(
            f"the page needs the package {exc.name}", remedy="pip install 'marwright[dashboard]'"
        ) from exc
    from marwright.monitor.looks import Recorder
    from marwright.monitor.page.access import keep_token
    from marwright.monitor.page.sources import Sources

    token, path = keep_token(token_file, name=record.name)
    if warning := warn_of_host(host):
        say(f"warning: {warning}")
    with (
        Recorder(record) as recorder,
        Service(Sources(record, recorder), token, host=host, port=port) as service,
    ):
        address = service.make_address()
        if as_json:
            facts = {"url": address, "token_file": str(path), "server": record.name}
            print(json.dumps(facts), flush=True)
        else:
            print(f"{record.name} is shown at {address}", flush=True)
            say(f"the address signs in once; the token is in {path}")
        try:
            service.wait()
        except KeyboardInterrupt:
            say("the page has ended")
