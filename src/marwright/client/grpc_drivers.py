"""The steps of a script, taken with grpc: by threads that wait, and by tasks that do."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

from marwright.client.calls import AnySteps, Pause, Request
from marwright.client.grpc_calls import Attempt, Caller, Result, Step
from marwright.client.grpc_errors import translate_status
from marwright.client.grpc_protocol import Method
from marwright.client.loops import drive, drive_async
from marwright.client.tokens import Purpose
from marwright.client.transport import make_session, send
from marwright.errors import ClientError, UsageError

__all__ = ["AsyncDriver", "Driver", "end_too_early", "Stream"]

SERVICES = 2
"""Inference and management: so many tokens may be renewed at once."""


class Stream:
    """A stream of answers, the first of which has come; None where it has ended."""

    def __init__(self, call: Any, attempt: Attempt) -> None:
        self.call = call
        self.attempt = attempt
        self.first: Any = None


class Channels:
    """The channels to one server, one for each service, opened when they are needed."""

    def __init__(self, caller: Caller, library: Any) -> None:
        self.caller = caller
        self._library = library  # grpc or grpc.aio
        self._channels: dict[Purpose, Any] = {}
        self._session = make_session(caller.endpoint, SERVICES)
        self._closed = False

    def _find_sender(self, method: Method) -> Any:
        """Return what sends messages of one method, as the library has it."""
        kind = (
            f"{'stream' if method.streams_requests else 'unary'}"
            f"_{'stream' if method.streams_responses else 'unary'}"
        )
        return getattr(self._find_channel(method.purpose), kind)(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )

    def _find_channel(self, purpose: Purpose) -> Any:
        import grpc

        if self._closed:
            raise UsageError("the client is closed", remedy="make another one")
        if purpose not in self._channels:
            address = self.caller.find_address(purpose)
            options = self.caller.options
            if self.caller.uses_tls:
                trust = grpc.ssl_channel_credentials(self.caller.read_certificate())
                channel = self._library.secure_channel(address, trust, options)
            else:
                channel = self._library.insecure_channel(address, options)
            self._channels[purpose] = channel
        return self._channels[purpose]

    def _translate(self, attempt: Attempt, exc: Any) -> ClientError:
        """Return our error for one of grpc's."""
        method = attempt.method
        return translate_status(
            exc.code().name,
            exc.details() or "",
            method=method.path.rpartition("/")[2],
            address=self.caller.find_address(method.purpose),
        )


class Driver(Channels):
    """Takes steps, and waits for what they bring."""

    def __init__(self, caller: Caller) -> None:
        import grpc

        super().__init__(caller, grpc)

    def run(self, steps: AnySteps[Result]) -> Result:
        """Do what the steps say, and return their result."""
        return drive(self.caller.run(steps), self._take)

    def open(self, attempt: Attempt, requests: Iterator[Any] | None = None) -> Stream:
        """Begin a stream, and wait for its first answer."""
        send_all = self._find_sender(attempt.method)
        outgoing: Any = attempt.message if requests is None else requests
        call = send_all(outgoing, timeout=attempt.timeout, metadata=attempt.metadata)
        stream = Stream(call, attempt)
        try:
            stream.first = self.read(stream)
        except BaseException:  # Ctrl-C too: nobody else knows the call
            call.cancel()
            raise
        return stream

    def read(self, stream: Stream) -> Any:
        """Return the next answer of a stream, or None at its end."""
        import grpc

        try:
            return next(stream.call, None)
        except grpc.RpcError as exc:
            raise self._translate(stream.attempt, exc) from exc

    def close(self) -> None:
        """Close the channels."""
        self._closed = True
        self._session.close()
        while self._channels:
            self._channels.popitem()[1].close()

    def _take(self, step: Step) -> Any:
        import grpc

        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        if isinstance(step, Request):
            return send(self._session, step)
        method = step.method
        if method.streams_requests:
            return step  # opened by whoever has the requests
        if method.streams_responses:
            return self.open(step)
        send_one = self._find_sender(method)
        try:
            return send_one(step.message, timeout=step.timeout, metadata=step.metadata)
        except grpc.RpcError as exc:
            raise self._translate(step, exc) from exc


class AsyncDriver(Channels):
    """Takes steps, and awaits what they bring; belongs to the loop that first needs it."""

    def __init__(self, caller: Caller) -> None:
        import grpc.aio

        super().__init__(caller, grpc.aio)

    async def run(self, steps: AnySteps[Result]) -> Result:
        """Do what the steps say, and return their result."""
        return await drive_async(self.caller.run(steps), self._take)

    async def open(self, attempt: Attempt, first: Any = None) -> Stream:
        """Begin a stream, and wait for its first answer; `first` is an open stream's request."""
        begin = self._find_sender(attempt.method)
        options = {"timeout": attempt.timeout, "metadata": attempt.metadata}
        outgoing = () if attempt.method.streams_requests else (attempt.message,)
        call = begin(*outgoing, **options)
        stream = Stream(call, attempt)
        try:
            stream.first = await self.read(stream, first)
        except BaseException:  # the one who waited was cancelled: nobody else knows the call
            call.cancel()
            raise
        return stream

    async def read(self, stream: Stream, message: Any = None) -> Any:
        """Send a request first, where there is one; return the next answer, or None at the end."""
        import grpc

        try:
            if message is not None:
                # Nothing can be written to what has ended; reading it says why it has.
                with contextlib.suppress(asyncio.InvalidStateError):
                    await stream.call.write(message)
            answer = await stream.call.read()
        except grpc.RpcError as exc:
            raise self._translate(stream.attempt, exc) from exc
        return None if answer is grpc.aio.EOF else answer

    async def close(self) -> None:
        """Close the channels."""
        self._closed = True
        self._session.close()
        while self._channels:
            await self._channels.popitem()[1].close()

    async def _take(self, step: Step) -> Any:
        import grpc

        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        if isinstance(step, Request):
            return await asyncio.to_thread(send, self._session, step)
        method = step.method
        if method.streams_requests:
            return step  # opened by whoever has the requests
        if method.streams_responses:
            return await self.open(step)
        send_one = self._find_sender(method)
        try:
            return await send_one(step.message, timeout=step.timeout, metadata=step.metadata)
        except grpc.RpcError as exc:
            raise self._translate(step, exc) from exc


def end_too_early(name: str) -> ClientError:
    """Return the error for a sequence that ended before every input had its answer."""
    return ClientError(
        f"the sequence of {name} ended before every input had its answer",
        remedy="look whether the model is configured for sequences, and at the server's log",
    )
