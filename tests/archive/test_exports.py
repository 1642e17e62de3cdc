from __future__ import annotations

import subprocess
import sys

import pytest

from marwright import archive


def test_every_name_of_the_package_can_be_imported() -> None:
    assert sorted(archive.__all__, key=str.casefold) == archive.__all__
    assert set(archive.__all__) == set(archive._MODULES)
    assert all(getattr(archive, name).__name__ == name for name in archive.__all__)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = archive.absent


def test_a_reader_of_archives_needs_neither_pydantic_nor_torch() -> None:
    script = (
        "import sys; from marwright.archive import Archive\n"
        "print(Archive.__module__, sys.modules.keys() & {'pydantic', 'torch', 'numpy'})"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "marwright.archive.reader set()\n"
