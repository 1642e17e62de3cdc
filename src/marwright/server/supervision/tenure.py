"""What one supervisor alone has: its configuration and its name, and the record that says so."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from marwright.server.deployment import Deployment
from marwright.server.process import read_start_time
from marwright.server.registry import Claim, Record, check_form, claim

__all__ = ["Tenure"]


class Tenure:
    """The claims of one supervisor; use it in a `with` block.

    `name` is the server's: the deployment's own, or its inference port; "" while that is free and
    not chosen yet. `key` is what other commands of this user tell the supervisor's endpoints.

    Raises:
        ServerError: another supervisor has the configuration or the name.
    """

    def __init__(self, deployment: Deployment, path: Path | None, since: str) -> None:
        ports, gateway = deployment.ports, deployment.gateway
        port = gateway.port if gateway else "" if ports == "free" else ports.inference
        self.name = deployment.name or str(port)
        self._path = path
        self._since = since
        self.key = secrets.token_urlsafe(24)
        self._claims: list[Claim] = []

    def __enter__(self) -> Tenure:
        with contextlib.ExitStack() as stack:
            stack.callback(self._release)
            if self._path:
                self._claims.append(claim(config=self._path))
            if self.name:
                check_form(self.name)
                self._claims.append(claim(self.name))
            self._write("", next((str(folder) for folder in self.list_left()), ""))
            stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def list_left(self) -> Iterator[Path]:
        """Yield the run folders that killed supervisors of this configuration have left."""
        folders = [one.previous.run_folder for one in self._claims if one.previous]
        for folder in dict.fromkeys(filter(None, folders)):
            if Path(folder).exists():
                yield Path(folder)

    def find_health_port(self) -> int:
        """Return where the killed supervisor's endpoints were, so that they stay there; else 0."""
        urls = [one.previous.health_url for one in self._claims if one.previous]
        return next((urlsplit(url).port or 0 for url in urls if url), 0)

    def note(self, run_folder: Path) -> None:
        """Say where the server will be, so that a supervisor killed meanwhile leaves word of it."""
        self._write("", str(run_folder))

    def settle(self, run_folder: Path, inference_url: str, health_url: str) -> str:
        """Say which server it is; return its name."""
        if not self.name:
            name = inference_url.rpartition(":")[2]
            self._claims.append(claim(name))
            self.name = name
        self._write(health_url, str(run_folder))
        return self.name

    def _write(self, health_url: str, run_folder: str) -> None:
        record = Record(
            name=self.name,
            pid=os.getpid(),
            start=read_start_time(os.getpid()) or "",
            since=self._since,
            config=str(self._path or ""),
            run_folder=run_folder,
            health_url=health_url,
            key=self.key,
        )
        for one in self._claims:
            one.write(record)

    def _release(self) -> None:
        while self._claims:
            self._claims.pop().release()
