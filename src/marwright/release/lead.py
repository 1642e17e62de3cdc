"""Who leads a release from another machine: their words, and what happens where none comes.

A word is a line on a stream: "stay" renews the lease, "move" lets the default move, "keep" ends the
release, "back" and a reason takes it back. Each one holds from when it was said, and renews the
lease. Where none comes for as long as the lease, or the stream ends, the release takes itself back:
so that a server that was cut off is where the others are.
"""

from __future__ import annotations

import threading
import time
from typing import IO

from marwright.errors import ReleaseError

__all__ = ["Lead"]

LOOK_SECONDS = 0.1


class Lead:
    """Hears the words of who leads, from a thread of its own."""

    def __init__(self, stream: IO[str], *, lease: float) -> None:
        self._stream = stream
        self._lease = lease
        self._heard = time.monotonic()
        self._words: set[str] = set()
        self._reason = ""
        threading.Thread(target=self._listen, daemon=True).start()

    def check(self) -> None:
        """Raise ReleaseError where it is to go back."""
        if "back" in self._words:
            raise ReleaseError("it is taken back", found=self._reason)
        silent = time.monotonic() - self._heard
        if silent > self._lease:
            raise ReleaseError(f"who leads the release was not heard of for {silent:.0f} s")

    def wait_for(self, word: str) -> None:
        """Wait until a word was said; raises what `check` raises."""
        while word not in self._words:
            self.check()
            time.sleep(LOOK_SECONDS)
        self.check()

    def _listen(self) -> None:
        for line in self._stream:
            word, _, reason = line.strip().partition(" ")
            self._heard = time.monotonic()
            self._reason = self._reason or (reason if word == "back" else "")
            self._words.add(word)
        self._reason = self._reason or "the site that it is made at has ended"
        self._words.add("back")
