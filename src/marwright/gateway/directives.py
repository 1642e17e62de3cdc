"""nginx's own language: blocks, and texts of others that must not become more than texts."""

from __future__ import annotations

import hashlib
import ipaddress
import re
import textwrap
from pathlib import Path

from marwright.errors import ConfigurationError
from marwright.storage import translate_os_errors

__all__ = ["quote_path", "quote_text", "stamp", "write_block", "write_host"]

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")


def write_block(head: str, *lines: str) -> str:
    """Return a directive with others in braces."""
    body = textwrap.indent("\n".join(lines), "    ")
    return f"{head} {{\n{body}\n}}"


def write_host(host: str) -> str:
    """Return a host as `listen` takes it."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not _HOST.fullmatch(host):
            raise ConfigurationError(
                "no such host is possible", expected="a name or an address", found=repr(host)
            ) from None
        return host
    if "%" in host:
        raise ConfigurationError("a host with a zone is not supported", found=repr(host))
    return f"[{address}]" if address.version == 6 else str(address)


def stamp(path: Path) -> str:
    """Return a comment that changes with a file, so that a renewed certificate is a change."""
    with translate_os_errors(f"read {path}"):
        return f"# sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


def quote_path(path: Path) -> str:
    """Return a file's absolute path; relative ones would begin in the run folder."""
    return quote_text(str(path.absolute()), what="path")


def quote_text(text: str, what: str = "text") -> str:
    """Return a text for nginx, which has no way to write a dollar that is no variable.

    Raises:
        ConfigurationError: it has one, or control characters.
    """
    if re.search(r"[$\x00-\x1f\x7f]", text) or any("\ud800" <= c <= "\udfff" for c in text):
        raise ConfigurationError(
            f"nginx cannot use this {what}",
            expected="no '$' and no control characters",
            found=repr(text),
        )
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
