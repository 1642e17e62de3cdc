"""The server's log: why a worker died, in the worker's own words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from marwright.errors import ModelLoadError

__all__ = ["read_failures", "read_tail", "WorkerFailure"]

# Worker output reaches the log through Java threads named W-<port>-<model>_<version>-stdout
# (org.pytorch.serve.wlm.WorkerLifeCycle.ReaderThread).
_LINE = re.compile(
    r"^\S+ \[\w+ *\] W-(?P<worker>\d+)-(?P<model>.+)_(?P<version>[^_]+)-std(?:out|err)"
    r" MODEL_LOG - (?P<text>.*)$"
)
SILENT_DEATHS = 3
"""Starts of one worker, none of which got READY, that count as a death without a traceback."""

_TRACEBACK = "Traceback (most recent call last):"
_CHAINED = ("During handling of the above", "The above exception was the direct cause")
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
    """The first traceback it printed, without TorchServe's own frames; empty where it left none."""

    @property
    def reason(self) -> str:
        """The traceback's last line: exception and message."""
        return self.traceback.rsplit("\n", 1)[-1]

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
    output: dict[tuple[str, str, str], list[str]] = {}
    for line in _read(path, offset).splitlines():
        if match := _LINE.match(line):
            key = match["worker"], match["model"], match["version"]
            output.setdefault(key, []).append(match["text"])
    failures = []
    for (_, model, version), lines in output.items():
        starts = sum(line.startswith("[PID]") for line in lines)
        if starts >= SILENT_DEATHS or any("Backend worker process died" in line for line in lines):
            failures.append(WorkerFailure(model, version, _first_traceback(lines)))
    return failures


def read_tail(path: Path, *, lines: int = 15) -> str:
    """Return the last lines of a log, without Java's stack frames."""
    kept = [line for line in _read(path, 0).splitlines() if not line.startswith("\tat ")]
    return "\n".join(kept[-lines:])


def _read(path: Path, offset: int) -> str:
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            return stream.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _first_traceback(lines: list[str]) -> str:
    """Return the first traceback: in a chain it is the cause, and what follows hides it.

    TorchServe itself chains: an ImportError inside a handler is followed by one about
    ts.torch_handler (ts/model_loader.py).
    """
    if _TRACEBACK not in lines:
        return ""
    block = lines[lines.index(_TRACEBACK) + 1 :]
    frames: list[str] = []
    for number, line in enumerate(block):
        if not line.startswith(" "):
            return "\n".join([_TRACEBACK, *_drop_torchserve(frames), *_message(block[number:])])
        frames.append(line)
    return "\n".join([_TRACEBACK, *_drop_torchserve(frames)])


def _message(lines: list[str]) -> list[str]:
    """Return the exception's line and the lines that its message goes on for."""
    message = lines[:1]
    for line in lines[1:20]:
        if not line.strip() or line.startswith((*_CHAINED, "Traceback", "Backend worker")):
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
