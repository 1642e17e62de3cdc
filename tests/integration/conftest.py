"""What tests of a real server share: archives of handlers under test, and plain HTTP."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from marwright.archive import Spec, pack_spec
from marwright.client.tokens import TokenFile
from marwright.server import TorchServe

Send = Callable[..., requests.Response]


@pytest.fixture(scope="session")
def connect() -> Iterator[Callable[[TorchServe], Send]]:
    """Return a function that gives one to send requests to a server, tokens added."""
    with requests.Session() as session:
        session.trust_env = False

        def connect_to(server: TorchServe) -> Send:
            assert server.endpoint.key_file is not None
            tokens = TokenFile(server.endpoint.key_file)

            def send(path: str, body: Any = None, kind: str = "", **options: Any) -> Any:
                headers = {"Authorization": f"Bearer {tokens.read('inference')}"}
                headers |= {"Content-Type": kind} if kind else {}
                headers |= options.pop("headers", {})
                method = options.pop("method", "POST")
                url = options.pop("url", server.endpoint.inference_url)
                return session.request(
                    method, url + path, data=body, headers=headers, timeout=60, **options
                )

            return send

        yield connect_to


@pytest.fixture(scope="session")
def read_counters(
    connect: Callable[[TorchServe], Send],
) -> Callable[[TorchServe, str], dict[tuple[str, ...], float]]:
    """Return a function that reads what the handlers of a model counted.

    Keys are the name without its prefix, then labels as "key=value", sorted.
    """

    def read(server: TorchServe, model: str) -> dict[tuple[str, ...], float]:
        text = connect(server)("/metrics", method="GET", url=server.endpoint.metrics_url).text
        found = {}
        for name, labels, value in re.findall(r"^marwright_(\w+)\{(.*?),?\} (\S+)$", text, re.M):
            pairs = sorted(f"{key}={label}" for key, label in re.findall(r'(\w+)="(.*?)"', labels))
            if f"model_name={model}" in pairs:
                kept = [pair for pair in pairs if not pair.startswith(("Hostname", "model_"))]
                series = (name, *kept)
                found[series] = float(value)
        return found

    return read


@pytest.fixture(scope="session")
def pack_own(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that packs a handler given as source, with ours beside it to derive from.

    Without a source it is one of ours, by its name.
    """

    def pack(
        name: str,
        handler: str,
        network: torch.nn.Module,
        *,
        source: str = "",
        out: Path | None = None,
        settings: dict[str, Any] | None = None,
        **spec: Any,
    ) -> Path:
        folder = tmp_path_factory.mktemp(name)
        torch.jit.save(torch.jit.script(network.eval()), str(folder / "model.pt"))
        if source:
            for path in (root / "handlers").glob("*.py"):
                shutil.copy(path, folder)
            (folder / handler).write_text(source, encoding="utf-8")
        made = Spec.create(
            name=name, handler=handler, model="model.pt", settings=settings or {}, **spec
        )
        path = (out or folder) / f"{name}.mar"
        return pack_spec(made, folder=folder, out=path, preflight=None).path

    return pack
