"""Samples sent through a gateway where its own traffic is too thin to judge a candidate."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Sequence
from typing import Any

from marwright.client import Client
from marwright.errors import MarwrightError

__all__ = ["Feeder"]

THREADS = 4
PAUSE_SECONDS = 0.002
"""Between two requests of one thread: real ones come first."""


class Feeder:
    """Sends samples from `start` until the end of its `with` block; `sent` counts them."""

    def __init__(self, client: Client, model: str, bodies: Sequence[Any]) -> None:
        self._client = client
        self._model = model
        self._bodies = bodies
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self.sent = 0

    def start(self) -> None:
        """Begin to send, where there is anything to send and it has not begun."""
        if self._threads or not self._bodies:
            return
        for number in range(THREADS):
            thread = threading.Thread(target=self._send, args=(number,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def __enter__(self) -> Feeder:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Send no more."""
        self._ended.set()
        for thread in self._threads:
            thread.join(5)

    def _send(self, number: int) -> None:
        for body in itertools.islice(itertools.cycle(self._bodies), number, None):
            with contextlib.suppress(MarwrightError):  # the gateway's log has what became of it
                self._client.predict(self._model, body)
            self.sent += 1
            if self._ended.wait(PAUSE_SECONDS):
                return
