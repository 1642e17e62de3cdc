"""Bearer tokens that a gateway asks for: read from their file, and compared by nginx."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from marwright.errors import ConfigurationError
from marwright.gateway.directives import write_block
from marwright.server.examination import BEARER_TOKEN
from marwright.storage import translate_os_errors

__all__ = ["check_token", "read_tokens", "render_tokens"]

LONGEST_TOKEN = 512


def read_tokens(path: Path) -> list[str]:
    """Return the tokens of a file, one a line; no error shows one."""
    with translate_os_errors(f"read {path}"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    tokens = [line.strip() for line in lines if line.strip()]
    if not tokens:
        raise ConfigurationError(f"{path} has no token", expected="one or more, a line each")
    for number, token in enumerate(lines, 1):
        if token.strip():
            check_token(token.strip(), f"{path}, line {number}")
    # nginx refuses a text that is there twice, in whatever case of letters.
    folded = [token.lower() for token in tokens]
    if len(set(folded)) < len(folded):
        raise ConfigurationError(f"{path} has two tokens that differ in case at most")
    return tokens


def check_token(token: str, where: str) -> None:
    """Refuse what nginx cannot compare, with a ConfigurationError."""
    if not BEARER_TOKEN.fullmatch(token) or len(token) > LONGEST_TOKEN:
        raise ConfigurationError(
            f"a token cannot be used ({where})",
            expected=f"letters, digits and -._~+/=, at most {LONGEST_TOKEN} characters",
            found=f"{len(token)} characters",
        )


def render_tokens(tokens: Sequence[str], variable: str) -> Iterator[str]:
    """Return the maps that set a variable where a request brings one of the tokens.

    nginx finds a map's texts by their hash, but in any case of letters; so the one that was found
    is compared once more.
    """
    yield write_block(
        f"map $http_authorization $known_{variable}", *(f'"Bearer {one}" 1;' for one in tokens)
    )
    exact = (rf'"~^1 (?i:bearer) {re.escape(one)}\z" 1;' for one in tokens)
    yield write_block(f'map "$known_{variable} $http_authorization" ${variable}', *exact)
