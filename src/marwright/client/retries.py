"""How often a request that is safe to send twice is sent again, and how long it waits before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from marwright.errors import (
    ConnectionFailedError,
    MarwrightError,
    OverloadedError,
    TokenRejectedError,
    UsageError,
    WorkerLostError,
)

__all__ = ["Attempts", "Retries"]


@dataclass
class Attempts:
    """What has been tried for one request so far."""

    failures: int = 0
    losses: int = 0
    rereads: int = 0
    renewed: bool = False


@dataclass(frozen=True)
class Retries:
    """Exponential backoff with full jitter; a call's deadline ends it in any case.

    Before the next try a client waits between nothing and `first`, doubled each time up to
    `longest`: clients that were turned away together do not come back together.
    """

    tries: int = 4
    """How often a request is sent at most."""
    first: float = 0.1
    """Seconds that the first pause lasts at most."""
    longest: float = 2.0
    """Seconds that any pause lasts at most, but for a Retry-After that asks for more."""
    after_loss: int = 2
    """How often it is sent again after its worker died.

    Few: an input that kills workers would kill one at each try.
    """

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: no try at all, or a time below nothing.
        """
        if self.tries < 1 or self.after_loss < 0 or self.first < 0 or self.longest < 0:
            raise UsageError(
                "no such retries are possible",
                expected="at least one try, and no pause below 0 s",
                found=repr(self),
            )

    def pause(self, failures: int, *, chance: float, asked: float = 0.0) -> float:
        """Return the seconds to wait after so many failures.

        `chance` is a random number below 1, `asked` what the server's Retry-After asks for.
        """
        # No float holds 2.0 ** 1024, and no pause grows for as long.
        return asked + chance * min(self.longest, self.first * 2.0 ** min(failures - 1, 64))

    def choose_pause(
        self,
        error: MarwrightError,
        attempts: Attempts,
        *,
        safe: bool,
        random: Callable[[], float],
        asked: float = 0.0,
    ) -> float | None:
        """Count a failure; return the seconds until the next try, None where there is to be none.

        `safe` tells whether the request may be sent twice; `random` is asked only for a pause that
        there is to be, and `asked` is as for `pause`.
        """
        kinds = (ConnectionFailedError, OverloadedError, WorkerLostError, TokenRejectedError)
        # A token that was rejected is another matter. Without one there is no server: it writes
        # the file, and not in one piece, whenever it starts.
        if not isinstance(error, kinds) or (isinstance(error, kinds[-1]) and error.status):
            return None
        attempts.failures += 1
        attempts.losses += isinstance(error, WorkerLostError)
        spent = attempts.failures >= self.tries or attempts.losses > self.after_loss
        if not safe or spent:
            return None
        return self.pause(attempts.failures, chance=random(), asked=asked)
