"""The way from steps to their result: tokens, deadlines and retries, without any input or output.

An exchange is a generator: it yields requests and pauses, takes responses, and returns the result.
A driver sends them with requests or with aiohttp, and throws into it what went wrong on the way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlencode

from marwright.client.calls import Call, Pause, Request, Response, Steps
from marwright.client.endpoint import Endpoint
from marwright.client.problems import translate
from marwright.client.retries import Retries
from marwright.client.tokens import KeyText, Purpose, TokenFile
from marwright.errors import (
    ConnectionFailedError,
    MarwrightError,
    OverloadedError,
    RequestTimeoutError,
    TokenRejectedError,
    UsageError,
    WorkerLostError,
)

__all__ = ["Exchange", "Exchanges"]

_log = logging.getLogger(__name__)

Result = TypeVar("Result")
Exchange = Generator[Request | Pause, Any, Result]

SUPERVISOR_HEADER = "X-Marwright-Key"
PURPOSES: dict[str, Purpose] = {"inference": "inference", "management": "management"}
"""Which token an API asks for; metrics are there for whoever reaches the address."""
RENEWAL_LOOK_SECONDS = 0.02
"""How often somebody who waits for another's renewal looks whether it is done."""
MOST_REREADS = 3
"""How often a request goes out again because others have renewed its token meanwhile."""


@dataclass(frozen=True)
class Deadline:
    """The moment at which a call's time is over."""

    limit: float
    at: float

    @classmethod
    def start(cls, limit: float) -> Deadline:
        """Return the deadline of a call that begins now."""
        return cls(limit, time.monotonic() + limit)

    def left(self) -> float:
        """Return the seconds that remain, or less than 0."""
        return self.at - time.monotonic()


@dataclass
class Attempts:
    """What has been tried for one request so far."""

    failures: int = 0
    losses: int = 0
    rereads: int = 0
    renewed: bool = False


@dataclass(frozen=True)
class Exchanges:
    """What all exchanges with one server share."""

    endpoint: Endpoint
    timeout: float
    """Seconds for a whole call that names no others."""
    start_timeout: float
    """Seconds for a call that waits for workers."""
    retries: Retries
    random: Callable[[], float]
    """Returns numbers below 1."""
    tokens: TokenFile | None = field(init=False)
    supervisor_key: KeyText | None = field(init=False)
    _urls: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        """Read from the endpoint what each request needs."""
        point = self.endpoint
        values = {
            "tokens": TokenFile(point.key_file) if point.key_file else None,
            "supervisor_key": KeyText(point.supervisor_key) if point.supervisor_key else None,
            "_urls": {
                "inference": point.inference_url.rstrip("/"),
                "management": point.management_url.rstrip("/"),
                "metrics": point.metrics_url.rstrip("/"),
            },
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def run(self, steps: Steps[Result]) -> Exchange[Result]:
        """Take steps to their result; all of them have the time of the first.

        Raises:
            MarwrightError: the member of the family that fits; see marwright.errors.
        """
        if isinstance(steps, Call):
            only: Call[Result] = steps
            return (yield from self._ask(only, Deadline.start(self._limit(only))))
        deadline: Deadline | None = None
        script = iter(steps)
        try:
            step = next(script)
            while True:
                if isinstance(step, Pause):
                    yield step
                    step = next(script)
                    continue
                deadline = deadline or Deadline.start(self._limit(step))
                try:
                    answer = yield from self._ask(step, deadline)
                except MarwrightError as exc:
                    step = script.throw(exc)
                else:
                    step = script.send(answer)
        except StopIteration as end:
            result: Result = end.value
            return result

    def _limit(self, call: Call[Any]) -> float:
        if call.timeout is not None:
            return call.timeout
        return self.start_timeout if call.starts_workers else self.timeout

    def _ask(self, call: Call[Result], deadline: Deadline) -> Exchange[Result]:
        """Send one call, again where that is safe and helps, until it has a result."""
        attempts = Attempts()
        while True:
            started = time.perf_counter()
            asked = 0.0
            error: MarwrightError
            try:
                token = yield from self._find_token(call, deadline)
                response = yield self._prepare(call, token, deadline)
            except (ConnectionFailedError, TokenRejectedError) as exc:
                error = exc  # of the latter: the tokens' file is not there
            else:
                if response.status < 300 or response.status in call.answers:
                    return call.read(response, time.perf_counter() - started)
                error = translate(response, f"{call.method} {call.path}")
                asked = _read_retry_after(response)
            if isinstance(error, TokenRejectedError) and error.status:
                # A rejected request had no effect, so sending it again is safe for all of them.
                if (yield from self._replace_token(call, token, attempts, deadline)):
                    continue
                raise error
            pause = self._choose_pause(call, error, asked, attempts)
            # To wait beyond the deadline would only hide what went wrong.
            if pause is None or pause >= deadline.left():
                raise error
            _log.debug("%s %s: %s; trying again in %.2f s", call.method, call.path, error, pause)
            yield Pause(pause)

    def _choose_pause(
        self, call: Call[Any], error: MarwrightError, asked: float, attempts: Attempts
    ) -> float | None:
        """Return the seconds until the next try, or None where there is to be none."""
        kinds = (ConnectionFailedError, OverloadedError, WorkerLostError, TokenRejectedError)
        # A token that was rejected is another matter. Without one there is no server: it writes
        # the file, and not in one piece, whenever it starts.
        if not isinstance(error, kinds) or (isinstance(error, kinds[-1]) and error.status):
            return None
        attempts.failures += 1
        attempts.losses += isinstance(error, WorkerLostError)
        spent = attempts.failures >= self.retries.tries or attempts.losses > self.retries.after_loss
        if not call.safe or spent:
            return None
        return self.retries.pause(attempts.failures, chance=self.random(), asked=asked)

    def _prepare(self, call: Call[Any], token: str, deadline: Deadline) -> Request:
        url = self._urls[call.api]
        if not url:
            raise UsageError(
                f"the server's {call.api} address is not known",
                remedy=f"pass --{call.api}-url http://HOST:PORT"
                if call.api != "metrics"
                else "name it in the endpoint: metrics_url",
            )
        headers = dict(call.headers)
        if token:
            headers["Authorization"] = f"Bearer {token}"
        if call.api == "management" and call.method != "GET" and self.supervisor_key:
            headers[SUPERVISOR_HEADER] = self.supervisor_key.read()
        url += call.path
        if call.params:
            url += f"?{urlencode(call.params)}"
        return _make_request(call.method, url, headers, call.body, deadline)

    def _find_token(self, call: Call[Any], deadline: Deadline) -> Exchange[str]:
        """Return the token to send, renewed where it would soon expire, or "" where none is."""
        purpose = PURPOSES.get(call.api)
        tokens = self.tokens
        if purpose is None or tokens is None:
            return ""
        if tokens.is_due(purpose) and tokens.claim(purpose):
            try:
                yield from self._renew(tokens, purpose, deadline)
            finally:
                tokens.release(purpose)
        return tokens.read(purpose)

    def _replace_token(
        self, call: Call[Any], sent: str, attempts: Attempts, deadline: Deadline
    ) -> Exchange[bool]:
        """Look for another token than the rejected one; return whether there is one to send."""
        purpose = PURPOSES.get(call.api)
        tokens = self.tokens
        if purpose is None or tokens is None or attempts.renewed:
            return False
        tokens.forget()
        if tokens.read(purpose) == sent:
            while not tokens.claim(purpose):  # another thread or task renews it just now
                if deadline.left() < RENEWAL_LOOK_SECONDS:
                    return False
                yield Pause(RENEWAL_LOOK_SECONDS)
            try:
                if tokens.read(purpose) == sent:
                    attempts.renewed = True
                    return (yield from self._renew(tokens, purpose, deadline))
            finally:
                tokens.release(purpose)
        attempts.rereads += 1
        return attempts.rereads <= MOST_REREADS

    def _renew(self, tokens: TokenFile, purpose: Purpose, deadline: Deadline) -> Exchange[bool]:
        """Ask the server for a fresh token; return whether it gave one into the key file."""
        url = self._urls["management"] or self._urls["inference"]
        try:
            headers = {"Authorization": f"Bearer {tokens.read('API')}"}
            response: Response = yield _make_request(
                "GET", f"{url}/token?type={purpose}", headers, b"", deadline
            )
        except MarwrightError as exc:
            _log.debug("the %s token was not renewed: %s", purpose, exc)
            return False
        return response.status < 300


def _make_request(
    method: str, url: str, headers: dict[str, str], body: bytes, deadline: Deadline
) -> Request:
    left = deadline.left()
    if left <= 0:
        raise RequestTimeoutError(
            f"no time is left to ask {url}",
            expected=f"an answer within {deadline.limit:g} s",
            remedy="raise --timeout, or look at the server's log",
        )
    return Request(method, url, headers, body, left, deadline.limit)


def _read_retry_after(response: Response) -> float:
    """Return the seconds after which a server wants to be asked again; dates are not read."""
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0.0
