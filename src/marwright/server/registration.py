"""Registering an archive with a running server, and telling why a worker died if one does."""

from __future__ import annotations

import contextlib
import filecmp
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from marwright.archive.admission import admit, find_policy, read_policy
from marwright.archive.reader import read_manifest
from marwright.archive.signature import signature_path
from marwright.client import Client, ModelVersion
from marwright.errors import (
    AnswerError,
    ArchiveError,
    ClientError,
    ConflictError,
    ModelLoadError,
    ModelNotFoundError,
    ServerError,
    UsageError,
)
from marwright.server.deployment import Deployment, ModelEntry
from marwright.server.staging import Staging
from marwright.server.wanted import read_wanted
from marwright.server.worker_log import WorkerFailure, read_failures
from marwright.storage import translate_os_errors, write_file

if TYPE_CHECKING:
    from marwright.archive.policy import Policy

__all__ = ["register", "start_version"]

SERVER_ERROR = 500
"""What TorchServe answers where workers do not start."""
LOG_SECONDS = 3.0
"""How long a dead worker's traceback may take to reach the log."""


def register(
    client: Client,
    archive: Path,
    *,
    workers: int = 1,
    store: Path | None = None,
    entry: ModelEntry | None = None,
) -> ModelVersion:
    """Check an archive, bring it into the server's store, register it, wait for its workers.

    It must fulfil the policy that the server was started with, or that its store holds. `store` is
    needed only where the client's endpoint does not say it. `entry` are settings beside the
    archive's own, which take a server of ours.

    Raises:
        ArchiveError: it is broken, or the policy refuses it; the server was not asked.
        UsageError: the store holds another archive of this file name.
        ConflictError: this version is registered already.
        ModelLoadError: a worker died while loading; nothing stays registered, nor in the store.
    """
    endpoint = client.endpoint
    store = store or endpoint.model_store
    if store is not None and archive.parent == Path() and not archive.exists():
        archive = store / archive  # a bare name, as TorchServe takes them
    manifest = read_manifest(archive)
    if store is None:
        raise ServerError(
            "the server's store is not known here", remedy="pass --store, where archives are read"
        )
    policy = read_policy(endpoint.policy) if endpoint.policy else find_policy(store)
    added = _bring_into_store(archive, store, policy)
    staging = Staging(endpoint.staging, policy) if endpoint.staging else None
    try:
        with contextlib.ExitStack() as stack:
            if staging is not None:
                wanted = read_wanted(
                    Deployment(store=store), entry or ModelEntry(archive=archive.name)
                )
                # Without an entry, what is staged keeps the settings that it has.
                if entry is not None or archive.name not in staging.list_unchanged([wanted]):
                    stack.enter_context(staging.try_stage(wanted))
            return start_version(client, archive.name, (manifest.name, manifest.version), workers)
    except (AnswerError, ArchiveError, ModelLoadError):
        for path in added:  # else the next `marwright serve` of the whole store stumbles over it
            path.unlink(missing_ok=True)
        raise


def start_version(client: Client, file: str, key: tuple[str, str], workers: int) -> ModelVersion:
    """Register an archive by its file name where the server reads it, and wait for its workers.

    `key` are the model and version that it is.

    Raises:
        ConflictError: this version is registered already.
        ModelLoadError: a worker died, and left a traceback; nothing stays registered.
        AnswerError: whatever else the server answered.
    """
    try:
        return _start(client, file, key, workers)
    except AnswerError as exc:
        if exc.status != SERVER_ERROR or client.endpoint.log_file is None:
            raise
        # Once more: of 100 workers that TorchServe stops for failing to load, about 2 are
        # stopped before a word of theirs has reached its log.
        return _start(client, file, key, workers)


def _start(client: Client, file: str, key: tuple[str, str], workers: int) -> ModelVersion:
    """Register an archive of the store; tell why a worker died, where the log says it.

    Raises:
        ModelLoadError: a worker died, and left a traceback.
        AnswerError: whatever else the server answered; nothing of this version stays registered.
    """
    log = client.endpoint.log_file
    offset = log.stat().st_size if log is not None and log.exists() else 0
    try:
        registered = client.models.register(file, workers=workers)
    except AnswerError as exc:
        if isinstance(exc, (ConflictError, ModelNotFoundError)):
            raise
        _forget(client, *key)
        failure = _wait_for_failure(log, offset, key) if log is not None else None
        if failure is None:
            raise
        raise failure.to_error() from exc
    return registered or client.models.describe(*key)


def _wait_for_failure(log: Path, offset: int, key: tuple[str, str]) -> WorkerFailure | None:
    """Return the worker's last words; the answer may overtake them on their way into the log."""
    deadline = time.monotonic() + LOG_SECONDS
    while time.monotonic() < deadline:
        for failure in read_failures(log, offset=offset):
            if (failure.model, failure.version) == key:
                return failure
        time.sleep(0.05)
    return None


def _bring_into_store(archive: Path, store: Path, policy: Policy | None) -> list[Path]:
    """Copy an archive and its signature into the store; return the files that were not there yet.

    The very bytes that will be loaded are judged, before they have a name that anything would load.
    """
    target = store / archive.name
    if target.exists():
        if target.samefile(archive):
            admit(target, policy)
            return []
        if not filecmp.cmp(target, archive, shallow=False):
            raise UsageError(
                f"the store holds another {archive.name}",
                found=str(target),
                remedy="give this archive a file name of its own, such as cnn-2.0.mar",
            )
    with (
        translate_os_errors(f"write {target}"),
        # Hidden: TorchServe passes over it when it loads the whole store.
        tempfile.TemporaryDirectory(prefix=".incoming-", dir=store) as folder,
    ):
        signatures = (signature_path(archive), signature_path(target))
        sources = [archive, *[path for path in signatures if path.exists()][:1]]
        copies = [_copy(path, Path(folder)) for path in sources]
        admit(copies[0], policy, shown=archive)
        added = [store / copy.name for copy in copies if not (store / copy.name).exists()]
        for copy in reversed(copies):  # the signature first: no moment without it
            copy.replace(store / copy.name)
    return added


def _copy(path: Path, folder: Path) -> Path:
    copy = folder / path.name
    with write_file(copy) as stream, path.open("rb") as source:
        shutil.copyfileobj(source, stream, 1 << 20)
    return copy


def _forget(client: Client, name: str, version: str) -> None:
    """Unregister what a failed registration left: TorchServe keeps some without workers."""
    with contextlib.suppress(ClientError):  # the caller has the error that matters
        if not client.models.describe(name, version).ready_workers:
            client.models.unregister(name, version)
