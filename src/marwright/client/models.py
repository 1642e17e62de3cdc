"""The management API's models: list, describe, register, scale, set default, unregister.

Each function says what to send and how to read the answer; `Models` and `AsyncModels` do it.
"""

from __future__ import annotations

import re
import time
from typing import Any
from urllib.parse import quote

from marwright.client.calls import Call, Pause, Response, Script
from marwright.client.results import ModelPage, ModelSummary, ModelVersion, parse_json
from marwright.errors import (
    ConnectionFailedError,
    ModelNotFoundError,
    NotReadyError,
    OverloadedError,
    RequestTimeoutError,
    UsageError,
)

__all__ = [
    "describe",
    "find_registered",
    "list_models",
    "list_page",
    "list_versions",
    "model_path",
    "MOST_MODELS",
    "read_versions",
    "register",
    "scale",
    "set_default",
    "unregister",
    "wait_until_ready",
]

LOOK_SECONDS = 0.1
"""How often a model is looked at that is waited for; the pause grows up to ten times as long."""
SETTLE_LOOKS = 10
"""At workers that TorchServe has started, and does not call READY yet."""
MOST_MODELS = 100
"""On one page, as TorchServe has it by itself."""


def list_models(*, timeout: float | None = None) -> Script[tuple[ModelSummary, ...]]:
    """Return every registered model, all pages of them."""
    models: tuple[ModelSummary, ...] = ()
    token = ""
    while True:
        page = yield from list_page(token=token, timeout=timeout)
        models += page.models
        if page.next_token in {"", token}:  # the same page again would never end
            return models
        token = page.next_token


def list_page(
    *, limit: int = MOST_MODELS, token: str = "", timeout: float | None = None
) -> Call[ModelPage]:
    """Return one page of the models: of at most `limit`, after the page that gave the token."""
    params = {"limit": str(limit)} | ({"next_page_token": token} if token else {})

    def read(response: Response, _: float) -> ModelPage:
        return parse_json(response.body, "GET /models", ModelPage.from_response)

    return Call("management", "GET", "/models", read, safe=True, params=params, timeout=timeout)


def describe(
    name: str,
    version: str | None = None,
    *,
    customized: bool = False,
    timeout: float | None = None,
) -> Call[ModelVersion]:
    """Return one version of a model: the default version where none is named.

    `customized` also asks the handler, in a worker, for what it says of the model: `metadata`.

    Raises:
        ModelNotFoundError: no such model or version.
    """
    path = model_path(name, version)
    params = {"customized": "true"} if customized else {}
    return Call(
        "management",
        "GET",
        path,
        lambda response, _: parse_json(response.body, f"GET {path}", read_versions)[0],
        safe=True,
        params=params,
        timeout=timeout,
    )


def list_versions(name: str, *, timeout: float | None = None) -> Call[tuple[ModelVersion, ...]]:
    """Return every version of a model, lowest first as TorchServe sorts them."""
    path = model_path(name, "all")
    return Call(
        "management",
        "GET",
        path,
        lambda response, _: parse_json(response.body, f"GET {path}", read_versions),
        safe=True,
        timeout=timeout,
    )


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
    the workers' and in seconds; TorchServe prefers what the archive's own model-config.yaml says.
    `timeout` is this call's, 300 s unless the client says otherwise.
    Returns the version that was registered where TorchServe's answer names it.

    Raises:
        ConflictError: this version is registered already.
        ModelNotFoundError: the store holds no such file.
        OverloadedError or AnswerError: the workers did not start; nothing stays registered.
    """
    options = {
        "model_name": name,
        "handler": handler,
        "runtime": runtime,
        "batch_size": batch_size,
        "max_batch_delay": max_batch_delay_ms,
        "response_timeout": response_timeout,
        "startup_timeout": startup_timeout,
        "s3_sse_kms": "true" if s3_sse_kms else None,
    }
    params = {
        "url": archive,
        "initial_workers": str(workers),
        "synchronous": _write_bool(synchronous),
    } | {key: str(value) for key, value in options.items() if value is not None}

    def read(response: Response, _: float) -> tuple[str, str] | None:
        return parse_json(
            response.body, "POST /models", lambda answer: find_registered(answer["status"])
        )

    registered = yield from Call(
        "management",
        "POST",
        "/models",
        read,
        safe=False,
        params=params,
        timeout=timeout,
        starts_workers=True,
    )
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
    """Set how many workers a version has, and wait until it has them unless told not to."""
    path = model_path(name, version)
    params = {
        "min_worker": str(workers),
        "max_worker": str(max_workers or workers),
        "synchronous": _write_bool(synchronous),
    }
    yield from Call(
        "management",
        "PUT",
        path,
        _read_nothing,
        safe=True,
        params=params,
        timeout=timeout,
        starts_workers=True,
    )
    described = yield from describe(name, version)
    for _ in range(SETTLE_LOOKS if synchronous else 0):
        if described.ready_workers >= workers:
            break
        # TorchServe answers just before it calls the last worker READY (WorkerThread.setState).
        yield Pause(LOOK_SECONDS)
        described = yield from describe(name, version)
    return described


def set_default(
    name: str, version: str, *, force: bool = False, timeout: float | None = None
) -> Script[ModelVersion]:
    """Make a version the one that answers where none is named.

    TorchServe does not ask whether the version has workers, so it is asked here first, unless
    `force` says that it need not have any.

    Raises:
        OverloadedError: the version has no READY worker; nothing was changed.
    """
    described = yield from describe(name, version, timeout=timeout)
    if not described.ready_workers and not force:
        raise OverloadedError(
            f"{name} {version} has no READY worker to become the default",
            status=0,
            remedy=f"add one first: marwright models scale {name} 1 --version {version}",
        )
    path = f"{model_path(name, version)}/set-default"
    yield from Call("management", "PUT", path, _read_nothing, safe=True)
    return described


def unregister(name: str, version: str, *, timeout: float | None = None) -> Call[None]:
    """Remove one version; the archive stays in the store.

    Raises:
        ConflictError: it is the default version and others exist.
    """
    path = model_path(name, version)
    return Call("management", "DELETE", path, _read_nothing, safe=False, timeout=timeout)


def wait_until_ready(
    name: str, version: str | None = None, *, timeout: float = 300.0
) -> Script[ModelVersion]:
    """Wait until a version has all its workers, and return it; `timeout` is in seconds.

    A server that is not there yet, or does not know the model yet, is waited for too.

    Raises:
        NotReadyError: the time is over.
    """
    ends_at = time.monotonic() + timeout
    pause = LOOK_SECONDS
    cause: Exception | None = None
    found = ""
    while (left := ends_at - time.monotonic()) > 0:
        try:
            described = yield from describe(name, version, timeout=left)
            if described.ready:
                return described
            found = f"{described.ready_workers} of {described.min_workers} workers READY"
            cause = None
        except (
            ConnectionFailedError,
            ModelNotFoundError,
            OverloadedError,
            RequestTimeoutError,
        ) as exc:
            found, cause = exc.message, exc
        yield Pause(max(0.0, min(pause, ends_at - time.monotonic())))
        pause = min(pause * 1.5, 10 * LOOK_SECONDS)
    raise NotReadyError(
        f"{name} {version or ''}".strip() + f" was not ready within {timeout:g} s",
        found=found or "no time to look",
        remedy="wait longer, or look at the server's log",
    ) from cause


def _read_nothing(response: Response, seconds: float) -> None:
    """Take a success for what it is: what such an answer says, is said in no fixed form."""


def read_versions(page: Any) -> tuple[ModelVersion, ...]:
    """Return the described versions; TorchServe names at least one."""
    versions = tuple(ModelVersion.from_response(item) for item in page)
    if not versions:
        raise ValueError("no version")
    return versions


def find_registered(text: str) -> tuple[str, str] | None:
    """Return what an answer names: 'Model "cnn" Version: 1.0 registered with ...'."""
    match = re.match(r'Model "(.+)" Version: (\S+) registered', text)
    return (match[1], match[2]) if match else None


def _write_bool(value: bool) -> str:
    return "true" if value else "false"


def model_path(name: str, version: str | None = None, *, root: str = "/models") -> str:
    """Return the URL path of a model or of one version; names are quoted.

    Raises:
        UsageError: a part that means another resource: DELETE /models/cnn/ is the whole model.
    """
    parts = [name] if version is None else [name, version]
    for part in parts:
        if part in {"", ".", ".."} or "/" in part:  # TorchServe decodes %2F before it splits
            raise UsageError("no such model name or version is possible", found=repr(part))
    return "/".join([root, *(quote(part, safe="") for part in parts)])
