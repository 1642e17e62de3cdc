"""Alertmanager's file: who is told, how soon, and what is not told besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from marwright.errors import ConfigurationError
from marwright.monitor.program import Program, check_file
from marwright.monitor.rules import Times, show_span
from marwright.server.deployment import Deployment
from marwright.server.sections import MailSettings
from marwright.storage import translate_os_errors

__all__ = ["check_configuration", "CONFIGURATION", "make_alertmanager", "read_webhook", "render"]

CONFIGURATION = "alertmanager.yml"
RECEIVER = "receiver"
LEAST_SECONDS = 0.1
URL_BYTES = 4096
MINUTE = 60.0
HOUR = 3600.0
# Of alerts that come together: how long the first message waits for others of its kind, the pause
# before what has joined it is told, and before all of it is told again.
PAGE = (5.0, MINUTE, HOUR)
TICKET = (MINUTE, 15 * MINUTE, 24 * HOUR)
SILENCED = (
    ("MarwrightDown", 'alertname!="MarwrightDown"', ["server"]),
    ("MarwrightVersionWithoutWorkers", 'alertname="MarwrightNotReady"', ["server"]),
    (
        "MarwrightErrorBudgetBurnFast",
        'alertname="MarwrightErrorBudgetBurnSlow"',
        ["server", "model"],
    ),
)
"""What is not told while another alert says more; of the same server, or model."""


def read_webhook(deployment: Deployment) -> str:
    """Return the URL that alerts are posted to; "" where there is none.

    Raises:
        ConfigurationError: the file holds no URL. It is not shown: it may be a secret.
        StorageError: it cannot be read.
    """
    path = deployment.monitoring.webhook
    if path is None:
        return ""
    with translate_os_errors(f"read {path}"), path.open("rb") as stream:
        url = stream.read(URL_BYTES).decode("utf-8", "replace").strip()
    try:
        parts = urlsplit(url)
        fits = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits or not url.isprintable() or " " in url:
        raise ConfigurationError(
            f"{path} holds no URL that alerts could be posted to",
            expected="one line, http:// or https://",
            found=f"{len(url)} letters that are none",
            remedy="mend monitoring.webhook in deploy.yaml, or the file",
        )
    return url


def render(deployment: Deployment, *, scale: float = 1.0) -> str:
    """Return the file; the webhook's URL is in it, and nobody else may read it.

    Alertmanager 0.25 takes that URL from no file of its own (`url_file` came with 0.26), and shows
    it to every user of this machine who asks it for its status; the mail's password stays in its
    file. `scale` divides every pause. Raises what read_webhook raises.
    """
    times = Times(scale)
    receiver: dict[str, Any] = {"name": RECEIVER}
    if url := read_webhook(deployment):
        receiver["webhook_configs"] = [
            {"url": url, "send_resolved": True, "http_config": {"follow_redirects": False}}
        ]
    if (mail := deployment.monitoring.mail) is not None:
        receiver["email_configs"] = [_render_mail(mail)]
    configuration = {
        "route": {
            "receiver": RECEIVER,
            "group_by": ["server", "alertname"],
            **_render_pauses(TICKET, times),
            "routes": [{"matchers": ['severity="page"'], **_render_pauses(PAGE, times)}],
        },
        "receivers": [receiver],
        "inhibit_rules": [
            {
                "source_matchers": [f'alertname="{source}"'],
                "target_matchers": [target],
                "equal": equal,
            }
            for source, target, equal in SILENCED
        ],
    }
    return yaml.safe_dump(configuration, sort_keys=False)


def check_configuration(folder: Path, *, secret: str = "") -> None:
    """Let amtool look at the file in a folder.

    Raises:
        ConfigurationError: it refuses it.
        ServerError: there is no amtool.
    """
    check_file(["amtool", "check-config"], folder / CONFIGURATION, secret=secret)


def make_alertmanager(
    deployment: Deployment, *, key: str, data: Path, scale: float = 1.0
) -> Program:
    """Return an Alertmanager that can be started, where amtool has no complaint of its file."""
    program = Program(
        "prometheus-alertmanager",
        "monitoring.alertmanager",
        deployment.monitoring.alertmanager,
        key=key,
        files={CONFIGURATION: render(deployment, scale=scale)},
        arguments=[
            f"--config.file={CONFIGURATION}",
            f"--storage.path={data}",
            "--cluster.listen-address=",  # else it listens on every address, for its like
        ],
    )
    try:
        check_configuration(program.folder, secret=read_webhook(deployment))
    except BaseException:
        program.end()
        raise
    return program


def _render_pauses(pauses: tuple[float, float, float], times: Times) -> dict[str, str]:
    names = ("group_wait", "group_interval", "repeat_interval")
    return {
        name: show_span(max(times.shrink(seconds), LEAST_SECONDS))
        for name, seconds in zip(names, pauses, strict=True)
    }


def _render_mail(mail: MailSettings) -> dict[str, Any]:
    account: dict[str, Any] = {}
    if mail.user is not None:
        account = {"auth_username": mail.user, "auth_identity": mail.user}
        if mail.password is not None:
            account["auth_password_file"] = str(mail.password)
    return {
        "to": mail.to,
        "from": mail.sender,
        "smarthost": mail.server,
        "require_tls": mail.tls,
        "send_resolved": True,
        **account,
    }
