"""How large an archive may be; one place for all of the numbers."""

from __future__ import annotations

from pathlib import Path

from marwright.errors import ArchiveError
from marwright.storage import translate_os_errors

__all__ = ["check_expansion", "expansion_limit"]

MAX_MEMBERS = 100_000
MAX_DIRECTORY_BYTES = 32 << 20
"""Of a zip file's list of members, which is read whole."""
MAX_RATIO = 100
"""How often its own size an archive may unpack to, beyond FREE_BYTES.

Deflate shrinks weights to a half at best, text to a tenth, zeros to a thousandth."""
FREE_BYTES = 1 << 30
"""What any archive may unpack to: a layer of zeros is no attack."""
QUIET_BYTES = 64 << 20
"""What any archive may unpack to without a word."""
MAX_HEADER_BYTES = 1 << 20
"""Of one read by tarfile; a longer extended header would only fill the memory."""
MAX_HEADERS_BYTES = 16 << 20
"""Of all extended headers of a tar file."""


def expansion_limit(path: Path) -> int:
    """Return how many bytes the members of an archive file may have, all of them together."""
    with translate_os_errors(f"read {path}"):
        return FREE_BYTES + MAX_RATIO * path.stat().st_size


def check_expansion(path: Path, unpacked_bytes: int) -> None:
    """Refuse an archive file that unpacks to more than any model needs.

    Raises:
        ArchiveError: it does.
    """
    if unpacked_bytes > (limit := expansion_limit(path)):
        raise ArchiveError(
            f"{path} unpacks to more than a model needs",
            expected=f"at most {limit:,} bytes of a file of this size",
            found=f"{unpacked_bytes:,} or more",
            remedy="do not use it; weights that are all zero can be packed with --archive-format "
            "zip-store",
        )
