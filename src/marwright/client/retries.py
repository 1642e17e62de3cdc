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
    misses: int = 0
    """How often in a row nobody answered, while the server's supervisor was waited for."""
    away_since: float = 0.0
    """When the first of them was, by the monotonic clock."""
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
    away: float = 20.0
    """Seconds that a server may be away whose supervisor starts it again; 0 waits for none.

    For so long predictions are sent again however often, and these tries count for no others.
    """

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: no try at all, or a time below nothing.
        """
        if self.tries < 1 or min(self.after_loss, self.first, self.longest, self.away) < 0:
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
        now: float,
        supervised: bool = False,
        asked: float = 0.0,
    ) -> float | None:
        """Count a failure; return the seconds until the next try, None where there is to be none.

        `safe` tells whether the request may be sent twice, `supervised` whether a server that is
        away comes back; `now` is the monotonic clock's. `random` is asked only for a pause that
        there is to be, and `asked` is as for `pause`.
        """
        is_away = _tells_absence(error)
        if not is_away and not isinstance(error, (OverloadedError, WorkerLostError)):
            return None
        if is_away and supervised and self.away:
            attempts.away_since = attempts.away_since if attempts.misses else now
            attempts.misses += 1
            if not safe or now - attempts.away_since >= self.away:
                return None
            return self.pause(attempts.misses, chance=random())
        attempts.misses = 0
        attempts.failures += 1
        attempts.losses += isinstance(error, WorkerLostError)
        spent = attempts.failures >= self.tries or attempts.losses > self.after_loss
        if not safe or spent:
            return None
        return self.pause(attempts.failures, chance=random(), asked=asked)


def _tells_absence(error: MarwrightError) -> bool:
    """Whether nobody answered.

    A token that was rejected is another matter. Without one there is no server: it writes the file,
    and not in one piece, whenever it starts.
    """
    if isinstance(error, TokenRejectedError):
        return not error.status
    return isinstance(error, ConnectionFailedError)
