"""config.properties: TorchServe's configuration file, read and written.

Keys are those of docs/configuration.md and org.pytorch.serve.util.ConfigManager.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from marwright.errors import StorageError, UsageError

__all__ = ["read_properties", "render_properties"]

_HEADER = """\
# What deploy.yaml becomes for TorchServe (marwright config render); a default one becomes the
# repository's config.properties: loopback, tokens, models from the store only. A copy in the
# working folder is taken where there is no deploy.yaml; marwright serve --config names another.
"""


def read_properties(path: Path) -> dict[str, str]:
    """Read a properties file: `key=value` lines, `#` and `!` begin comments.

    Escapes and lines continued by a backslash are those of java.util.Properties.

    Raises:
        StorageError: the file cannot be read.
        UsageError: lines that are neither; all of them are named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise StorageError(f"cannot read {path}", found=str(exc)) from exc
    properties: dict[str, str] = {}
    broken = []
    for number, text in _join_lines(lines):
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            broken.append(f"line {number}: {text!r}")
        properties[_unescape(key.strip())] = _unescape(value.strip())
    if broken:
        raise UsageError(f"{path} cannot be read", expected="key=value", found="; ".join(broken))
    return properties


def render_properties(properties: Mapping[str, str]) -> str:
    """Return the text of a properties file.

    Java reads it as Latin-1, so that all but ASCII is escaped, as backslashes are.
    """
    lines = [f"{key}={_escape(value)}" for key, value in properties.items()]
    return _HEADER + "\n".join(lines) + "\n"


def _join_lines(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Yield the lines that say something, each with its number, continued ones as one."""
    text = ""
    first = 0
    for number, line in enumerate([*lines, ""], start=1):  # "" ends one that nothing follows
        if not text:
            first = number
            if line.strip().startswith(("#", "!")):
                continue
        text += line.strip()
        if (len(text) - len(text.rstrip("\\"))) % 2:
            text = text[:-1]  # the line ends in a backslash that is not itself escaped
        elif text:
            yield first, text
            text = ""


def _escape(value: str) -> str:
    r"""Return the value in ASCII; UTF-16 units as \uXXXX, as java.util.Properties reads them."""
    units = value.replace("\\", "\\\\").encode("utf-16-be", "surrogatepass")
    pairs = zip(units[::2], units[1::2], strict=True)
    codes = [high << 8 | low for high, low in pairs]
    return "".join(chr(code) if 32 <= code < 127 else f"\\u{code:04x}" for code in codes)


def _unescape(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        if match["unit"]:
            return chr(int(match["unit"], 16))
        return {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}.get(match["sign"], match["sign"])

    replaced = re.sub(r"\\(?:u(?P<unit>[0-9a-fA-F]{4})|(?P<sign>.))", replace, text)
    # Two units of one sign beyond the first 65536 become that sign.
    return replaced.encode("utf-16-be", "surrogatepass").decode("utf-16-be", "surrogatepass")
