"""How often a server may fail: pauses that grow, and an end to them."""

from __future__ import annotations

import time

from marwright.errors import MarwrightError, ServerDiedError
from marwright.server.sections import SupervisionSettings
from marwright.server.torchserve import TorchServe
from marwright.server.worker_log import read_failures

__all__ = ["Attempts"]

FIRST_PAUSE = 0.5
"""Seconds before the first restart; it doubles."""


class Attempts:
    """The failures of one server in a row; being ready for long enough ends the row."""

    def __init__(self) -> None:
        self.failures = 0
        self._ready_since: float | None = None

    def note(self, *, ready: bool) -> bool | None:
        """Hear how the server is; return that where it is another news than before, else None."""
        if ready == (self._ready_since is not None):
            return None
        self._ready_since = time.monotonic() if ready else None
        return ready

    def fail(self, settings: SupervisionSettings) -> float | None:
        """Count a failure; return the seconds to wait before the next start, None for no more."""
        since, self._ready_since = self._ready_since, None
        if since is not None and time.monotonic() - since >= settings.calm_seconds:
            self.failures = 0
        self.failures += 1
        if self.failures > settings.restarts:
            return None
        # Not beyond what a float can hold, of a thousand failures.
        return min(FIRST_PAUSE * 2.0 ** min(self.failures - 1, 60), settings.longest_pause)

    def explain(self, error: MarwrightError, server: TorchServe) -> ServerDiedError:
        """Return the error for a server that is not started again, with its last worker's words."""
        failures = read_failures(server.log_file, offset=server.log_offset)
        traceback = failures[-1].traceback if failures else ""
        return ServerDiedError(
            f"the server failed {self.failures} times in a row; it is not started again",
            found=str(error),
            remedy="mend what its last lines tell, and start it again",
            detail="\n".join(filter(None, (error.detail, traceback))),
        )
