"""Registering an archive with a running server, and telling why a worker died if one does."""

from __future__ import annotations

import contextlib
import filecmp
import shutil
import time
from pathlib import Path

from marwright.archive.manifest import Manifest
from marwright.archive.reader import Archive
from marwright.client import Client, ModelVersion
from marwright.errors import (
    AnswerError,
    ClientError,
    ConflictError,
    ModelNotFoundError,
    ServerError,
    UsageError,
)
from marwright.server.worker_log import WorkerFailure, read_failures
from marwright.storage import write_file

__all__ = ["register"]

LOG_SECONDS = 3.0
"""How long a dead worker's traceback may take to reach the log."""


def register(
    client: Client, archive: Path, *, workers: int = 1, store: Path | None = None
) -> ModelVersion:
    """Check an archive, bring it into the server's store, register it, wait for its workers.

    `store` is needed only where the client's endpoint does not say it.

    Raises:
        ArchiveError: it is broken; the server was not asked.
        UsageError: the store holds another archive of this file name.
        ConflictError: this version is registered already.
        ModelLoadError: a worker died while loading; nothing stays registered, nor in the store.
    """
    endpoint = client.endpoint
    store = store or endpoint.model_store
    if store is not None and archive.parent == Path() and not archive.exists():
        archive = store / archive  # a bare name, as TorchServe takes them
    manifest = Archive.open(archive).manifest
    if store is None:
        raise ServerError(
            "the server's store is not known here", remedy="pass --store, where archives are read"
        )
    copied = _bring_into_store(archive.resolve(), store)
    log = endpoint.log_file
    offset = log.stat().st_size if log is not None and log.exists() else 0
    try:
        registered = client.models.register(archive.name, workers=workers)
    except AnswerError as exc:
        if copied:  # else the next `marwright serve` of the whole store would stumble over it
            (store / archive.name).unlink(missing_ok=True)
        if isinstance(exc, (ConflictError, ModelNotFoundError)):
            raise
        _forget(client, manifest.name, manifest.version)
        failure = _wait_for_failure(log, offset, manifest) if log is not None else None
        if failure is None:
            raise
        raise failure.to_error() from exc
    return registered or client.models.describe(manifest.name, manifest.version)


def _wait_for_failure(log: Path, offset: int, manifest: Manifest) -> WorkerFailure | None:
    """Return the worker's last words; the answer may overtake them on their way into the log."""
    deadline = time.monotonic() + LOG_SECONDS
    while time.monotonic() < deadline:
        for failure in read_failures(log, offset=offset):
            if (failure.model, failure.version) == (manifest.name, manifest.version):
                return failure
        time.sleep(0.05)
    return None


def _bring_into_store(archive: Path, store: Path) -> bool:
    """Copy an archive into the store where it is not there yet; return whether it was copied."""
    target = store / archive.name
    if target.exists():
        if target.samefile(archive) or filecmp.cmp(target, archive, shallow=False):
            return False
        raise UsageError(
            f"the store holds another {archive.name}",
            found=str(target),
            remedy="give this archive a file name of its own, such as cnn-2.0.mar",
        )
    with write_file(target) as stream, archive.open("rb") as source:
        shutil.copyfileobj(source, stream, 1 << 20)
    return True


def _forget(client: Client, name: str, version: str) -> None:
    """Unregister what a failed registration left: TorchServe keeps some without workers."""
    with contextlib.suppress(ClientError):  # the caller has the error that matters
        if not client.models.describe(name, version).ready_workers:
            client.models.unregister(name, version)
