"""What each page of the page shows: the values that templates get, and what changes live."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from marwright.errors import MarwrightError
from marwright.monitor.page.archives import Archives
from marwright.monitor.page.measures import read_measures
from marwright.monitor.page.pictures import Pictures
from marwright.monitor.page.plots import Plot, show_number, show_seconds
from marwright.monitor.page.rollbacks import find_holder
from marwright.monitor.page.scene import (
    Scene,
    describe_changes,
    describe_server,
    describe_state,
    group_versions,
    list_differences,
    list_facts,
    list_problems,
    list_states,
    show_clock,
    show_moment,
)
from marwright.monitor.page.sources import Sources
from marwright.monitor.page.steps import Progress, list_releases
from marwright.monitor.page.stream import Frame, Topic
from marwright.monitor.page.traffic import Moment, pick_rates, plot_rates, sum_rates

if TYPE_CHECKING:
    from marwright.server.metrics.exposition import Sample

__all__ = ["View", "Views"]

FAILURES = 24
FAILURE_SECONDS = 5.0
"""How long a reading of the prediction log counts as the latest."""
RELEASES = 50


@dataclass(frozen=True)
class View:
    """One page, not yet drawn."""

    template: str
    topic: Topic
    stamp: str
    values: dict[str, Any]


class Views:
    """Makes views and frames of one server; threads may share it."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.pictures = Pictures()
        self._archives = Archives()
        self._states: dict[str, str] = {}
        self._sums: dict[float, Moment] = {}
        self._releases: tuple[Any, list[Progress]] = (None, [])
        self._failures: tuple[float, list[dict[str, Any]] | None] = (0.0, None)
        self._samples: tuple[float | None, list[Sample]] = (None, [])
        self._lock = threading.Lock()
        self._failures_lock, self._samples_lock = threading.Lock(), threading.Lock()
        """Held while a disk or a server is waited for, which plots and releases must not."""

    # What is sent while somebody watches.

    def draw(self, topic: Topic) -> Frame:
        """Return what of a topic's page may have changed."""
        scene = self.read_scene()
        text = {"looked": show_clock(scene.last.time) if scene.last else "never"}
        text["server"] = describe_server(scene)[1]
        stamp = self.stamp(topic, scene)
        if topic.name == "overview":
            groups = group_versions(scene)
            rows = {row.key: row.values for group in groups for row in group.rows}
            return Frame(stamp, rows, text, _collect_html(self._plot_all(scene)))
        if topic.name == "version":
            text |= self._describe_version(scene, topic)
            return Frame(stamp, {}, text, _collect_html(self._plot_version(scene, topic)))
        return Frame(stamp, {}, text, {})

    def notice(self) -> list[str]:
        """Return what has changed since the last call, in sentences."""
        before, self._states = self._states, list_states(self.read_scene())
        return describe_changes(before, self._states) if before else []

    def wait(self, after: float, timeout: float) -> float | None:
        """Return the moment of the latest look, once there is one after another."""
        found = self.sources.recorder.wait(after, timeout)
        return None if found is None else max(found.time, self.sources.recorder.looks[-1].time)

    def stamp(self, topic: Topic, scene: Scene) -> str:
        """Return a text that is another one where a topic's page must be made anew."""
        models = [(m["name"], m["version"], m["default"]) for m in scene.models]
        facts: list[Any] = [scene.problem, describe_server(scene), list_problems(scene)]
        facts.append(list_differences(scene))
        if topic.name in {"overview", "releases", "version"}:
            releases = self.read_releases()
            facts.append([(item.standing.last.time, item.outcome) for item in releases[:1]])
        if topic.name == "overview":
            facts.append(sorted(models))
        elif topic.name == "version":
            found = scene.find(topic.model, topic.version) or {}
            drift = scene.shown.drift.get(topic[1:]) if scene.shown else None
            facts.append([found.get("problem"), found.get("default"), found.get("workers")])
            facts.append(sorted((drift or {}).items()))
        elif topic.name == "failures":
            facts.append(
                [(row.get("request"), str(row.get("time"))) for row in self._read_failed()]
            )
        elif topic.name == "releases":
            facts.append(len(self.read_releases()))
        return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]

    # Pages.

    def show_overview(self, wanted: str = "") -> View:
        """Return the first page: all versions, traffic, and the server."""
        scene = self.read_scene()
        topic = Topic("overview")
        groups = group_versions(scene, wanted)
        open_releases = [item for item in self.read_releases() if item.standing.is_open]
        values = {
            "groups": groups,
            "wanted": wanted,
            "versions": sum(len(group.rows) for group in groups),
            "plots": self._plot_all(scene),
            "facts": list_facts(scene),
            "replicas": scene.shown.status.get("replicas", ()) if scene.shown else (),
            "open_releases": open_releases,
        }
        return self._finish("overview.html", topic, scene, values)

    def show_version(self, model: str, version: str) -> View | None:
        """Return the page of one version; None where there is none."""
        scene = self.read_scene()
        item = scene.find(model, version)
        if item is None:
            return None
        topic = Topic("version", model, version)
        values: dict[str, Any] = {
            "item": item,
            "mood": describe_state(item, away=bool(scene.problem))[0],
            "text": self._describe_version(scene, topic),
            "plots": self._plot_version(scene, topic),
            "measures": read_measures(self._read_samples(scene), model, version),
            "contents": None,
            "archive_problem": "",
        }
        try:
            path = self.sources.find_archive(model, version)
            values["contents"] = self._archives.read(path) if path else None
        except MarwrightError as exc:
            values["archive_problem"] = str(exc)
        return self._finish("version.html", topic, scene, values)

    def show_releases(self) -> View:
        """Return the history of releases, the one in progress first."""
        scene, releases = self.read_scene(), self.read_releases()
        values = {"releases": releases[:RELEASES], "more": max(0, len(releases) - RELEASES)}
        return self._finish("releases.html", Topic("releases"), scene, values)

    def show_failures(self) -> View:
        """Return the latest requests that failed, with pictures of their inputs."""
        scene = self.read_scene()
        rows = self._read_failed()
        shown = [
            {
                **row,
                "clock": show_moment(row["time"]),
                "picture": self.pictures.add(row["input"]) if row.get("input") else "",
            }
            for row in rows
        ]
        values = {"failures": shown, "is_kept": self._failures[1] is not None}
        return self._finish("failures.html", Topic("failures"), scene, values)

    def show_form(self, **values: Any) -> View:
        """Return the form to try a model with, and the answer where there is one."""
        scene = self.read_scene()
        items = sorted(scene.models, key=lambda m: (m["name"].lower(), not m["default"]))
        choices = [(m["name"], m["version"], m["default"]) for m in items if m["workers"]]
        return self._finish("try.html", Topic("try"), scene, {"choices": choices, **values})

    def show_rollback(self, model: str) -> View | None:
        """Return the question whether a release is to be taken back; None where there is none."""
        found = [item for item in self.read_releases() if item.standing.begun.model == model]
        if not found:
            return None
        values = {"release": found[0], "model": model}
        return self._finish("rollback.html", Topic("rollback"), self.read_scene(), values)

    def make_report(self) -> dict[str, Any]:
        """Return the latest look as JSON has it."""
        scene = self.read_scene()
        if scene.last is None:
            return {"problem": scene.problem}
        rates = [
            {"model": key[0], "version": key[1], **vars(value)}
            for key, value in scene.last.rates.items()
        ]
        status, moment = dict(scene.last.status), scene.last.time
        return {"time": moment, "problem": scene.problem, "status": status, "rates": rates}

    # What they are made of.

    def read_scene(self) -> Scene:
        """Return the looks there are."""
        return Scene(self.sources.recorder.looks)

    def read_releases(self) -> list[Progress]:
        """Return the releases, the last one first; read anew where the history has changed."""
        history = self.sources.history
        stat = history.path.stat() if history.path.exists() else None
        mark = stat and (stat.st_mtime_ns, stat.st_size)
        is_running = find_holder(history) is not None
        if mark is None:
            return []
        with self._lock:
            if self._releases[0] != (mark, is_running):
                found = list_releases(history, is_running=is_running)
                self._releases = ((mark, is_running), found)
            return self._releases[1]

    def _read_samples(self, scene: Scene) -> list[Sample]:
        """Return the server's metrics, fetched once for all viewers of a look."""
        moment = scene.last.time if scene.last else None
        with self._samples_lock:
            if moment is None or self._samples[0] != moment:
                self._samples = (moment, self.sources.read_metrics())
            return self._samples[1]

    def _read_failed(self) -> list[dict[str, Any]]:
        with self._failures_lock:
            if time.monotonic() - self._failures[0] > FAILURE_SECONDS:
                rows = self.sources.read_failures(FAILURES)
                self._failures = (time.monotonic(), rows)
            return self._failures[1] or []

    def _finish(self, template: str, topic: Topic, scene: Scene, values: dict[str, Any]) -> View:
        """Add what each page shows."""
        mood, state = describe_server(scene)
        common = {
            "name": self.sources.record.name,
            "server_mood": mood,
            "server_state": state,
            "problems": list_problems(scene),
            "differences": list_differences(scene),
            "looked": show_clock(scene.last.time) if scene.last else "never",
        }
        return View(template, topic, self.stamp(topic, scene), {**common, **values})

    def _describe_version(self, scene: Scene, topic: Topic) -> dict[str, str]:
        item = scene.find(topic.model, topic.version)
        away = bool(scene.problem)
        rates = scene.shown.rates.get(topic[1:]) if scene.shown and not away else None
        if item is None:
            return {"state": "gone"}
        return {
            "state": describe_state(item, away=away)[1],
            "workers": f"{0 if away else item['ready_workers']} of {item['workers']}",
            "memory": f"{item['memory_bytes'] >> 20} MiB",
            "requests": show_number(rates.requests if rates else None),
            "errors": show_number(rates.errors if rates else None),
            "p50": show_seconds(rates.p50 if rates else None),
            "p95": show_seconds(rates.p95 if rates else None),
            "p99": show_seconds(rates.p99 if rates else None),
            "queue": show_number(rates.queue if rates else None),
            "batch": show_number(rates.batch if rates else None),
        }

    def _plot_all(self, scene: Scene) -> list[Plot]:
        """Draw the whole server; each look is summed up once."""
        with self._lock:
            sums = {look.time: self._sums.get(look.time) or sum_rates(look) for look in scene.looks}
            self._sums = sums
        return plot_rates(list(sums), list(sums.values()), slowest=True)

    def _plot_version(self, scene: Scene, topic: Topic) -> list[Plot]:
        times = [look.time for look in scene.looks]
        rates = [pick_rates(look, topic[1:]) for look in scene.looks]
        return plot_rates(times, rates, slowest=False)


def _collect_html(plots: Sequence[Plot]) -> dict[str, str]:
    found = {f"{plot.id}-drawing": str(plot.drawing) for plot in plots}
    return found | {f"{plot.id}-rows": str(plot.body) for plot in plots}
