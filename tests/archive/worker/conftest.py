"""Archives of a few lines, as folders: they load without unpacking."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ECHO = """
class Echo:
    def initialize(self, context):
        self.context = context

    def handle(self, data, context):
        return [
            {
                name: value.decode() if isinstance(value, bytearray) else value
                for name, value in row.items()
            }
            for row in data
        ]
"""


@pytest.fixture
def unpacked(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes an unpacked archive from the sources of its files."""

    def write(
        files: Mapping[str, str] | str = ECHO,
        *,
        handler: str = "handler.py",
        folder: str = "model",
        config: str | None = None,
    ) -> Path:
        path = tmp_path / folder
        sources = {"handler.py": files} if isinstance(files, str) else dict(files)
        model = {"modelName": "tiny", "handler": handler}
        if config is not None:
            sources["model-config.yaml"] = config
            model["configFile"] = "model-config.yaml"
        sources["MAR-INF/MANIFEST.json"] = json.dumps({"runtime": "python", "model": model})
        for name, text in sources.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(text, encoding="utf-8")
        return path

    return write
