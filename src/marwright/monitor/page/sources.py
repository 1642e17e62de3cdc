"""Where the page gets its facts: the server's record, deploy.yaml, logs, archives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marwright.client import Client, Endpoint
from marwright.errors import ConfigurationError, NoServerError
from marwright.release.history import HISTORY_NAME, History
from marwright.release.target import find_version, place_history
from marwright.server.deployment import Deployment
from marwright.server.registry import Record, list_records, list_replicas

if TYPE_CHECKING:
    from marwright.monitor.looks import Recorder
    from marwright.monitor.predictions import PredictionLog
    from marwright.server.metrics.exposition import Sample

__all__ = ["Sources"]


@dataclass(frozen=True)
class Sources:
    """What is known of one server, whether it runs or not."""

    record: Record
    """As it was when the page was started."""
    recorder: Recorder
    """Looks at the server for all viewers."""

    def find_record(self) -> Record:
        """Return the server's record of now; the one known last while it is away."""
        return list_records().get(self.record.name, self.record)

    def read_deployment(self) -> Deployment:
        """Return what deploy.yaml says; the defaults where there is none, or it is broken now."""
        config = self.find_record().config
        with contextlib.suppress(ConfigurationError):
            if config and Path(config).exists():
                return Deployment.parse(Path(config))[0]
        return Deployment()

    @property
    def history(self) -> History:
        """The releases of this server; see release/target.py."""
        record = self.find_record()
        if record.config:
            return History(Path(record.config).with_name(HISTORY_NAME))
        return History(place_history(record.name))

    @contextlib.contextmanager
    def open_client(self, *, manages: bool = False) -> Iterator[Client]:
        """Yield a client of the server; `manages`: of one that lists models, behind any gateway.

        Raises:
            NoServerError: it does not run.
        """
        record = self.find_record()
        if manages:
            record = next(iter(list_replicas(record)), record)
        if not record.run_folder:
            raise NoServerError(f"the server {record.name} has not started yet")
        with Client(Endpoint.read(Path(record.run_folder) / "endpoint.json")) as client:
            yield client

    def find_archive(self, model: str, version: str) -> Path | None:
        """Return the archive of a version: the store's own, or else what the server reads."""
        with self.open_client(manages=True) as client:
            found = find_version(client, model, version)
            if found is None:
                return None
            name = found.archive.rpartition("/")[2]
            for folder in (client.endpoint.model_store, client.endpoint.staging):
                if folder is not None and (folder / name).is_file():
                    return folder / name
        return None

    def open_log(self) -> PredictionLog | None:
        """Return the prediction log; None where none is kept."""
        settings = self.read_deployment().monitoring.predictions
        if settings is None or not settings.folder.is_dir():
            return None
        from marwright.monitor.predictions import PredictionLog  # needs pyarrow

        return PredictionLog(
            settings.folder, keep_days=settings.keep_days, most_bytes=settings.most_bytes
        )

    def read_failures(self, limit: int) -> list[dict[str, Any]] | None:
        """Return the latest failed predictions, the last one first; None where none are kept."""
        log = self.open_log()
        return None if log is None else log.read_recent(limit=limit, failed=True)

    def read_metrics(self) -> list[Sample]:
        """Return the samples of the server's endpoint; none while it is away."""
        from marwright.server.metrics.exposition import read_lines
        from marwright.server.supervision.inspection import fetch_metrics

        record = self.find_record()
        text = fetch_metrics(record.health_url) if record.health_url else None
        return list(read_lines(text)[0]) if text else []
