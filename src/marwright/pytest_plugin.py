"""A pytest plugin: archives under test, served by a real TorchServe.

One server runs for the session, on free ports and with a store of its own; an archive is registered
for one test and taken away after it. What its workers wrote stands in the report of a test that
failed. Without its fixtures the plugin imports nothing and does nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from marwright.archive.checks.samples import Sample
    from marwright.client import Answer, Client
    from marwright.errors import MarwrightError
    from marwright.server import TorchServe

__all__ = ["served_archive", "ServedArchive", "torchserve"]

TIMEOUT = 120.0
STORE = "model_store"
LOG_SECONDS = 0.3
"""How long a worker's last lines may take into the log after an answer; spent on failed tests."""
MOST_LINES = 100
MOST_LETTERS = 20_000


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options; each may stand in the ini file too, as torchserve_..."""
    group = parser.getgroup("torchserve", "archives served by TorchServe (marwright)")
    store = f"Folder of archives that tests name by file name alone ({STORE})."
    group.addoption("--torchserve-store", metavar="DIR", help=store)
    parser.addini("torchserve_store", store, default=STORE)
    timeout = f"Seconds until the server must have started ({TIMEOUT:g})."
    group.addoption("--torchserve-timeout", metavar="SECONDS", help=timeout)
    parser.addini("torchserve_timeout", timeout, default=str(TIMEOUT))


def pytest_configure(config: pytest.Config) -> None:
    """Announce the marker."""
    line = "archive(path, workers=None): the archive that the fixture served_archive serves"
    config.addinivalue_line("markers", line)


@dataclass(frozen=True)
class ServedArchive:
    """An archive for as long as a test runs."""

    path: Path
    name: str
    """Model name."""
    version: str
    client: Client
    """Of the server; it reaches every model there."""
    samples: tuple[Sample, ...]
    """What the archive carries: requests, and what is recorded of their answers."""
    since: datetime
    """From when on its workers' lines belong to the test."""

    def predict(self, data: Any, **options: Any) -> Answer:
        """Send one input - a sample, a file, bytes, whatever Client.predict takes.

        Raises:
            AnswerError: the answer has an error status.
        """
        return self.client.predict(self.name, _read(data), version=self.version, **options)

    def explain(self, data: Any, **options: Any) -> Answer:
        """Ask why the model answers so; see Client.explain."""
        return self.client.explain(self.name, _read(data), version=self.version, **options)

    def check(self, sample: Sample, *, tolerance: float = 1e-4) -> None:
        """Send a sample and hold the answer against what is recorded of it: status and values.

        `tolerance` of numbers is relative and absolute. Without a record any status below 400 will
        do.

        Raises:
            AssertionError: it is another answer.
        """
        __tracebackhide__ = True
        from marwright.archive.checks.comparison import compare_values
        from marwright.errors import AnswerError

        try:
            answer = self.predict(sample)
            status, body = answer.status, answer.body
        except AnswerError as exc:
            if not exc.status:  # no answer of the server's
                raise
            status, body = exc.status, exc.body
        if not (status == sample.status if sample.status else status < 400):
            expected = sample.status or "one below 400"
            text = body[:500].decode("utf-8", "replace")
            raise AssertionError(f"{sample.name} has status {status} instead of {expected}: {text}")
        if sample.answer is None:
            return
        difference = compare_values(sample.answer, _parse(body), tolerance=tolerance, subset=True)
        if difference is not None:
            raise AssertionError(f"{sample.name}: {difference.text}")

    def read_log(self) -> str:
        """Return the last lines that the archive's workers wrote since the test began."""
        from marwright.errors import StorageError
        from marwright.server.log import read_log

        path = self.client.endpoint.log_file
        lines: list[str] = []
        with contextlib.suppress(StorageError):  # no log, nothing to tell
            lines = [
                line.message
                for line in (read_log(path, since=self.since) if path else ())
                if (line.model, line.version) == (self.name, self.version) and line.stream
            ]
        text = "\n".join(lines[-MOST_LINES:])[-MOST_LETTERS:]
        left_out = len(lines) - text.count("\n") - 1
        return f"... {left_out} lines before\n{text}" if left_out > 0 else text


_SERVED = pytest.StashKey[list[ServedArchive]]()


@pytest.fixture(scope="session")
def torchserve(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TorchServe]:
    """One TorchServe for the session, on free ports, with an empty store of its own."""
    from marwright.errors import MarwrightError
    from marwright.server import TorchServe

    timeout = _read_timeout(request.config)
    try:
        server = TorchServe(tmp_path_factory.mktemp("torchserve"), timeout=timeout)
        server.start()
    except MarwrightError as exc:
        _fail(exc)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def served_archive(
    request: pytest.FixtureRequest,
    torchserve: TorchServe,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServedArchive | Callable[..., ServedArchive]]:
    """Serve archives for one test: the one of the marker, else a function that serves one.

    Example:
        @pytest.mark.archive("model_store/cnn.mar")
        def test_the_samples(served_archive):
            for sample in served_archive.samples:
                served_archive.check(sample)

    The function is called as the marker is: served_archive("model_store/cnn.mar", workers=1). Paths
    start in pytest's rootdir; a bare file name stands for one in the folder --torchserve-store.
    """
    served: list[ServedArchive] = []
    request.node.stash[_SERVED] = served

    def serve(archive: str | Path, *, workers: int | None = None) -> ServedArchive:
        from marwright.errors import MarwrightError

        path = _find_archive(request.config, Path(archive))
        try:
            found = _serve(torchserve, path, workers, tmp_path_factory.mktemp("samples"))
        except MarwrightError as exc:
            _fail(exc)
        served.append(found)
        return found

    marker = request.node.get_closest_marker("archive")
    try:
        yield serve(*marker.args, **marker.kwargs) if marker else serve
    finally:
        _take_away(torchserve, served)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what the workers wrote to the report of a test that failed."""
    report = yield
    served = item.stash.get(_SERVED, [])
    if served and report.failed:
        time.sleep(LOG_SECONDS)
        for archive in served:
            if text := archive.read_log():
                title = f"worker log of {archive.name} {archive.version}"
                report.sections.append((title, text))
    return report


def _serve(server: TorchServe, path: Path, workers: int | None, folder: Path) -> ServedArchive:
    """Register an archive; `workers` None means as many as it says itself."""
    from marwright.archive.checks.samples import Sample
    from marwright.archive.reader import Archive
    from marwright.server import register

    now = datetime.now(timezone.utc)
    since = now.replace(microsecond=now.microsecond // 1000 * 1000)  # the log counts milliseconds
    with Archive.open(path) as archive:
        carried = tuple(name for name in archive.names if name.startswith("MAR-INF/samples"))
        if carried:
            archive.extract(folder, members=carried)
    samples = tuple(Sample.read_all(folder))
    version = register(server.client, path, workers=workers or 1)
    if workers is not None and version.min_workers != workers:
        # TorchServe takes the archive's own number over that of the registration.
        server.client.models.scale(version.name, workers, version=version.version)
    return ServedArchive(path, version.name, version.version, server.client, samples, since)


def _take_away(server: TorchServe, served: list[ServedArchive]) -> None:
    """Unregister archives and remove them from the server's store."""
    from marwright.archive.signature import signature_path
    from marwright.errors import ConflictError, MarwrightError, ModelNotFoundError

    endpoint = server.endpoint
    waiting = list(reversed(served))  # the first version of a model is its default, and goes last
    try:
        for archive in [*waiting, *waiting]:
            # Unregistered already, or a default that others hold until the second round.
            with contextlib.suppress(ModelNotFoundError, ConflictError):
                server.client.models.unregister(archive.name, archive.version)
    except MarwrightError as exc:
        _fail(exc)
    finally:
        for folder in filter(None, (endpoint.model_store, endpoint.staging)):
            for archive in served:
                file = folder / archive.path.name
                file.unlink(missing_ok=True)
                signature_path(file).unlink(missing_ok=True)


def _find_archive(config: pytest.Config, archive: Path) -> Path:
    if archive.parent != Path():
        return config.rootpath / archive
    given: str | None = config.getoption("torchserve_store")
    if given is not None:
        return config.invocation_params.dir / given / archive
    return config.rootpath / str(config.getini("torchserve_store")) / archive


def _read_timeout(config: pytest.Config) -> float:
    given = config.getoption("torchserve_timeout")
    text = str(config.getini("torchserve_timeout") if given is None else given)
    try:
        return float(text)
    except ValueError as exc:
        raise pytest.UsageError(f"torchserve_timeout is no number of seconds: {text!r}") from exc


def _read(data: Any) -> Any:
    """Return a sample as the client sends it, by its content type; anything else as it is."""
    from marwright.archive.checks.samples import Sample

    if not isinstance(data, Sample):
        return data
    kind = data.content_type or ""
    if kind.startswith("application/json"):
        return _parse(data.path.read_bytes())
    return data.path.read_text("utf-8") if kind.startswith("text/") else data.path


def _parse(body: bytes) -> Any:
    """Return JSON's value, or the text that it is instead."""
    import json

    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")


def _fail(error: MarwrightError) -> NoReturn:
    """Fail the test with our error's line, and what belongs below it; no traceback of ours."""
    text = f"{error}\n{error.detail}".rstrip()
    raise pytest.fail.Exception(text, pytrace=False) from None
