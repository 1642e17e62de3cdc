"""What is seen of the models whose traffic is split: how each version answers, and copies."""

from __future__ import annotations

import base64
import contextlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marwright.gateway.accesses import AccessLog, list_tries
from marwright.gateway.capture import Capture
from marwright.gateway.traffic import Split

__all__ = ["Observation"]

ARMS = ("stable", "candidate")
IDLE_SECONDS = 60.0
"""The log is passed over once nobody has asked for so long: each line that is read costs 20 us."""
MOST = 200_000
"""Answers of one version that are kept; what comes after them is not."""


@dataclass
class _Watch:
    """One pair of versions, since their split was first set."""

    pair: tuple[str, str]
    since: float = field(default_factory=time.time)
    answers: dict[str, list[tuple[int, float]]] = field(
        default_factory=lambda: {arm: [] for arm in ARMS}
    )


class Observation:
    """Keeps what the gateway's log says of split models; may be asked from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: dict[str, _Watch] = {}
        self._asked = 0.0
        """When somebody wanted to know, in time.monotonic()."""
        self._log: AccessLog | None = None
        self._capture: Capture | None = None

    def open(self, folder: Path, stack: contextlib.ExitStack) -> None:
        """Begin to look at the gateway of a run folder, until the stack is closed."""
        self._log = stack.enter_context(AccessLog(folder))
        self._capture = stack.enter_context(Capture(folder))

    def watch(self, split: Split) -> None:
        """Keep what the versions of a split answer; anew where they were others before."""
        pair = split.stable, split.candidate
        with self._lock:
            self._asked = time.monotonic()
            watch = self._watches.get(split.model)
            if watch is None or watch.pair != pair:
                self._watches[split.model] = _Watch(pair)

    def read(self) -> None:
        """Take what the gateway has logged since the last call."""
        with self._lock:
            if self._log is None:
                return
            if time.monotonic() - self._asked > IDLE_SECONDS:
                self._log.skip()
                return
            accesses = self._log.read()
            for model, watch in self._watches.items():
                for arm in ARMS:
                    kept = watch.answers[arm]
                    tries = list_tries(accesses, model, arm, since=watch.since)  # type: ignore[arg-type]
                    kept += [(item.status, item.seconds) for item in tries][: MOST - len(kept)]

    def tell(
        self, model: str, since: Mapping[str, int] | None = None, captured: bool = False
    ) -> dict[str, Any]:
        """Return the answers of each arm as [status, seconds], from the given counts on.

        `captured`: also hand over the requests that were copied, of all models.
        """
        with self._lock:
            self._asked = time.monotonic()
        self.read()
        with self._lock:
            watch = self._watches.get(model)
            answers = watch.answers if watch else {arm: [] for arm in ARMS}
            told: dict[str, Any] = {arm: answers[arm][(since or {}).get(arm, 0) :] for arm in ARMS}
        if captured and self._capture:
            told["captured"] = [
                {
                    "request": item.request,
                    "method": item.method,
                    "path": item.path,
                    "content_type": item.content_type,
                    "body": base64.b64encode(item.body).decode(),
                }
                for item in self._capture.take()
            ]
        return told
