"""What a trial's answers tell: whether each request got its own, the same in every batch."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marwright.archive.checks.comparison import Difference, compare_bodies, compare_values
from marwright.archive.checks.ending import DIED, find_place
from marwright.archive.checks.findings import Finding, Rule, Severity
from marwright.archive.checks.samples import Sample
from marwright.archive.checks.trial import Trial
from marwright.archive.member import SPEC_NAME

__all__ = ["judge_answers", "read_batches", "RULES"]

COUNT = Rule(
    "W511",
    Severity.ERROR,
    "the handler does not return one answer for each request",
    "return a list with as many answers as the batch has requests",
)
NOT_SERIALISABLE = Rule(
    "W512",
    Severity.ERROR,
    "an answer that TorchServe cannot turn into bytes",
    "return text, bytes, or what json.dumps takes: call .tolist() or .item() on tensors and arrays",
)
RAISES = Rule(
    "W513", Severity.ERROR, "the handler fails on a sample", "mend the handler, or the sample"
)
STATUS = Rule(
    "W514",
    Severity.ERROR,
    "a sample is answered with another status",
    "mend the handler, or the sample's status",
)
ANSWER = Rule(
    "W515",
    Severity.ERROR,
    "a sample is answered otherwise than recorded",
    "mend the handler, pack the model that the answers are of, or record them again",
)
BATCH = Rule(
    "W516",
    Severity.ERROR,
    "an answer depends on what else is in the batch",
    "answer each request from its own row; put the model into eval mode",
)
NEIGHBOURS = Rule(
    "W517",
    Severity.WARNING,
    "one broken request fails the whole batch",
    "catch what one request raises, answer it alone: context.set_response_status(400, ..., index)",
)
BLAMES_SERVER = Rule(
    "W518",
    Severity.NOTE,
    "a broken request is answered as the server's fault",
    "check the input, and answer 4xx: context.set_response_status(400, ..., index)",
)
ACCEPTS = Rule(
    "W519",
    Severity.NOTE,
    "a broken request is answered as if it were whole",
    "check the input, and answer 4xx: context.set_response_status(400, ..., index)",
)
UNSTEADY = Rule(
    "W520",
    Severity.NOTE,
    "the same request is answered differently from time to time, so that batches are not compared",
    "set a seed if the answers should agree",
)
SCHEMA = Rule(
    "W521",
    Severity.ERROR,
    "an answer does not fit the declared output",
    "mend the handler, or output.schema in model.yaml",
)
RULES = (
    COUNT,
    NOT_SERIALISABLE,
    RAISES,
    STATUS,
    ANSWER,
    BATCH,
    NEIGHBOURS,
    BLAMES_SERVER,
    ACCEPTS,
    UNSTEADY,
    SCHEMA,
)

_FAILURES = {"wrong-count": COUNT, "not-a-list": COUNT, "not-serialisable": NOT_SERIALISABLE}
_KINDS = {"empty": "an empty body", "cut": "the first half of a body", "random": "random bytes"}


@dataclass(frozen=True)
class _Reply:
    """One answer of the trial, and what it answers."""

    sample: int
    kind: str
    size: int
    """Of its batch."""
    is_mixed: bool
    """Whether the batch had a broken request."""
    status: int
    body: bytes
    failure: dict[str, str] | None

    @property
    def is_whole(self) -> bool:
        """Whether the request was not broken."""
        return self.kind == "whole"


def judge_answers(
    trial: Trial, samples: Sequence[Sample], *, folder: Path, batch_size: int
) -> Iterator[Finding]:
    """Yield what is wrong with the answers of a trial.

    `batch_size` is the archive's own: what fails only in larger batches is a warning.
    """
    replies = list(_read_replies(trial))
    judge = _Judge(replies, samples, folder, batch_size)
    yield from judge.find_failures()
    yield from judge.find_other_answers()
    yield from judge.find_misfits(read_output_schema(folder))
    yield from judge.find_dependence()
    yield from judge.find_harm()


def read_batches(trial: Trial) -> Iterator[tuple[int, float]]:
    """Yield (size, seconds) of the batches in which every request was whole."""
    for event in trial.events:
        if event["event"] == "answered" and all(kind == "whole" for _, kind in event["requests"]):
            yield len(event["requests"]), event["answers"][0]["seconds"]


def _read_replies(trial: Trial) -> Iterator[_Reply]:
    for event in trial.events:
        if event["event"] != "answered":
            continue
        requests = event["requests"]
        is_mixed = any(kind != "whole" for _, kind in requests)
        for (sample, kind), answer in zip(requests, event["answers"], strict=True):
            yield _Reply(
                sample=sample,
                kind=kind,
                size=len(requests),
                is_mixed=is_mixed,
                status=answer["status"],
                body=base64.b64decode(answer["body"]),
                failure=answer["failure"],
            )


@dataclass(frozen=True)
class _Judge:
    replies: Sequence[_Reply]
    samples: Sequence[Sample]
    folder: Path
    batch_size: int

    def find_failures(self) -> Iterator[Finding]:
        """Find whole requests, among whole ones, that got no answer of the handler's own."""
        groups: dict[tuple[str, str], list[_Reply]] = {}
        for reply in self.replies:
            if reply.failure is None or reply.is_mixed or self._is_recorded(reply):
                continue
            groups.setdefault((reply.failure["kind"], reply.failure["place"]), []).append(reply)
        for (kind, _), group in groups.items():
            rule = DIED if kind == "worker-died" else _FAILURES.get(kind, RAISES)
            yield self._at(rule, group, _message(group[0]), failure=group[0].failure)

    def find_other_answers(self) -> Iterator[Finding]:
        """Find answers to whole requests that are not what their samples record."""
        for number, sample in enumerate(self.samples):
            replies = [
                reply
                for reply in self.replies
                if reply.sample == number and reply.is_whole and reply.failure is None
            ]
            others = [reply for reply in replies if not _has_status(reply, sample)]
            if others:
                expected = sample.status or "a status below 400"
                found = f"{sample.name} is answered with {others[0].status} instead of {expected}"
                yield self._at(STATUS, others, found, detail=_quote(others[0].body))
            elif replies and sample.answer is not None:
                yield from self._compare_recorded(sample, replies[0])

    def find_misfits(self, schema: dict[str, Any] | None) -> Iterator[Finding]:
        """Find the first answer that the declared output schema does not allow."""
        if schema is None:
            return
        for reply in self.replies:
            answered = reply.is_whole and reply.failure is None and reply.status < 400
            if answered and (misfit := _find_misfit(reply.body, schema)):
                yield SCHEMA.at(f"{self.samples[reply.sample].name}: {misfit}")
                return

    def find_dependence(self) -> Iterator[Finding]:
        """Find answers that differ between a request alone and the same request in a batch."""
        alone: dict[int, _Reply] = {}
        differing: list[tuple[_Reply, Difference]] = []
        answered = [reply for reply in self.replies if reply.is_whole and reply.failure is None]
        for reply in answered:
            if reply.size > 1:
                continue
            first = alone.setdefault(reply.sample, reply)
            if difference := _compare(first, reply):
                name = self.samples[reply.sample].name
                yield UNSTEADY.at(f"{name}: {difference.text}")
                return
        for reply in answered:
            if reply.size > 1 and reply.sample in alone:
                difference = _compare(alone[reply.sample], reply)
                differing += [(reply, difference)] if difference else []
        if differing:
            reply, difference = max(differing, key=lambda pair: pair[1].is_grave)
            beside = " beside a broken request" if reply.is_mixed else ""
            found = f"{self.samples[reply.sample].name}{beside}: {difference.text}"
            severity = None if difference.is_grave else Severity.WARNING
            yield self._at(BATCH, [reply for reply, _ in differing], found, severity=severity)

    def find_harm(self) -> Iterator[Finding]:
        """Find what broken requests do to themselves and to others."""
        failing = {reply.size for reply in self.replies if reply.failure and not reply.is_mixed}
        broken = [reply for reply in self.replies if not reply.is_whole]
        dead = [
            reply for reply in broken if reply.failure and reply.failure["kind"] == "worker-died"
        ]
        if dead:
            cause = [reply for reply in dead if reply.size == 1] or dead
            found = f"{_list_kinds(cause)} ends the worker: {_message(dead[0])}"
            yield self._at(DIED, cause, found, failure=dead[0].failure)
        harmed = [
            reply
            for reply in self.replies
            if reply.is_whole and reply.is_mixed and reply.failure and reply.size not in failing
        ]
        alone = [reply for reply in broken if reply.size == 1]
        blaming = [reply for reply in alone if reply.status >= 500 and reply not in dead]
        if harmed and not dead:
            cause = blaming or broken
            found = f"{_list_kinds(cause)} fails the batch: {_message(harmed[0])}"
            severity = None if self.batch_size > 1 else Severity.NOTE
            yield self._at(NEIGHBOURS, harmed, found, failure=harmed[0].failure, severity=severity)
        elif blaming and 1 not in failing:
            found = f"{_list_kinds(blaming)} is answered with {blaming[0].status}"
            yield self._at(BLAMES_SERVER, blaming, found, failure=blaming[0].failure)
        accepted = [reply for reply in alone if reply.status < 400]
        if accepted:
            yield ACCEPTS.at(f"{_list_kinds(accepted)} is answered with {accepted[0].status}")

    def _compare_recorded(self, sample: Sample, reply: _Reply) -> Iterator[Finding]:
        try:
            found = json.loads(reply.body)
        except (ValueError, RecursionError):
            found = reply.body.decode("utf-8", "replace")
        difference = compare_values(sample.answer, found, subset=True)
        if difference:
            severity = None if difference.is_grave else Severity.WARNING
            yield ANSWER.at(f"{sample.name}: {difference.text}", severity=severity)

    def _is_recorded(self, reply: _Reply) -> bool:
        """Whether a sample is one that the handler is to refuse."""
        return reply.is_whole and self.samples[reply.sample].status == reply.status

    def _at(
        self,
        rule: Rule,
        replies: Sequence[_Reply],
        found: str,
        *,
        failure: dict[str, str] | None = None,
        severity: Severity | None = None,
        detail: str = "",
    ) -> Finding:
        """Return a finding with the batch sizes it was met at, and the place it comes from."""
        place = failure["place"] if failure else ""
        member, line = find_place(place, self.folder)
        where = f" at {place}" if place and not member else ""
        sizes = sorted({reply.size for reply in replies})
        in_batch = f" (batch size {', '.join(map(str, sizes))})" if sizes != [1] else ""
        if severity is None and sizes[0] > max(self.batch_size, 1):
            severity = min(rule.severity, Severity.WARNING)
        return rule.at(
            f"{found}{where}{in_batch}",
            member=member,
            line=line,
            detail=detail or (failure["traceback"] if failure else ""),
            severity=severity,
        )


def read_output_schema(folder: Path) -> dict[str, Any] | None:
    """Return the JSON Schema that an unpacked archive declares for its answers, if it does."""
    try:
        spec = json.loads((folder / SPEC_NAME).read_bytes())
        schema = spec["output"]["schema"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return schema if isinstance(schema, dict) else None


def _find_misfit(body: bytes, schema: dict[str, Any]) -> str:
    """Return why a body is not what a schema allows, or "" where it is; nothing is fetched."""
    from jsonschema.exceptions import SchemaError, best_match  # 0.1 s that only a schema needs
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as exc:
        return f"no JSON: {exc}"
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
        error = best_match(kind(schema, registry=Registry()).iter_errors(value))
    except (SchemaError, Unresolvable, RecursionError) as exc:
        return f"the schema itself cannot be used: {str(exc).splitlines()[0]}"
    return f"{error.json_path}: {error.message[:200]}" if error else ""


def _message(reply: _Reply) -> str:
    return reply.failure["message"] if reply.failure else ""


def _list_kinds(replies: Sequence[_Reply]) -> str:
    """Return `an empty body, random bytes`."""
    return ", ".join(text for kind, text in _KINDS.items() if kind in {r.kind for r in replies})


def _has_status(reply: _Reply, sample: Sample) -> bool:
    return reply.status == sample.status if sample.status else reply.status < 400


def _compare(one: _Reply, other: _Reply) -> Difference | None:
    if one.status != other.status:
        return Difference(f"status {other.status} instead of {one.status}", is_grave=True)
    return compare_bodies(one.body, other.body)


def _quote(body: bytes) -> str:
    return body[:500].decode("utf-8", "replace")
