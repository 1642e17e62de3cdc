"""A candidate tried with traffic: first on copies of requests, then on a rising share of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from marwright.errors import ReleaseError
from marwright.release.candidate import Candidate
from marwright.release.feeder import Feeder
from marwright.release.gates import (
    ARMS,
    PARTS,
    Agreement,
    Canary,
    Verdict,
    is_prediction,
    read_body,
)
from marwright.release.target import Target

__all__ = ["Trial"]

LOOK_SECONDS = 0.1
THIN_SECONDS = 0.3
"""After so long a step may find that it has too few requests."""
PAIRS = 10
"""How many samples are sent to both versions between two looks, where copies are too few."""
PATIENCE_SECONDS = 10.0
"""Requests are too few where they would not be enough within so long."""

Figures = Mapping[str, Any]


class Trial:
    """Compares the candidate with the version that is the default, behind a gateway.

    `judge` hears of every look, and raises where a gate says no.
    """

    def __init__(
        self, target: Target, candidate: Candidate, *, judge: Callable[[Verdict], None]
    ) -> None:
        self._target = target
        self._candidate = candidate
        self._judge = judge
        self._settings = target.settings
        self._bodies = [body for body, _ in candidate.samples]
        self._canary = Canary(self._settings.canary, self._settings.error_rate / PARTS)
        self._seen: dict[str, int] | None = None
        """How many answers of each version were read; None before the first."""

    def shadow(self) -> Figures:
        """Compare both versions' answers to copies of requests."""
        wanted, model = self._settings.shadow.requests, self._candidate.model
        self._direct(shadow=self._settings.shadow.share)
        versions = self._candidate.before, self._candidate.version
        gate = Agreement(self._settings, self._target.clients[0], model, versions)
        bodies = itertools.cycle(self._bodies)
        own = 0

        def look() -> int:
            for captured in self._target.observe(model, captured=True)["captured"]:
                if is_prediction(captured, model) and gate.total < wanted:
                    gate.ask(read_body(captured))
            self._judge(gate.judge())
            return gate.total

        def add() -> None:
            nonlocal own
            for body in itertools.islice(bodies, PAIRS):
                gate.ask(body)
                own += 1

        self._gather(look, wanted, "copied requests", add)
        return {**gate.judge().figures, "own": own}

    def share(self, percent: float) -> Figures:
        """Let the candidate answer a share of all requests, and compare."""
        self._direct(share=percent)
        is_first = self._seen is None
        late = self._read_answers()
        if not is_first:  # else it is what an earlier release of these versions has left
            self._canary.take(late)
        self._canary.begin()

        def look() -> int:
            self._canary.take(self._read_answers())
            self._judge(self._canary.judge())
            return self._canary.count

        assert self._target.gateway is not None  # a trial needs one
        with Feeder(self._target.gateway, self._candidate.model, self._bodies) as feeder:
            wanted = self._settings.canary.requests
            self._gather(look, wanted, "answers of the candidate", feeder.start)
        return {**self._canary.judge().figures, "own": feeder.sent}

    def _read_answers(self) -> Mapping[str, Sequence[tuple[int, float]]]:
        """Return what both versions answered since the last call."""
        seen = self._seen or dict.fromkeys(ARMS, 0)
        observed = self._target.observe(self._candidate.model, since=seen)
        self._seen = {arm: count + len(observed[arm]) for arm, count in seen.items()}
        return {arm: observed[arm] for arm in ARMS}

    def _gather(
        self, look: Callable[[], int], wanted: int, what: str, add: Callable[[], None]
    ) -> None:
        """Look until there is enough to go by; `add` sends samples where too few others ask."""
        began, thin = time.monotonic(), False
        while (count := look()) < wanted:
            passed = time.monotonic() - began
            if passed > self._settings.step_seconds:
                raise ReleaseError(
                    f"there were {count} {what} in {passed:.0f} s",
                    expected=str(wanted),
                    remedy="raise releases.step_seconds, or ask for fewer",
                )
            thin |= passed > THIN_SECONDS and count < wanted * passed / PATIENCE_SECONDS
            if thin:
                add()
            time.sleep(LOOK_SECONDS)

    def _direct(self, **shares: float) -> None:
        self._target.direct(
            model=self._candidate.model,
            stable=self._candidate.before,
            candidate=self._candidate.version,
            **shares,
        )
