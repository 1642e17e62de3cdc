"""Methods made of operations: one for whoever waits, one for whoever awaits."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from marwright.client.calls import AnySteps

__all__ = ["awaited", "blocking"]

P = ParamSpec("P")
Result = TypeVar("Result")


class Blocking(Protocol):
    """Takes steps to their result before it returns."""

    def _run(self, steps: AnySteps[Result]) -> Result: ...


class Awaiting(Protocol):
    """Takes steps to their result while others run."""

    def _run(self, steps: AnySteps[Result]) -> Coroutine[Any, Any, Result]: ...


def blocking(operation: Callable[P, AnySteps[Result]]) -> Callable[Concatenate[Any, P], Result]:
    """Return an operation as a method that returns its result."""

    @functools.wraps(operation)
    def run(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        runner: Blocking = self
        return runner._run(operation(*args, **kwargs))

    _describe(run, operation, "{}")
    return run


def awaited(
    operation: Callable[P, AnySteps[Result]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, Result]]:
    """Return an operation as a method whose result is awaited."""

    @functools.wraps(operation)
    def run(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, Result]:
        runner: Awaiting = self
        return runner._run(operation(*args, **kwargs))

    _describe(run, operation, "Coroutine[Any, Any, {}]")
    return run


def _describe(method: Any, operation: Callable[..., Any], form: str) -> None:
    """Give a method the signature that help and editors show: `self`, and what it returns."""
    signature = inspect.signature(operation)
    steps = str(signature.return_annotation)  # Call[Answer], Script[ModelVersion | None]
    result = steps[steps.index("[") + 1 : -1]
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = signature.replace(
        parameters=[this, *signature.parameters.values()],
        return_annotation=form.format(result),
    )
