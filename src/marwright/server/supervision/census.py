"""The workers of one server over time: which ended unasked, and the CPU time of all."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator

from marwright.server.state import State
from marwright.server.supervision.usage import read_cpu_seconds

__all__ = ["Census"]

Key = tuple[str, str]


class Census:
    """Counts by model and version; a version that is gone keeps its counts."""

    def __init__(self) -> None:
        self.restarts: Counter[Key] = Counter()
        self.cpu_seconds: defaultdict[Key, float] = defaultdict(float)
        self._workers: dict[tuple[Key, str], int] = {}
        """The process of each worker at the last look, by its id."""
        self._taken: dict[int, float] = {}
        """CPU seconds of each process at the last look."""
        self._replacing: set[Key] = set()
        self._replaced: set[Key] = set()

    @contextlib.contextmanager
    def expect_ends(self, key: Key) -> Iterator[None]:
        """Count no restart of this version while the block replaces its workers."""
        self._replacing.add(key)
        try:
            yield
        finally:
            self._replaced.add(key)  # the next look still sees what the block did
            self._replacing.discard(key)

    def forget(self) -> None:
        """Expect other processes: the server is started again."""
        self._workers.clear()
        self._taken.clear()

    def take(self, state: State) -> None:
        """Take what one look at the server found.

        A worker that lost its process and has none yet counts once, when that is seen.
        """
        workers: dict[tuple[Key, str], int] = {}
        taken: dict[int, float] = {}
        expected = self._replacing | self._replaced
        self._replaced -= expected - self._replacing
        for key, version in state.versions.items():
            self.restarts.setdefault(key, 0)
            for worker in version.workers:
                place = key, worker.id
                before = self._workers.get(place, 0)
                now = worker.pid if worker.pid > 0 else 0
                if before and now != before and key not in expected:
                    self.restarts[key] += 1
                workers[place] = now
                if now:
                    taken[now] = read_cpu_seconds(now)
                    grown = taken[now] - self._taken.get(now, 0.0)
                    self.cpu_seconds[key] += max(0.0, grown)
        self._workers, self._taken = workers, taken
