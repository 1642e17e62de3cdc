"""What nginx lets through to a site from who leads releases elsewhere: see control.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from marwright.errors import ConfigurationError
from marwright.gateway.directives import quote_text, write_block
from marwright.gateway.tokens import read_tokens, render_tokens
from marwright.gateway.traffic import NAME
from marwright.server.examination import judge_control
from marwright.server.registry import KEY_HEADER

__all__ = ["ControlSettings", "DIGEST", "render_control", "render_control_tokens", "UPLOADS"]

UPLOADS = "uploads"
"""The folder of the run folder that whoever has a control token puts archives into."""
DIGEST = "[0-9a-f]{64}"
"""An archive is put into a folder of this name: the SHA-256 of its file."""
ARCHIVE_BYTES = "8g"
"""Largest archive that is uploaded."""
ANSWER_SECONDS = 180


@dataclass(frozen=True)
class ControlSettings:
    """Who may release from elsewhere, and whom their requests are handed to."""

    tokens: Path
    """A file of accepted bearer tokens, one a line; those of clients are not among them."""
    url: str
    """The site's own endpoints, on loopback."""
    key: str
    """Sent there as KEY_HEADER."""


def render_control_tokens(control: ControlSettings, clients: Path | None) -> Iterator[str]:
    """Return the maps that set $controls where a request brings a token of those who may release.

    `clients` is the file of the clients' tokens.

    Raises:
        ConfigurationError: a client has one of them too, or one is short.
    """
    tokens = read_tokens(control.tokens)
    for problem in judge_control(control.tokens, clients):
        raise ConfigurationError(problem)
    yield from render_tokens(tokens, "controls")


def render_control(control: ControlSettings) -> Iterator[str]:
    """Return where archives are put, and where words of a release go."""
    token = write_block("if ($controls = '')", "return 401;")
    yield write_block(
        f'location ~ "^/control/archives/(?<digest>{DIGEST})/(?<file>{NAME}[.]mar(?:[.]sig)?)$"',
        token,
        write_block("limit_except PUT", "deny all;"),
        f"client_max_body_size {ARCHIVE_BYTES};",
        "dav_methods PUT;",
        "create_full_put_path on;",
        f"alias {UPLOADS}/$digest/$file;",
    )
    yield write_block(
        'location ~ "^/control/(?<operation>check|begin|say)$"',
        token,
        write_block("limit_except POST", "deny all;"),
        "client_max_body_size 64k;",
        f"proxy_pass {control.url}/control/$operation;",
        "proxy_set_header Host localhost;",
        'proxy_set_header Connection "";',
        'proxy_set_header Authorization "";',
        f"proxy_set_header {KEY_HEADER} {quote_text(control.key)};",
        "proxy_next_upstream off;",
        f"proxy_read_timeout {ANSWER_SECONDS}s;",
    )
