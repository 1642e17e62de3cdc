"""Looking at supervisors from outside: how they are, stopping them, having servers restarted."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from marwright.client.endpoint import Endpoint
from marwright.errors import (
    MarwrightError,
    NoServerError,
    NotReadyError,
    RequestTimeoutError,
    ServerDiedError,
    ServerError,
)
from marwright.server.process import Process
from marwright.server.registry import KEY_HEADER, Record, list_records, list_replicas

__all__ = [
    "ask_supervisor",
    "fetch_metrics",
    "fetch_status",
    "find_supervisor",
    "inspect_server",
    "is_current",
    "look_anew",
    "restart_server",
    "stop_server",
]

ANSWER_SECONDS = 5.0
END_SECONDS = 40.0
"""How long a server may take to answer what it holds, and end."""
LOOK_SECONDS = 30.0
METRICS_SECONDS = 8.0
"""More than a supervisor waits for TorchServe, and less than Prometheus waits for it."""
METRICS_BYTES = 64 << 20
POLL_SECONDS = 0.1

Status = dict[str, Any]
"""What /status answers; see status.Status."""


def fetch_status(health_url: str, key: str = "") -> Status | None:
    """Return what a supervisor says of its server; None where it does not answer.

    Without the `key` of its record it tells no tracebacks and no paths.
    """
    return _fetch(f"{health_url}/status", key)


def fetch_metrics(health_url: str) -> str | None:
    """Return what stands at /metrics of a supervisor; None where it does not answer whole."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{health_url}/metrics", timeout=METRICS_SECONDS) as answer:
            content: bytes = answer.read(METRICS_BYTES)
            if answer.length:  # what is missing of it
                return None
    except (OSError, ValueError, http.client.HTTPException):
        return None
    return content.decode("utf-8", "replace")


def is_current(record: Record) -> bool:
    """Whether a server is as its deploy.yaml says; its supervisor, which has all at hand, looks."""
    found = _fetch(f"{record.health_url}/current", record.key) if record.health_url else None
    return bool(found and found.get("current"))


def find_supervisor(endpoint: Endpoint) -> Record | None:
    """Return the supervisor of a server of ours that runs here; of a site, the site's own."""
    folder = str(endpoint.staging.parent) if endpoint.staging else None

    def is_meant(record: Record) -> bool:
        if endpoint.health_url:
            return record.health_url == endpoint.health_url
        return record.run_folder == folder

    return next(filter(is_meant, list_records().values()), None)


def look_anew(record: Record) -> Status:
    """Have a supervisor look at its server now, and return what it then says.

    It waits some seconds for answers to the samples of versions that are new; raises what
    ask_supervisor raises.
    """
    found: Status = ask_supervisor(record, "/look", timeout=LOOK_SECONDS)
    return found


def ask_supervisor(
    record: Record, path: str, asked: Any = None, *, timeout: float = ANSWER_SECONDS
) -> Any:
    """Return what a supervisor answers; `asked` is sent as JSON, None reads only.

    Raises:
        NoServerError: it does not answer.
        MarwrightError: what went wrong there, in its words.
    """
    try:
        return _send(f"{record.health_url}{path}", record.key, asked, timeout)
    except urllib.error.HTTPError as exc:
        with contextlib.suppress(ValueError, TypeError), exc:
            problem = json.load(exc)
            facts = ("message", "expected", "found", "remedy", "detail")
            raise ServerError(**{key: problem[key] for key in facts if key in problem}) from exc
        found = f"{exc.code} {exc.reason}"
    except (OSError, ValueError, http.client.HTTPException) as exc:
        found = str(exc)
    raise NoServerError(
        f"the supervisor of {record.name} does not answer",
        found=found,
        remedy=f"look at it: marwright status {record.name}",
    )


def _fetch(url: str, key: str) -> dict[str, Any] | None:
    try:
        found = _send(url, key, None, ANSWER_SECONDS)
    except (OSError, ValueError, http.client.HTTPException):
        return None
    return found if isinstance(found, dict) else None


def _send(url: str, key: str, asked: Any, timeout: float) -> Any:
    """Send a GET, or a POST where anything is asked, and return what comes back."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    data = None if asked is None else json.dumps(asked).encode()
    request = urllib.request.Request(url, data, headers={KEY_HEADER: key})
    with opener.open(request, timeout=timeout) as answer:
        return json.load(answer)


def inspect_server(record: Record) -> Status:
    """Return how a server is, also where its supervisor hangs or was killed."""
    status = None
    if record.is_alive and record.health_url:
        status = fetch_status(record.health_url, record.key)
    if status is not None:
        return status
    phase = "starting" if record.is_alive and not record.health_url else "hung"
    reason = "its supervisor does not answer"
    if not record.is_alive:
        phase = "abandoned"
        reason = "its supervisor was killed; marwright serve adopts it, marwright stop ends it"
    return {
        "name": record.name,
        "phase": phase,
        "pid": record.pid,
        "since": record.since,
        "config": record.config,
        "health_url": record.health_url,
        **_read_endpoint(record),
        "problems": [reason] if phase != "starting" else [],
        "models": [],
        "live": False,
        "ready": False,
        "started": False,
    }


def _read_endpoint(record: Record) -> dict[str, str]:
    """Return what a server has left word of, whatever became of its supervisor."""
    with contextlib.suppress(NoServerError):
        endpoint = Endpoint.read(Path(record.run_folder) / "endpoint.json")
        return {"address": endpoint.inference_url, "log": str(endpoint.log_file or "")}
    return {}


def stop_server(record: Record, *, timeout: float) -> None:
    """Stop a supervisor and its server in order; of a killed supervisor, what it left.

    Raises:
        RequestTimeoutError: it did not end in time.
        ServerError: another supervisor has adopted the server meanwhile.
    """
    if not record.is_alive:
        _end_left(record)
        return
    try:
        record.send(signal.SIGTERM)
    except NoServerError:
        return
    deadline = time.monotonic() + timeout
    while record.is_alive:
        if time.monotonic() > deadline:
            raise RequestTimeoutError(
                f"the server {record.name} did not stop within {timeout:g} s",
                found=f"process {record.pid} still runs",
                remedy="wait longer: --timeout; the supervisor's log says what it waits for",
            )
        time.sleep(POLL_SECONDS)


def _end_left(record: Record) -> None:
    """End what a killed supervisor left: of a site the gateway, and then what was behind it."""
    if not record.run_folder:
        return  # it was killed before it had a server
    folder = Path(record.run_folder)
    records, parts = list_replicas(record), list(folder.glob("replica-*"))
    _end(folder, keep_folder=bool(parts))
    for part in parts:
        _end(part)
    for left in records:  # of a replica whose own supervisor was killed too
        if not left.is_alive:
            _end_left(left)
    if parts:
        shutil.rmtree(folder, ignore_errors=True)


def _end(folder: Path, *, keep_folder: bool = False) -> None:
    try:
        process = Process.adopt(folder, grace=END_SECONDS)
    except ServerDiedError:  # its guard was killed too
        process = Process(folder)
    process.end(keep_folder=keep_folder)


def restart_server(record: Record, *, timeout: float) -> float:
    """Have a server started again with its configuration as it is now; wait until it is ready.

    Returns the seconds that it was away.

    Raises:
        NoServerError: no supervisor runs that could do it.
        ServerDiedError: the supervisor has given up, or was stopped meanwhile.
        ServerError: it could not be started so; the server runs on as it was, where that works.
        NotReadyError: it is not ready in time.
    """
    before = fetch_status(record.health_url, record.key)
    if before is None or not record.is_alive:
        raise NoServerError(
            f"the supervisor of {record.name} does not answer",
            remedy="start the server: marwright serve",
        )
    record.send(signal.SIGUSR1)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and record.is_alive:
        status = fetch_status(record.health_url, record.key) or before
        done = status["restart"]
        if done["count"] > before["restart"]["count"]:
            if done["state"] == "failed":
                raise _fail(record, done["problem"])
            if done["state"] == "done" and status["ready"]:
                return float(done["seconds"])
        time.sleep(POLL_SECONDS)
    if not record.is_alive:
        raise ServerDiedError(
            f"the supervisor of {record.name} has ended",
            found="the server was not started again, or was stopped meanwhile",
            remedy="see why, on its standard error or in supervisor.log; then marwright serve",
        )
    raise NotReadyError(
        f"the server {record.name} is not ready after {timeout:g} s",
        remedy=f"see why: marwright status {record.name}",
    )


def _fail(record: Record, problem: str) -> MarwrightError:
    return ServerError(
        f"the server {record.name} was not started again as its configuration says",
        found=problem,
        remedy="mend it, and try again; marwright logs has more",
    )
