"""`marwright top`, in a pseudo-terminal and without one."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.conftest import Served, wait_until
from typer.testing import CliRunner, Result

from marwright.cli.top import COLUMNS, KEY_NAMES, View, _choose_columns, top
from marwright.client import Client, Endpoint
from marwright.errors import NoServerError
from marwright.server.metrics.exposition import Exposition
from marwright.server.process import read_start_time
from marwright.server.registry import Claim, Record, claim
from marwright.server.supervision.health import Health
from marwright.server.supervision.status import Status, VersionStatus

app = typer.Typer()
app.command()(top)

PROGRAM = """
import fcntl, os, sys, termios
if sys.argv.pop(1) == "terminal":
    os.setsid()
    fcntl.ioctl(1, termios.TIOCSCTTY, 0)  # so that Ctrl-C there is a signal here
from marwright.cli import main
main.COMMANDS["top"] = "top.top"
main.main()
"""
SECONDS = 30.0
COLOR = re.compile(r"\x1b\[[0-9;]*\b(?:3[0-7]|4[0-7]|9[0-7]|38|48)[0-9;]*m")


class StandIn:
    """A supervisor of whose versions each answers one request more a scrape than the last."""

    def __init__(self, count: int = 2, name: str = "cnn") -> None:
        self.status = Status(name="shop", phase="serving", started=True)
        self.versions = [(name, f"{number}.0") for number in range(1, count + 1)]
        self.failed: dict[tuple[str, str], str] = {}
        self.shifted: set[tuple[str, str]] = set()
        self.key = "key"
        self._scrapes = 0
        self._claim: Claim | None = None
        self._health: Health | None = None

    def read(self) -> Status:
        models = tuple(
            VersionStatus(*key, key == self.versions[0], 1, 1, 3 << 20, self.failed.get(key, ""))
            for key in self.versions
        )
        return dataclasses.replace(self.status, models=models)

    def scrape(self) -> Exposition:
        self._scrapes += 1
        exposition = Exposition()
        for place, (model, version) in enumerate(self.versions, 1):
            labels = {"model": model, "version": version}
            count = self._scrapes * place
            status = "500" if (model, version) in self.failed else "200"
            exposition.add("marwright_http_requests_total", count, **labels, status=status)
            exposition.add("marwright_queue_length", 7, **labels)
            if (model, version) in self.shifted:
                exposition.add("marwright_drift_detected", 1, **labels)
        return exposition

    def start(self) -> None:
        self._health = Health(self.read, port=0, key=self.key, scrape=self.scrape)
        self._health.__enter__()
        start = read_start_time(os.getpid()) or ""
        record = Record("shop", os.getpid(), start, "today", health_url=self._health.url, key="key")
        self._claim = claim("shop")
        self._claim.write(record)

    def end(self) -> None:
        if self._health is not None and self._claim is not None:
            self._health.__exit__(None, None, None)
            self._claim.release()
        self._health = self._claim = None


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("MARWRIGHT_SERVER", "NO_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    it = StandIn()
    it.start()
    yield it
    it.end()


class Terminal:
    """A `marwright top` in a pseudo-terminal."""

    def __init__(
        self, *words: str, size: tuple[int, int] = (100, 24), env: dict[str, str] | None = None
    ) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(*size)
        self.before = termios.tcgetattr(self.slave)
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "terminal", "top", "--seconds", "0.5", *words],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env={**os.environ, "TERM": "xterm-256color", **(env or {})},
        )

    def resize(self, columns: int, lines: int) -> None:
        size = struct.pack("HHHH", lines, columns, 0, 0)
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, size)
        self.columns, self.lines = columns, lines

    def press(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def read(self) -> str:
        """Return all that was written so far."""
        while select.select([self.master], [], [], 0.05)[0]:
            self.text += os.read(self.master, 65536).decode()
        return self.text

    @property
    def screen(self) -> list[str]:
        """The lines of the last whole picture, without what rules the terminal."""
        frames = self.read().split("\x1b[H")[1:]
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frames[-1]) if frames else ""
        return [line.rstrip() for line in text.replace("\r", "").split("\n")]

    def wait(self, text: str) -> list[str]:
        """Return the picture that has a text."""
        found = wait_until(
            lambda: (shown := self.screen) and text in "\n".join(shown) and shown,
            timeout=SECONDS,
            what=f"{text!r} on the screen",
        )
        assert len(found) <= self.lines
        assert max(map(len, found)) <= self.columns
        return list(found)

    def end(self) -> int:
        """Wait until it has ended; return its exit status."""

        def has_ended() -> bool:
            self.read()  # it waits for whoever reads
            return self.process.poll() is not None

        wait_until(has_ended, timeout=SECONDS, what="the end of top")
        self.read()
        return self.process.returncode

    def check_restored(self) -> None:
        assert termios.tcgetattr(self.slave) == self.before
        assert self.text.rindex("\x1b[?1049l") > self.text.rindex("\x1b[?1049h")
        assert self.text.rindex("\x1b[?25h") > self.text.rindex("\x1b[?25l")
        assert "Traceback" not in self.text

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def show() -> Iterator[Callable[..., Terminal]]:
    """Return a function that starts `marwright top` in a terminal."""
    terminals: list[Terminal] = []

    def start(*words: str, **values: Any) -> Terminal:
        terminals.append(Terminal(*words, **values))
        return terminals[-1]

    yield start
    for one in terminals:
        one.close()


def call(*words: str) -> Result:
    result = CliRunner().invoke(app, ["--seconds", "0.5", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_once_prints_one_table_and_ends(stand_in: StandIn) -> None:
    stand_in.shifted.add(("cnn", "2.0"))
    result = call("--once")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["state", "serving,", "ready"] in lines
    rows = [line for line in lines if line[:1] == ["cnn"]]
    assert [row[1] for row in rows] == ["2.0", "1.0"]  # the busiest first
    assert rows[0][-1] == "shifted"
    assert rows[1][2:5] == ["default", "ready", "1/1"]
    assert "\x1b" not in result.stdout


def test_once_as_json_prints_one_object(stand_in: StandIn) -> None:
    stand_in.failed["cnn", "2.0"] = "KeyError"
    found = json.loads(call("--once", "--json", "shop").stdout)
    assert found["problems"] == ["cnn 2.0: KeyError"]
    assert [row["version"] for row in found["versions"]] == ["2.0", "1.0"]
    row = found["versions"][0]
    assert row["requests"] == row["errors"] == pytest.approx(4, rel=0.5)  # 2 in half a second
    assert found["requests"] == pytest.approx(6, rel=0.5)


def test_output_that_is_no_terminal_is_one_table(stand_in: StandIn) -> None:
    result = call()
    assert (result.exit_code, result.stdout.count("workers")) == (0, 1)


def test_a_dumb_terminal_gets_one_table(stand_in: StandIn, show: Callable[..., Terminal]) -> None:
    terminal = show(env={"TERM": "dumb"})
    assert terminal.end() == 0
    assert "\x1b" not in terminal.text
    assert "5xx/s" in terminal.text


def test_json_is_a_line_a_look_until_ctrl_c(stand_in: StandIn) -> None:
    command = [sys.executable, "-c", PROGRAM, "pipe", "top", "--json", "--seconds", "0.5"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first, second = (json.loads(process.stdout.readline()) for _ in range(2))
        assert (first["requests"], first["server"]) == (0, "shop")
        assert second["requests"] > 0
        assert second["time"] > first["time"]
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130
        assert "Traceback" not in process.stderr.read()


def test_a_server_that_does_not_run_is_said_at_once() -> None:
    with pytest.raises(NoServerError, match="no server runs here"):
        call("--once")


def test_once_of_a_server_that_does_not_answer_is_status_1(tmp_path: Path) -> None:
    start = read_start_time(os.getpid()) or ""
    held = claim("shop")
    held.write(Record("shop", os.getpid(), start, "today", health_url="http://127.0.0.1:1"))
    try:
        result = call("--once")
    finally:
        held.release()
    assert result.exit_code == 1
    assert "no answer" in result.stdout
    assert "problem: its supervisor does not answer" in result.stderr


def test_names_do_not_rule_the_terminal(show: Callable[..., Terminal]) -> None:
    it = StandIn(name="a\x1b]0;title\x07\x9b31m\u202eb[bold]")
    it.failed["\x1b[2J", "1.0"] = "\x1b[5m"
    it.versions.append(("\x1b[2J", "1.0"))
    it.start()
    try:
        once = call("--once")
        terminal = show(size=(120, 24))
        terminal.wait("req/s")
        shown = "\n".join(terminal.wait("a\\x1b]0;ti"))
        terminal.press(b"q")
        assert terminal.end() == 0
    finally:
        it.end()
    for text in (once.stdout + once.stderr, terminal.text):
        assert not re.search("\x1b\\]|\x07|\x9b|\u202e|\x1b\\[2J|\x1b\\[5m", text)
    assert "\\x1b[2J 1.0: \\x1b[5m" in shown
    assert "[bold]" in once.stdout


def test_q_ends_it_and_leaves_the_terminal_as_it_was(
    stand_in: StandIn, show: Callable[..., Terminal]
) -> None:
    terminal = show()
    shown = terminal.wait("2.0")
    assert shown[0].startswith("shop  serving, ready")
    wait_until(lambda: " 0.0 requests/s" not in terminal.wait("requests/s")[1], timeout=SECONDS)
    assert "▁" in terminal.text
    assert termios.tcgetattr(terminal.slave) != terminal.before
    terminal.press(b"xyz\x1b[Zq")  # what has no meaning does nothing
    assert terminal.end() == 0
    terminal.check_restored()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_leaves_the_terminal_as_it_was(
    number: signal.Signals, status: int, stand_in: StandIn, show: Callable[..., Terminal]
) -> None:
    terminal = show()
    terminal.wait("2.0")
    if number == signal.SIGINT:
        terminal.press(b"\x03")
    else:
        terminal.process.send_signal(number)
    assert terminal.end() == status
    terminal.check_restored()


def test_200_versions_fit_and_can_be_paged_through(show: Callable[..., Terminal]) -> None:
    it = StandIn(200)
    it.start()
    try:
        terminal = show(size=(100, 20))
        first = terminal.wait("200.0")
        assert first[-1].endswith("versions: 1-16 of 200, +184 more")
        terminal.press(b"\x1b[6~")
        assert "versions: 17-32 of 200" in terminal.wait("17-32")[-1]
        terminal.press(b"\x1b[A\x1b[A\x1b[B")
        terminal.wait("16-31 of 200")
        terminal.press(b"\x1b[6~" * 20)
        terminal.wait("185-200 of 200")
        terminal.press(b"\x1b[H")
        terminal.wait("1-16 of 200")
        terminal.press(b"sss")
        shown = terminal.wait("sorts: name")
        assert shown[3].split()[:2] == ["cnn", "1.0"]
        terminal.resize(60, 10)
        terminal.wait("1-6 of 200")
        terminal.press(b"q")
        assert terminal.end() == 0
    finally:
        it.end()


@pytest.mark.parametrize("is_plain", [False, True])
def test_colours_are_for_who_wants_them(
    is_plain: bool, stand_in: StandIn, show: Callable[..., Terminal]
) -> None:
    stand_in.failed["cnn", "1.0"] = "KeyError"
    terminal = show(env={"NO_COLOR": "1"} if is_plain else {})
    assert "not ready" in "\n".join(terminal.wait("KeyError"))
    terminal.press(b"q")
    assert terminal.end() == 0
    assert bool(COLOR.search(terminal.text)) != is_plain


def test_a_server_that_goes_away_is_said_and_shown_again_when_it_is_back(
    stand_in: StandIn, show: Callable[..., Terminal]
) -> None:
    terminal = show()
    terminal.wait("2.0")
    stand_in.end()
    gone = "\n".join(terminal.wait("no server shop runs here"))
    assert "no answer" in gone
    assert "2.0" in gone  # what was seen last stays
    stand_in.start()
    terminal.wait("serving, ready")
    terminal.press(b"q")
    assert terminal.end() == 0
    terminal.check_restored()


def test_a_terminal_without_such_letters_gets_plain_bars(
    stand_in: StandIn, show: Callable[..., Terminal]
) -> None:
    terminal = show(env={"PYTHONIOENCODING": "ascii"})
    wait_until(lambda: "@" in terminal.wait("requests/s")[1], timeout=SECONDS)
    assert terminal.text.isascii()
    terminal.press(b"q")
    assert terminal.end() == 0


def test_a_terminal_that_is_closed_ends_it(
    stand_in: StandIn, show: Callable[..., Terminal]
) -> None:
    terminal = show()
    terminal.wait("2.0")
    master, terminal.master = terminal.master, os.dup(terminal.slave)
    os.close(master)
    assert terminal.process.wait(SECONDS) != 0


def test_a_narrow_screen_keeps_the_columns_that_matter_most() -> None:
    for width in range(20, 250):
        columns = _choose_columns(width)
        assert sum(column.width + 1 for column in columns) <= width
        assert columns[0].title == "model"
    assert [column.title for column in _choose_columns(35)] == ["model", "version", "req/s"]
    assert _choose_columns(200) == list(COLUMNS)


def test_keys_move_within_the_rows() -> None:
    view, rows = View(), list(range(10))
    assert view.choose(rows, 4) == [0, 1, 2, 3]
    view.press("page down")
    view.press("down")
    assert view.choose(rows, 4) == [5, 6, 7, 8]
    view.press("page down")
    assert view.choose(rows, 4) == [6, 7, 8, 9]
    assert len(view.choose(rows, -3)) == 1  # there is always one
    view.press("s")
    assert (view.first, view.order) == (0, 1)
    view.press("up")
    view.press("")
    assert (view.first, view.is_left) == (0, False)
    assert set(KEY_NAMES.values()) == {"up", "down", "home", "page up", "page down"}


@pytest.mark.slow
def test_it_shows_a_real_server_s_traffic(
    tmp_path: Path, store: Path, scan: bytes, show: Callable[..., Terminal]
) -> None:
    it = Served(tmp_path, "shop")
    it.write(store=str(store), models=["cnn.mar"])
    try:
        it.start()
        it.wait()
        terminal = show()
        terminal.wait("cnn")
        with Client(Endpoint.read(it.endpoint_file)) as client:
            deadline = time.monotonic() + SECONDS
            while not re.search(
                r"cnn +1\.0 .* [1-9][0-9.]+ +0\.0 .* ms", "\n".join(terminal.screen)
            ):
                client.predict("cnn", scan)
                assert time.monotonic() < deadline, terminal.screen
        terminal.press(b"q")
        assert terminal.end() == 0
        terminal.check_restored()
    finally:
        it.end()
