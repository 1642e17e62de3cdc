"""What the tests of archives share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _private_temporary_folder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep torch-model-archiver away from /tmp: it deletes `<tmp>/<model name>` first."""
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
