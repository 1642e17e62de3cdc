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

from marwright.client.calls import AnySteps, Call, Pause, Request, Response, Steps
from marwright.client.endpoint import Endpoint
from marwright.client.problems import translate
from marwright.client.retries import Attempts, Retries
from marwright.client.tokens import KeyText, Purpose, TokenFile
from marwright.errors import (
    ConnectionFailedError,
    MarwrightError,
    RequestTimeoutError,
    TokenRejectedError,
    UsageError,
)

__all__ = ["Deadline", "Exchange", "Exchanges"]

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

    def need(self, purpose: str) -> float:
        """Return the seconds that remain for something.

        Raises:
            RequestTimeoutError: there are none.
        """
        left = self.left()
        if left <= 0:
            raise RequestTimeoutError(
                f"no time is left {purpose}",
                expected=f"an answer within {self.limit:g} s",
                remedy="raise --timeout, or look at the server's log",
            )
        return left


@dataclass
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
    gateway_token: KeyText | None = field(init=False)
    _urls: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        """Read from the endpoint what each request needs."""
        point = self.endpoint
        self.tokens = TokenFile(point.key_file) if point.key_file else None
        self.supervisor_key = KeyText(point.supervisor_key) if point.supervisor_key else None
        self.gateway_token = KeyText(point.gateway_token) if point.gateway_token else None
        self._urls = {
            "inference": point.inference_url.rstrip("/"),
            "management": point.management_url.rstrip("/"),
            "metrics": point.metrics_url.rstrip("/"),
        }

    def run(self, steps: Steps[Result]) -> Exchange[Result]:
        """Take steps to their result; all of them have the time of the first.

        Raises:
            MarwrightError: the member of the family that fits; see marwright.errors.
        """
        return self.expand(steps, self._ask)

    def expand(
        self, steps: AnySteps[Result], ask: Callable[[Any, Deadline], Exchange[Any]]
    ) -> Exchange[Result]:
        """Do the same with calls of any protocol: `ask` says how one of them is made."""
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
                    answer = yield from ask(step, deadline)
                except MarwrightError as exc:
                    step = script.throw(exc)
                else:
                    step = script.send(answer)
        except StopIteration as end:
            result: Result = end.value
            return result

    def _limit(self, call: Any) -> float:
        usual = self.start_timeout if call.starts_workers else self.timeout
        return usual if call.timeout is None else float(call.timeout)

    def _ask(self, call: Call[Result], deadline: Deadline) -> Exchange[Result]:
        """Send one call, again where that is safe and helps, until it has a result."""
        purpose = PURPOSES.get(call.api)
        attempts = Attempts()
        while True:
            started = time.perf_counter()
            asked = 0.0
            error: MarwrightError
            try:
                token = yield from self.find_token(purpose, deadline)
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
                if (yield from self.replace_token(purpose, token, attempts, deadline)):
                    continue
                raise error
            what = f"{call.method} {call.path}"
            yield self.wait(what, error, attempts, deadline, purpose, safe=call.safe, asked=asked)

    def wait(
        self,
        what: str,
        error: MarwrightError,
        attempts: Attempts,
        deadline: Deadline,
        purpose: Purpose | None,
        *,
        safe: bool,
        asked: float = 0.0,
    ) -> Pause:
        """Return the pause before a call that failed is sent again; see Retries.choose_pause.

        Raises:
            MarwrightError: the error, where it is not to be sent again.
        """
        # Who manages a server, its own start included, is to hear at once that it is away.
        supervised = bool(self.endpoint.health_url) and purpose != "management"
        pause = self.retries.choose_pause(
            error,
            attempts,
            safe=safe,
            random=self.random,
            now=time.monotonic(),
            supervised=supervised,
            asked=asked,
        )
        # To wait beyond the deadline would only hide what went wrong.
        if pause is not None and pause < deadline.left():
            _log.debug("%s: %s; trying again in %.2f s", what, error, pause)
            return Pause(pause)
        if self.endpoint.health_url and isinstance(error, ConnectionFailedError):
            error.remedy = "it is being started again, or has gone: marwright status"
        raise error

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

    def find_token(self, purpose: Purpose | None, deadline: Deadline) -> Exchange[str]:
        """Return the token to send, renewed where it would soon expire, or "" where none is.

        Raises:
            TokenRejectedError: the key file is missing or broken.
        """
        tokens = self.tokens
        if purpose == "inference" and self.gateway_token:
            return self.gateway_token.read()
        if purpose is None or tokens is None:
            return ""
        if tokens.is_due(purpose) and tokens.claim(purpose):
            try:
                yield from self._renew(tokens, purpose, deadline)
            finally:
                tokens.release(purpose)
        return tokens.read(purpose)

    def replace_token(
        self, purpose: Purpose | None, sent: str, attempts: Attempts, deadline: Deadline
    ) -> Exchange[bool]:
        """Look for another token than the rejected one; return whether there is one to send."""
        tokens = self.tokens
        if purpose == "inference" and self.gateway_token:
            self.gateway_token.forget()
            attempts.rereads += 1
            return self.gateway_token.read() != sent and attempts.rereads <= MOST_REREADS
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
        if not url:  # the client speaks gRPC, which renews nothing
            return False
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
    left = deadline.need(f"to ask {url}")
    return Request(method, url, headers, body, left, deadline.limit)


def _read_retry_after(response: Response) -> float:
    """Return the seconds after which a server wants to be asked again; dates are not read."""
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0.0
