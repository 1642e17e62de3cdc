"""What is asked of a candidate before traffic moves to it: measured, and judged at each look."""

from __future__ import annotations

import base64
import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from marwright.server.sections import CanarySettings, ReleaseSettings

__all__ = ["Agreement", "ARMS", "Canary", "is_prediction", "PARTS", "read_body", "Verdict"]

PARTS = 4
"""Comparisons that share a release's rate of false alarms: agreement, errors, median, p95."""
QUANTILES = (0.5, 0.95)
ARMS = "stable", "candidate"
MORE = 1.1
"""By how much the number of answers must have grown for another look at their times."""

Reply = tuple[int, bytes]
"""The status and body of an answer; of one with an error status the body does not count."""


@dataclass(frozen=True)
class Verdict:
    """What a gate says so far."""

    problem: str
    """Why the candidate is stopped; empty while nothing speaks against it."""
    figures: Mapping[str, Any]


class Agreement:
    """Compares the answers of both versions to the same requests."""

    def __init__(
        self, settings: ReleaseSettings, client: Client, model: str, versions: tuple[str, str]
    ) -> None:
        self._least = settings.shadow.agreement
        self._alpha = settings.error_rate / PARTS
        self._client = client
        self._model = model
        self._versions = versions
        self.total = 0
        self._agreed = 0
        self._example = ""

    def ask(self, body: Any) -> None:
        """Send one request to the stable version and to the candidate.

        One that the stable version does not answer counts for nothing.
        """
        stable, candidate = (self._predict(body, version) for version in self._versions)
        if stable is None or stable[0] in FALLBACK_STATUSES:
            return
        self.total += 1
        if candidate is not None and agree(stable, candidate):
            self._agreed += 1
        elif not self._example:
            self._example = f"{_describe_answer(candidate)} instead of {_describe_answer(stable)}"

    def _predict(self, body: Any, version: str) -> Reply | None:
        """Return a version's answer; None where there is none."""
        try:
            answer = self._client.predict(self._model, body, version=version)
        except AnswerError as exc:
            return exc.status, b""
        except MarwrightError:
            return None
        return answer.status, answer.body

    def judge(self) -> Verdict:
        """Return whether the versions agree often enough."""
        found = judge_agreement(self._agreed, self.total, least=self._least, alpha=self._alpha)
        share = self._agreed / self.total if self.total else math.nan
        figures = {"pairs": self.total, "agreement": _round(share), **_bounds(found)}
        if found.verdict == "worse":
            text = f"the versions agree on {share:.0%} of {self.total} requests"
            text += f", wanted {self._least:.0%}; for example {self._example}"
            return Verdict(text, figures)
        return Verdict("", figures)


class Canary:
    """Compares how both versions answer the traffic; looks may be as frequent as one likes.

    Errors are compared over all shares: each bet is on what came between two looks. Times are
    compared anew at each share, since both versions become slower as the split and the traffic
    change; their part of `alpha` is shared out over the steps.
    """

    def __init__(self, settings: CanarySettings, alpha: float) -> None:
        self._settings = settings
        self._alpha = alpha
        """For each comparison, over the whole release."""
        self._answers: dict[str, list[tuple[int, float]]] = {arm: [] for arm in ARMS}
        self._looks: dict[str, list[Counts]] = {arm: [] for arm in ARMS}
        self.begin()

    def begin(self) -> None:
        """Begin a step: the share is another one from now on."""
        self._first = {arm: len(kept) for arm, kept in self._answers.items()}
        self._timed = 0
        self._times: dict[float, Comparison] = {}

    def take(self, observed: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        """Add what was answered since the last call, as (status, seconds) by arm."""
        for arm, kept in self._answers.items():
            kept += [(int(status), float(seconds)) for status, seconds in observed[arm]]
            failed = sum(status in FALLBACK_STATUSES for status, _ in kept)
            self._looks[arm].append(Counts(failed, len(kept)))

    @property
    def count(self) -> int:
        """How many answers the candidate has given in this step."""
        return len(self._answers["candidate"]) - self._first["candidate"]

    def judge(self) -> Verdict:
        """Return whether the candidate is worse in errors or in time."""
        errors = compare_errors(
            self._looks["stable"],
            self._looks["candidate"],
            margin=self._settings.errors,
            alpha=self._alpha,
        )
        self._compare_times()
        figures: dict[str, Any] = {"errors": _describe(errors)}
        problem = ""
        stable, candidate = (self._looks[arm][-1] for arm in ("stable", "candidate"))
        if errors.verdict == "worse":
            problem = (
                f"{candidate.errors} of its {candidate.total} answers are errors,"
                f" of the stable version's {stable.errors} of {stable.total}"
            )
        for quantile, found in self._times.items():
            name = "median" if quantile == 0.5 else f"p{quantile * 100:g}"
            figures[name] = _describe(found)
            if found.verdict == "worse" and not problem:
                ratio = found.interval.estimate
                problem = f"its {name} is {ratio:.2f} times the stable version's"
                problem += f", at most {self._settings.slower:g} wanted"
        answers = {arm: looks[-1].total for arm, looks in self._looks.items()}
        return Verdict(problem, {"answers": answers, **figures})

    def _compare_times(self) -> None:
        """Compare anew once there are a tenth more answers: it takes some milliseconds."""
        if self.count < max(10, self._timed * MORE):
            return
        self._timed = self.count
        times = {
            arm: [
                seconds
                for status, seconds in kept[self._first[arm] :]
                if status not in FALLBACK_STATUSES
            ]
            for arm, kept in self._answers.items()
        }
        for quantile in QUANTILES:
            self._times[quantile] = compare_latency(
                times["stable"],
                times["candidate"],
                quantile=quantile,
                ratio=self._settings.slower,
                alpha=self._alpha / len(self._settings.steps),
            )


def agree(one: Reply, other: Reply) -> bool:
    """Whether two answers say the same: status, and the same first label, or else all values."""
    if one[0] != other[0]:
        return False
    labels = [_find_label(body) for _, body in (one, other)]
    if None not in labels:
        return labels[0] == labels[1]
    return compare_bodies(one[1], other[1]) is None


def is_prediction(captured: Mapping[str, Any], model: str) -> bool:
    """Whether a copied request asks a model for a prediction, and not for an explanation."""
    return unquote(urlsplit(captured["path"]).path).rstrip("/") == f"/predictions/{model}"


def read_body(captured: Mapping[str, Any]) -> Any:
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


def _describe(found: Comparison) -> dict[str, Any]:
    estimate = _round(found.interval.estimate)
    return {"verdict": found.verdict, "estimate": estimate, **_bounds(found)}


def _bounds(found: Comparison) -> dict[str, Any]:
    return {"low": _round(found.interval.low), "high": _round(found.interval.high)}


def _round(value: float) -> float | None:
    """Return a number as JSON may hold it."""
    return round(value, 5) if math.isfinite(value) else None


def _describe_answer(reply: Reply | None) -> str:
    if reply is None:
        return "no answer"
    status, body = reply
    text = body.decode("utf-8", "replace") or f"status {status}"
    return text if len(text) <= 60 else f"{text[:57]}..."
