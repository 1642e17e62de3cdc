"""Handlers as a worker has them: their folder on the path, each module by its bare name."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

Import = Callable[[str], Any]


@pytest.fixture(scope="module")
def handlers(root: Path) -> Iterator[Import]:
    """Return a function that imports one of the handlers' modules."""
    names = [path.stem for path in (root / "handlers").glob("*.py")]
    _forget(names)  # those of an archive that another test unpacked
    sys.path.insert(0, str(root / "handlers"))
    yield importlib.import_module
    sys.path.remove(str(root / "handlers"))
    _forget(names)


def _forget(names: list[str]) -> None:
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def post(handlers: Import) -> Callable[..., Any]:
    """Return a function that makes a request as fast_worker hands it over; all but bytes as JSON.

    With `parts` it is a form: name to bytes, or to (bytes, content type).
    """
    incoming = handlers("inference_request").Incoming

    def make_request(
        body: Any = b"",
        kind: str = "",
        *,
        accept: str = "",
        parts: dict[str, Any] | None = None,
        number: int = 0,
        explain: bool = False,
    ) -> Any:
        if not isinstance(body, bytes):
            body, kind = json.dumps(body).encode(), kind or "application/json"
        fields = [("body", body, kind)]
        if parts is not None:
            pairs = [(n, v if isinstance(v, tuple) else (v, "")) for n, v in parts.items()]
            fields = [(name, value, kind) for name, (value, kind) in pairs]
        return incoming(f"request-{number}", fields, "", accept, explain)

    return make_request


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that initialises a handler of some class, as a worker does.

    `config` stands beside `handler:` in model-config.yaml, `settings` in it.
    """
    from ts.context import Context

    threads = torch.get_num_threads()

    def start_handler(
        kind: type,
        network: torch.nn.Module,
        *,
        batch_size: int = 8,
        metrics: Any = None,
        config: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Any:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        torch.jit.save(torch.jit.script(network.eval()), str(folder / "model.pt"))
        handler = kind()
        handler.initialize(
            Context(
                model_name="m",
                model_dir=str(folder),
                manifest={
                    "model": {
                        "modelName": "m",
                        "modelVersion": "1.0",
                        "serializedFile": "model.pt",
                    }
                },
                batch_size=batch_size,
                gpu=None,
                mms_version="0.12.0",
                metrics=metrics,
                model_yaml_config={**(config or {}), "handler": settings},
            )
        )
        return handler

    yield start_handler
    torch.set_num_threads(threads)
