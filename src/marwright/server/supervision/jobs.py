"""Work that takes its time beside the watching: one thing after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from marwright.errors import MarwrightError

__all__ = ["Jobs"]

_log = logging.getLogger(__name__)


class Jobs:
    """A thread that does jobs in their order; what one raises is logged, and ends only that one."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="job")
        self._last: Future[None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a job is being done, or waits."""
        return self._last is not None and not self._last.done()

    def start(self, job: Callable[[], None]) -> None:
        """Do a job once those before it are done; does not wait."""
        self._last = self._pool.submit(_do, job)

    def close(self) -> None:
        """Begin nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _do(job: Callable[[], None]) -> None:
    try:
        job()
    except MarwrightError as exc:
        _log.error("%s", exc, extra={"detail": exc.detail})
    except Exception:
        _log.exception("the supervisor itself failed")
