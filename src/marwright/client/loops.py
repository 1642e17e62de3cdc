"""Scripts taken to their result step by step: by a thread that waits, and by a task that awaits."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

from marwright.errors import ClientError

__all__ = ["drive", "drive_async"]

Step = TypeVar("Step")
Result = TypeVar("Result")


def drive(script: Generator[Step, Any, Result], take: Callable[[Step], Any]) -> Result:
    """Give a script what each step brings, or throw into it what went wrong; return its result."""
    try:
        step = next(script)
        while True:
            try:
                brought = take(step)
            except ClientError as exc:
                step = script.throw(exc)
            else:
                step = script.send(brought)
    except StopIteration as end:
        result: Result = end.value
        return result
    finally:
        script.close()


async def drive_async(
    script: Generator[Step, Any, Result], take: Callable[[Step], Coroutine[Any, Any, Any]]
) -> Result:
    """Do what `drive` does, and let others run meanwhile."""
    try:
        step = next(script)
        while True:
            try:
                brought = await take(step)
            except ClientError as exc:
                step = script.throw(exc)
            else:
                step = script.send(brought)
    except StopIteration as end:
        result: Result = end.value
        return result
    finally:
        script.close()
