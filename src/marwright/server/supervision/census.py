"""The workers of one server over time: which ended unasked, and the CPU time of all."""

from __future__ import annotations

from collections import Counter, defaultdict

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
        self._asked: set[int] = set()
        """Processes that were told to end."""

    def expect_end(self, pid: int) -> None:
        """Count no restart where this process is replaced: somebody asked for that."""
        self._asked.add(pid)

    def forget(self) -> None:
        """Expect other processes: the server is started again."""
        self._workers.clear()
        self._taken.clear()
        self._asked.clear()

    def take(self, state: State) -> None:
        """Take what one look at the server found.

        A worker that lost its process and has none yet counts once, when that is seen.
        """
        workers: dict[tuple[Key, str], int] = {}
        taken: dict[int, float] = {}
        for key, version in state.versions.items():
            self.restarts.setdefault(key, 0)
            for worker in version.workers:
                place = key, worker.id
                before = self._workers.get(place, 0)
                now = worker.pid if worker.pid > 0 else 0
                if before and now != before and not self._was_asked(before):
                    self.restarts[key] += 1
                workers[place] = now
                if now:
                    taken[now] = read_cpu_seconds(now)
                    grown = taken[now] - self._taken.get(now, 0.0)
                    self.cpu_seconds[key] += max(0.0, grown)
        self._workers, self._taken = workers, taken

    def _was_asked(self, pid: int) -> bool:
        if pid in self._asked:
            self._asked.discard(pid)
            return True
        return False
