"""The server's log: why a worker died, in the worker's own words."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from marwright.errors import ModelLoadError
from marwright.server.log import parse_line

__all__ = ["read_failures", "read_tail", "WorkerFailure"]

SILENT_DEATHS = 3
"""Starts of one worker, none of which got READY, that count as a death without a traceback."""

_WORKER_LOGGERS = ("MODEL_LOG", "org.pytorch.serve.wlm.WorkerLifeCycle")
_DIED = "Backend worker process died."
# What TorchServe says before the traceback that ended the worker (ts/model_service_worker.py). A
# handler may have logged others before, of exceptions that it had caught.
_LAST_WORDS = re.compile(rf"Failed to load model |Load model .* OOM, |{re.escape(_DIED)}")
# A worker starts with "[PID]"; one that cannot import ts only ends, which the thread that reads its
# output says.
_STARTED = "[PID]"
_ENDED = re.compile(r"Stopped Scanner - W-.*-stdout$")
# What follows a traceback in the same stream.
_AFTER_MESSAGE = (
    "During handling of the above",
    "The above exception was the direct cause",
    "Traceback",
    _DIED,
    "Stopped Scanner",
    "s_name_part0=",
    "Listening on ",
    _STARTED,
)

_TRACEBACK = "Traceback (most recent call last):"
_TORCHSERVE_FRAME = re.compile(
    r'  File ".*[/\\](?:ts[/\\]model_(?:service_worker|loader)\.py'
    r'|importlib[/\\]__init__\.py)"|  File "<frozen importlib'
)


@dataclass(frozen=True)
class WorkerFailure:
    """A worker that ended while it loaded a model."""

    model: str
    version: str
    traceback: str
    """What ended it, without TorchServe's own frames; empty where it left no traceback."""

    @property
    def reason(self) -> str:
        """Exception and message in one line: its first, or two where the first only announces."""
        lines = self.traceback.split("\n")[1:]
        message = [line.strip() for line in lines[_count_frame_lines(lines) :]]
        return " ".join(message[: 2 if message and message[0].endswith(":") else 1])

    @property
    def place(self) -> str:
        """File and line of the innermost frame, such as `handler.py:12`."""
        frames = re.findall(r'  File "(?:.*/)?([^"/]+)", line (\d+)', self.traceback)
        return f"{frames[-1][0]}:{frames[-1][1]}" if frames else ""

    def to_error(self) -> ModelLoadError:
        """Return the error that quotes it."""
        reason = self.reason or "no traceback: it was killed, or ended itself"
        return ModelLoadError(
            f"{self.model} {self.version} cannot be loaded",
            found=f"{reason} at {self.place}" if self.place else reason,
            remedy="mend the handler or the weights and pack again",
            detail=self.traceback,
        )


def read_failures(path: Path, *, offset: int = 0) -> list[WorkerFailure]:
    """Return the workers that died after the log's first `offset` bytes, in order."""
    output: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for line in map(parse_line, _read(path, offset)):
        if line.stream and line.logger in _WORKER_LOGGERS:
            key = str(line.worker), line.model, line.version
            # Two threads write the two streams, so that lines of one may part those of the other.
            streams = output.setdefault(key, {"stdout": [], "stderr": []})
            streams[line.stream].append(line.message)
    failures = []
    for (_, model, version), streams in output.items():
        lines = streams["stdout"]
        traceback = _find_traceback(lines)
        starts = sum(line.startswith(_STARTED) for line in lines)
        ends = sum(_ENDED.match(line) is not None for line in lines)
        if max(starts, ends) >= SILENT_DEATHS:
            traceback = traceback or _find_traceback(streams["stderr"])
        elif not (traceback and (_DIED in lines or (ends and _count_last_words(lines)))):
            # Alive, or its last words are still on their way into the log. TorchServe stops a
            # worker that answers 500 to a load, often before that one can say that it died.
            continue
        failures.append(WorkerFailure(model, version, traceback))
    return failures


def read_tail(path: Path, *, lines: int = 15) -> str:
    """Return the last lines of a log in plain text, without Java's stack frames."""
    written = [text for text in _read(path, 0) if not text.startswith(b"\tat ")]
    kept: list[str] = []
    for line in map(parse_line, written[-lines:]):
        who = f"{line.level} {line.logger} - " if line.logger else ""
        trace = [row for row in line.exception.split("\n") if row and not row.startswith("\tat ")]
        kept += [f"{who}{line.message}", *trace]
    return "\n".join(kept[-lines:])


def _read(path: Path, offset: int) -> list[bytes]:
    """Return the whole lines after an offset."""
    try:
        if not path.is_file():
            return []  # not written yet, or a device, which has no end
        with path.open("rb") as stream:
            if stream.seek(0, os.SEEK_END) < offset:
                offset = 0  # the log was rotated in between
            stream.seek(offset)
            return [line for line in stream.read().split(b"\n") if line.strip()]
    except OSError:
        return []  # not ours to read: there is nothing to tell


def _count_last_words(lines: list[str]) -> int:
    return sum(_LAST_WORDS.match(line) is not None for line in lines)


def _find_traceback(lines: list[str]) -> str:
    """Return the first traceback after the worker's last words, or "" where none is complete.

    The first one of a chain is the cause, and what follows hides it. TorchServe itself chains: an
    ImportError inside a handler is followed by one about ts.torch_handler (ts/model_loader.py).
    """
    spoken = [number for number, line in enumerate(lines) if _LAST_WORDS.match(line)]
    lines = lines[spoken[0] :] if spoken else lines
    if _TRACEBACK not in lines:
        return ""
    block = lines[lines.index(_TRACEBACK) + 1 :]
    end = _count_frame_lines(block)
    if end == len(block):
        return ""
    return "\n".join([_TRACEBACK, *_drop_torchserve(block[:end]), *_message(block[end:])])


def _count_frame_lines(lines: list[str]) -> int:
    """Count the lines before the exception's own, the first that is not indented."""
    return next((number for number, line in enumerate(lines) if line[:1] != " "), len(lines))


def _message(lines: list[str]) -> list[str]:
    """Return the exception's line and the lines that its message goes on for."""
    message = lines[:1]
    for line in lines[1:20]:
        if not line.strip() or line.startswith(_AFTER_MESSAGE):
            break
        message.append(line)
    return message


def _drop_torchserve(frames: list[str]) -> list[str]:
    kept: list[str] = []
    dropping = False
    for line in frames:
        if line.startswith("  File "):
            dropping = _TORCHSERVE_FRAME.match(line) is not None
        if not dropping:
            kept.append(line)
    return kept
