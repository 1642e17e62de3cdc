"""Which servers run here: `marwright serve` leaves a link, the other commands follow it.

A link points into the server's run folder, which vanishes with the server, so that a link that
leads nowhere is a server that is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from marwright.client import Endpoint
from marwright.errors import NoServerError, UsageError
from marwright.storage import translate_os_errors

__all__ = ["announce", "check_name", "find_endpoint", "list_servers"]

_log = logging.getLogger(__name__)


def announce_folder() -> Path:
    """Return the folder of links: in XDG_RUNTIME_DIR, or in XDG_STATE_HOME where there is none."""
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "marwright"
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(state) / "marwright/servers"


@contextlib.contextmanager
def announce(name: str, run_folder: Path) -> Iterator[None]:
    """Let other commands find the server under `name` while the block runs; see check_name."""
    check_name(name)
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


def check_name(name: str) -> None:
    """Raise UsageError for a name that no file can have, or that a running server has."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise UsageError(
            "no such server name is possible",
            expected="letters, digits, '_', '-' or '.', beginning with a letter or digit",
            found=repr(name),
        )
    if name in list_servers():
        raise UsageError(f"a server {name} runs already", remedy="choose another --name")


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
    """Return the named server's endpoint, or the only one's.

    Raises:
        NoServerError: none runs, or none of this name.
        UsageError: several run and none was named.
    """
    servers = list_servers()
    if name is not None and name in servers:
        return servers[name]
    names = ", ".join(servers) or "none"
    if name is None and len(servers) == 1:
        return next(iter(servers.values()))
    if name is None and servers:
        raise UsageError(
            "several servers run here", found=names, remedy="choose one with --server NAME"
        )
    raise NoServerError(
        "no server runs here" if name is None else f"no server {name} runs here",
        found=f"servers: {names}",
        remedy="choose one with --server NAME" if servers else "start one: marwright serve",
    )
