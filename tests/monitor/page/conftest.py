"""A page over looks that a test chooses, and a real Chromium to look at it with."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

pytest.importorskip("fastapi")
playwright = pytest.importorskip("playwright.sync_api")

from marwright.monitor.looks import Look, Rates, Recorder  # noqa: E402
from marwright.monitor.page.service import Service  # noqa: E402
from marwright.monitor.page.sources import Sources  # noqa: E402
from marwright.server.process import read_start_time  # noqa: E402
from marwright.server.registry import Record  # noqa: E402

TOKEN = "a-token-of-the-tests"
CHROMIUM = shutil.which("chromium")
LOOK_SECONDS = 0.1


def make_model(name: str = "cnn", version: str = "1.0", **changes: Any) -> dict[str, Any]:
    """Return a version as a status has it."""
    model = {"name": name, "version": version, "default": version == "1.0", "workers": 2}
    model |= {"ready_workers": 2, "memory_bytes": 300 << 20, "problem": "", "detail": ""}
    return {**model, **changes}


class Told(Recorder):
    """A recorder that sees what it is told."""

    def __init__(self, record: Record) -> None:
        super().__init__(record, seconds=LOOK_SECONDS)
        self.models = [make_model(), make_model(version="2.0")]
        self.values: dict[str, Any] = {}
        self.problem = ""
        self.drift: dict[tuple[str, str], dict[str, float]] = {}
        self.rates = Rates(12.5, 0.25, 0.004, 0.009, 0.031, 1, 2.5)

    def _look(self) -> Look:
        if self.problem:
            status = {"name": "told", "models": [], "problems": [self.problem], "ready": False}
            return Look(time.time(), status, problem=self.problem)
        status = {
            "name": "told",
            "phase": "serving",
            "ready": True,
            "pid": 4711,
            "since": "2026-11-28T07:00:00",
            "restarts": 0,
            "address": "http://127.0.0.1:8080",
            "models": self.models,
            "problems": [],
            **self.values,
        }
        rates = {(m["name"], m["version"]): self.rates for m in self.models}
        return Look(time.time(), status, rates, self.drift)


class Shown:
    """A page that runs, and what it is told."""

    def __init__(self, service: Service, recorder: Told) -> None:
        self.service = service
        self.recorder = recorder
        self.url = service.url.rstrip("/")

    def ask(self, path: str, method: str = "GET", **options: Any) -> requests.Response:
        """Ask with the token, as a script does."""
        headers = {"Authorization": f"Bearer {TOKEN}", **options.pop("headers", {})}
        options = {"timeout": 20, "allow_redirects": False, **options}
        return requests.request(method, self.url + path, headers=headers, **options)


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    """A server that nobody runs, with a deploy.yaml."""
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "deploy.yaml").write_text("limits: {request_bytes: 100000}\n", encoding="utf-8")
    start = read_start_time(os.getpid()) or ""
    return Record("told", os.getpid(), start, "today", config=str(tmp_path / "deploy.yaml"))


@pytest.fixture
def open_page(record: Record) -> Iterator[Callable[..., Shown]]:
    """Return a function that serves a page, which is ended with the test."""
    with contextlib.ExitStack() as stack:

        def start(change: Callable[[Told], None] = lambda told: None, **options: Any) -> Shown:
            told = Told(record)
            change(told)
            told.look()
            stack.enter_context(told)
            options = {"host": "127.0.0.1", "port": 0, **options}
            service = stack.enter_context(Service(Sources(record, told), TOKEN, **options))
            return Shown(service, told)

        yield start


@pytest.fixture
def shown(open_page: Callable[..., Shown]) -> Shown:
    return open_page()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A real Chromium without a window."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Return a function that opens a window, signed in by the printed address.

    What the window's console says of errors fails the test.
    """
    with contextlib.ExitStack() as stack:
        errors: list[str] = []

        def open_window(service: Service, path: str = "/", **options: Any) -> Any:
            context = chromium.new_context(**options)
            stack.callback(context.close)
            window = context.new_page()
            window.set_default_timeout(20_000)
            window.on("pageerror", lambda error: errors.append(str(error)))
            window.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
            window.goto(service.make_address())
            window.wait_for_selector("main[data-topic]")
            if path != "/":
                window.goto(service.url.rstrip("/") + path)
            window.errors = errors
            return window

        yield open_window
        assert [text for text in errors if "Failed to load resource" not in text] == []
