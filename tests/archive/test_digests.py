"""Digests are SHA-256, and the root digest is what sha256sum would say of the list."""

from __future__ import annotations

import hashlib
import io
import subprocess
from pathlib import Path

from marwright.archive.digests import digest_stream, root_digest


def test_a_stream_is_hashed_from_where_it_stands() -> None:
    stream = io.BytesIO(b"head" + b"x" * (3 << 20))
    stream.seek(4)
    assert digest_stream(stream) == hashlib.sha256(b"x" * (3 << 20)).hexdigest()


def test_the_root_digest_is_that_of_the_list_sha256sum_prints(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"weights")
    (tmp_path / "handler.py").write_bytes(b"code")
    listed = subprocess.run(
        ["sha256sum", "handler.py", "model.pt"], cwd=tmp_path, capture_output=True, check=True
    ).stdout
    digests = {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for name in ("model.pt", "handler.py")
    }
    assert root_digest(digests) == hashlib.sha256(listed).hexdigest()


def test_the_root_digest_depends_on_names_and_not_on_their_order() -> None:
    one = root_digest({"a": "1", "b": "2"})
    assert root_digest({"b": "2", "a": "1"}) == one
    assert root_digest({"a": "2", "b": "1"}) != one
    assert root_digest({"a": "1"}) != one
