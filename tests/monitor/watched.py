"""A real server with `marwright monitor up` beside it, and what tests do to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import Served, end_serving, wait_until
from tests.monitor.receivers import Mailbox, Receiver

from marwright.server.ports import Ports
from marwright.server.registry import find_record

SCALE = 120.0
PATIENCE = 200.0
HANDLER = """\
import os
import time

KEPT = []

def handle(data, context):
    return data and [answer(bytes(item.get("body") or item.get("data")).decode()) for item in data]

def answer(asked):
    word, _, value = asked.partition(" ")
    if word == "fail":
        raise ValueError("asked to fail")
    if word == "sleep":
        time.sleep(float(value))
    if word == "grow":
        KEPT.append(bytearray(b"x" * int(value)))
    return "done"
"""


def write_archive(path: Path, model: str, version: str = "1.0", handler: str = HANDLER) -> None:
    manifest = {
        "createdOn": "01/01/2026 00:00:00",
        "runtime": "python",
        "model": {"modelName": model, "handler": "odd.py", "modelVersion": version},
        "archiverVersion": "0.12.0",
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        archive.writestr("odd.py", handler)


class Watched(Served):
    """A server with `marwright monitor up` beside it."""

    def __init__(self, folder: Path, name: str, *, scale: float = SCALE) -> None:
        super().__init__(folder, name)
        self.scale = scale
        self.receiver = Receiver()
        self.mailbox = Mailbox()
        self.monitor: subprocess.Popen[str] | None = None
        self.addresses: dict[str, str] = {}
        self.began = 0.0
        """When the monitoring was asked for."""
        (folder / "store").mkdir()
        (folder / "webhook").write_text(self.receiver.url + "\n")
        self.environment = {**os.environ, "XDG_STATE_HOME": str(folder / "state")}

    def write(self, *, monitoring: dict[str, Any] | None = None, **values: Any) -> None:
        ports = Ports.find_free()
        chosen = {
            "prometheus": ports.inference,
            "alertmanager": ports.management,
            "webhook": "webhook",
            **(monitoring or {}),
        }
        super().write(monitoring=chosen, **values)

    def watch(self) -> None:
        command = [sys.executable, "-m", "marwright", "monitor", "up", self.name, "--json"]
        self.began = time.monotonic()
        with (self.folder / "monitor.txt").open("ab") as errors:
            self.monitor = subprocess.Popen(
                [*command, "--scale", str(self.scale)],
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=self.environment,
            )
        assert self.monitor.stdout is not None
        line = self.monitor.stdout.readline()
        assert line, self.read_words()
        self.addresses = json.loads(line)

    def read_words(self) -> str:
        return (self.folder / "monitor.txt").read_text()

    def await_alert(
        self, name: str, since: float, during: Callable[[], Any] = lambda: None
    ) -> tuple[float, Any]:
        """Return how many seconds later it came, and the alert; `during` is done meanwhile."""

        def look() -> Any:
            during()
            return self.receiver.find(name, since)

        moment, alert = wait_until(look, timeout=PATIENCE, what=f"{name}; {self.read_words()}")
        assert alert["annotations"]["runbook_url"].endswith(f"#{name.lower()}")
        return moment - since, alert

    def end(self) -> None:
        try:
            if self.monitor is not None:
                end_serving(self.monitor)
        finally:
            super().end()
            self.receiver.close()
            self.mailbox.close()


def kill_java(watched: Watched) -> None:
    folder = Path(find_record(watched.name).run_folder)
    pid = int((folder / "server_pid").read_text("ascii").split()[0])
    os.kill(pid, signal.SIGKILL)
