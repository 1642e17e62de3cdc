"""TorchServe's own metrics as ours: what the door and the handlers count there, and queue times.

TorchServe names labels model_name and model_version, adds the host to each, and calls the version
"default" where a request named none (frontend: org.pytorch.serve.job.RestJob).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from marwright.server.metrics.exposition import Exposition, LineReader, Sample

__all__ = ["QueueTimes", "translate"]

QUEUE = "ts_queue_latency_microseconds"
_RENAMED = {
    "model": "model",
    "model_name": "model",
    "version": "version",
    "model_version": "version",
    "status": "status",
    "stage": "stage",
    "le": "le",
}
_reader = LineReader(_RENAMED)


class QueueTimes:
    """Seconds that requests waited, by the version that answered them.

    What was counted for "default" since the last reading goes to the version that is the default
    at this one.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], float] = {}
        self._seconds: defaultdict[tuple[str, str], float] = defaultdict(float)

    def restart(self) -> None:
        """Expect a server that counts from 0."""
        self._seen.clear()

    def take(self, sample: Sample, defaults: Mapping[str, str]) -> None:
        """Take one reading of TorchServe's counter; `defaults` are versions by model."""
        labels = dict(sample.labels)
        key = labels.get("model", ""), labels.get("version", "")
        value = float(sample.value)
        grown = value - self._seen.get(key, 0.0)
        self._seen[key] = value
        model, version = key
        if version == "default":
            version = defaults.get(model, "")
        # A server that was started again counts from 0.
        self._seconds[model, version] += (grown if grown >= 0 else value) / 1e6

    def write(self, exposition: Exposition) -> None:
        """Add what was counted."""
        for (model, version), seconds in self._seconds.items():
            if version:
                exposition.add(
                    "marwright_queue_seconds_total", seconds, model=model, version=version
                )


def translate(
    text: str, exposition: Exposition, queue: QueueTimes, defaults: Mapping[str, str]
) -> int:
    """Add what TorchServe's text says of our metrics; return how many lines could not be read."""
    samples, failed = _reader.read(text)
    ours = []
    for sample in samples:
        if sample.name == QUEUE:
            queue.take(sample, defaults)
        elif sample.name.startswith("marwright_"):
            ours.append(sample)
    exposition.take(ours)
    return failed
