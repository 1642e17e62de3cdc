"""A release: one version after the other becomes the default, gate by gate, and back if need be.

Each step looks at what is there before it changes anything, so that an interrupted release is
finished by doing it again, and taken back from wherever it stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from marwright.client import Client
from marwright.errors import ReleaseError, StorageError
from marwright.release.candidate import Candidate, digest_file
from marwright.release.drain import drain
from marwright.release.entries import remove_versions, write_default
from marwright.release.gates import Verdict
from marwright.release.history import Event, Line, make_line, start_line
from marwright.release.lead import Lead
from marwright.release.rollback import take_back
from marwright.release.target import Target, find_version, list_files
from marwright.release.trial import Trial
from marwright.server.registration import register
from marwright.server.samples import judge_sample

__all__ = ["KEEP", "MOVE", "Release"]

MOVE, KEEP = "wait to move", "wait to keep"
"""Steps of a release that is led from elsewhere: until others have got as far."""
SAMPLE_SECONDS = 30.0

Tell = Callable[[str], None]
Figures = Mapping[str, Any]


class Release:
    """One candidate on its way; `run` takes it to its end.

    `tell` hears of each decision in a line; `begun` is the first line of an interrupted release of
    the same archive, which is finished. Of what it passed only the registration is looked at again.
    `lead` is who leads it, where that is done elsewhere.
    """

    def __init__(
        self,
        target: Target,
        candidate: Candidate,
        *,
        tell: Tell,
        begun: Line | None = None,
        lead: Lead | None = None,
    ) -> None:
        self._target = target
        self._candidate = candidate
        self._tell = tell
        self._lead = lead
        self.begun = begun or target.history.add(_make_first(target, candidate))
        """The first line of its history."""
        self._trial = Trial(target, candidate, judge=self._judge)
        self._figures: Figures = {}
        """What the last gate measured."""

    def run(self) -> None:
        """Do all steps; where a gate fails, or Ctrl-C comes, take it back.

        Raises:
            ReleaseError: a gate failed; it was taken back.
            KeyboardInterrupt: it was taken back.
        """
        name, passed = "", self._list_passed()
        try:
            for name, step in self._list_steps():
                if name in passed:
                    continue
                self._note("step", name)
                self._note("passed", name, figures=dict(step()))
                if self._lead is not None:
                    self._lead.check()
        except BaseException as exc:
            reason = str(exc) if isinstance(exc, Exception) else "it was interrupted"
            self._note("failed", name, reason=reason, figures=dict(self._figures))
            take_back(self._target, self.begun, reason=reason, tell=self._tell)
            raise
        self._note("released")

    def _list_passed(self) -> set[str]:
        """Return the steps that need not be done again: a server may have been started anew."""
        return {
            line.step
            for line in self._target.history.read(self._candidate.model)
            if line.release == self.begun.release and line.event == "passed"
        } - {"register", MOVE, KEEP}

    def _list_steps(self) -> Iterator[tuple[str, Callable[[], Figures]]]:
        yield "register", self._register
        if self._candidate.samples:
            yield "warm-up", self._warm_up
            yield "samples", self._try_samples
        if self._target.gateway is None:
            self._tell("without a gateway there is no shadow and no canary")
        else:
            if self._target.settings.shadow.requests:
                yield "shadow", self._trial.shadow
            for share in self._target.settings.canary.steps:
                yield f"canary {share:g} %", partial(self._trial.share, share)
        if self._lead is not None:
            yield MOVE, partial(self._wait, self._lead, "move")
        yield "default", self._set_default
        yield "drain", self._drain
        if self._lead is not None:
            yield KEEP, partial(self._wait, self._lead, "keep")
        yield "keep", self._keep

    def _register(self) -> Figures:
        """Register it on each server, and wait for its workers."""
        began = time.monotonic()
        for client in self._target.clients:
            self._register_with(client)
        return {
            "servers": len(self._target.clients),
            "workers": self._candidate.workers,
            "seconds": round(time.monotonic() - began, 2),
        }

    def _register_with(self, client: Client) -> None:
        found = find_version(client, *self._candidate.key)
        if found is not None and found.ready:
            return
        if found is not None:  # a registration that was cut off
            client.models.unregister(*self._candidate.key)
        store, path = self._target.store, self._candidate.path
        if store is not None and (store / path.name).exists():
            path = store / path.name  # by now: of what stands there no server gets another copy
        register(
            client,
            path,
            workers=self._candidate.workers,
            store=store,
            entry=self._candidate.entry,
        )

    def _warm_up(self) -> Figures:
        """Send samples to each worker before anybody waits for its first answers."""
        count = self._target.settings.warm_up * self._candidate.workers
        samples = self._candidate.samples
        seconds = []
        for client in self._target.clients:
            for number in range(count):
                began = time.monotonic()
                self._ask(client, *samples[number % len(samples)])
                seconds.append(time.monotonic() - began)
        figures = {"first": round(seconds[0], 4), "last": round(seconds[-1], 4)} if seconds else {}
        return {"requests": len(seconds), **figures}

    def _try_samples(self) -> Figures:
        """Ask each sample once on each server; the answers must be those that are recorded."""
        said = [
            self._ask(client, body, sample)
            for client in self._target.clients
            for body, sample in self._candidate.samples
        ]
        wrong = [problem for problem in said if problem]
        figures = {"samples": len(said), "wrong": len(wrong)}
        self._judge(Verdict(wrong[0] if wrong else "", figures))
        return figures

    def _ask(self, client: Client, body: Any, sample: Any) -> str:
        return judge_sample(client, self._candidate.key, body, sample, timeout=SAMPLE_SECONDS)

    def _set_default(self) -> Figures:
        """Make it the default on each server, then in deploy.yaml; then end the split."""
        for client in self._target.clients:
            client.models.set_default(*self._candidate.key)
        files = list_files(self._target.clients[0], self._candidate.model)
        write_default(
            self._target,
            self._candidate.entry,
            list(files.values()),
            workers=self._candidate.workers,
        )
        self._target.direct(model=self._candidate.model)
        return {}

    def _drain(self) -> Figures:
        """Wait until the old version has answered what the gateway sent it before."""
        most = self._target.settings.drain_seconds
        seconds = drain(self._target, self._candidate.model, "stable", most=most)
        return {"seconds": round(seconds, 2)}

    def _wait(self, lead: Lead, word: str) -> Figures:
        """Wait for a word of who leads."""
        began = time.monotonic()
        lead.wait_for(word)
        return {"seconds": round(time.monotonic() - began, 2)}

    def _keep(self) -> Figures:
        """Unregister what is older than the versions to return to."""
        kept, gone = self._sort_earlier()
        files = list_files(self._target.clients[0], self._candidate.model)
        remove_versions(self._target, [files[version] for version in gone])
        for version in gone:
            self._target.unregister(self._candidate.model, version)
        return {"kept": kept, "unregistered": gone}

    def _sort_earlier(self) -> tuple[list[str], list[str]]:
        """Return the versions that earlier releases have left: those to keep, and the others."""
        released = [
            standing.begun.before
            for standing in self._target.history.list_standings(self._candidate.model)
            if standing.last.event == "released"
        ]
        order = [self._candidate.before, *reversed(released)]
        live = list_files(self._target.clients[0], self._candidate.model)
        earlier = [v for v in dict.fromkeys(order) if v in live and v != self._candidate.version]
        keep = self._target.settings.keep
        return earlier[:keep], earlier[keep:]

    def _judge(self, verdict: Verdict) -> None:
        """Raise ReleaseError where a gate says no, or who leads it."""
        self._figures = verdict.figures
        if self._lead is not None:
            self._lead.check()
        if verdict.problem:
            raise ReleaseError(
                f"{self._candidate.model} {self._candidate.version} does not pass",
                found=verdict.problem,
            )

    def _note(self, event: Event, step: str = "", **values: Any) -> None:
        line = self._target.history.add(make_line(self.begun, event, step=step, **values))
        self._tell(line.describe())


def _make_first(target: Target, candidate: Candidate) -> Line:
    """Return the line that a release begins with."""
    return start_line(
        *candidate.key,
        before=candidate.before,
        archive=candidate.path.name,
        digest=candidate.digest,
        before_archive=candidate.before_archive,
        before_digest=_digest_before(target, candidate),
        deployment=target.deployment_digest,
        present=list(candidate.present),
    )


def _digest_before(target: Target, candidate: Candidate) -> str:
    """Return the digest of the version that is the default; "" where its file is not there."""
    try:
        return digest_file(target.store / candidate.before_archive) if target.store else ""
    except StorageError:
        return ""
