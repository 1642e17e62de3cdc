"""One life of a worker: from loading a model to its death, or until it is no longer needed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

from ts.protocol.otf_message_handler import retrieve_msg

from marwright.archive.worker.answer import Answer
from marwright.archive.worker.call import Call
from marwright.archive.worker.frontend import DIED, make_answer
from marwright.archive.worker.isolation import Isolation
from marwright.archive.worker.loader import Assignment, load_service
from marwright.archive.worker.profile import Profile
from marwright.archive.worker.protocol import Connection, encode_batch, merge_replies, read_reply
from marwright.archive.worker.request import Message
from marwright.archive.worker.trace import cut_traceback, describe, is_interruption
from marwright.errors import HandlerError

__all__ = ["Debugger", "Worker"]

Debugger = Callable[[TracebackType | None], None]


class Worker:
    """A handler in TorchServe's service, called with its own view of the process."""

    def __init__(
        self, assignment: Assignment, isolation: Isolation, *, debugger: Debugger | None
    ) -> None:
        """Import the handler and call its initialize.

        Raises:
            HandlerError: whatever the handler raises; `detail` is the traceback.
        """
        self.alive = True
        self._isolation = isolation
        self._debugger = debugger
        self._profile: Profile | None = None
        self._call = Call(isolation.roots)
        with isolation.entered():
            try:
                loaded = load_service(assignment)
            except BaseException as exc:
                if is_interruption(exc):
                    raise
                self._debug(exc)
                raise _to_error(exc, assignment, isolation) from exc
        self.import_seconds = loaded.import_seconds
        self.initialize_seconds = loaded.initialize_seconds
        self._service: Any = loaded.service
        self._entry_point: Any = loaded.service._entry_point
        # Service.predict turns what the handler raises into a reply; this keeps it.
        loaded.service._entry_point = self._handle

    def answer(
        self, batch: Mapping[str, Message], *, max_bytes: int, profile: Profile | None
    ) -> list[Answer]:
        """Answer a batch in order; keys are request ids. No longer `alive` where it died of it."""
        connection = Connection(encode_batch(batch))
        self._call = Call(self._isolation.roots)
        self._profile = profile
        started = time.perf_counter()
        try:
            with self._isolation.entered():
                self._service.set_cl_socket(connection)
                _, message = retrieve_msg(connection)
                connection.sendall(self._service.predict(message))
            reply = merge_replies([read_reply(item, max_bytes) for item in connection.sent])
            answers = [make_answer(reply, key) for key in batch]
            failure = self._call.explain(reply.message)
        except BaseException as exc:
            if is_interruption(exc):
                raise
            answers = [DIED] * len(batch)
            failure = self._call.explain_death(exc)
            self.end()
        seconds = time.perf_counter() - started
        return [replace(answer, seconds=seconds, failure=failure) for answer in answers]

    def end(self) -> None:
        """Let go of the handler, whose weights may be large."""
        self.alive = False
        self._service = self._entry_point = None
        self._call = Call(())

    def _handle(self, data: list[Any], context: Any) -> Any:
        """Call the handler, and remember how that ended."""
        self._call.requests = len(data)
        handler = getattr(self._entry_point, "__self__", None)
        timed = self._profile.handling(handler) if self._profile else contextlib.nullcontext()
        try:
            with timed:
                self._call.returned = self._entry_point(data, context)
        except BaseException as exc:
            self._call.raised = exc
            if not is_interruption(exc):
                self._debug(exc)
            raise
        return self._call.returned

    def _debug(self, error: BaseException) -> None:
        if self._debugger is not None:
            self._debugger(cut_traceback(error, self._isolation.roots))


def _to_error(error: BaseException, assignment: Assignment, isolation: Isolation) -> HandlerError:
    trace = describe(error, isolation.roots)
    remedy = "mend the handler or the weights and pack again"
    if isinstance(error, ModuleNotFoundError) and error.name:
        remedy = (
            f"install what brings {error.name.split('.')[0]!r} here, and name it in the archive's "
            "requirements; or pack the file with the handler"
        )
    return HandlerError(
        f"{assignment.source} cannot be loaded",
        found=f"{trace.reason} at {trace.place}" if trace.place else trace.reason,
        remedy=remedy,
        detail=trace.text,
    )
