"""What is asked of a candidate before traffic moves to it: measured, and judged at each look."""

from __future__ import annotations

import base64
import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from marwright.archive.checks.comparison import compare_bodies
from marwright.client import Client
from marwright.errors import AnswerError, MarwrightError
from marwright.gateway.configuration import FALLBACK_STATUSES
from marwright.release.statistics import (
    Comparison,
    Counts,
    compare_errors,
    compare_latency,
    judge_agreement,
)
from marwright.server.deployment import CanarySettings, ReleaseSettings

__all__ = ["Agreement", "Canary", "is_prediction", "Verdict"]

PARTS = 4
"""Comparisons that share a release's rate of false alarms: agreement, errors, median, p95."""
QUANTILES = (0.5, 0.95)
MORE = 1.1
"""By how much the number of answers must have grown for another look at their times."""


@dataclass(frozen=True)
class Verdict:
    """What a gate says so far."""

    problem: str
    """Why the candidate is stopped; empty while nothing speaks against it."""
    figures: Mapping[str, Any]


class Agreement:
    """Compares the answers of both versions to the same requests."""

    def __init__(self, settings: ReleaseSettings, model: str, versions: tuple[str, str]) -> None:
        self._least = settings.shadow.agreement
        self._alpha = settings.error_rate / PARTS
        self.model = model
        self._versions = versions
        self.total = 0
        self._agreed = 0
        self._example = ""

    def ask(self, client: Client, captured: Mapping[str, Any]) -> None:
        """Send one copied request to the stable version and to the candidate.

        A request that the stable version does not answer counts for nothing.
        """
        body = _read_body(captured)
        answers = []
        for version in self._versions:
            try:
                answers.append(client.predict(self.model, body, version=version).body)
            except AnswerError as exc:
                answers.append(f"{exc.status}".encode())
            except MarwrightError:
                return
        if answers[0] in {b"500", b"503", b"507"}:
            return
        self.total += 1
        if agree(*answers):
            self._agreed += 1
        elif not self._example:
            self._example = f"{_shorten(answers[1])} instead of {_shorten(answers[0])}"

    def judge(self) -> Verdict:
        """Return whether the versions agree often enough."""
        found = judge_agreement(self._agreed, self.total, least=self._least, alpha=self._alpha)
        share = self._agreed / self.total if self.total else math.nan
        figures = {"pairs": self.total, "agreement": _round(share), **_bounds(found)}
        # Below the wanted share by what was counted is enough: there is no harm in being careful.
        low = self.total >= 10 and share < self._least and found.verdict != "fine"
        if found.verdict == "worse" or low:
            text = f"the versions agree on {share:.0%} of {self.total} requests"
            text += f", wanted {self._least:.0%}; for example {self._example}"
            return Verdict(text, figures)
        return Verdict("", figures)


@dataclass
class Canary:
    """Compares how both versions answer the traffic; looks may be as frequent as one likes."""

    settings: CanarySettings
    alpha: float
    """For each comparison."""
    answers: dict[str, list[tuple[int, float]]] = field(
        default_factory=lambda: {"stable": [], "candidate": []}
    )
    _looks: dict[str, list[Counts]] = field(default_factory=lambda: {"stable": [], "candidate": []})
    _timed: int = 0
    _times: dict[float, Comparison] = field(default_factory=dict)

    def take(self, observed: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        """Add what was answered since the last call, as (status, seconds) by arm."""
        for arm, kept in self.answers.items():
            kept += [(int(status), float(seconds)) for status, seconds in observed[arm]]
        for arm, kept in self.answers.items():
            failed = sum(status in FALLBACK_STATUSES for status, _ in kept)
            self._looks[arm].append(Counts(failed, len(kept)))

    @property
    def counts(self) -> dict[str, int]:
        """How many answers there are of each arm."""
        return {arm: len(kept) for arm, kept in self.answers.items()}

    def judge(self) -> Verdict:
        """Return whether the candidate is worse in errors or in time."""
        errors = compare_errors(
            self._looks["stable"],
            self._looks["candidate"],
            margin=self.settings.errors,
            alpha=self.alpha,
        )
        self._compare_times()
        figures: dict[str, Any] = {"errors": self._describe("errors", errors)}
        problem = ""
        stable, candidate = (self._looks[arm][-1] for arm in ("stable", "candidate"))
        if errors.verdict == "worse":
            problem = (
                f"{candidate.errors} of its {candidate.total} answers are errors,"
                f" of the stable version's {stable.errors} of {stable.total}"
            )
        for quantile, found in self._times.items():
            name = "median" if quantile == 0.5 else f"p{quantile * 100:g}"
            figures[name] = self._describe(name, found)
            if found.verdict == "worse" and not problem:
                ratio = found.interval.estimate
                problem = f"its {name} is {ratio:.2f} times the stable version's"
                problem += f", at most {self.settings.slower:g} wanted"
        return Verdict(problem, {"answers": self.counts, **figures})

    def _compare_times(self) -> None:
        """Compare anew once there are a tenth more answers: it takes some milliseconds."""
        count = len(self.answers["candidate"])
        if count < max(10, self._timed * MORE):
            return
        self._timed = count
        times = {
            arm: [seconds for status, seconds in kept if status not in FALLBACK_STATUSES]
            for arm, kept in self.answers.items()
        }
        for quantile in QUANTILES:
            self._times[quantile] = compare_latency(
                times["stable"],
                times["candidate"],
                quantile=quantile,
                ratio=self.settings.slower,
                alpha=self.alpha,
            )

    def _describe(self, name: str, found: Comparison) -> dict[str, Any]:
        return {
            "verdict": found.verdict,
            "estimate": _round(found.interval.estimate),
            **_bounds(found),
        }


def agree(one: bytes, other: bytes) -> bool:
    """Whether two answers say the same: the same first label, or else the same values."""
    labels = [_find_label(body) for body in (one, other)]
    if None not in labels:
        return labels[0] == labels[1]
    return compare_bodies(one, other) is None


def is_prediction(captured: Mapping[str, Any], model: str) -> bool:
    """Whether a copied request asks a model for a prediction, and not for an explanation."""
    return unquote(urlsplit(captured["path"]).path).rstrip("/") == f"/predictions/{model}"


def _read_body(captured: Mapping[str, Any]) -> Any:
    """Return a copied request's body so that the client sends the same kind again."""
    body, kind = base64.b64decode(captured["body"]), captured["content_type"]
    with contextlib.suppress(ValueError):
        if kind.startswith("application/json"):
            return json.loads(body)
        if kind.startswith("text/"):
            return body.decode()
    return body


def _find_label(body: bytes) -> str | None:
    """Return the most probable label of a classifier's answer; None for another answer."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not value:
        return None
    if not all(isinstance(item, (int, float)) for item in value.values()):
        return None
    return str(max(value, key=lambda label: value[label]))


def _bounds(found: Comparison) -> dict[str, Any]:
    return {"low": _round(found.interval.low), "high": _round(found.interval.high)}


def _round(value: float) -> float | None:
    """Return a number as JSON may hold it."""
    return round(value, 5) if math.isfinite(value) else None


def _shorten(body: bytes) -> str:
    text = body.decode("utf-8", "replace")
    return text if len(text) <= 60 else f"{text[:57]}..."
