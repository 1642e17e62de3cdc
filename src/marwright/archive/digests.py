"""Digests: SHA-256 of every member, and one over them all.

They stand in the comments of a zip file and in the headers of a tar file
(docs/decisions/0005-digests.md); checks/integrity.py computes them again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import IO

__all__ = ["digest_stream", "root_digest"]

BLOCK_BYTES = 1 << 20


def digest_stream(stream: IO[bytes]) -> str:
    """Return the SHA-256, in hex, of all that a stream still holds."""
    digest = hashlib.sha256()
    while block := stream.read(BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def root_digest(digests: Mapping[str, str]) -> str:
    """Return one SHA-256, in hex, over all members' names and SHA-256 digests."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
