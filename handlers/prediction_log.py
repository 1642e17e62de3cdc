"""The prediction log: a sample of requests and answers, written by a thread of its own.

The path of a request pays for noting what is to be logged, in memory that is bounded; digests,
features and JSON are made by the thread, and what it writes is in the kernel's hands within a
second. Whatever stands in its way, a full disk or a folder it may not write, costs lines of the
log, which are counted, and no answer.

Settings: the environment variable MARWRIGHT_PREDICTIONS, which `marwright serve` sets (JSON), else
`prediction_log` under `handler:`; see LogSettings.
"""

from __future__ import annotations

import atexit
import base64
import hashlib
import json
import logging
import math
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from collation import Tensors
from inference_request import Part
from logits import SCORES
from problem import RejectedInput
from spool import Spool

__all__ = ["LogSettings", "Note", "Observation", "open_log", "PredictionLog", "VARIABLE"]

_log = logging.getLogger(__name__)

VARIABLE = "MARWRIGHT_PREDICTIONS"
FLUSH_SECONDS = 0.5
RETRY_SECONDS = 1.0
"""How long nothing is tried after a failure; what comes meanwhile waits, as far as it may."""
MOST_NOTES = 10_000
MOST_BYTES = 32 << 20
"""What may wait to be written: predictions, and bytes of their inputs."""
AT_ONCE = 64
"""Notes made into lines together: many, since each time costs a millisecond; and few, since the
thread that answers waits for the interpreter's lock."""
LABEL_CHARACTERS = 1000
SMALL = 64
"""Numbers of an array that is kept whole as JSON; a larger one is kept as its digest."""

INPUTS = ("none", "digest", "whole")
FIELDS = (
    *("request", "digest", "input", "content_type", "seconds"),
    *("features", "prediction", "confidence", "score", "embedding"),
)
"""What can be redacted."""


@dataclass(frozen=True)
class LogSettings:
    """What is logged, and where."""

    folder: Path
    """Its folder `spool` is written."""
    share: float = 10.0
    """Percent of requests, chosen by their ids: servers and versions choose the same."""
    inputs: str = "digest"
    """What is kept of an input: none, its SHA-256 (digest), or also the input (whole)."""
    input_bytes: int = 1 << 16
    """Size above which an input is kept as its digest alone."""
    redact: frozenset[str] = frozenset()
    """What is never written: FIELDS, or features.NAME."""
    score: str = "none"
    """How far an input is from what the model learnt: none, or one of logits.SCORES."""
    spool_bytes: int = 1 << 26
    """Most bytes of the spool; what comes above is lost, and counted."""

    @classmethod
    def parse(cls, values: Any) -> LogSettings:
        """Read settings; a key that is not known is left alone: newer servers may have more.

        Raises:
            ValueError: a value that cannot be used. A redaction that is not understood is one.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("folder"), (str, Path)):
            raise ValueError("prediction_log: expected a mapping with a folder")
        default = cls(Path(values["folder"]))
        redact = values.get("redact", [])
        if not isinstance(redact, (list, tuple)):
            raise ValueError(f"prediction_log.redact: expected a list, found {redact!r}")
        for name in redact:
            if name not in FIELDS and not str(name).startswith("features."):
                raise ValueError(
                    f"prediction_log.redact: expected features.NAME or one of {', '.join(FIELDS)}, "
                    f"found {name!r}"
                )
        found = cls(
            folder=default.folder,
            share=float(values.get("share", default.share)),
            inputs=str(values.get("inputs", default.inputs)),
            input_bytes=int(values.get("input_bytes", default.input_bytes)),
            redact=frozenset(redact),
            score=str(values.get("score", default.score)),
            spool_bytes=int(values.get("spool_bytes", default.spool_bytes)),
        )
        if not 0 <= found.share <= 100:
            raise ValueError(f"prediction_log.share: expected 0 to 100, found {found.share}")
        for key, choices in (("inputs", INPUTS), ("score", ("none", *SCORES))):
            if getattr(found, key) not in choices:
                raise ValueError(
                    f"prediction_log.{key}: expected one of {', '.join(choices)}, "
                    f"found {getattr(found, key)!r}"
                )
        return found


class Observation(NamedTuple):
    """What a handler tells of one thing and the model's output for it."""

    features: Mapping[str, float] = MappingProxyType({})
    """Numbers that say what the input is like."""
    prediction: str | None = None
    confidence: float | None = None
    """In its prediction, 0 to 1."""
    embedding: Sequence[float] = ()
    """What the model makes of the input, as numbers."""
    score: float | None = None
    """How far it is from what the model learnt."""


class Note(NamedTuple):
    """One thing that was asked, and answered, as the path of the request leaves it."""

    time: float
    request: str
    item: int
    status: int
    seconds: float
    value: Any
    """What came: bytes, or a Part that holds text or base64; None for numbers."""
    content_type: str
    tensors: Tensors
    output: Any
    """None for a request that failed, which has no tensors either."""


Describe = Callable[[Sequence[Note]], Sequence[Observation]]


def open_log(
    setting: Any,
    *,
    model: str,
    version: str,
    describe: Describe,
    count: Callable[[int, int], None],
) -> PredictionLog | None:
    """Return the log that the variable asks for, or else the handler's setting; None for neither.

    Raises:
        ValueError: the handler's setting cannot be used. What the variable says is the server's:
            it may be newer than this file, so where it cannot be used nothing is logged.
    """
    if text := os.environ.get(VARIABLE):
        try:
            settings = LogSettings.parse(json.loads(text))
        except (ValueError, TypeError) as exc:
            _log.error("the prediction log is off: %s: %s", VARIABLE, exc)
            return None
    elif setting:
        settings = LogSettings.parse(setting)
    else:
        return None
    if not settings.share:
        return None
    return PredictionLog(settings, model=model, version=version, describe=describe, count=count)


class PredictionLog:
    """Takes notes of predictions and writes them; see the module."""

    def __init__(
        self,
        settings: LogSettings,
        *,
        model: str,
        version: str,
        describe: Describe,
        count: Callable[[int, int], None] = lambda logged, lost: None,
    ) -> None:
        self.settings = settings
        self._lines = _Lines(settings, model, version)
        self._describe = describe
        self._count = count
        """Is told how many were logged, and how many lost."""
        self._least = round(settings.share * 100)
        self._spool = Spool(
            settings.folder / "spool",
            model=model,
            version=version,
            most_bytes=settings.spool_bytes,
        )
        self._ended = threading.Event()
        self._is_failing = False
        self._begin()
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._go_on_in_child)

    def takes(self, request: str) -> bool:
        """Tell whether a request is one of the sample."""
        return zlib.crc32(request.encode("utf-8", "replace")) % 10_000 < self._least

    def keep(self, notes: Sequence[Note]) -> None:
        """Take notes; what there is no room for is lost."""
        sizes = [_weigh((_unwrap(note.value), note.tensors, note.output)) for note in notes]
        with self._lock:
            fits = len(self._waiting) + len(notes) <= MOST_NOTES
            if fits and self._bytes + sum(sizes) <= MOST_BYTES:
                self._waiting.extend(zip(notes, sizes, strict=True))
                self._bytes += sum(sizes)
                return
        self._count(0, len(notes))

    def flush(self) -> None:
        """Write what waits, now."""
        self._drain(patient=False)

    def close(self) -> None:
        """Write what waits and end."""
        if not self._ended.is_set():
            self._ended.set()
            self.flush()
            self._spool.close()
            atexit.unregister(self.close)

    def _begin(self) -> None:
        self._waiting: deque[tuple[Note, int]] = deque()
        self._bytes = 0
        self._retry_at = 0.0
        self._lock = threading.Lock()
        """Held for a moment, to take from or add to what waits."""
        self._writing = threading.Lock()
        threading.Thread(target=self._write_forever, name="prediction log", daemon=True).start()

    def _go_on_in_child(self) -> None:
        """Begin anew in a forked process: with no thread, and its parent's file open, it is."""
        if not self._ended.is_set():
            self._spool.leave()
            self._begin()

    def _write_forever(self) -> None:
        while not self._ended.wait(FLUSH_SECONDS):
            self._drain()

    def _drain(self, *, patient: bool = True) -> None:
        with self._writing:
            while not (patient and time.monotonic() < self._retry_at):
                notes = self._take()
                if not notes:
                    self._spool.end_old()
                    return
                self._write(notes)

    def _take(self) -> list[Note]:
        with self._lock:
            taken = [self._waiting.popleft() for _ in range(min(AT_ONCE, len(self._waiting)))]
            self._bytes -= sum([size for _, size in taken])
        return [note for note, _ in taken]

    def _drop(self) -> int:
        """Let go of all that waits; return how much it was."""
        with self._lock:
            count = len(self._waiting)
            self._waiting.clear()
            self._bytes = 0
        return count

    def _write(self, notes: Sequence[Note]) -> None:
        """Write notes as lines; what cannot be written is lost, and it is tried again later."""
        try:
            lines = [
                self._lines.make(note, observation)
                for note, observation in zip(notes, self._observe(notes), strict=True)
            ]
            self._spool.write(lines)
        except Exception as exc:  # nothing may end this thread
            # Where the disk is full, what waits has no place either: its memory is let go.
            self._count(0, len(notes) + (self._drop() if isinstance(exc, OSError) else 0))
            self._retry_at = time.monotonic() + RETRY_SECONDS
            if not self._is_failing:
                _log.error("the prediction log cannot be written, and loses lines: %s", exc)
            self._is_failing = True
            return
        self._count(len(notes), 0)
        if self._is_failing:
            _log.warning("the prediction log is written again")
        self._is_failing = False

    def _observe(self, notes: Sequence[Note]) -> Iterator[Observation]:
        """Give what the handler says of each; nothing of those that failed."""
        answered = [note for note in notes if note.output is not None]
        try:
            told = iter(self._describe(answered) if answered else ())
            found = {id(note): next(told) for note in answered}
        except Exception as exc:  # a handler's own describe; the rest of the line can be written
            if not self._is_failing:
                _log.error("describe failed: %s: %s", type(exc).__name__, exc)
            found = {}
        nothing = Observation()
        return (found.get(id(note), nothing) for note in notes)


class _Lines:
    """Makes lines of JSON."""

    def __init__(self, settings: LogSettings, model: str, version: str) -> None:
        self._settings = settings
        self._names = {"model": _clean(model), "version": _clean(version)}
        redact = settings.redact
        self._redacted = [name for name in FIELDS if name in redact]
        self._features = frozenset(
            name.removeprefix("features.") for name in redact if name.startswith("features.")
        )
        self._encode = json.JSONEncoder(
            separators=(",", ":"), allow_nan=False, check_circular=False
        ).encode

    def make(self, note: Note, observation: Observation) -> bytes:
        """Return one line. What is redacted is taken out before the line is made."""
        line: dict[str, Any] = {
            "time": round(note.time, 6),
            "request": note.request,
            "item": note.item,
            **self._names,
            "status": note.status,
            "seconds": round(note.seconds, 6),
            **self._describe_input(note),
        }
        features = {
            name: float(value)
            for name, value in observation.features.items()
            if math.isfinite(value)
        }
        for name in self._features:
            features.pop(name, None)
        if features:
            line["features"] = features
        if observation.prediction is not None:
            line["prediction"] = _clean(observation.prediction)[:LABEL_CHARACTERS]
        for name, value in (("confidence", observation.confidence), ("score", observation.score)):
            if value is not None and math.isfinite(value):
                line[name] = float(value)
        embedding = list(map(float, observation.embedding))
        if embedding and all(map(math.isfinite, embedding)):
            line["embedding"] = embedding
        for name in self._redacted:
            line.pop(name, None)
        return self._encode(line).encode("ascii") + b"\n"

    def _describe_input(self, note: Note) -> dict[str, str]:
        """Return digest and input: of bytes as they came, of numbers as the model got them."""
        if self._settings.inputs == "none":
            return {}
        content, kind = _read_bytes(note.value), note.content_type
        if content is not None:
            found = {"digest": hashlib.sha256(content).hexdigest()}
        elif note.tensors:
            digest = hashlib.sha256()
            for tensor in note.tensors:
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            found = {"digest": digest.hexdigest()}
            if len(note.tensors) == 1 and note.tensors[0].numel() <= SMALL:
                content, kind = json.dumps(note.tensors[0].tolist()).encode(), "application/json"
        else:
            return {}
        if kind:
            found["content_type"] = _clean(kind)[:200]
        is_whole = self._settings.inputs == "whole"
        if is_whole and content is not None and len(content) <= self._settings.input_bytes:
            found["input"] = base64.b64encode(content).decode("ascii")
        return found


def _weigh(value: Any) -> int:
    """Return about how many bytes something holds."""
    if type(value) is torch.Tensor:  # isinstance takes five times as long
        return value.numel() * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum([_weigh(item) for item in value])
    if isinstance(value, (bytearray, bytes, memoryview, str)):
        return len(value)
    if isinstance(value, Mapping):
        return sum([_weigh(item) for item in value.values()])
    return int(getattr(value, "nbytes", 0))  # NumPy's arrays, and kinds of tensors


def _read_bytes(value: Any) -> bytes | bytearray | memoryview | None:
    """Return what came as bytes: as they are, or from base64; None for anything else."""
    part = value if isinstance(value, Part) else Part(value)
    try:
        return part.read_bytes()
    except RejectedInput:
        return part.value.encode("utf-8", "replace") if isinstance(part.value, str) else None


def _unwrap(value: Any) -> Any:
    return value.value if isinstance(value, Part) else value


def _clean(text: str) -> str:
    """Return text without lone surrogates, which no file of UTF-8 can hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
