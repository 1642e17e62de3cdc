"""How a supervisor comes by its server: it starts one, or adopts what a killed one left.

And of what it warns then.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from marwright.errors import ClientError, NotReadyError, ServerDiedError, UsageError
from marwright.server.certificate import warn_of_expiry
from marwright.server.deployment import Deployment
from marwright.server.process import Process
from marwright.server.sections import TlsFiles
from marwright.server.supervision.status import list_restart_reasons
from marwright.server.torchserve import TorchServe

__all__ = ["adopt", "boot", "warn_of_certificate", "warn_of_root"]

_log = logging.getLogger(__name__)


def adopt(folders: Iterable[Path], deployment: Deployment) -> TorchServe | None:
    """Take over the server of a run folder, where it is as the deployment says but for its models.

    What cannot be adopted is ended and cleared away, so that another one can be started.

    Raises:
        ServerError: another process holds it.
    """
    for folder in folders:
        try:
            server = TorchServe.adopt(folder)
        except ServerDiedError as exc:
            _log.warning("%s; it is cleared away", exc)
            Process(folder).end()
            continue
        changed = list_restart_reasons(server.deployment, deployment)
        if not changed and server.exit_status is None:
            _log.info("adopted the server in %s", folder)
            return server
        reason = f"{', '.join(changed)} changed" if changed else "it has ended"
        _log.info("took over the server in %s; starting it again: %s", folder, reason)
        server.stop()
    return None


def boot(server: TorchServe) -> None:
    """Start a server; what cannot be loaded does not keep the rest from being served.

    Raises:
        MarwrightError: it did not start, or nothing of what is wanted could be loaded.
    """
    server.start()
    wanted = [item.key for item in server.wanted if item.workers]
    errors = [*server.failed.values(), *server.refused.values()]
    if not (wanted or errors) or any(_has_worker(server, key) for key in wanted):
        return
    if errors:
        raise errors[0]
    raise NotReadyError(
        f"no worker got READY within {server.timeout:g} s",
        remedy="raise supervision.start_timeout, or look into the server's log",
    )


def _has_worker(server: TorchServe, key: tuple[str, str]) -> bool:
    with contextlib.suppress(ClientError):
        return server.client.models.describe(*key).ready_workers > 0
    return False


def warn_of_root() -> None:
    """Say what it means to run as root, where it does."""
    if os.geteuid() == 0:
        _log.warning(
            "running as root: whatever an archive's handler does, it does as root;"
            " run it as a user of its own"
        )


def warn_of_certificate(deployment: Deployment) -> None:
    """Say that a certificate of the user's own expires within days, where it does."""
    if isinstance(deployment.tls, TlsFiles):
        with contextlib.suppress(UsageError):  # the package that could tell is not installed
            if warning := warn_of_expiry(deployment.tls.certificate):
                _log.warning("%s", warning)
