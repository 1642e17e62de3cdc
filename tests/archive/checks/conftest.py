"""Archives of one small handler, unpacked, with samples that they must answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marwright.archive import Manifest

MakeFolder = Callable[..., tuple[Path, Manifest]]


@pytest.fixture
def unpacked(tmp_path: Path) -> MakeFolder:
    """Return a function that writes handler.py, samples and settings as an unpacked archive.

    `samples` are texts, or (text, answer), or dicts of samples.json with a `text`.
    """

    def make(
        source: str,
        *,
        samples: tuple[Any, ...] = (),
        settings: str = "",
        requirements: str = "",
        handler: str = "handler.py",
        **others: str,
    ) -> tuple[Path, Manifest]:
        folder = tmp_path / "archive"
        for name, text in {"handler": source, **others}.items():
            folder.mkdir(exist_ok=True)
            (folder / f"{name}.py").write_text(text, encoding="utf-8")
        manifest = Manifest(
            "m",
            "1.0",
            handler,
            config_file="model-config.yaml" if settings else None,
            requirements_file="requirements.txt" if requirements else None,
        )
        texts = {"model-config.yaml": settings, "requirements.txt": requirements}
        for name, text in texts.items():
            if text:
                (folder / name).write_text(text)
        (folder / "MAR-INF/samples").mkdir(parents=True, exist_ok=True)
        (folder / "MAR-INF/MANIFEST.json").write_bytes(manifest.to_json())
        entries = []
        for number, sample in enumerate(samples):
            text, answer = sample if isinstance(sample, tuple) else (sample, None)
            entry = {"text": text, "answer": answer} if isinstance(text, str) else text
            name = f"{number}.txt"
            (folder / "MAR-INF/samples" / name).write_text(entry.pop("text"))
            entries.append({"file": name, **entry})
        if entries:
            (folder / "MAR-INF/samples.json").write_text(json.dumps(entries))
        return folder, manifest

    return make
