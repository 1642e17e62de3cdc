"""A trial: a worker's life in a process of its own, which may hang, crash or be killed.

The program is trial_worker.py. It tells what happens through a pipe, one JSON object a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import marwright
from marwright.storage import translate_os_errors

__all__ = ["Batch", "Kind", "parse_events", "Trial", "try_worker"]

Kind = str
"""What is sent of a sample: `whole`, or broken: `empty`, `cut`, `random`."""
GRACE = 2.0
"""Seconds beyond the time limit after which the process is killed: it ends itself at the limit."""
MAX_OUTPUT_BYTES = 64 << 10
"""Of what the handler prints; the last part is kept."""
MAX_EVENTS_BYTES = 256 << 20
POLL = 0.2
"""Seconds between looks whether the process lives, where nobody closed its pipe."""

_TIMEOUT = "Timeout ("
"""How faulthandler.dump_traceback_later begins."""
_PROGRAM = Path(__file__).with_name("trial_worker.py")
# What TorchServe sets (org.pytorch.serve.util.ConfigManager, getBackendConfiguration).
_ENVIRONMENT = {
    "TS_DECODE_INPUT_REQUEST": "true",
    "TS_IPEX_ENABLE": "false",
    "TS_IPEX_GPU_ENABLE": "false",
}


@dataclass(frozen=True)
class Batch:
    """Requests that are sent to the handler together."""

    requests: tuple[tuple[int, Kind], ...]
    """Number of the sample, and what is sent of it."""
    is_optional: bool = False
    """Whether it is left out where time is short."""


@dataclass(frozen=True)
class Trial:
    """What happened in the process."""

    events: list[dict[str, Any]]
    status: int | None
    """How the process ended: its exit status, or the negative number of a signal; None where it
    was ended from here."""
    stack: str
    """The Python stack at the time limit or at a crash, innermost frame first."""
    output: str
    """The end of what the handler printed."""

    @property
    def has_timed_out(self) -> bool:
        """Whether the time limit ended it."""
        return self.status is None or self.stack.startswith(_TIMEOUT)

    def find(self, kind: str) -> dict[str, Any] | None:
        """Return the last event of a kind."""
        return next((event for event in reversed(self.events) if event["event"] == kind), None)


def try_worker(
    folder: Path,
    *,
    samples: Sequence[tuple[Path, str | None]],
    batches: Sequence[Batch],
    timeout: float,
) -> Trial:
    """Load the model of an unpacked archive and send batches to it.

    `samples` are bodies with their content types. Whatever happens, the process and those that it
    started have ended when this returns.

    Raises:
        StorageError: the process cannot be started.
    """
    folder = folder.resolve()
    plan = {
        "folder": str(folder),
        "marwright": str(Path(marwright.__file__).parents[1]),
        "samples": [[str(path.resolve()), content_type] for path, content_type in samples],
        "batches": [[batch.requests, batch.is_optional] for batch in batches],
        "timeout": timeout,
    }
    with (
        translate_os_errors("start the preflight"),
        tempfile.TemporaryFile() as plan_file,
        tempfile.TemporaryFile() as stack_file,
        contextlib.closing(_Pipe(limit=MAX_EVENTS_BYTES)) as events,
        contextlib.closing(_Pipe(limit=MAX_OUTPUT_BYTES)) as output,
    ):
        plan_file.write(json.dumps(plan).encode())
        plan_file.seek(0)
        process = _spawn(folder, plan_file, stack_file, events, output)
        try:
            _listen(process, (events, output), time.monotonic() + timeout + GRACE)
        finally:
            status = process.poll()
            _kill(process)
        stack_file.seek(0)
        stack = stack_file.read(MAX_OUTPUT_BYTES).decode("utf-8", "replace")
        return Trial(
            events=parse_events(bytes(events.content)),
            status=status,
            stack=stack,
            output=output.content[-MAX_OUTPUT_BYTES:].decode("utf-8", "replace"),
        )


class _Pipe:
    """A pipe from the child, of which a bounded part is kept."""

    def __init__(self, *, limit: int) -> None:
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)
        self.content = bytearray()
        self.is_open = True
        self._limit = limit

    def read(self) -> None:
        """Take what is there; of too much the first part is dropped."""
        try:
            while block := os.read(self.reading, 1 << 16):
                self.content += block
                if len(self.content) > 2 * self._limit:
                    del self.content[: -self._limit]
        except BlockingIOError:
            return
        self.is_open = False

    def close_writing(self) -> None:
        """Leave the writing end to the child alone."""
        if self.writing >= 0:
            os.close(self.writing)
            self.writing = -1

    def close(self) -> None:
        """Close both ends."""
        self.close_writing()
        os.close(self.reading)


def _spawn(
    folder: Path, plan: IO[bytes], stack: IO[bytes], events: _Pipe, output: _Pipe
) -> subprocess.Popen[bytes]:
    descriptors = (events.writing, stack.fileno())
    process = subprocess.Popen(
        [sys.executable, str(_PROGRAM), *map(str, descriptors)],
        stdin=plan,
        stdout=output.writing,
        stderr=output.writing,
        cwd=folder,  # as WorkerLifeCycle.startWorkerPython has it
        env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": _python_path(folder, os.environ)},
        pass_fds=descriptors,
        start_new_session=True,
    )
    for pipe in (events, output):
        pipe.close_writing()
    return process


def _python_path(folder: Path, environment: Mapping[str, str]) -> str:
    """Return PYTHONPATH as EnvironmentUtils.getEnvString makes it, its last colon included."""
    inherited = environment.get("PYTHONPATH")
    entries = [inherited] if inherited is not None else []
    return os.pathsep.join([*entries, str(folder), ""])


def _listen(process: subprocess.Popen[bytes], pipes: tuple[_Pipe, _Pipe], deadline: float) -> None:
    """Read both pipes until the first is closed, the process has ended, or the deadline is over."""
    events, _ = pipes
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe.reading, selectors.EVENT_READ, pipe)
        while events.is_open and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(min(left, POLL)):
                pipe = key.data
                pipe.read()
                if not pipe.is_open:
                    selector.unregister(pipe.reading)
            if process.poll() is not None:  # what it started may keep the pipe open
                break
        for pipe in pipes:
            if pipe.is_open:
                pipe.read()
    if not events.is_open:  # by its end, which follows at once
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(GRACE, max(0.0, deadline - time.monotonic())))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the whole group: also what an ended process has left behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def parse_events(content: bytes) -> list[dict[str, Any]]:
    """Return what the program told, but for a line that its death cut off."""
    events = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events
