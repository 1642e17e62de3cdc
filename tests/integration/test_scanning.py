from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from marwright.archive.checks import scan
from marwright.archive.manifest import MANIFEST_NAME
from marwright.errors import ArchiveError
from marwright.server import TorchServe, register

pytestmark = pytest.mark.server

HANDLER = "def handle(data, context):\n    return ['%s'] * len(data or ())\n"
MANIFEST = {
    "runtime": "python",
    "model": {"modelName": "odd", "modelVersion": "1.0", "handler": "h.py"},
}


def write(path: Path, **more: bytes) -> Path:
    """Write a small archive that TorchServe can serve, and further members."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MANIFEST_NAME, json.dumps(MANIFEST))
        archive.writestr("h.py", HANDLER % "listed")
        for name, content in more.items():
            archive.writestr(name, content)
    return path


def write_with_a_second_handler(path: Path) -> Path:
    """Write the handler once more where only those look who read header after header."""
    content = write(path).read_bytes()
    start = content.index(b"PK\x01\x02")
    code = (HANDLER % "hidden").encode()
    sizes = struct.pack("<III", zlib.crc32(code), len(code), len(code))
    hidden = (
        b"PK\x03\x04\x14\0" + struct.pack("<HHHH", 0, 0, 0, 33) + sizes + b"\4\0\0\0h.py" + code
    )
    end = bytearray(content[start:])
    end[-6:-2] = struct.pack("<I", start + len(hidden))
    path.write_bytes(content[:start] + hidden + end)
    return path


def write_with_an_attack(path: Path) -> Path:
    return write(path, **{"weights.bin": b"cos\nsystem\n(S'touch /tmp/reached'\ntR."})


def write_with_a_name_outside(path: Path) -> Path:
    return write(path, **{"../reached.py": b""})


@pytest.fixture
def odd(server: TorchServe) -> Iterator[Path]:
    """A path in the server's store for an archive that is gone afterwards."""
    path = server.store / "odd.mar"
    yield path
    path.unlink(missing_ok=True)


def test_torchserve_takes_a_member_that_the_list_does_not_name(
    server: TorchServe, odd: Path
) -> None:
    write_with_a_second_handler(odd)
    with zipfile.ZipFile(io.BytesIO(odd.read_bytes())) as archive:
        assert b"listed" in archive.read("h.py")
        assert archive.testzip() is None
    staged = server.staging.folder / odd.name  # not by ours, which would refuse
    staged.write_bytes(odd.read_bytes())
    server.client.models.register(odd.name, workers=1)
    try:
        assert server.client.predict("odd", b"x").body == b"hidden"
    finally:
        server.client.models.unregister("odd", "1.0")
        staged.unlink(missing_ok=True)
    assert [finding.rule.id for finding in scan(odd)] == ["S114"]


@pytest.mark.parametrize(
    ("write", "id"),
    [
        (write_with_a_second_handler, "S114"),
        (write_with_an_attack, "P201"),
        (write_with_a_name_outside, "S101"),
    ],
)
def test_the_server_never_sees_a_dangerous_archive(
    tmp_path: Path, server: TorchServe, write: Callable[[Path], Path], id: str
) -> None:
    path = write(tmp_path / "dangerous.mar")
    before = server.client.models.list()
    with pytest.raises(ArchiveError, match=rf"dangerous\.mar is refused: .*{id}"):
        register(server.client, path, store=server.store)
    assert server.client.models.list() == before
    assert not list(server.store.glob("*dangerous*"))
    assert not list(server.store.glob(".*"))
    assert "dangerous" not in server.log_file.read_text()


def test_a_server_is_not_started_with_a_dangerous_archive(tmp_path: Path) -> None:
    write_with_an_attack(tmp_path / "m.mar")
    server = TorchServe(tmp_path, models=["m.mar"])
    with pytest.raises(ArchiveError, match="P201"), server:
        pass
    assert not server.run_folder.exists()
