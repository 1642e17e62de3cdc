"""What tests of monitoring share: a spool as workers leave it."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest


@pytest.fixture(scope="session")
def spool_record() -> Callable[..., dict[str, Any]]:
    """Return a function that makes one record, as a worker would."""

    def make(request: str = "r", **values: Any) -> dict[str, Any]:
        return {
            "time": time.time(),
            "request": request,
            "item": 0,
            "model": "cnn",
            "version": "1.0",
            "status": 200,
            "seconds": 0.004,
            "features": {"brightness": 0.5},
            "prediction": "7",
            "confidence": 0.75,
            "embedding": [0.5, -1.0],
            **values,
        }

    return make


@pytest.fixture(scope="session")
def spool_write() -> Callable[..., Path]:
    """Return a function that writes lines to a log's spool; nobody holds the file after it."""

    def write(folder: Path, records: Iterable[Any], name: str = "cnn-1.0-7-1-0") -> Path:
        path = folder / "spool" / f"{name}.jsonl"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            for record in records:
                is_raw = isinstance(record, bytes)
                stream.write(record if is_raw else json.dumps(record).encode() + b"\n")
        return path

    return write


@pytest.fixture
def spool_hold() -> Iterator[Callable[[Path], IO[bytes]]]:
    """Return a function that keeps a spool file locked, as a worker that writes it does."""
    held: list[IO[bytes]] = []

    def hold(path: Path) -> IO[bytes]:
        stream = path.open("ab", buffering=0)
        fcntl.flock(stream, fcntl.LOCK_EX)
        held.append(stream)
        return stream

    yield hold
    for stream in held:
        stream.close()
