"""supervisor.log: what the supervisor and all of marwright's library say, one JSON object a line.

The form is that of server.log (log4j2.xml), so that both are read alike (log.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from marwright.storage import translate_os_errors

__all__ = ["Journal", "keep_journal", "LOG_NAME"]

LOG_NAME = "supervisor.log"
EARLY_LINES = 1000
"""Lines that are kept until the journal has a file."""
_LIBRARY = "marwright"


class Journal:
    """The journal of one supervisor; what is said before it has a file is written into it then."""

    def __init__(self, tell: Callable[[str], None] | None) -> None:
        self._opened: tuple[Path, int, int] | None = None
        self._early = logging.handlers.MemoryHandler(EARLY_LINES, flushLevel=logging.CRITICAL + 1)
        self.handlers: list[logging.Handler] = [self._early]
        if tell is not None:
            self.handlers.append(_Teller(tell))

    def open(self, path: Path, *, file_bytes: int, files: int) -> None:
        """Write into a file from now on, and begin another one at `file_bytes`; `files` are kept.

        Raises:
            StorageError: there is no writing there.
        """
        if (path, file_bytes, files) == self._opened:
            return
        with translate_os_errors(f"write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            handler = _QuietFile(path, maxBytes=file_bytes, backupCount=files - 1, encoding="utf-8")
        handler.setFormatter(_Formatter())
        library = logging.getLogger(_LIBRARY)
        for old in self.handlers[:]:
            if old is self._early:
                self._early.setTarget(handler)
            if isinstance(old, (_QuietFile, logging.handlers.MemoryHandler)):
                library.removeHandler(old)
                self.handlers.remove(old)
                old.close()  # of the early lines: hands them over
        self._opened = (path, file_bytes, files)
        self.handlers.append(handler)
        library.addHandler(handler)


@contextlib.contextmanager
def keep_journal(tell: Callable[[str], None] | None = None) -> Iterator[Journal]:
    """Keep a journal while the block runs; `tell` hears of each message in a line for people."""
    library = logging.getLogger(_LIBRARY)
    journal = Journal(tell)
    level = library.level
    library.setLevel(logging.INFO)
    for handler in journal.handlers:
        library.addHandler(handler)
    try:
        yield journal
    finally:
        library.setLevel(level)
        for handler in journal.handlers:
            library.removeHandler(handler)
            handler.close()


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        exception = getattr(record, "detail", "")
        if record.exc_info and not exception:
            exception = self.formatException(record.exc_info)
        line = {
            "time": datetime.fromtimestamp(record.created).astimezone().isoformat(),
            "level": record.levelname,
            "thread": record.threadName,
            "logger": record.name,
            "message": record.getMessage(),
            **({"exception": exception} if exception else {}),
        }
        return json.dumps(line)


class _QuietFile(logging.handlers.RotatingFileHandler):
    """A full disk ends the journal for a while, and nothing else."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: there is nowhere to say it."""

    def close(self) -> None:
        """Close the file, even where its last lines find no room."""
        with contextlib.suppress(OSError):
            super().close()


class _Teller(logging.Handler):
    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.CRITICAL:
            return  # it is raised too, and whoever catches it says it
        detail = str(getattr(record, "detail", ""))
        lines = [record.getMessage(), *(f"    {line}" for line in detail.splitlines())]
        with contextlib.suppress(OSError, ValueError):  # nobody listens any more
            self._tell("\n".join(lines))
