"""What the gateway answered, read from its access log while it is written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import unquote

from marwright.gateway.configuration import ACCESS_LOG, FALLBACK_STATUSES

__all__ = ["Access", "AccessLog", "list_tries", "Try"]

Arm = Literal["stable", "candidate", "none"]
KEPT = f"{ACCESS_LOG}.1"


@dataclass(frozen=True)
class Try:
    """One version's own answer to a request, whatever the client was told in the end."""

    arm: Arm
    status: int
    """502 where no replica could be reached, 504 where none answered in time."""
    seconds: float
    """From the connection to the answer's last byte, of the last replica that was asked."""
    replicas: tuple[str, ...]
    """host:port of all that were asked, in order."""

    @property
    def failed(self) -> bool:
        """Whether the version is to blame: a status that sends a candidate's request on."""
        return self.status in FALLBACK_STATUSES


@dataclass(frozen=True)
class Access:
    """One request to the gateway."""

    time: float
    """Seconds since the epoch, when it was answered."""
    request: str
    """Its X-Request-ID."""
    method: str
    model: str
    """As decoded from the path; empty where that names none."""
    asked: str
    """The version that the client named; empty for none."""
    arm: Arm
    """Where it was sent first."""
    version: str
    """The version that answered a request of a split; empty for others."""
    status: int
    """What the client got; 499 where it did not wait."""
    seconds: float
    """From the request's first byte to the answer's last."""
    tries: tuple[Try, ...]
    """One for each version that was asked; the stable one comes after a candidate that failed."""


class AccessLog:
    """Reads a gateway's access log piece by piece, over rotations."""

    def __init__(self, folder: Path) -> None:
        self._paths = (folder / KEPT, folder / ACCESS_LOG)
        self._streams: dict[tuple[int, int], IO[bytes]] = {}

    def read(self) -> list[Access]:
        """Return what was answered since the last call; all that is kept at the first."""
        known = {key for path in self._paths if (key := self._open(path))}
        found = []
        for key in list(self._streams):  # in the order in which they were begun
            found += _read_lines(self._streams[key])
            if key not in known:
                self._streams.pop(key).close()
        return found

    def skip(self) -> None:
        """Pass over what was answered since the last call."""
        known = {key for path in self._paths if (key := self._open(path))}
        for key in list(self._streams):
            self._streams[key].seek(0, os.SEEK_END)
            if key not in known:
                self._streams.pop(key).close()

    def close(self) -> None:
        """Close the files."""
        while self._streams:
            self._streams.popitem()[1].close()

    def __enter__(self) -> AccessLog:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self.close()

    def _open(self, path: Path) -> tuple[int, int] | None:
        """Return which file has this name, open by now."""
        try:
            found = path.stat()
            key = (found.st_dev, found.st_ino)
            if key not in self._streams:
                self._streams[key] = path.open("rb")
        except FileNotFoundError:
            return None
        return key


def list_tries(accesses: Iterable[Access], model: str, arm: Arm, *, since: float = 0) -> list[Try]:
    """Return how one arm of a model's split answered by itself since a moment.

    A candidate that failed counts as failed, although the stable version answered the client.
    `since` is in seconds since the epoch.
    """
    return [
        item
        for access in accesses
        if access.model == model and access.time >= since
        for item in access.tries
        if item.arm == arm
    ]


def _read_lines(stream: IO[bytes]) -> list[Access]:
    """Return what stands in whole lines; half a line is read again, once it is whole."""
    accesses: list[Access] = []
    while True:
        line = stream.readline()
        if not line.endswith(b"\n"):
            stream.seek(-len(line), 1)
            return accesses
        access = _parse(line)
        if access is not None:
            accesses.append(access)


def _parse(line: bytes) -> Access | None:
    """Return what a line says; None for one that a full disk has cut."""
    try:
        item = json.loads(line.decode("utf-8", "replace"))
        arm: Arm = item["arm"] or "none"
        return Access(
            time=float(item["time"]),
            request=item["request"],
            method=item["method"],
            model=item["model"],
            asked=item["asked"],
            arm=arm,
            version=unquote(item["version"]),
            status=int(item["status"]),
            seconds=float(item["seconds"]),
            tries=tuple(_list_tries(item, arm)),
        )
    except (ValueError, KeyError, TypeError):
        return None


def _list_tries(item: dict[str, Any], arm: Arm) -> list[Try]:
    """Return one try for each arm; nginx separates replicas by commas, and arms by colons."""
    columns = ("upstream_status", "upstream_seconds", "upstream")
    statuses, seconds, replicas = ([_split(part) for part in _part(item[c])] for c in columns)
    arms: tuple[Arm, ...] = ("candidate", "stable") if arm == "candidate" else (arm,)
    return [
        Try(which, int(status[-1]), float(second[-1]), tuple(replica))
        for which, status, second, replica in zip(arms, statuses, seconds, replicas, strict=False)
        if status and status[-1].isdigit() and second[-1] != "-"  # "-": nobody waited for it
    ]


def _part(value: str) -> list[str]:
    return value.split(" : ") if value else []


def _split(value: str) -> list[str]:
    return value.split(", ")
