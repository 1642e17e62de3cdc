"""The page: how soon it is painted, how large it is, and viewers that watch it.

Run as `python benchmarks/page.py SERVER` beside `marwright serve`; prints what it measured as JSON.
`make bench WHAT=monitoring` measures the same, and what viewers cost a served model. Needs
Debian's chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import selectors
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import BrowserContext, sync_playwright

__all__ = ["measure_page", "open_page", "Page", "start_viewers"]

CHROMIUM = "/usr/bin/chromium"
ROUNDS = 15
READ_PAINT = """() => performance.getEntriesByType("paint").map((p) => [p.name, p.startTime])"""
READ_BYTES = """() => [...performance.getEntriesByType("navigation"),
  ...performance.getEntriesByType("resource")].filter((e) => !e.name.includes("/api/events"))
  .map((e) => e.transferSize)"""


@dataclass(frozen=True)
class Page:
    """A page that runs."""

    url: str
    """Of the overview."""
    address: str
    """Signs in once."""
    token: str
    pid: int


@contextlib.contextmanager
def open_page(server: str) -> Iterator[Page]:
    """Run `marwright dashboard` in a process of its own, at a free port."""
    command = [sys.executable, "-m", "marwright", "dashboard", server, "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        facts = json.loads(process.stdout.readline())
        token = Path(facts["token_file"]).read_text("utf-8").strip()
        url = facts["url"].partition("login#")[0]
        yield Page(url, facts["url"], token, process.pid)
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def measure_page(page: Page, *, rounds: int = ROUNDS) -> dict[str, Any]:
    """Open the overview again and again with nothing in the browser's cache.

    `first_paint_ms` is what Chromium itself says of each round, from asking for the page to its
    first pixels; `bytes` what it took over the wire, headers included, without the live updates.
    """
    painted: list[float] = []
    sizes: list[int] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        first = browser.new_context()
        window = first.new_page()
        window.goto(page.address)
        window.wait_for_selector("main[data-topic]")
        cookies = first.cookies()
        for _ in range(rounds + 1):
            context = browser.new_context()
            context.add_cookies([{**one} for one in cookies])
            paint, size = _open_once(context, page.url)
            painted.append(paint)
            sizes.append(size)
            context.close()
        browser.close()
    # The first one warms Chromium up.
    return {"first_paint_ms": [round(one, 1) for one in painted[1:]], "bytes": max(sizes)}


def _open_once(context: BrowserContext, url: str) -> tuple[float, int]:
    """Return the milliseconds to the first paint, and the bytes that it took."""
    window = context.new_page()
    window.goto(url, wait_until="load")
    deadline = time.monotonic() + 10
    while True:
        found = dict(window.evaluate(READ_PAINT))
        if "first-paint" in found:
            return float(found["first-paint"]), int(sum(window.evaluate(READ_BYTES)))
        if time.monotonic() > deadline:
            raise TimeoutError("Chromium has painted nothing")
        time.sleep(0.02)


def start_viewers(page: Page, count: int, seconds: float) -> subprocess.Popen[str]:
    """Have so many viewers watch the overview, from a process of its own.

    It prints "watching" once all of them do, and at the end what they got, as JSON.
    """
    command = [sys.executable, __file__, "--watch", page.url]
    command += ["--viewers", str(count), "--seconds", str(seconds)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(page.token + "\n")  # not as an argument, which all can read
    process.stdin.close()
    return process


def watch(url: str, token: str, count: int, seconds: float) -> dict[str, Any]:
    """Watch with plain sockets, which cost less than what is measured; return what came."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    head = (
        f"GET /api/events?topic=overview HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"Authorization: Bearer {token}\r\nAccept: text/event-stream\r\n\r\n"
    ).encode()
    events = total = dropped = 0
    first: set[int] = set()
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        for number in range(count):
            sock = socket.create_connection((parts.hostname, parts.port or 80), timeout=30)
            stack.enter_context(sock).sendall(head)
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ, number)
        deadline = float("inf")
        while time.monotonic() < deadline and dropped < count:
            for key, _ in selector.select(0.2):
                assert isinstance(key.fileobj, socket.socket)
                content = key.fileobj.recv(1 << 18)
                if not content:
                    selector.unregister(key.fileobj)
                    dropped += 1
                total += len(content)
                events += content.count(b"event: look")
                if b"event: look" in content:
                    first.add(key.data)
            if len(first) == count and deadline == float("inf"):
                print("watching", flush=True)
                deadline = time.monotonic() + seconds
    return {"viewers": count, "events": events, "bytes": total, "dropped": dropped}


def main() -> None:
    """Measure the page of a server that runs; or be the viewers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", nargs="?", default="")
    parser.add_argument("--watch", default="")
    parser.add_argument("--viewers", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=10.0)
    asked = parser.parse_args()
    if asked.watch:
        token = sys.stdin.readline().strip()
        print(json.dumps(watch(asked.watch, token, asked.viewers, asked.seconds)))
        return
    with open_page(asked.server) as page:
        found = measure_page(page)
        found["first_paint_median_ms"] = statistics.median(found["first_paint_ms"])
        viewers = start_viewers(page, asked.viewers, asked.seconds)
        assert viewers.stdout is not None
        with viewers:
            lines = viewers.stdout.read().splitlines()
    print(json.dumps({**found, "watched": json.loads(lines[-1])}, indent=2))


if __name__ == "__main__":
    main()
