"""The management calls over gRPC, each said once; see grpc_calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from marwright.client.grpc_calls import Call, Caller, Result, Script, check_names
from marwright.client.grpc_errors import UNEXPLAINED
from marwright.client.results import ModelSummary, ModelVersion, parse_json
from marwright.errors import AnswerError, ConflictError, OverloadedError, UsageError

__all__ = ["ModelScripts"]

PAGE = 100


class ModelScripts:
    """What both clients ask of the management service."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def list(self, timeout: float | None) -> Script[tuple[ModelSummary, ...]]:
        """Ask for all pages of the model list."""
        return (yield from self._list(self._caller.start(timeout)))

    def describe(
        self, name: str, version: str | None, timeout: float | None
    ) -> Script[ModelVersion]:
        """Ask for one version."""
        return (yield from self._describe(name, version, self._caller.start(timeout)))[0]

    def versions(self, name: str, timeout: float | None) -> Script[tuple[ModelVersion, ...]]:
        """Ask for every version."""
        return (yield from self._describe(name, "all", self._caller.start(timeout)))

    def register(
        self, archive: str, options: Mapping[str, Any], timeout: float | None
    ) -> Script[ModelVersion | None]:
        """Register an archive of the store, and wait for its workers."""
        check_workers(options["initial_workers"])
        deadline = self._caller.start(timeout, starts_workers=True)
        said = {key: value for key, value in options.items() if value is not None}
        fields = {"url": archive, **said}
        call = Call("RegisterModel", fields, lambda reply: str(reply.msg), safe=False)
        try:
            text = yield from self._caller.send(call, deadline)
        except AnswerError as exc:
            if UNEXPLAINED in exc.message:
                yield from self._explain_register(archive, deadline, exc)
            raise
        match = re.match(r'Model "(.+)" Version: (\S+) registered', text)
        if match is None:
            return None
        return (yield from self._describe(match[1], match[2], deadline))[0]

    def scale(
        self,
        name: str,
        options: Mapping[str, Any],
        version: str | None,
        timeout: float | None,
    ) -> Script[ModelVersion]:
        """Set how many workers a version has, and wait until it has them."""
        check_names(name, version)
        check_workers(options["min_worker"])
        deadline = self._caller.start(timeout, starts_workers=True)
        fields = {"model_name": name, "model_version": version or "", **options}
        yield from self._caller.send(Call("ScaleWorker", fields, _read_nothing, True), deadline)
        return (yield from self._describe(name, version, deadline))[0]

    def set_default(
        self, name: str, version: str, force: bool, timeout: float | None
    ) -> Script[ModelVersion]:
        """Make a version the default one, where it has a worker."""
        deadline = self._caller.start(timeout)
        described = (yield from self._describe(name, version, deadline))[0]
        if not described.ready_workers and not force:
            raise OverloadedError(
                f"{name} {version} has no READY worker to become the default",
                status=0,
                remedy="add one first: models.scale()",
            )
        fields = {"model_name": name, "model_version": version}
        yield from self._caller.send(Call("SetDefault", fields, _read_nothing, True), deadline)
        return described

    def unregister(self, name: str, version: str, timeout: float | None) -> Script[None]:
        """Remove one version."""
        check_names(name, version)
        deadline = self._caller.start(timeout)
        fields = {"model_name": name, "model_version": version}
        try:
            yield from self._caller.send(
                Call("UnregisterModel", fields, _read_nothing, safe=False), deadline
            )
        except AnswerError as exc:
            if UNEXPLAINED in exc.message:
                yield from self._explain_unregister(name, version, deadline, exc)
            raise

    def _list(self, deadline: float) -> Script[tuple[ModelSummary, ...]]:
        models: tuple[ModelSummary, ...] = ()
        token = 0
        while True:
            fields = {"limit": PAGE, "next_page_token": token}
            call = Call("ListModels", fields, _parse("ListModels", _read_page), safe=True)
            page, following = yield from self._caller.send(call, deadline)
            models += page
            if not following or following == token:  # the same page again would never end
                return models
            token = following

    def _describe(
        self, name: str, version: str | None, deadline: float
    ) -> Script[tuple[ModelVersion, ...]]:
        check_names(name, version)
        fields = {"model_name": name, "model_version": version or ""}
        read = _parse("DescribeModel", _read_versions)
        call = Call("DescribeModel", fields, read, safe=True)
        return (yield from self._caller.send(call, deadline))

    def _explain_register(
        self, archive: str, deadline: float, refused: AnswerError
    ) -> Script[None]:
        """Raise ConflictError where the archive is registered already.

        TorchServe lets its ConflictStatusException fall, and gRPC sends UNKNOWN and no text
        (pytorch/serve#3199): so the model list has to tell.
        """
        for model in (yield from self._list(deadline)):
            for version in (yield from self._describe(model.name, "all", deadline)):
                if version.archive == archive:
                    raise ConflictError(
                        f"{archive} is registered already: {version.name} {version.version}",
                        status=409,
                        remedy="unregister it first, or register another version",
                    ) from refused

    def _explain_unregister(
        self, name: str, version: str, deadline: float, refused: AnswerError
    ) -> Script[None]:
        """Raise ConflictError where it is the default version and others exist."""
        default = (yield from self._describe(name, None, deadline))[0]
        if default.version == version:
            raise ConflictError(
                f"{version} is the default version of {name}",
                status=403,
                remedy="make another version the default first",
            ) from refused


def check_workers(workers: int) -> None:
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


def _parse(method: str, read: Callable[[Any], Result]) -> Callable[[Any], Result]:
    """Return what reads the JSON that a management answer's text is."""

    def read_reply(reply: Any) -> Result:
        return parse_json(reply.msg.encode(), method, read)

    return read_reply


def _read_page(page: Any) -> tuple[tuple[ModelSummary, ...], int]:
    """Return one page of the model list, and the number of the next, or 0."""
    models = tuple(ModelSummary.from_response(item) for item in page["models"])
    return models, int(page.get("nextPageToken") or 0)


def _read_versions(page: Any) -> tuple[ModelVersion, ...]:
    """Return the described versions; TorchServe names at least one."""
    versions = tuple(ModelVersion.from_response(item) for item in page)
    if not versions:
        raise ValueError("no version")
    return versions


def _read_nothing(reply: Any) -> None:
    """Take an answer that says no more than that it worked."""
