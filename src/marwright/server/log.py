"""A server's log, read: one JSON object a line, as log4j2.xml and the supervisor write it.

Other lines, such as those that a full disk cut in two, are told as they are.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

from marwright.errors import StorageError

__all__ = ["LEVELS", "LogLine", "parse_line", "read_log", "read_logs"]

LEVELS = ("debug", "info", "warning", "error", "critical")
"""From the least important to the most."""
POLL_SECONDS = 0.2
_ALIASES = {"trace": "debug", "warn": "warning", "fatal": "critical"}
_UNKNOWN_TIME = datetime.fromtimestamp(0, timezone.utc)

# What a worker writes reaches the log through Java threads named W-<port>-<model>_<version>-stdout
# (org.pytorch.serve.wlm.WorkerLifeCycle.ReaderThread); the thread that feeds it has no last part.
_THREAD = re.compile(
    r"W-(?P<worker>\d+)-(?P<model>.+)_(?P<version>[^_]+?)(?:-(?P<stream>stdout|stderr))?"
)


@dataclass(frozen=True)
class LogLine:
    """One line of a log."""

    time: datetime
    level: str
    """One of LEVELS."""
    logger: str
    message: str
    exception: str = ""
    """Java's or Python's trace, several lines."""
    model: str = ""
    """The model, version and port of the worker that the line is about, where it is about one."""
    version: str = ""
    worker: int | None = None
    stream: str = ""
    """stdout or stderr, where a worker wrote the line."""
    request_id: str = ""
    """TorchServe's x-request-id, where the line names one."""


def parse_line(text: bytes, *, at: datetime = _UNKNOWN_TIME) -> LogLine:
    """Return a line; one in another form is a message of the time `at`."""
    decoded = text.decode("utf-8", "replace")
    try:
        fields = json.loads(decoded)
        message = fields["message"]
        line_time = _parse_time(str(fields["time"]))
        if not isinstance(message, str):
            raise TypeError(f"the message is {message!r}")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return LogLine(at, "info", "", decoded)
    said = _parse_object(message)
    level = str(fields.get("level", "info")).lower()
    level = _ALIASES.get(level, level)
    thread = _THREAD.fullmatch(str(fields.get("thread", "")))
    return LogLine(
        time=line_time,
        level=level if level in LEVELS else "info",
        logger=str(fields.get("logger", "")),
        message=message,
        exception=str(fields.get("exception", "")),
        model=thread["model"] if thread else str(said.get("model", "")),
        version=thread["version"] if thread else str(said.get("version", "")),
        worker=int(thread["worker"]) if thread else None,
        stream=(thread["stream"] or "") if thread else "",
        request_id=str(said.get("request_id", "")),
    )


def read_log(
    path: Path, *, follow: bool = False, since: datetime | None = None
) -> Iterator[LogLine]:
    """Yield a log's lines, those from `since` on; with `follow`, also those still to come.

    A log that is rotated while it is followed is read to its end, and then the new one. Following
    ends when the log's folder is gone, as it is after a server's end.

    Raises:
        StorageError: there is no such file, or it cannot be read.
    """
    yield from read_logs([path], follow=follow, since=since)


def read_logs(
    paths: Sequence[Path],
    *,
    follow: bool = False,
    since: datetime | None = None,
    is_wanted: Callable[[LogLine], bool] = lambda line: True,
    last: int | None = None,
) -> Iterator[LogLine]:
    """Yield the wanted lines of several logs in the order of time, as read_log does.

    Of what is there already, only the `last` ones.
    """

    def select(lines: Iterable[LogLine]) -> Iterator[LogLine]:
        return (line for line in lines if (since is None or line.time >= since) and is_wanted(line))

    tails = [_Tail(path) for path in paths]
    try:
        for tail in tails:
            tail.open()
        written = (
            itertools.chain(tail.read(), () if follow else tail.read_rest()) for tail in tails
        )
        merged = select(heapq.merge(*written, key=_get_time))
        yield from merged if last is None else deque(merged, maxlen=last)
        while follow and any(path.parent.exists() for path in paths):
            fresh = sorted((line for tail in tails for line in tail.read()), key=_get_time)
            yield from select(fresh)
            if not fresh:
                time.sleep(POLL_SECONDS)
    finally:
        for tail in tails:
            tail.close()


class _Tail:
    """One log, read up to where it ends now, again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: BinaryIO | None = None
        self._torn = b""
        self._last = _UNKNOWN_TIME

    def open(self) -> None:
        try:
            self._stream = self.path.open("rb")
        except OSError as exc:
            raise StorageError(f"cannot read {self.path}", found=str(exc)) from exc

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def read(self) -> Iterator[LogLine]:
        """Yield the whole lines that were written since, of the file and of one in its place."""
        assert self._stream is not None
        # Asked before reading: what is written after the answer goes to the file in its place.
        replaced = self._open_successor()
        yield from self._read_lines(self._stream)
        if replaced is not None:
            yield from self.read_rest()
            self._stream.close()
            self._stream = replaced
            yield from self._read_lines(replaced)

    def read_rest(self) -> Iterator[LogLine]:
        """Yield a last line without an end, unless it is half a line."""
        torn, self._torn = self._torn, b""
        if torn and (line := self._parse(torn)).logger:
            yield line

    def _open_successor(self) -> BinaryIO | None:
        """Return the file that took this one's place, opened; None where none did."""
        assert self._stream is not None
        try:
            stream = self.path.open("rb")
        except OSError:
            return None  # between two names, or gone
        mine, its = os.fstat(self._stream.fileno()), os.fstat(stream.fileno())
        if (mine.st_dev, mine.st_ino) != (its.st_dev, its.st_ino):
            return stream
        stream.close()
        if mine.st_size < self._stream.tell():
            self._stream.seek(0)  # emptied, as by logrotate's copytruncate
            self._torn = b""
        return None

    def _read_lines(self, stream: BinaryIO) -> Iterator[LogLine]:
        while text := stream.readline():
            text, self._torn = self._torn + text, b""
            if not text.endswith(b"\n"):
                self._torn = text
            elif text := text.rstrip(b"\r\n\0"):
                yield self._parse(text)

    def _parse(self, text: bytes) -> LogLine:
        line = parse_line(text, at=self._last)
        self._last = line.time
        return line


def _get_time(line: LogLine) -> datetime:
    return line.time


def _parse_time(text: str) -> datetime:
    """Return a time with its zone; one without is of this machine's."""
    # Python 3.10 knows neither "Z" nor an offset without its colon.
    text = re.sub(r"([+-]\d\d)(\d\d)$", r"\1:\2", text.replace("Z", "+00:00").replace(",", "."))
    return datetime.fromisoformat(text).astimezone()


def _parse_object(message: str) -> dict[str, Any]:
    """Return the JSON object that a message is, as handlers and the door write them, or {}."""
    if not message.startswith("{"):
        return {}
    try:
        said = json.loads(message)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
