"""Which servers run here: `marwright serve` leaves a link and a record, other commands follow them.

A link points into the server's run folder, which vanishes with the server, so that a link that
leads nowhere is a server that is gone. A record is a file that its supervisor keeps locked, and
says which process that is; one that nobody locks is of a supervisor that was killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import signal
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TypeVar

from marwright.client import Endpoint
from marwright.errors import NoServerError, ServerError, UsageError
from marwright.server.process import read_start_time
from marwright.storage import lock_file, translate_os_errors

__all__ = [
    "announce",
    "Claim",
    "claim",
    "DEPLOYMENT_NAME",
    "find_endpoint",
    "find_record",
    "hide_replicas",
    "KEY_HEADER",
    "list_records",
    "list_replicas",
    "list_servers",
    "Record",
    "state_folder",
]

_log = logging.getLogger(__name__)

DEPLOYMENT_NAME = "deploy.yaml"
"""What is taken for a deployment where none is named."""
KEY_HEADER = "X-Marwright-Key"
"""In which a request to a supervisor's endpoints carries the key of its record."""

_Found = TypeVar("_Found")


def announce_folder() -> Path:
    """Return the folder of links: in XDG_RUNTIME_DIR, or in XDG_STATE_HOME where there is none."""
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "marwright"
    return state_folder() / "servers"


def state_folder() -> Path:
    """Return where marwright keeps what it has to remember: in XDG_STATE_HOME."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(state) / "marwright"


@contextlib.contextmanager
def announce(name: str, run_folder: Path) -> Iterator[None]:
    """Let other commands find the server under `name` while the block runs.

    It takes the place of a link of this name: who may have a name is said by `claim`.
    """
    check_form(name)
    folder = announce_folder()
    link = folder / f"{name}.json"
    with translate_os_errors(f"write {link}"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / "link"
            fresh.symlink_to(run_folder / "endpoint.json")
            fresh.replace(link)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if link.readlink() == run_folder / "endpoint.json":
                link.unlink()


def check_form(name: str) -> None:
    """Raise UsageError for a name that no file can have."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise UsageError(
            "no such server name is possible",
            expected="letters, digits, '_', '-' or '.', beginning with a letter or digit",
            found=repr(name),
        )


def list_servers() -> dict[str, Endpoint]:
    """Return the running servers by name, and drop links whose server is gone."""
    servers = {}
    for link in sorted(announce_folder().glob("*.json")):
        try:
            servers[link.stem] = Endpoint.read(link)
        except NoServerError as exc:
            # One that is gone, perhaps since the folder was read; never the others' trouble.
            _log.debug("%s names no server: %s", link, exc)
            if link.is_symlink() and not link.exists():
                link.unlink(missing_ok=True)
    return servers


def find_endpoint(name: str | None = None) -> Endpoint:
    """Return the named server's endpoint, or the only one's; a site is one, with its replicas.

    Raises:
        NoServerError: none runs, or none of this name.
        UsageError: several run and none was named.
    """
    return _choose(list_servers(), name, "choose one with --server NAME")


def _choose(found: dict[str, _Found], name: str | None, remedy: str) -> _Found:
    """Return the named one, or the only one; `remedy` is for who must choose among several."""
    if name is not None and name in found:
        return found[name]
    if name is None:
        found = hide_replicas(found)
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    names = ", ".join(found) or "none"
    if name is None and found:
        raise UsageError("several servers run here", found=names, remedy=remedy)
    raise NoServerError(
        "no server runs here" if name is None else f"no server {name} runs here",
        found=f"servers: {names}",
        remedy=remedy if found else "start one: marwright serve",
    )


@dataclass(frozen=True)
class Record:
    """A supervisor, and the server that it holds."""

    name: str
    """The server's; empty while it has none yet."""
    pid: int
    start: str
    """When the supervisor's process began, as read_start_time says it: numbers are used again."""
    since: str
    """When it began, ISO 8601."""
    config: str = ""
    """The deploy.yaml, resolved; empty where there is none."""
    run_folder: str = ""
    health_url: str = ""
    key: str = ""
    """Whoever sends it to the supervisor's endpoints is told all of /status."""

    @property
    def is_alive(self) -> bool:
        """Whether the supervisor runs."""
        return read_start_time(self.pid) == self.start

    def send(self, number: signal.Signals) -> None:
        """Send the supervisor a signal, and no other process that has its number now.

        Raises:
            NoServerError: it has ended.
        """
        try:
            descriptor = os.pidfd_open(self.pid)
            try:
                if not self.is_alive:
                    raise ProcessLookupError
                signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)
        except ProcessLookupError as exc:
            raise NoServerError(
                f"the supervisor of {self.name} has ended", found=f"no process {self.pid}"
            ) from exc


class Claim:
    """What only one supervisor may have: a name, or a configuration file."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self._path = path
        self._stream = stream
        self.previous = _read_record(path)
        """Who had it and was killed, if anybody."""

    def write(self, record: Record) -> None:
        """Say who has it, to this user alone."""
        os.fchmod(self._stream.fileno(), 0o600)
        self._stream.truncate(0)
        self._stream.write(json.dumps(asdict(record)).encode())

    def release(self) -> None:
        """Let others have it."""
        self._path.unlink(missing_ok=True)
        self._stream.close()


def claim(name: str | None = None, *, config: Path | None = None) -> Claim:
    """Take a name or a configuration file, until `release` or the end of this process.

    Raises:
        ServerError: another supervisor has it.
    """
    path = announce_folder() / (f"{name}.lock" if name else f"_{_digest(config)}.lock")
    with translate_os_errors(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        stream = lock_file(path)
    if stream is not None:
        return Claim(path, stream)
    holder = _read_record(path)
    raise ServerError(
        f"{f'a server {name}' if name else config} is served already",
        found=f"process {holder.pid if holder else 'unknown'} has it"
        + (f", the server {holder.name}" if holder and holder.name else ""),
        remedy="stop it first: marwright stop; or choose another --name"
        if name
        else "change what it serves: marwright apply; or stop it: marwright stop",
    )


def list_records() -> dict[str, Record]:
    """Return the servers by name, also where a supervisor was killed and its run folder is left."""
    records = {}
    for path in sorted(announce_folder().glob("*.lock")):
        record = _read_record(path)
        if record is None or path.name.startswith("_"):
            continue
        if record.is_alive or (record.run_folder and Path(record.run_folder).exists()):
            records[record.name] = record
    return records


def list_replicas(site: Record) -> list[Record]:
    """Return the servers behind a site's gateway, by their names; none where it is no site."""
    if not site.run_folder:
        return []
    return [
        record
        for record in list_records().values()
        if record.config and Path(record.config).parent.parent == Path(site.run_folder)
    ]


def hide_replicas(found: Mapping[str, _Found]) -> dict[str, _Found]:
    """Return servers by name without those behind a gateway, which is there in their place."""
    parts = {part.name for one in list_records().values() for part in list_replicas(one)}
    return {name: value for name, value in found.items() if name not in parts}


def find_record(name: str | None = None) -> Record:
    """Return the named server's record, or the only one's; raises what find_endpoint raises."""
    return _choose(list_records(), name, "name one of them")


def _read_record(path: Path) -> Record | None:
    """Return what a claim says; None where that is nothing yet."""
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _digest(config: Path | None) -> str:
    return hashlib.sha256(str(config).encode()).hexdigest()[:16]
