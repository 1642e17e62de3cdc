"""A release: one version after the other becomes the default, gate by gate, and back if need be.

Each step looks at what is there before it changes anything, so that an interrupted release is
finished by doing it again, and taken back from wherever it stands.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from marwright.errors import MarwrightError, ModelNotFoundError, ReleaseError
from marwright.release.candidate import Candidate
from marwright.release.feeder import Feeder
from marwright.release.gates import PARTS, Agreement, Canary, Verdict, is_prediction
from marwright.release.history import Line, Standing, make_line, tell_time, tell_user
from marwright.release.rollback import take_back
from marwright.release.target import Target, find_version, list_files
from marwright.server.registration import register
from marwright.server.revision import find_entry, remove_entry, revise, set_default, set_entry
from marwright.server.samples import judge_sample

__all__ = ["Release"]

LOOK_SECONDS = 0.2
THIN_SECONDS = 1.0
"""After so long without enough requests a step sends samples of its own."""
SAMPLE_SECONDS = 30.0
QUIET_SECONDS = 0.5
"""The old version has answered all it held once nothing of it was logged for so long."""

Tell = Callable[[str], None]


class Release:
    """One candidate on its way; `run` takes it to its end.

    `tell` hears of each decision in a line; `standing` is an interrupted release of the same
    archive, which is finished.
    """

    def __init__(
        self, target: Target, candidate: Candidate, *, tell: Tell, standing: Standing | None = None
    ) -> None:
        self._target = target
        self._candidate = candidate
        self._tell = tell
        self._settings = target.settings
        self._begun = standing.begun if standing else self._begin()
        if standing:
            self._candidate = candidate = replace(candidate, before=standing.begun.before)
        self._canary = Canary(self._settings.canary, self._settings.error_rate / PARTS)
        self._own = 0
        """Samples that the last step sent itself."""
        self._figures: dict[str, Any] = {}
        """What the last gate measured."""

    @property
    def begun(self) -> Line:
        """The first line of its history."""
        return self._begun

    def run(self) -> None:
        """Do all steps; where a gate fails, or Ctrl-C comes, take it back.

        Raises:
            ReleaseError: a gate failed; it was taken back.
            KeyboardInterrupt: it was taken back.
        """
        try:
            for name, step in self._list_steps():
                self._note("step", name)
                figures = step()
                self._note("passed", name, figures=figures)
        except BaseException as exc:
            if not isinstance(exc, (MarwrightError, KeyboardInterrupt, SystemExit)):
                raise
            self._fail(name, exc)
            raise
        self._note("released", "")

    def _list_steps(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        yield "register", self._register
        if self._candidate.samples:
            yield "warm-up", self._warm_up
            yield "samples", self._judge_samples
        if self._target.gateway is None:
            self._tell("without a gateway there is no shadow and no canary")
        else:
            if self._settings.shadow.requests:
                yield "shadow", self._shadow
            for share in self._settings.canary.steps:
                yield f"canary {share:g} %", partial(self._try_share, share)
        yield "default", self._set_default
        yield "drain", self._drain
        yield "keep", self._keep

    def _register(self) -> dict[str, Any]:
        """Register it on each server, and wait for its workers."""
        began = time.monotonic()
        for client in self._target.clients:
            found = find_version(client, *self._candidate.key)
            if found is None or not found.ready:
                if found is not None:
                    client.models.unregister(*self._candidate.key)
                register(
                    client,
                    self._candidate.path,
                    workers=self._candidate.workers,
                    store=self._target.store,
                )
        return {
            "servers": len(self._target.clients),
            "workers": self._candidate.workers,
            "seconds": round(time.monotonic() - began, 2),
        }

    def _warm_up(self) -> dict[str, Any]:
        """Send samples to each worker before anybody waits for its first answers."""
        count = self._settings.warm_up * self._candidate.workers
        seconds = []
        for client in self._target.clients:
            for number in range(count):
                body, sample = self._candidate.samples[number % len(self._candidate.samples)]
                began = time.monotonic()
                judge_sample(client, self._candidate.key, body, sample, timeout=SAMPLE_SECONDS)
                seconds.append(time.monotonic() - began)
        if not seconds:
            return {"requests": 0}
        return {
            "requests": len(seconds),
            "first": round(seconds[0], 4),
            "last": round(seconds[-1], 4),
        }

    def _judge_samples(self) -> dict[str, Any]:
        """Ask each sample once on each server; the answers must be those that are recorded."""
        wrong = [
            problem
            for client in self._target.clients
            for body, sample in self._candidate.samples
            if (
                problem := judge_sample(
                    client, self._candidate.key, body, sample, timeout=SAMPLE_SECONDS
                )
            )
        ]
        asked = len(self._candidate.samples) * len(self._target.clients)
        figures = {"samples": asked, "wrong": len(wrong)}
        self._pass(Verdict(wrong[0] if wrong else "", figures))
        return figures

    def _shadow(self) -> dict[str, Any]:
        """Compare both versions' answers to copies of requests."""
        settings = self._settings.shadow
        self._direct(shadow=settings.share)
        gate = Agreement(
            self._settings, self._candidate.model, (self._candidate.before, self._candidate.version)
        )
        client = self._target.clients[0]

        def look() -> int:
            observed = self._target.observe(self._candidate.model, captured=True)
            for captured in observed["captured"]:
                if (
                    is_prediction(captured, self._candidate.model)
                    and gate.total < settings.requests
                ):
                    gate.ask(client, captured)
            self._pass(gate.judge())
            return gate.total

        self._gather(look, settings.requests, "copied requests")
        return {**gate.judge().figures, "own": self._own}

    def _try_share(self, share: float) -> dict[str, Any]:
        """Let the candidate answer a share of all requests, and compare."""
        first = self._canary.counts["candidate"]
        self._direct(share=share)

        def look() -> int:
            observed = self._target.observe(self._candidate.model, since=self._canary.counts)
            self._canary.take(observed)
            self._pass(self._canary.judge())
            return self._canary.counts["candidate"] - first

        self._gather(look, self._settings.canary.requests, "answers of the candidate")
        return {**self._canary.judge().figures, "own": self._own}

    def _gather(self, look: Callable[[], int], wanted: int, what: str) -> None:
        """Look until there is enough to go by; send samples where nobody else asks."""
        gateway = self._target.gateway
        assert gateway is not None  # these steps need one
        began = time.monotonic()
        bodies = [body for body, _ in self._candidate.samples]
        with Feeder(gateway, self._candidate.model, bodies) as feeder:
            while (count := look()) < wanted:
                passed = time.monotonic() - began
                if passed > self._settings.step_seconds:
                    raise ReleaseError(
                        f"there were {count} {what} in {passed:.0f} s",
                        expected=str(wanted),
                        remedy="raise releases.step_seconds, or ask for fewer",
                    )
                if passed > THIN_SECONDS and count < wanted * passed / (10 * THIN_SECONDS):
                    feeder.start()
                time.sleep(LOOK_SECONDS)
            self._own = feeder.sent

    def _set_default(self) -> dict[str, Any]:
        """Make it the default on each server, then in deploy.yaml; then end the split."""
        if self._target.gateway is not None:
            self._direct(share=100)
        for client in self._target.clients:
            client.models.set_default(*self._candidate.key)
        self._write_default(self._candidate.path.name)
        self._target.apply()
        return {}

    def _drain(self) -> dict[str, Any]:
        """Wait until the old version has answered what it held; then end the split."""
        began = time.monotonic()
        if self._target.gateway is not None:
            last, seen = began, -1
            while time.monotonic() - began < self._settings.drain_seconds:
                count = len(self._target.observe(self._candidate.model)["stable"])
                now = time.monotonic()
                last, seen = (now, count) if count != seen else (last, seen)
                if now - last >= QUIET_SECONDS:
                    break
                time.sleep(LOOK_SECONDS / 2)
            self._target.direct(model=self._candidate.model)
        return {"seconds": round(time.monotonic() - began, 2)}

    def _keep(self) -> dict[str, Any]:
        """Unregister what is older than the versions to return to."""
        kept, gone = self._sort_earlier()
        files = list_files(self._target.clients[0], self._candidate.model)
        for client in self._target.clients:
            for version in gone:
                with contextlib.suppress(ModelNotFoundError):
                    client.models.unregister(self._candidate.model, version)
        self._forget(gone, files)
        return {"kept": kept, "unregistered": gone}

    def _forget(self, versions: list[str], files: Mapping[str, str]) -> None:
        """Take versions out of deploy.yaml; `files` are the archives by version."""

        def change(document: dict[str, Any]) -> None:
            for version in versions:
                remove_entry(document, files[version])

        if versions and self._target.path is not None:
            revise(self._target.path, change)
            self._target.apply()

    def _sort_earlier(self) -> tuple[list[str], list[str]]:
        """Return the versions that earlier releases have left: those to keep, and the others."""
        released = [
            standing.begun.before
            for standing in self._target.history.list_standings(self._candidate.model)
            if standing.last.event == "released"
        ]
        order = [self._candidate.before, *reversed(released)]
        client = self._target.clients[0]
        live = [item.version for item in client.models.versions(self._candidate.model)]
        earlier = [v for v in dict.fromkeys(order) if v in live and v != self._candidate.version]
        return earlier[: self._settings.keep], earlier[self._settings.keep :]

    def _direct(self, **shares: float) -> None:
        self._target.direct(
            model=self._candidate.model,
            stable=self._candidate.before,
            candidate=self._candidate.version,
            **shares,
        )

    def _write_default(self, archive: str) -> None:
        """Say in deploy.yaml which version is the default now."""
        path = self._target.path
        if path is None:
            return
        files = list_files(self._target.clients[0], self._candidate.model)
        workers = self._candidate.workers

        def change(document: dict[str, Any]) -> None:
            if find_entry(document, archive) is None:
                set_entry(document, archive, {"workers": workers})
            set_default(document, archive, list(files.values()))

        revise(path, change)

    def _pass(self, verdict: Verdict) -> None:
        """Raise ReleaseError where a gate says no."""
        self._figures = dict(verdict.figures)
        if verdict.problem:
            raise ReleaseError(
                f"{self._candidate.model} {self._candidate.version} does not pass",
                found=verdict.problem,
            )

    def _begin(self) -> Line:
        candidate = self._candidate
        now = tell_time()
        line = Line(
            time=now,
            release=f"{candidate.model}-{candidate.version}-{now}",
            event="begun",
            model=candidate.model,
            version=candidate.version,
            before=candidate.before,
            archive=candidate.path.name,
            digest=candidate.digest,
            deployment=self._target.deployment_digest,
            user=tell_user(),
        )
        return self._target.history.add(line)

    def _note(self, event: Any, step: str, **values: Any) -> None:
        line = self._target.history.add(make_line(self._begun, event, step=step, **values))
        self._tell(line.describe())

    def _fail(self, step: str, error: BaseException) -> None:
        """Write down why it goes back, and take it back."""
        reason = str(error) or "it was interrupted"
        self._note("failed", step, reason=reason, figures=self._figures)
        take_back(self._target, self._begun, reason=reason, tell=self._tell)
