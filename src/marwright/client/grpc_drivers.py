"""The steps of a script, taken with grpc: by threads that wait, and by tasks that do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from marwright.client.calls import Pause
from marwright.client.grpc_calls import Attempt, Caller, Renewal, Result, Script
from marwright.client.grpc_errors import translate_status
from marwright.client.tokens import Purpose
from marwright.errors import ClientError, UsageError

if TYPE_CHECKING:
    import grpc
    import grpc.aio

__all__ = ["AsyncDriver", "Driver", "end_too_early", "Stream"]


class Stream:
    """A stream of answers, the first of which has come; None where it has ended."""

    def __init__(self, call: Any, attempt: Attempt) -> None:
        self.call = call
        self.attempt = attempt
        self.first: Any = None


class Driver:
    """Takes steps with grpc's channels, one for each service, opened when they are needed."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self._channels: dict[Purpose, grpc.Channel] = {}
        self._closed = False

    def run(self, script: Script[Result]) -> Result:
        """Take every step of a script, and return its result."""
        try:
            step = next(script)
            while True:
                try:
                    brought = self._take(step)
                except ClientError as exc:
                    step = script.throw(exc)
                else:
                    step = script.send(brought)
        except StopIteration as end:
            result: Result = end.value
            return result
        finally:
            script.close()

    def open(self, attempt: Attempt, requests: Iterator[Any] | None = None) -> Stream:
        """Begin a stream, and wait for its first answer."""
        method = attempt.method
        channel = self._find_channel(method.purpose)
        make = channel.stream_stream if method.streams_requests else channel.unary_stream
        send = make(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        outgoing: Any = attempt.message if requests is None else requests
        call = send(outgoing, timeout=attempt.timeout, metadata=attempt.metadata)
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
            raise translate_call(self.caller, stream.attempt, exc) from exc

    def close(self) -> None:
        """Close the channels."""
        self._closed = True
        while self._channels:
            self._channels.popitem()[1].close()

    def _take(self, step: Attempt | Renewal | Pause) -> Any:
        import grpc

        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        if isinstance(step, Renewal):
            return self.caller.renew(step.purpose)
        if step.method.streams_responses:
            return self.open(step)
        method = step.method
        send = self._find_channel(method.purpose).unary_unary(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        try:
            return send(step.message, timeout=step.timeout, metadata=step.metadata)
        except grpc.RpcError as exc:
            raise translate_call(self.caller, step, exc) from exc

    def _find_channel(self, purpose: Purpose) -> grpc.Channel:
        import grpc

        if self._closed:
            raise UsageError("the client is closed", remedy="make another one")
        if purpose not in self._channels:
            address = self.caller.find_address(purpose)
            options = self.caller.options
            if self.caller.uses_tls:
                trust = grpc.ssl_channel_credentials(self.caller.read_certificate())
                self._channels[purpose] = grpc.secure_channel(address, trust, options)
            else:
                self._channels[purpose] = grpc.insecure_channel(address, options)
        return self._channels[purpose]


class AsyncDriver:
    """Takes steps with grpc.aio's channels; they belong to the loop that first needs them."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self._channels: dict[Purpose, grpc.aio.Channel] = {}
        self._closed = False

    async def run(self, script: Script[Result]) -> Result:
        """Take every step of a script, and return its result."""
        try:
            step = next(script)
            while True:
                try:
                    brought = await self._take(step)
                except ClientError as exc:
                    step = script.throw(exc)
                else:
                    step = script.send(brought)
        except StopIteration as end:
            result: Result = end.value
            return result
        finally:
            script.close()

    async def open(self, attempt: Attempt, first: Any = None) -> Stream:
        """Begin a stream, and wait for its first answer; `first` is an open stream's request."""
        method = attempt.method
        channel = self._find_channel(method.purpose)
        make: Any = channel.stream_stream if method.streams_requests else channel.unary_stream
        send = make(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        options = {"timeout": attempt.timeout, "metadata": attempt.metadata}
        call = send(**options) if method.streams_requests else send(attempt.message, **options)
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
                await stream.call.write(message)
            answer = await stream.call.read()
        except grpc.RpcError as exc:
            raise translate_call(self.caller, stream.attempt, exc) from exc
        except asyncio.InvalidStateError as exc:  # to write to what has ended
            raise end_too_early(stream.attempt.method.path) from exc
        return None if answer is grpc.aio.EOF else answer

    async def close(self) -> None:
        """Close the channels."""
        self._closed = True
        while self._channels:
            await self._channels.popitem()[1].close()

    async def _take(self, step: Attempt | Renewal | Pause) -> Any:
        import grpc

        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        if isinstance(step, Renewal):
            return await asyncio.to_thread(self.caller.renew, step.purpose)
        if step.method.streams_responses:
            return await self.open(step)
        method = step.method
        send = self._find_channel(method.purpose).unary_unary(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        try:
            return await send(step.message, timeout=step.timeout, metadata=step.metadata)
        except grpc.RpcError as exc:
            raise translate_call(self.caller, step, exc) from exc

    def _find_channel(self, purpose: Purpose) -> grpc.aio.Channel:
        import grpc.aio

        if self._closed:
            raise UsageError("the client is closed", remedy="make another one")
        if purpose not in self._channels:
            address = self.caller.find_address(purpose)
            options = self.caller.options
            if self.caller.uses_tls:
                trust = grpc.ssl_channel_credentials(self.caller.read_certificate())
                self._channels[purpose] = grpc.aio.secure_channel(address, trust, options)
            else:
                self._channels[purpose] = grpc.aio.insecure_channel(address, options)
        return self._channels[purpose]


def translate_call(caller: Caller, attempt: Attempt, exc: Any) -> ClientError:
    """Return our error for one of grpc's."""
    method = attempt.method
    return translate_status(
        exc.code().name,
        exc.details() or "",
        method=method.path.rpartition("/")[2],
        address=caller.find_address(method.purpose),
    )


def end_too_early(name: str) -> ClientError:
    """Return the error for a stream that ended before every input had its answer."""
    return ClientError(
        f"the sequence of {name} ended before every input had its answer",
        remedy="look whether the model is configured for sequences, and at the server's log",
    )
