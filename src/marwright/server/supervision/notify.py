"""Telling systemd how a service of Type=notify is: sd_notify(3), without its library."""

from __future__ import annotations

import contextlib
import os
import socket
import time

__all__ = ["notify_systemd"]


def notify_systemd(state: str) -> None:
    """Tell systemd, where it started us and listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if state.startswith("RELOADING"):
        state += f"\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        link.connect("\0" + address[1:] if address[0] == "@" else address)
        link.sendall(state.encode())
