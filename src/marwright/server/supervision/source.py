"""Where a supervisor has its configuration from, and what of a new one it cannot take."""

from __future__ import annotations

import logging
from collections.abc import Callable

from marwright.errors import MarwrightError
from marwright.server.deployment import Deployment
from marwright.server.supervision.status import list_start_reasons

__all__ = ["Source"]

_log = logging.getLogger(__name__)


class Source:
    """The configuration of one supervisor, which began with `begun`.

    `reread` returns it anew, and raises MarwrightError where it cannot be used; without it there is
    nothing to read again.
    """

    def __init__(self, begun: Deployment, reread: Callable[[], Deployment] | None) -> None:
        self._begun = begun
        self._reread = reread

    @property
    def is_findable(self) -> bool:
        """Whether another supervisor, started likewise, would have the same name."""
        return bool(self._begun.name) or self._begun.ports != "free"

    def read(self, current: Deployment) -> Deployment:
        """Return the configuration as it is now, `current` where that cannot be read again.

        Raises:
            MarwrightError: it cannot be used, which is logged.
        """
        try:
            fresh = self._reread() if self._reread else current
        except MarwrightError as exc:
            _log.error("the configuration is not taken: %s", exc, extra={"detail": exc.detail})
            raise
        if reasons := list_start_reasons(self._begun, fresh):
            keys = ", ".join(reasons)
            _log.warning("changed, but taken only by marwright stop and marwright serve: %s", keys)
        return fresh
