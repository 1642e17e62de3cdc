"""The knobs of a federation: how many train, how often they meet, what of them is averaged."""

from __future__ import annotations

import math
from dataclasses import dataclass

from marwright.errors import UsageError

__all__ = ["Federation", "FEWEST_ANSWERS", "STRATEGIES"]

STRATEGIES = ("fedavg", "fedprox")
FEWEST_ANSWERS = 2
"""A round with fewer usable answers changes nothing: an average of one hides nobody."""


@dataclass(frozen=True)
class Federation:
    """Who trains together, and how; what one client does in between stands in Settings."""

    clients: int = 5
    rounds: int = 10
    local_epochs: int = 2
    """Passes of a client over its own data between two averages."""
    strategy: str = "fedavg"
    """fedavg (McMahan et al. 2017), or fedprox, which holds clients to the common weights."""
    proximal_mu: float = 0.1
    """How strongly fedprox holds them (Li et al. 2020); fedavg has no use for it."""
    alpha: float = 0.5
    """Of the Dirichlet distribution that shares out labels: the smaller, the more uneven."""
    seed: int = 0
    """Of the shares."""
    timeout: float = 600.0
    """Seconds that a round waits for answers; it then goes on with those it has."""
    drop_out: tuple[int, ...] = ()
    """Clients, counted from 0, that stop answering after their first round: for trials."""
    garbage: tuple[int, ...] = ()
    """Clients, counted from 0, that answer noise and NaN: for trials."""
    noise_multiplier: float = 0.0
    """Of DP-SGD's noise, in units of `max_grad_norm`; above 0 the clients train privately."""
    max_grad_norm: float = 1.0
    """What an item's gradient is clipped to before the noise."""
    delta: float = 1e-5
    """The probability with which epsilon may not hold."""

    def __post_init__(self) -> None:
        """Refuse impossible values, all at once."""
        problems = [
            f"{name.replace('_', ' ')} {getattr(self, name)}, at least {least}"
            for name, least in (("clients", FEWEST_ANSWERS), ("rounds", 1), ("local_epochs", 1))
            if getattr(self, name) < least
        ]
        if self.strategy not in STRATEGIES:
            problems.append(f"strategy {self.strategy!r}, one of {', '.join(STRATEGIES)}")
        for name in ("proximal_mu", "noise_multiplier"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                problems.append(f"{name.replace('_', ' ')} {getattr(self, name)}, at least 0")
        for name in ("alpha", "timeout", "max_grad_norm"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                problems.append(f"{name.replace('_', ' ')} {getattr(self, name)}, above 0")
        if not 0 < self.delta < 1:
            problems.append(f"delta {self.delta}, between 0 and 1")
        if not 0 <= self.seed < 1 << 32:
            problems.append(f"seed {self.seed}, from 0 to {(1 << 32) - 1}")
        problems += self._check_trials()
        if problems:
            raise UsageError("this federation cannot be", found="; ".join(problems))

    def _check_trials(self) -> list[str]:
        bad = {*self.drop_out, *self.garbage}
        unknown = sorted(number for number in bad if not 0 <= number < self.clients)
        if unknown:
            listed = ", ".join(map(str, unknown))
            return [f"no client {listed}, from 0 to {self.clients - 1}"]
        if self.clients - len(bad) < FEWEST_ANSWERS:
            return [f"{len(bad)} of {self.clients} clients fail, leave {FEWEST_ANSWERS} that work"]
        return []

    @property
    def is_private(self) -> bool:
        """Whether the clients train with differential privacy."""
        return self.noise_multiplier > 0
