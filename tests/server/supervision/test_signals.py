from __future__ import annotations

import os
import queue
import signal
import socket
from pathlib import Path

import pytest

from marwright.server.supervision.notify import notify_systemd
from marwright.server.supervision.signals import ignore_signals, take_signals


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_signals_become_wishes_in_their_order_and_only_in_the_block() -> None:
    wishes: queue.SimpleQueue[str] = queue.SimpleQueue()
    before = signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGUSR1)
    with take_signals(wishes):
        send(signal.SIGHUP)
        send(signal.SIGUSR1)
        assert [wishes.get(timeout=5), wishes.get(timeout=5)] == ["reload", "restart"]
    assert (signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGUSR1)) == before


def test_a_terminal_that_was_closed_ends_what_was_in_its_foreground(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter([True, False])
    monkeypatch.setattr("marwright.server.supervision.signals._has_terminal", lambda: next(answers))
    wishes: queue.SimpleQueue[str] = queue.SimpleQueue()
    with pytest.raises(SystemExit), take_signals(wishes):
        send(signal.SIGHUP)
    assert wishes.empty()


def test_nothing_interrupts_the_stopping() -> None:
    with ignore_signals():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            send(number)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("abstract", [True, False])
def test_systemd_is_told_where_it_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    name = f"@marwright-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name[1:] if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify_systemd("READY=1")
        notify_systemd("RELOADING=1")
        assert listener.recv(100) == b"READY=1"
        assert listener.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")


@pytest.mark.parametrize("name", [None, "", "vsock:2:1", "/nowhere/notify"])
def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if name is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", name)
    notify_systemd("READY=1")
