"""`marwright monitor`: Prometheus, Alertmanager and their files for a server, and a dashboard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marwright.cli.options import Json
from marwright.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from marwright.server.deployment import Deployment

__all__ = ["app"]

app = typer.Typer(
    help="Watch a server with Prometheus and Alertmanager, and make their files.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Deploy = Annotated[
    Path | None,
    typer.Option(help="A deploy.yaml; ./deploy.yaml where there is one, else the defaults."),
]


@app.command("up")
def watch_server(
    server: Annotated[
        str | None, typer.Argument(help="The server's name; not needed where only one runs.")
    ] = None,
    scale: Annotated[
        float,
        typer.Option(
            min=1, max=1000, hidden=True, help="Divides windows and pauses: for drills and tests."
        ),
    ] = 1.0,
    as_json: Json = False,
) -> None:
    """Start Prometheus and Alertmanager beside a server; end them with it, or at Ctrl-C.

    Meanwhile the prediction log is collected, drift and quality are measured, and alerts are sent
    to monitoring.webhook and monitoring.mail of the server's deploy.yaml, as it says at the start.
    """
    from marwright.monitor.watch import Watch
    from marwright.server.deployment import Deployment
    from marwright.server.process import hide_environment
    from marwright.server.registry import find_record

    hide_environment()
    record = find_record(server)
    deployment = Deployment.parse(Path(record.config))[0] if record.config else Deployment()
    if deployment.monitoring.webhook is None and deployment.monitoring.mail is None:
        say("nobody is told of alerts: deploy.yaml has neither monitoring.webhook nor .mail")

    def show(addresses: dict[str, str]) -> None:
        if as_json:
            print(json.dumps(addresses), flush=True)
            return
        print_table(["", ""], list(addresses.items()))
        say("watching; Ctrl-C or SIGTERM ends it")

    try:
        Watch(record, deployment, tell=say, begun=show, scale=scale).run()
    except (KeyboardInterrupt, SystemExit):  # how it is meant to end, too
        say("stopped")


@app.command("render")
def render_files(
    folder: Annotated[Path, typer.Argument(help="Where the files are written.")],
    deploy: Deploy = None,
) -> None:
    """Write the files for a Prometheus and an Alertmanager of one's own.

    alertmanager.yml holds the webhook's URL, and is yours alone to read.
    """
    from marwright.storage import translate_os_errors

    with translate_os_errors(f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    for name in _write_files(folder, _read_deployment(deploy), deploy):
        say(f"wrote {folder / name}")


@app.command("check")
def check_files(deploy: Deploy = None, as_json: Json = False) -> None:
    """Have promtool and amtool look at what is made of a deploy.yaml; start nothing."""
    import tempfile

    from marwright.monitor import alertmanager, prometheus
    from marwright.monitor.rules import Times, list_alerts, list_recordings

    deployment = _read_deployment(deploy)
    with tempfile.TemporaryDirectory(prefix="marwright-check-") as scratch:
        _write_files(Path(scratch), deployment, deploy)
        prometheus.check_configuration(Path(scratch))
        secret = alertmanager.read_webhook(deployment)
        alertmanager.check_configuration(Path(scratch), secret=secret)
    alerts = list_alerts(deployment, Times())
    if as_json:
        print_json([{"alert": one.name, "severity": one.severity} for one in alerts])
        return
    rows = [[one.name, one.severity, f"{one.hold_seconds:g} s"] for one in alerts]
    print_table(["alert", "severity", "must hold"], rows)
    say(f"promtool and amtool take it: {len(alerts)} alerts, {len(list_recordings(Times()))} more")


@app.command("grafana")
def show_dashboard(
    out: Annotated[Path | None, typer.Option(help="Write it here instead of printing it.")] = None,
) -> None:
    """Print a dashboard for Grafana, as JSON to import."""
    from marwright.monitor.grafana import render_dashboard
    from marwright.storage import write_file

    text = json.dumps(render_dashboard(), indent=2)
    if out is None:
        print(text)
        return
    with write_file(out) as stream:
        stream.write(text.encode() + b"\n")
    say(f"wrote {out}")


def _read_deployment(deploy: Path | None) -> Deployment:
    from marwright.server.deployment import Deployment
    from marwright.server.registry import DEPLOYMENT_NAME

    path = deploy or Path(DEPLOYMENT_NAME)
    if deploy is None and not path.is_file():
        return Deployment()
    return Deployment.parse(path)[0]


def _write_files(folder: Path, deployment: Deployment, deploy: Path | None) -> list[str]:
    """Write all files; return their names."""
    from marwright.monitor import alertmanager, prometheus
    from marwright.monitor.program import write_private
    from marwright.storage import write_file

    name, health_url = _find_server(deployment, deploy)
    files = prometheus.render_files(deployment, name, health_url)
    for file, text in files.items():
        with write_file(folder / file) as stream:
            stream.write(text.encode())
    write_private(folder / alertmanager.CONFIGURATION, alertmanager.render(deployment))
    return [*files, alertmanager.CONFIGURATION]


def _find_server(deployment: Deployment, deploy: Path | None) -> tuple[str, str]:
    """Return the name and the health endpoint of the server that runs so, or that is to."""
    from marwright.server.ports import HOST
    from marwright.server.registry import DEPLOYMENT_NAME, list_records
    from marwright.server.sections import PortSettings

    config = str((deploy or Path(DEPLOYMENT_NAME)).resolve())
    running = next((one for one in list_records().values() if one.config == config), None)
    if running is not None and running.health_url:
        return running.name, running.health_url
    ports = PortSettings() if deployment.ports == "free" else deployment.ports
    port = deployment.gateway.port if deployment.gateway else ports.inference
    return deployment.name or str(port), f"http://{HOST}:{ports.health}"
