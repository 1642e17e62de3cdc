"""What a site answers at /metrics: its replicas' metrics, told apart, and the gateway's own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from marwright.gateway.overview import SiteStatus
from marwright.gateway.replica import Replica
from marwright.gateway.traffic import Split
from marwright.server.metrics.exposition import Exposition, read_lines
from marwright.server.metrics.files import read_files
from marwright.server.supervision.inspection import fetch_metrics
from marwright.server.supervision.measures import Mishaps

__all__ = ["SiteMeasures"]


class SiteMeasures:
    """Gathers a site's metrics; `scrape` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mishaps = Mishaps()

    def scrape(
        self,
        status: SiteStatus,
        replicas: Sequence[Replica],
        splits: Sequence[Split],
        *,
        run_folder: Path,
        gateway_runs: bool,
    ) -> Exposition:
        """Return all metrics as they are now; what cannot be read is missing, and counted."""
        exposition = Exposition()
        exposition.add("marwright_gateway_up", gateway_runs)
        exposition.add("marwright_gateway_restarts_total", status.restarts)
        for split in splits:
            _describe_split(split, exposition)
        texts = _ask_all(replicas)
        with self._lock:
            for replica, text in zip(replicas, texts, strict=True):
                self._take(replica, text, exposition)
            self._mishaps.note("files", read_files(run_folder, exposition))
            self._mishaps.write(exposition)
        return exposition

    def _take(self, replica: Replica, text: str | None, exposition: Exposition) -> None:
        label = {"replica": str(replica.number)}
        own = Exposition()
        own.add("marwright_replica_ready", replica.is_ready)
        if text is None:
            own.add("marwright_server_up", 0)
            self._mishaps.note("replica")
        else:
            samples, failed = read_lines(text)
            own.take(samples)
            self._mishaps.note("replica", failed)
        exposition.take(own.list_samples(**label))


def _describe_split(split: Split, exposition: Exposition) -> None:
    shares = (
        ("stable", split.stable, 100 - split.share),
        ("candidate", split.candidate, split.share),
        ("shadow", split.candidate, split.shadow),
    )
    for arm, version, percent in shares:
        exposition.add(
            "marwright_split_share_ratio",
            round(percent / 100, 4),
            model=split.model,
            version=version,
            arm=arm,
        )


def _ask_all(replicas: Sequence[Replica]) -> list[str | None]:
    """Return each replica's metrics; None where its supervisor does not answer."""
    if not replicas:
        return []
    with ThreadPoolExecutor(len(replicas)) as pool:
        return list(pool.map(_ask, replicas))


def _ask(replica: Replica) -> str | None:
    url = replica.status.get("health_url")
    return fetch_metrics(url) if url else None
