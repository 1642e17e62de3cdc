"""What a worker process has for itself, and a model in this process must not leave behind.

A worker's modules, sys.path, working folder, logging and torch threads are its own. Here they are
swapped in around every call into the handler, so that two models can have modules of one name, and
swapped out after it. They belong to the whole process: a lock keeps models apart, but other threads
see them while a handler runs.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from marwright.archive.worker.ownership import find_own
from marwright.storage import translate_os_errors

__all__ = ["Isolation"]

_LOCK = threading.RLock()


class Isolation:
    """The process as one model sees it."""

    def __init__(self, roots: Sequence[Path], *, handler_module: str) -> None:
        """`roots` are the folders whose modules are the model's own; the last is its model_dir."""
        self.roots = tuple(map(str, roots))
        self._handler_module = handler_module
        self._modules: dict[str, ModuleType] = {}
        self._states: list[Any] = [
            [*self.roots, *_list_installed()],
            _read_logging(),
            True,
            torch.get_num_threads(),
            self.roots[-1],
        ]

    @property
    def sources(self) -> tuple[Path, ...]:
        """The files of the model's own modules that were imported so far."""
        files = (getattr(module, "__file__", None) for module in self._modules.values())
        return tuple(sorted({Path(file) for file in files if file}))

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Swap the model's state in, and out again whatever happens."""
        with _LOCK, self._swapped_states(), self._swapped_modules(), _quiet_torchserve():
            yield

    def forget(self) -> None:
        """Drop the model's modules, as the end of a worker does."""
        self._modules.clear()
        for entry in list(sys.path_importer_cache):
            if entry in self.roots or find_own(entry, self.roots):
                del sys.path_importer_cache[entry]
        importlib.invalidate_caches()

    @contextlib.contextmanager
    def _swapped_states(self) -> Iterator[None]:
        with translate_os_errors("use the working folder"):
            outside = [read() for read, _ in _STATES]
        try:
            for (_, write), state in zip(_STATES, self._states, strict=True):
                write(state)
            yield
        finally:
            # What the handler changed is the model's: sys.path, logging, threads.
            for index, (read, write) in enumerate(_STATES):
                with contextlib.suppress(FileNotFoundError):  # it left a folder that is gone
                    self._states[index] = read()
                write(outside[index])

    @contextlib.contextmanager
    def _swapped_modules(self) -> Iterator[None]:
        own = {module.name for module in pkgutil.iter_modules(self.roots)} | {self._handler_module}
        shadowed = own & sys.modules.keys()
        hidden = {
            name: sys.modules.pop(name)
            for name in (list(sys.modules) if shadowed else ())
            if name.partition(".")[0] in shadowed
        }
        before = sys.modules.keys() - self._modules.keys()
        sys.modules.update(self._modules)
        try:
            yield
        finally:
            added = {name: sys.modules[name] for name in sys.modules.keys() - before}
            self._modules = {
                name: module
                for name, module in added.items()
                if name in self._modules or self._is_own(module)
            }
            for name in self._modules:
                del sys.modules[name]
            sys.modules.update(hidden)

    def _is_own(self, module: ModuleType) -> bool:
        """Tell whether a module was found below the roots; torch and its like stay for everyone."""
        spec = getattr(module, "__spec__", None)
        places = [getattr(spec, "origin", None), *(getattr(module, "__path__", None) or ())]
        return any(isinstance(place, str) and find_own(place, self.roots) for place in places)


def _list_installed() -> list[str]:
    """Return sys.path without the working folder and the running script's: a worker has neither."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    absent = {Path().resolve(), *([Path(script).resolve().parent] if script else [])}
    return [entry for entry in sys.path if Path(entry).resolve() not in absent]


def _read_logging() -> tuple[list[logging.Handler], int]:
    return logging.root.handlers[:], logging.root.level


def _set_logging(state: tuple[list[logging.Handler], int]) -> None:
    logging.root.handlers[:] = state[0]
    if logging.root.level != state[1]:
        logging.root.setLevel(state[1])  # which makes every logger look up its level anew


def _set_path(entries: list[str]) -> None:
    sys.path[:] = entries


def _set_bytecode(forbidden: bool) -> None:
    sys.dont_write_bytecode = forbidden


def _set_threads(count: int) -> None:
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


_STATES: tuple[tuple[Callable[[], Any], Callable[[Any], None]], ...] = (
    (sys.path.copy, _set_path),
    # TorchServe's calls of logging.info() add a handler where the root logger has none.
    (_read_logging, _set_logging),
    # A folder that is used in place stays as it is; and what was compiled from a handler that
    # changed within a second would be taken for the new one's.
    (lambda: sys.dont_write_bytecode, _set_bytecode),
    (torch.get_num_threads, _set_threads),
    (os.getcwd, os.chdir),
)


@contextlib.contextmanager
def _quiet_torchserve() -> Iterator[None]:
    """Keep TorchServe's own log lines back: what they say of failures, an Answer says better."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return not record.pathname.replace(os.sep, "/").endswith(
            ("ts/service.py", "ts/protocol/otf_message_handler.py")
        )

    loggers = logging.root, logging.getLogger("ts.service")
    for logger in loggers:
        logger.addFilter(is_wanted)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_wanted)
