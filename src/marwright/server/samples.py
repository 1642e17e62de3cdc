"""The samples that an archive carries, sent to a server that has it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from marwright.archive.checks.comparison import compare_values
from marwright.archive.checks.samples import Sample
from marwright.archive.reader import Archive
from marwright.client import Client
from marwright.errors import (
    AnswerError,
    ConnectionFailedError,
    MarwrightError,
    OverloadedError,
    RequestTimeoutError,
)

__all__ = ["BUSY", "judge_sample", "read_sample", "read_samples"]

BUSY = (OverloadedError, ConnectionFailedError, RequestTimeoutError)
"""Of a server that has too much to do, or is being restarted: no answer, neither a wrong one."""
_FOLDER = "MAR-INF/samples"

Request = tuple[Any, Sample]
"""A body as the client takes it, and what is recorded of the answer."""


def read_samples(path: Path) -> list[Request]:
    """Return the samples of an archive as they are sent; none where it carries none.

    Raises:
        ArchiveError: it is broken, or their list cannot be read.
    """
    with Archive.open(path) as archive, tempfile.TemporaryDirectory() as scratch:
        names = tuple(name for name in archive.names if name.startswith(_FOLDER))
        if not names:
            return []
        folder = archive.extract(Path(scratch) / "samples", members=names)
        return [
            (_encode(sample, sample.path.read_bytes()), sample)
            for sample in Sample.read_all(folder)
        ]


def read_sample(path: Path) -> Request | None:
    """Return the first sample; None where there is none, or none can be read."""
    try:
        return next(iter(read_samples(path)), None)
    except (MarwrightError, OSError):
        return None  # TorchServe itself says what it cannot load


def judge_sample(
    client: Client, key: tuple[str, str], body: Any, sample: Sample, *, timeout: float
) -> str:
    """Send a sample to a version; return what is wrong with the answer, "" where nothing is.

    Raises BUSY, and whatever else predict raises but for an answer with an error status.
    """
    try:
        answer = client.predict(key[0], body, version=key[1], timeout=timeout)
    except BUSY:
        raise
    except AnswerError as exc:
        if exc.status == sample.status:
            return ""
        return f"sample {sample.name}: {exc}"
    if sample.status not in (None, answer.status):
        return f"sample {sample.name} is answered with {answer.status} instead of {sample.status}"
    if sample.answer is None:
        return ""
    try:
        found = json.loads(answer.body)
    except (ValueError, RecursionError):
        found = answer.body.decode("utf-8", "replace")
    difference = compare_values(sample.answer, found, subset=True)
    grave = difference is not None and difference.is_grave
    return f"sample {sample.name}: {difference.text}" if difference and grave else ""


def _encode(sample: Sample, content: bytes) -> Any:
    """Return a body as the client takes it, so that it sends the kind that the sample has."""
    kind = sample.content_type or ""
    try:
        if kind.startswith("application/json"):
            return json.loads(content)
        if kind.startswith("text/"):
            return content.decode()
    except ValueError:
        pass  # then as bytes: a sample may be one that is to be refused
    return content
