"""Failed requests with what they were about, from a real prediction log."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.monitor.page.conftest import Shown

pytest.importorskip("pyarrow")

SCRIPT = '<script>alert("x")</script>'


@pytest.fixture
def log(shown: Shown) -> Callable[..., None]:
    """Return a function that has a worker log a failed request."""
    config = Path(shown.recorder.record.config)
    config.write_text("monitoring: {predictions: {inputs: whole}}\n", encoding="utf-8")
    spool = config.with_name("predictions") / "spool"
    spool.mkdir(parents=True, mode=0o700)

    def write(name: str, content: bytes, **values: Any) -> None:
        row = {"time": time.time(), "request": name, "item": 0, "model": "cnn"}
        row |= {"version": "1.0", "status": 503, "seconds": 0.01, "digest": "a" * 64}
        row |= {"input": base64.b64encode(content).decode(), "content_type": "image/png"}
        path = spool / f"cnn-1.0-1-{name}.jsonl"
        path.write_text(json.dumps({**row, **values}) + "\n", encoding="utf-8")
        path.chmod(0o600)

    return write


def test_a_failure_is_shown_with_a_thumbnail_of_its_input(
    shown: Shown, log: Callable[..., None], scan: bytes, visit: Callable[..., Any]
) -> None:
    log("good", scan, status=200, prediction="7")
    log("bad1", scan)
    log("text", SCRIPT.encode(), status=400)
    window = visit(shown.service, "/failures")
    rows = window.locator(".failures li")
    assert rows.count() == 2
    text = window.inner_text(".failures")
    assert "bad1" in text
    assert "good" not in text
    image = window.locator(".failures img")
    assert image.count() == 1
    assert image.get_attribute("alt") == "The input of request bad1"
    assert image.evaluate("(i) => i.decode().then(() => i.naturalWidth)") == 96
    address = image.get_attribute("src")
    answer = shown.ask(address)
    assert answer.headers["content-type"] == "image/png"
    assert scan not in answer.content


def test_what_a_client_named_is_escaped(
    shown: Shown, log: Callable[..., None], scan: bytes
) -> None:
    log("x1", scan, request=SCRIPT, prediction=SCRIPT, model=SCRIPT)
    text = shown.ask("/failures").text
    assert "alert" in text
    assert SCRIPT not in text


def test_without_a_log_it_says_how_to_have_one(shown: Shown) -> None:
    assert "monitoring: {predictions: true}" in shown.ask("/failures").text


def test_an_empty_log_is_said(shown: Shown, log: Callable[..., None]) -> None:
    assert "No failed request" in shown.ask("/failures").text
