"""What a supervisor answers at /metrics: TorchServe's counts, and what it sees itself."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from marwright.client import Client
from marwright.errors import MarwrightError
from marwright.server.metrics.exposition import Exposition
from marwright.server.metrics.files import read_files
from marwright.server.metrics.torchserve import QueueTimes, translate
from marwright.server.state import State
from marwright.server.supervision.census import Census
from marwright.server.supervision.status import Status
from marwright.server.supervision.usage import read_cpu_seconds, read_resident

__all__ = ["describe_status", "list_packages", "Measures", "Mishaps"]

STATUSES = ("200", "500", "503")
"""Of which each version has a count from the start."""
SCRAPE_SECONDS = 5.0
"""How long TorchServe may take to answer; Prometheus itself gives up after 10."""


class Mishaps:
    """What went wrong in scrapes, counted since the start."""

    def __init__(self) -> None:
        self._errors: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()

    def note(self, source: str, count: int = 1) -> None:
        """Count parts of one source that could not be read; 0 says that it was read whole."""
        self._errors[source] += count

    def write(self, exposition: Exposition) -> None:
        """Add them, with what this exposition has left out."""
        self._dropped.update(exposition.dropped)
        for source, count in self._errors.items():
            exposition.add("marwright_scrape_errors_total", count, source=source)
        for family, count in self._dropped.items():
            exposition.add("marwright_series_dropped_total", count, family=family)


class Measures:
    """Keeps counts over the server's restarts; `scrape` may be called from any thread."""

    def __init__(self) -> None:
        self.census = Census()
        self._packages = list_packages()
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        """Held from a question to TorchServe until its answer is taken: an older answer that is
        taken after a newer one looks like a server that counts anew."""
        self._client: Client | None = None
        self._run_folder = Path()
        self._state = State({}, {})
        self._queue = QueueTimes()
        self._mishaps = Mishaps()

    def follow(self, client: Client, run_folder: Path) -> None:
        """Read from this server from now on."""
        with self._lock:
            self._client, self._run_folder = client, run_folder
            self._state = State({}, {})
            self._queue.restart()
            self.census.forget()

    def take(self, state: State) -> None:
        """Take what one look at the server found."""
        with self._lock:
            self._state = state
            self.census.take(state)

    def scrape(self, status: Status) -> Exposition:
        """Return all metrics as they are now; what cannot be read is missing, and counted."""
        exposition = Exposition()
        exposition.add("marwright_build_info", 1, **self._packages)
        describe_status(status, exposition)
        with self._asking:
            self._ask_server(exposition)
        with self._lock:
            self._describe_workers(exposition)
            self._queue.write(exposition)
            if self._client is not None:
                self._mishaps.note("files", read_files(self._run_folder, exposition))
            self._mishaps.write(exposition)
        return exposition

    def _ask_server(self, exposition: Exposition) -> None:
        """Take what TorchServe says now; it says nothing while it starts again."""
        with self._lock:
            client = self._client
        if client is None:
            return
        try:
            text = client.metrics_text(timeout=SCRAPE_SECONDS)
        except MarwrightError:
            self._mishaps.note("torchserve")
            return
        with self._lock:
            if client is self._client:  # else it is of the server before
                failed = translate(text, exposition, self._queue, self._state.defaults)
                self._mishaps.note("torchserve", failed)
                exposition.add_missing(
                    "marwright_http_requests_total",
                    [
                        {"model": name, "version": number, "status": status}
                        for name, number in self._state.versions
                        for status in STATUSES
                    ],
                )

    def _describe_workers(self, exposition: Exposition) -> None:
        for (name, number), found in self._state.versions.items():
            labels = {"model": name, "version": number}
            exposition.add("marwright_queue_length", found.queue_length, **labels)
            exposition.add("marwright_queue_room", found.queue_room, **labels)
        for (name, number), count in self.census.restarts.items():
            exposition.add("marwright_worker_restarts_total", count, model=name, version=number)
        for (name, number), seconds in self.census.cpu_seconds.items():
            exposition.add(
                "marwright_worker_cpu_seconds_total", round(seconds, 2), model=name, version=number
            )


def describe_status(status: Status, exposition: Exposition) -> None:
    """Add what a supervisor knows without asking anybody."""
    up = status.phase in {"starting", "serving"} and status.java_pid is not None
    exposition.add("marwright_server_up", up and not status.problems)
    exposition.add("marwright_server_ready", not status.not_ready)
    exposition.add("marwright_server_restarts_total", status.restarts)
    if status.java_pid is not None:
        exposition.add("marwright_server_memory_bytes", read_resident(status.java_pid))
        exposition.add("marwright_server_cpu_seconds_total", read_cpu_seconds(status.java_pid))
    for model in status.models:
        labels = {"model": model.name, "version": model.version}
        exposition.add("marwright_model_ready", not model.problem, **labels)
        exposition.add("marwright_model_default", model.default, **labels)
        exposition.add("marwright_workers_wanted", model.workers, **labels)
        exposition.add("marwright_workers_ready", model.ready_workers, **labels)
        exposition.add("marwright_worker_memory_bytes", model.memory_bytes, **labels)


def list_packages() -> dict[str, str]:
    """Return the versions that run, as marwright_build_info has them; empty where unknown."""
    found = dict.fromkeys(("marwright", "torchserve", "torch"), "")
    for name in found:
        with contextlib.suppress(LookupError, ImportError):
            found[name] = version(name)
    return found
