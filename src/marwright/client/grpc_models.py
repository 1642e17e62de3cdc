"""What is asked of the management service over gRPC; see grpc_calls.

Each function says what to send and how to read the answer; the two clients do it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from marwright.client.grpc_calls import Call, Result, Script
from marwright.client.grpc_errors import UNEXPLAINED
from marwright.client.grpc_inference import check_names
from marwright.client.models import MOST_MODELS, find_registered, read_versions
from marwright.client.results import ModelPage, ModelSummary, ModelVersion, parse_json
from marwright.errors import AnswerError, ConflictError, OverloadedError, UsageError

__all__ = [
    "describe",
    "list_models",
    "list_versions",
    "register",
    "scale",
    "set_default",
    "unregister",
]


def list_models(*, timeout: float | None = None) -> Script[tuple[ModelSummary, ...]]:
    """Return every registered model, all pages of them."""
    read = _parse("ListModels", ModelPage.from_response)
    models: tuple[ModelSummary, ...] = ()
    token = ""
    while True:
        fields = {"limit": MOST_MODELS, "next_page_token": int(token or 0)}
        page = yield from Call("ListModels", fields, read, safe=True, timeout=timeout)
        models += page.models
        if page.next_token in {"", token}:  # the same page again would never end
            return models
        token = page.next_token


def describe(
    name: str, version: str | None = None, *, timeout: float | None = None
) -> Script[ModelVersion]:
    """Return one version of a model: the default version where none is named.

    Raises:
        ModelNotFoundError: no such model or version.
    """
    return (yield from _describe(name, version, timeout))[0]


def list_versions(name: str, *, timeout: float | None = None) -> Call[tuple[ModelVersion, ...]]:
    """Return every version of a model, lowest first as TorchServe sorts them."""
    return _describe(name, "all", timeout)


def register(
    archive: str,
    *,
    workers: int = 1,
    name: str | None = None,
    handler: str | None = None,
    runtime: str | None = None,
    batch_size: int | None = None,
    max_batch_delay_ms: int | None = None,
    response_timeout: int | None = None,
    startup_timeout: int | None = None,
    s3_sse_kms: bool = False,
    synchronous: bool = True,
    timeout: float | None = None,
) -> Script[ModelVersion | None]:
    """Register an archive by its file name in the server's store; wait for its workers.

    What is None the archive or the server decides. `response_timeout` and `startup_timeout` are
    the workers' and in seconds; `timeout` is this call's.

    Raises:
        ConflictError: this archive is registered already.
        ModelNotFoundError: the store holds no such file.
        AnswerError: the workers did not start.
        UsageError: no workers, which gRPC cannot say.
    """
    _check_workers(workers)
    options = {
        "model_name": name,
        "handler": handler,
        "runtime": runtime,
        "batch_size": batch_size,
        "max_batch_delay": max_batch_delay_ms,
        "response_timeout": response_timeout,
        "startup_timeout": startup_timeout,
    }
    fields = {
        "url": archive,
        "initial_workers": workers,
        "s3_sse_kms": s3_sse_kms,
        "synchronous": synchronous,
    } | {key: value for key, value in options.items() if value is not None}

    def read(reply: Any, _: float) -> tuple[str, str] | None:
        return find_registered(reply.msg)

    try:
        registered = yield from Call(
            "RegisterModel", fields, read, safe=False, timeout=timeout, starts_workers=True
        )
    except AnswerError as exc:
        if UNEXPLAINED in exc.message:
            yield from _explain_register(archive, exc)
        raise
    return (yield from describe(*registered)) if registered else None


def scale(
    name: str,
    workers: int,
    *,
    version: str | None = None,
    max_workers: int | None = None,
    synchronous: bool = True,
    timeout: float | None = None,
) -> Script[ModelVersion]:
    """Set how many workers a version has, at least one; wait for them unless told not to."""
    check_names(name, version)
    _check_workers(workers)
    fields = {
        "model_name": name,
        "model_version": version or "",
        "min_worker": workers,
        "max_worker": max_workers or workers,
        "synchronous": synchronous,
    }
    yield from Call(
        "ScaleWorker", fields, _read_nothing, safe=True, timeout=timeout, starts_workers=True
    )
    return (yield from describe(name, version))


def set_default(
    name: str, version: str, *, force: bool = False, timeout: float | None = None
) -> Script[ModelVersion]:
    """Make a version the one that answers where none is named.

    Raises:
        OverloadedError: the version has no READY worker, and `force` does not say that it need
            not have any; nothing was changed.
    """
    described = yield from describe(name, version, timeout=timeout)
    if not described.ready_workers and not force:
        raise OverloadedError(
            f"{name} {version} has no READY worker to become the default",
            status=0,
            remedy="add one first: models.scale()",
        )
    fields = {"model_name": name, "model_version": version}
    yield from Call("SetDefault", fields, _read_nothing, safe=True)
    return described


def unregister(name: str, version: str, *, timeout: float | None = None) -> Script[None]:
    """Remove one version; the archive stays in the store.

    Raises:
        ConflictError: it is the default version and others exist.
    """
    check_names(name, version)
    fields = {"model_name": name, "model_version": version}
    try:
        yield from Call("UnregisterModel", fields, _read_nothing, safe=False, timeout=timeout)
    except AnswerError as exc:
        if UNEXPLAINED in exc.message:
            yield from _explain_unregister(name, version, exc)
        raise


def _describe(
    name: str, version: str | None, timeout: float | None
) -> Call[tuple[ModelVersion, ...]]:
    check_names(name, version)
    fields = {"model_name": name, "model_version": version or ""}
    read = _parse("DescribeModel", read_versions)
    return Call("DescribeModel", fields, read, safe=True, timeout=timeout)


def _explain_register(archive: str, refused: AnswerError) -> Script[None]:
    """Raise ConflictError where the archive is registered already.

    TorchServe lets its ConflictStatusException fall, and gRPC sends UNKNOWN and no text
    (pytorch/serve#3199): so the model list has to tell.
    """
    for model in (yield from list_models()):
        for version in (yield from list_versions(model.name)):
            if version.archive == archive:
                raise ConflictError(
                    f"{archive} is registered already: {version.name} {version.version}",
                    status=409,
                    remedy="unregister it first, or register another version",
                ) from refused


def _explain_unregister(name: str, version: str, refused: AnswerError) -> Script[None]:
    """Raise ConflictError where it is the default version and others exist."""
    default = yield from describe(name)
    if default.version == version:
        raise ConflictError(
            f"{version} is the default version of {name}",
            status=403,
            remedy="make another version the default first",
        ) from refused


def _check_workers(workers: int) -> None:
    """Refuse numbers that gRPC cannot carry: TorchServe takes 0 for "not said", and starts one.

    Raises:
        UsageError: fewer than one worker.
    """
    if workers < 1:
        raise UsageError(
            "TorchServe cannot be told this number of workers over gRPC",
            expected="at least 1",
            found=str(workers),
            remedy="use the REST client for 0",
        )


def _parse(method: str, read: Callable[[Any], Result]) -> Callable[[Any, float], Result]:
    """Return what reads the JSON that a management answer's text is."""
    return lambda reply, _: parse_json(reply.msg.encode(), method, read)


def _read_nothing(reply: Any, seconds: float) -> None:
    """Take an answer that says no more than that it worked."""
