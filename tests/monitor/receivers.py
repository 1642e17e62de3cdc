"""Who is told of alerts in tests: a webhook, and a mail server."""

from __future__ import annotations

import email.policy
import json
import threading
import time
from datetime import datetime
from email import message_from_bytes
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, Envelope, Session

from marwright.server.ports import Ports

USER, PASSWORD = "alerts", "a-secret-of-the-mail-server"


def read_time(text: str) -> float:
    """Return seconds since the epoch; Go writes more digits than Python 3.10 reads."""
    whole, _, fraction = text.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")


class Receiver:
    """A webhook: it keeps every alert that comes, with the moment."""

    def __init__(self) -> None:
        self.alerts: list[tuple[float, dict[str, Any]]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                now = time.monotonic()
                receiver.alerts += [(now, alert) for alert in body["alerts"]]
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/a-secret"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def find(self, name: str, since: float, status: str = "firing") -> tuple[float, Any] | None:
        """Return an alert that has begun since then, and when it came."""
        return next(
            (
                (moment, alert)
                for moment, alert in list(self.alerts)
                if time.monotonic() - (time.time() - read_time(alert["startsAt"])) >= since
                and alert["labels"]["alertname"] == name
                and alert["status"] == status
            ),
            None,
        )

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Mailbox:
    """A mail server that keeps what comes from who has signed in."""

    def __init__(self) -> None:
        self.mails: list[EmailMessage] = []
        self._controller = Controller(
            self,
            hostname="127.0.0.1",
            port=Ports.find_free().inference,
            auth_require_tls=False,
            auth_exclude_mechanism=["LOGIN"],  # it asks for "User Name", which Go's does not answer
            authenticator=self._sign_in,
        )
        self._controller.start()

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "server": f"127.0.0.1:{self._controller.port}",
            "sender": "marwright@example.org",
            "to": "team@example.org",
            "user": USER,
            "password": "password",
            "tls": False,
        }

    async def handle_DATA(self, server: object, session: Session, envelope: Envelope) -> str:
        if not session.authenticated:
            return "530 5.7.0 Authentication required"
        assert isinstance(envelope.content, bytes)
        mail = message_from_bytes(envelope.content, policy=email.policy.default)
        assert isinstance(mail, EmailMessage)
        self.mails.append(mail)
        return "250 OK"

    def find(self, name: str) -> EmailMessage | None:
        return next((mail for mail in list(self.mails) if name in mail["Subject"]), None)

    def close(self) -> None:
        self._controller.stop()

    def _sign_in(self, server: object, session: object, mail: object, way: str, given: Any) -> Any:
        asked = (given.login, given.password)
        return AuthResult(success=asked == (USER.encode(), PASSWORD.encode()))
