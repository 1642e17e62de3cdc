"""A server that is killed and comes back on its ports, with other tokens in the same file."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from marwright.client import Endpoint, Retries
from marwright.errors import ConnectionFailedError, TokenRejectedError

SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        known = self.headers["Authorization"] == f"Bearer {sys.argv[2]}"
        problem = {"code": 400, "type": "InvalidKeyException", "message": "expired"}
        body = sys.argv[2].encode() if known else json.dumps(problem).encode()
        self.send_response(200 if known else 400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass

ThreadingHTTPServer.daemon_threads = True
server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@pytest.fixture
def boot() -> Iterator[Callable[[int, str], Any]]:
    """Return a function that starts a server with one token; it tells its port."""
    processes: list[subprocess.Popen[str]] = []

    def start(port: int, token: str) -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, "-c", SERVER, str(port), token]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_client_goes_on_after_its_server_was_killed_and_started_again(
    boot: Any, connect: Callable[..., Any], write_keys: Callable[..., Path]
) -> None:
    process, port = boot(0, "first")
    url = f"http://127.0.0.1:{port}"
    endpoint = Endpoint(url, url, key_file=write_keys(API="a", inference="first"))
    client = connect(endpoint, retries=Retries(tries=2, first=0.001))
    assert len(list(client.predict_many("cnn", [b""] * 20))) == 20  # several kept connections
    process.kill()
    process.wait()
    with pytest.raises(ConnectionFailedError):
        client.predict("cnn", b"")
    boot(port, "second")
    write_keys(API="a", inference="second")
    outcomes = client.predict_many("cnn", [b""] * 20)
    assert {answer.body for _, answer in outcomes} == {b"second"}


def test_a_default_client_waits_out_the_restart_of_a_server_that_a_supervisor_keeps(
    boot: Any, connect: Callable[..., Any], write_keys: Callable[..., Path]
) -> None:
    process, port = boot(0, "first")
    url = f"http://127.0.0.1:{port}"
    key_file = write_keys(API="a", inference="first")
    client = connect(Endpoint(url, url, key_file=key_file, health_url="http://127.0.0.1:9"))
    assert client.predict("cnn", b"").body == b"first"
    process.kill()
    process.wait()
    key_file.unlink()

    def come_back() -> None:
        time.sleep(1)  # longer than a client without a supervisor waits
        write_keys(API="a", inference="second")
        time.sleep(0.5)
        boot(port, "second")

    thread = threading.Thread(target=come_back)
    thread.start()
    try:
        assert client.predict("cnn", b"").body == b"second"
    finally:
        thread.join()


def test_a_server_that_does_not_come_back_is_said_to_be_away_or_gone(
    boot: Any, connect: Callable[..., Any], write_keys: Callable[..., Path]
) -> None:
    process, port = boot(0, "first")
    process.kill()
    process.wait()
    url = f"http://127.0.0.1:{port}"
    key_file = write_keys(API="a", inference="first", management="m")
    endpoint = Endpoint(url, url, key_file=key_file, health_url="http://127.0.0.1:9")
    client = connect(endpoint, retries=Retries(tries=1, away=0.3))
    with pytest.raises(ConnectionFailedError, match="started again, or has gone"):
        client.predict("cnn", b"")
    key_file.unlink()
    with pytest.raises(TokenRejectedError, match="is starting or has stopped"):
        client.predict("cnn", b"")


def test_who_manages_a_server_hears_at_once_that_it_is_away(
    boot: Any, connect: Callable[..., Any]
) -> None:
    process, port = boot(0, "first")
    process.kill()
    process.wait()
    url = f"http://127.0.0.1:{port}"
    endpoint = Endpoint(url, url, health_url="http://127.0.0.1:9")
    client = connect(endpoint, retries=Retries(tries=1, away=3600), timeout=3600)
    with pytest.raises(ConnectionFailedError):
        client.models.list()


def test_patient_retries_outlast_a_restart(
    boot: Any, connect: Callable[..., Any], write_keys: Callable[..., Path]
) -> None:
    process, port = boot(0, "first")
    url = f"http://127.0.0.1:{port}"
    endpoint = Endpoint(url, url, key_file=write_keys(API="a", inference="first"))
    client = connect(endpoint, timeout=60, retries=Retries(tries=1000, longest=0.2))
    answers = []
    for number, (_, answer) in enumerate(client.predict_many("cnn", [b""] * 200, in_flight=4)):
        answers.append(answer.body)
        if number == 50:
            process.kill()
            process.wait()
            write_keys(API="a", inference="second")
            boot(port, "second")
    assert len(answers) == 200
    assert set(answers) == {b"first", b"second"}
