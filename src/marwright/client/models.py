"""The management API's models: list, describe, register, scale, set default, unregister."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from marwright.client.results import ModelSummary, ModelVersion, Result, parse_json
from marwright.client.transport import Transport
from marwright.errors import OverloadedError, UsageError

__all__ = ["model_path", "Models"]


class Models:
    """Models of one server; versions are named in every call that changes something."""

    def __init__(self, transport: Transport, *, start_timeout: float) -> None:
        self._transport = transport
        self._start_timeout = start_timeout
        """Seconds that registering or scaling up may take: workers load the model meanwhile."""

    def list(self) -> tuple[ModelSummary, ...]:
        """Return every registered model, all pages of them."""
        models: tuple[ModelSummary, ...] = ()
        token: str | None = None
        while True:
            params = {"limit": "100"} | ({"next_page_token": token} if token else {})
            page, following = self._read("/models", _read_page, params=params)
            models += page
            if not following or following == token:  # the same page again would never end
                return models
            token = following

    def describe(self, name: str, version: str | None = None) -> ModelVersion:
        """Return one version of a model: the default version where none is named.

        Raises:
            ModelNotFoundError: no such model or version.
        """
        return self._read(model_path(name, version), _read_versions)[0]

    def versions(self, name: str) -> tuple[ModelVersion, ...]:
        """Return every version of a model, lowest first as TorchServe sorts them."""
        return self._read(model_path(name, "all"), _read_versions)

    def register(self, archive: str, *, workers: int = 1) -> ModelVersion | None:
        """Register an archive by its file name in the server's store; wait for its workers.

        Returns the version that was registered where it has workers; TorchServe's answer does not
        otherwise name it.

        Raises:
            ConflictError: this version is registered already.
            ModelNotFoundError: the store holds no such file.
            OverloadedError or AnswerError: the workers did not start; nothing stays registered.
        """
        answer = self._transport.send(
            "POST",
            "/models",
            retry=False,
            params={"url": archive, "initial_workers": str(workers), "synchronous": "true"},
            timeout=self._start_timeout,
        )
        registered = parse_json(answer.content, "POST /models", _read_registered)
        return self.describe(*registered) if registered else None

    def scale(
        self, name: str, workers: int, *, version: str | None = None, max_workers: int | None = None
    ) -> ModelVersion:
        """Set how many workers a version has, and wait until it has them."""
        self._transport.send(
            "PUT",
            model_path(name, version),
            retry=True,
            params={
                "min_worker": str(workers),
                "max_worker": str(max_workers or workers),
                "synchronous": "true",
            },
            timeout=self._start_timeout,
        )
        return self.describe(name, version)

    def set_default(self, name: str, version: str) -> ModelVersion:
        """Make a version the one that answers where none is named.

        TorchServe does not ask whether the version has workers, so it is asked here first.

        Raises:
            OverloadedError: the version has no READY worker; nothing was changed.
        """
        described = self.describe(name, version)
        if not described.ready_workers:
            raise OverloadedError(
                f"{name} {version} has no READY worker to become the default",
                status=0,
                remedy=f"add one first: marwright models scale {name} 1 --version {version}",
            )
        self._transport.send("PUT", f"{model_path(name, version)}/set-default", retry=True)
        return described

    def unregister(self, name: str, version: str) -> None:
        """Remove one version; the archive stays in the store.

        Raises:
            ConflictError: it is the default version and others exist.
        """
        self._transport.send("DELETE", model_path(name, version), retry=False)

    def _read(
        self, path: str, read: Callable[[Any], Result], params: dict[str, str] | None = None
    ) -> Result:
        response = self._transport.send("GET", path, retry=True, params=params)
        return parse_json(response.content, f"GET {path}", read)


def _read_page(page: Any) -> tuple[tuple[ModelSummary, ...], str | None]:
    """Return one page of the model list, and the token of the next."""
    models = tuple(ModelSummary.from_response(item) for item in page["models"])
    return models, page.get("nextPageToken")


def _read_versions(page: Any) -> tuple[ModelVersion, ...]:
    """Return the described versions; TorchServe names at least one."""
    versions = tuple(ModelVersion.from_response(item) for item in page)
    if not versions:
        raise ValueError("no version")
    return versions


def _read_registered(answer: Any) -> tuple[str, str] | None:
    """Return what the answer names: 'Model "cnn" Version: 1.0 registered with ...'."""
    match = re.match(r'Model "(.+)" Version: (\S+) registered', answer["status"])
    return (match[1], match[2]) if match else None


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
