"""Many inputs to one model, a bounded number of them in flight; without threads or tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from marwright.client.calls import Script
from marwright.client.inference import predict
from marwright.client.results import Answer
from marwright.errors import MarwrightError, UsageError

__all__ = ["ask", "keep_in_flight", "Outcome", "WAIT"]


class Wait:
    """Take one outcome before anything else is sent."""


WAIT: Final = Wait()


class Outcome(NamedTuple):
    """What came of one input."""

    input: Any
    """The input as it was given."""
    result: Answer | MarwrightError
    """The answer, or why there is none."""


def ask(name: str, item: Any, **options: Any) -> Script[Outcome]:
    """Predict one input of many; whatever goes wrong is its outcome. Options are predict's."""
    try:
        answer = yield from predict(name, item, **options)
    except MarwrightError as exc:
        return Outcome(item, exc)
    return Outcome(item, answer)


def keep_in_flight(inputs: Iterable[Any], in_flight: int) -> Iterator[Any]:
    """Yield each input when it is to be sent, and WAIT when an outcome is to be taken first.

    Inputs are read as they are needed: of a million no more than `in_flight` are held.

    Raises:
        UsageError: nothing could be in flight.
    """
    if in_flight < 1:
        raise UsageError("nothing can be in flight", expected="at least 1", found=str(in_flight))
    return _keep_in_flight(inputs, in_flight)


def _keep_in_flight(inputs: Iterable[Any], in_flight: int) -> Iterator[Any]:
    running = 0
    for item in inputs:
        yield item
        running += 1
        if running == in_flight:  # before the next is read: whoever waits may end the inputs
            yield WAIT
            running -= 1
    for _ in range(running):
        yield WAIT
