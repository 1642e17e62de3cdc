"""A bench: one server whose model is loaded anew for every candidate, and what loads it."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from marwright.archive.admission import admit, find_policy
from marwright.archive.checks.samples import Sample
from marwright.archive.reader import Archive
from marwright.archive.repack import Changes, repack
from marwright.archive.summary import read_settings
from marwright.client.models import model_path
from marwright.client.tokens import TokenFile
from marwright.errors import AnswerError, ModelLoadError, ServerError, UsageError
from marwright.server.registration import register
from marwright.server.torchserve import TorchServe
from marwright.storage import translate_os_errors
from marwright.tuning.search import Candidate, Measurement, Trial

__all__ = ["Bench"]

PROGRAM = Path(__file__).with_name("load.py")
HOPELESS = 2.0
"""Times the bound: what p99 is at more connections need not be measured then."""
END_SECONDS = 40.0
OURS = "batch_handler.py"
"""The member by which a handler of ours is known: it takes a number of threads."""


class Bench:
    """One TorchServe and one generator of load; use it in a `with` block.

    Every candidate is a copy of the archive with other settings, since TorchServe 0.12 lets an
    archive's own settings win. The server's Java runs on meanwhile.
    """

    def __init__(
        self, path: Path, samples: Sequence[Sample] = (), *, eager_batches: bool = True
    ) -> None:
        """Read the archive; `samples` are sent beside those that it carries.

        Raises:
            ArchiveError: it is broken, or the policy of its store refuses it.
            UsageError: there is nothing to send.
        """
        admit(path, find_policy(path.parent))
        self.path = path
        self.eager_batches = eager_batches
        with Archive.open(path) as archive:
            self.manifest = archive.manifest
            self.settings = read_settings(archive)
            self.has_threads = OURS in archive.names
            self._requests = _read_requests(archive, samples)
        self._files = contextlib.ExitStack()

    def __enter__(self) -> Bench:
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="marwright-")))
            self._store = scratch / "store"
            self._store.mkdir()
            server = TorchServe(self._store, eager_batches=self.eager_batches)
            self._server = stack.enter_context(server)
            self._load = stack.enter_context(_start_load())
            self._files = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.close()

    def read_candidate(self, cores: int) -> Candidate:
        """Return how the archive itself wants to be served; threads as its handler chooses them."""
        workers = max(1, int(self.settings.get("minWorkers") or 1))
        handler = self.settings.get("handler")
        threads = handler.get("threads") if isinstance(handler, dict) else None
        return Candidate(
            workers,
            int(threads or (max(1, cores // workers) if self.has_threads else 1)),
            max(1, int(self.settings.get("batchSize") or 1)),
            max(1, int(self.settings.get("maxBatchDelay") or 1)),
        )

    def measure(
        self,
        candidate: Candidate,
        stage: str,
        *,
        levels: Sequence[int],
        warm_up: float,
        seconds: float,
        bound_ms: float,
    ) -> Trial:
        """Serve the archive as the candidate says, and load it with so many connections in turn.

        `warm_up` and `seconds` are of each load. More connections are not tried once p99 is far
        beyond the bound. What TorchServe cannot serve comes back as a trial with a failure.
        """
        settings = candidate.to_settings()
        if not self.has_threads:
            del settings["handler.threads"]
        copy = self._store / self.path.name
        repack(self.path, Changes(settings=settings), out=copy, force=True, preflight=None)
        started = time.monotonic()
        try:
            version = register(self._server.client, copy, workers=candidate.workers)
        except (ModelLoadError, AnswerError) as exc:
            copy.unlink(missing_ok=True)
            return Trial(candidate, stage, (), failure=str(exc))
        load_seconds = time.monotonic() - started
        try:
            found: list[Measurement] = []
            failure = ""
            for number, connections in enumerate(levels):
                # The first load also warms what is slower the first time.
                pause = warm_up if number else 2 * warm_up
                figures = self._run_load(connections, warm_up=pause, seconds=seconds)
                failure = failure or figures.pop("failure")
                figures.pop("failure", None)
                found.append(Measurement(**figures))
                if found[-1].errors or found[-1].p99_ms > HOPELESS * bound_ms:
                    break
        finally:
            self._server.client.models.unregister(version.name, version.version)
            copy.unlink(missing_ok=True)
        return Trial(candidate, stage, tuple(found), round(load_seconds, 2), failure)

    def _run_load(self, connections: int, *, warm_up: float, seconds: float) -> dict[str, Any]:
        """Have the server loaded for so many seconds; return the figures."""
        endpoint = self._server.endpoint
        address = urlsplit(endpoint.inference_url)
        manifest = self.manifest
        token = TokenFile(endpoint.key_file).read("inference") if endpoint.key_file else ""
        job = {
            "host": address.hostname,
            "port": address.port,
            "path": model_path(manifest.name, manifest.version, root="/predictions"),
            "token": token,
            "requests": self._requests,
            "connections": connections,
            "warm_up_seconds": warm_up,
            "seconds": seconds,
        }
        assert self._load.stdin is not None
        assert self._load.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the line that does not come says it
            self._load.stdin.write(json.dumps(job).encode() + b"\n")
            self._load.stdin.flush()
        line = self._load.stdout.readline()
        if not line:
            raise ServerError(
                "the generator of load ended by itself", remedy="if it was killed, memory ran out"
            )
        figures: dict[str, Any] = json.loads(line)
        return figures


@contextlib.contextmanager
def _start_load() -> Any:
    """Yield the generator's process; a session of its own keeps Ctrl-C from it."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(PROGRAM)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _read_requests(archive: Archive, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return what is sent, as the generator reads it: samples that are to be answered below 400."""
    with tempfile.TemporaryDirectory(prefix="marwright-") as name:
        folder = Path(name)
        carried = tuple(item for item in archive.names if item.startswith("MAR-INF/samples"))
        if carried:
            archive.extract(folder, members=carried)
        found = [
            {
                "content_type": sample.content_type or "application/octet-stream",
                "status": sample.status or 200,
                "body": _encode(sample.path),
            }
            for sample in [*Sample.read_all(folder), *samples]
            if (sample.status or 200) < 400
        ]
    if not found:
        raise UsageError(
            f"{archive.path} carries no samples to be asked",
            remedy="pass --sample FILE, or pack it with some",
        )
    return found


def _encode(path: Path) -> str:
    with translate_os_errors(f"read {path}"):
        return base64.b64encode(path.read_bytes()).decode("ascii")
