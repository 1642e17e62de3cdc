"""Where the time of a batch goes: preprocess, infer, postprocess."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

__all__ = ["Profile"]

_METHODS = {
    "preprocess": "preprocess",
    "inference": "infer",
    "postprocess": "postprocess",
}
"""What a handler made after TorchServe's BaseHandler calls from its `handle`."""


class Profile:
    """Seconds of a handler's stages, summed over batches.

    A handler with the methods of TorchServe's BaseHandler is timed by them. Otherwise the calls of
    torch modules are what infers; what comes before the first of them is taken for preprocess, the
    rest for postprocess. Without any such call everything is `other`.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("preprocess", "infer", "postprocess", "other"), 0.0)
        self.measured_by: Literal["methods", "torch modules", ""] = ""

    @contextlib.contextmanager
    def handling(self, handler: object | None) -> Iterator[None]:
        """Time what happens inside one call of `handle`; `handler` is None for a function."""
        methods = _Spans()
        forwards = _Spans()
        with _timed_methods(handler, methods), _timed_forwards(forwards):
            started = _read_clock()
            try:
                yield
            finally:
                self._add(_read_clock() - started, started, methods, forwards)

    def _add(self, total: float, started: float, methods: _Spans, forwards: _Spans) -> None:
        parts: dict[str, float] = {}
        if methods.seconds:
            self.measured_by = "methods"
            parts = {_METHODS[name]: value for name, value in methods.seconds.items()}
        elif forwards.first is not None:
            self.measured_by = self.measured_by or "torch modules"
            before, infer = forwards.first - started, sum(forwards.seconds.values())
            parts = {"preprocess": before, "infer": infer, "postprocess": total - before - infer}
        for stage, value in parts.items():
            self.seconds[stage] += value
        self.seconds["other"] += total - sum(parts.values())


class _Spans:
    """Outermost calls by name: what a timed call calls in turn is its own time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.first: float | None = None
        self._depth = 0
        self._started = 0.0

    def enter(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._started = _read_clock()
            self.first = self._started if self.first is None else self.first

    def leave(self, name: str) -> None:
        self._depth -= 1
        if self._depth == 0:
            passed = _read_clock() - self._started
            self.seconds[name] = self.seconds.get(name, 0.0) + passed

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.enter()
            try:
                return function(*arguments, **options)
            finally:
                self.leave(name)

        return call


@contextlib.contextmanager
def _timed_methods(handler: object | None, spans: _Spans) -> Iterator[None]:
    methods = {name: getattr(handler, name, None) for name in _METHODS}
    own = getattr(handler, "__dict__", None)
    if own is None or not all(callable(method) for method in methods.values()):
        yield
        return
    before = {name: own[name] for name in methods if name in own}
    own.update({name: spans.timed(name, method) for name, method in methods.items() if method})
    try:
        yield
    finally:
        for name in methods:
            del own[name]
        own.update(before)


@contextlib.contextmanager
def _timed_forwards(spans: _Spans) -> Iterator[None]:
    from torch.nn.modules import module

    hooks = (
        module.register_module_forward_pre_hook(lambda *_: spans.enter()),
        module.register_module_forward_hook(lambda *_: spans.leave("forward"), always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _read_clock() -> float:
    torch = sys.modules["torch"]
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # a kernel that is still running belongs to what started it
    return time.perf_counter()
