"""Signals of a supervisor: SIGHUP and SIGUSR1 become wishes, a second Ctrl-C hurries nothing."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["ignore_signals", "take_signals"]


@contextlib.contextmanager
def take_signals(wishes: queue.SimpleQueue[str]) -> Iterator[None]:
    """Put "reload" for SIGHUP and "restart" for SIGUSR1 while the block runs.

    A SIGHUP because the terminal was closed raises SystemExit, as SIGTERM does.
    """
    terminal = _has_terminal()

    def reload(number: int, frame: FrameType | None) -> None:
        if terminal and not _has_terminal():
            raise SystemExit(128 + number)
        wishes.put("reload")  # a SimpleQueue may be filled by a signal's handler

    def restart(number: int, frame: FrameType | None) -> None:
        wishes.put("restart")

    with _handlers({signal.SIGHUP: reload, signal.SIGUSR1: restart}):
        yield


@contextlib.contextmanager
def ignore_signals() -> Iterator[None]:
    """Let nothing interrupt the block but SIGKILL."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    with _handlers(dict.fromkeys(numbers, signal.SIG_IGN)):
        yield


@contextlib.contextmanager
def _handlers(handlers: dict[signal.Signals, signal._HANDLER]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


def _has_terminal() -> bool:
    """Whether this process has a terminal that could be closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
