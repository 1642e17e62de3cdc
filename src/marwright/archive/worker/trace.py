"""An exception of a handler's, told as its author needs it: reason, place, traceback."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from marwright.archive.worker.ownership import find_own

__all__ = ["cut_traceback", "describe", "is_interruption", "Trace"]

_OURS = str(Path(__file__).parent) + os.sep
_COMMAND_LINE = str(Path(__file__).parents[2] / "cli") + os.sep
_NOT_THE_HANDLERS = ("ts/service.py", "ts/model_loader.py", "importlib/__init__.py")


class Trace(NamedTuple):
    """What is to be told of an exception."""

    reason: str
    """Type and message in one line."""
    place: str
    """`handler.py:12`: the innermost frame below the given folders, or the innermost one."""
    text: str
    """The traceback without the frames of whoever called the handler."""


def describe(error: BaseException, roots: Sequence[str]) -> Trace:
    """Describe an exception; files below `roots`, the handler's folders, are named relatively."""
    whole = traceback.TracebackException.from_exception(error)
    for part in _walk(whole):
        part.stack = traceback.StackSummary.from_list(
            [frame for frame in part.stack if not _is_caller(frame.filename)]
        )
    text = "".join(whole.format()).rstrip()
    for root in roots:
        text = text.replace(f'File "{root}{os.sep}', 'File "')
    return Trace(_reason(error), _find_place(error, whole.stack, roots), text)


def cut_traceback(error: BaseException, roots: Sequence[str]) -> TracebackType | None:
    """Return an exception's traceback from the handler's first frame to its last one."""
    entries = []
    entry = error.__traceback__
    while entry is not None:
        entries.append(entry)
        entry = entry.tb_next
    own = [bool(find_own(item.tb_frame.f_code.co_filename, roots)) for item in entries]
    if not any(own):
        return error.__traceback__
    first, last = own.index(True), len(own) - own[::-1].index(True)
    cut: TracebackType | None = None
    for item in reversed(entries[first:last]):
        cut = TracebackType(cut, item.tb_frame, item.tb_lasti, item.tb_lineno)
    return cut


def is_interruption(error: BaseException) -> bool:
    """Tell Ctrl-C and SIGTERM, which are not the handler's doing."""
    if isinstance(error, Exception):
        return False
    entry = error.__traceback__
    while entry is not None and entry.tb_next is not None:
        entry = entry.tb_next
    # The command line turns SIGTERM into a SystemExit, wherever the handler happens to be.
    innermost = entry.tb_frame.f_code.co_filename if entry else ""
    return not isinstance(error, SystemExit) or innermost.startswith(_COMMAND_LINE)


def _walk(part: traceback.TracebackException | None) -> Iterator[traceback.TracebackException]:
    while part is not None:
        yield part
        part = part.__cause__ or part.__context__


def _is_caller(filename: str) -> bool:
    if filename.startswith((_OURS, "<frozen importlib")):
        return True
    return filename.replace(os.sep, "/").endswith(_NOT_THE_HANDLERS)


def _find_place(error: BaseException, stack: traceback.StackSummary, roots: Sequence[str]) -> str:
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{find_own(error.filename, roots) or Path(error.filename).name}:{error.lineno}"
    for frame in reversed(stack):
        if name := find_own(frame.filename, roots):
            return f"{name}:{frame.lineno}"
    return f"{Path(stack[-1].filename).name}:{stack[-1].lineno}" if stack else ""


def _reason(error: BaseException) -> str:
    """Return the message's first line, or two where the first only announces the second."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
