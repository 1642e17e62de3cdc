"""docs/operations.md: what it lets a user copy works."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from marwright.archive import Run
from marwright.client import Client, Endpoint
from marwright.errors import InputRejectedError, ModelNotFoundError
from marwright.server.certificate import make_certificate
from marwright.server.deployment import Deployment
from marwright.server.nginx import check_configuration, find_nginx
from marwright.server.ports import is_free
from marwright.server.registry import find_endpoint, list_records
from marwright.server.supervision.inspection import stop_server

TOKEN = "one-clients-token"
KEY = "the-text-of-gateway_key"
needs_nginx = pytest.mark.skipif(
    shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None, reason="needs nginx"
)


def find_blocks(root: Path, language: str) -> list[str]:
    text = (root / "docs/operations.md").read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def find_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def put(text: str, changes: Mapping[str, str]) -> str:
    """Return a text with other words in place of some that it must have."""
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


def wait_for(question: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not question():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def make_folder(folder: Path, store: Path, deployment: str) -> Path:
    """Make a working folder with all the files that the page's deployments name."""
    (folder / "model_store").symlink_to(store)
    files = make_certificate(folder)
    files.certificate.rename(folder / "server.pem")
    files.key.rename(folder / "server.key")
    for name, text in (("tokens", TOKEN), ("gateway_key", KEY)):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o600)
    (folder / "deploy.yaml").write_text(f"{deployment}ports: free\n", encoding="utf-8")
    return folder


def serve(folder: Path) -> Iterator[Path]:
    """Run `marwright serve --detach` there, and stop what it started."""
    with pytest.MonkeyPatch.context() as patch, (folder / "errors").open("w") as errors:
        patch.setenv("XDG_RUNTIME_DIR", str(folder / "runtime"))
        try:
            command = [sys.executable, "-m", "marwright", "serve", "--detach"]
            done = subprocess.run(command, cwd=folder, stdout=errors, stderr=errors, timeout=200)
            assert done.returncode == 0, (folder / "errors").read_text()
            yield folder
        finally:
            for record in list_records().values():
                stop_server(record, timeout=60)


@pytest.fixture(scope="module")
def served(root: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a server as the page has it behind an nginx of the user's own."""
    folder = tmp_path_factory.mktemp("served")
    yield from serve(make_folder(folder, store, find_blocks(root, "yaml")[1]))


@dataclass(frozen=True)
class Front:
    """What a client elsewhere knows."""

    url: str
    certificate: Path

    def ask(self, token: str, path: str) -> int:
        with requests.Session() as session:
            session.trust_env = False
            headers = {"Authorization": f"Bearer {token}"}
            verify = str(self.certificate)
            return session.get(
                self.url + path, headers=headers, verify=verify, timeout=30
            ).status_code


@pytest.fixture
def front(root: Path, served: Path, tmp_path: Path) -> Iterator[Front]:
    """The page's nginx, in front of the server."""
    port = find_port()
    included = put(
        find_blocks(root, "nginx")[0],
        {
            "listen 8443 ssl": f"listen 127.0.0.1:{port} ssl",
            "/etc/nginx/server": f"{served}/server",
            "127.0.0.1:8080": find_endpoint().inference_url.removeprefix("http://"),
        },
    )
    names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = "\n".join(f"{name}_temp_path {name};" for name in names)
    path = tmp_path / "nginx.conf"
    path.write_text(
        f"daemon off; worker_processes 1; pid nginx.pid; error_log error.log;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{folders}\n{included}\n}}\n",
        encoding="utf-8",
    )
    if os.geteuid() == 0:
        path.write_text(f"user root;\n{path.read_text()}", encoding="utf-8")
    check_configuration(path)
    command = [str(find_nginx()), "-c", str(path), "-p", f"{tmp_path}/"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: not is_free(port))
            yield Front(f"https://localhost:{port}", served / "server.pem")
        finally:
            process.terminate()


def enter(folder: Path, command: str) -> str:
    """Run what the page prints; return what that prints."""
    script = f'marwright() {{ {shlex.quote(sys.executable)} -m marwright "$@"; }}\n{command}'
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_nginx
@pytest.mark.server
def test_the_nginx_shown_lets_the_right_ones_through_to_the_right_places(
    front: Front, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    endpoint = Endpoint(
        front.url, "", gateway_token=tmp_path / "token", certificate=front.certificate
    )
    with Client(endpoint) as client:
        assert "7" in client.predict("cnn", run.samples[7].path).json()
        assert client.health().healthy
        with pytest.raises(InputRejectedError, match="expected a PNG"):
            client.predict("cnn", b"no picture")
    assert front.ask(TOKEN, "/ping") == 200
    assert front.ask(TOKEN.upper(), "/ping") == front.ask(f"{TOKEN}2", "/ping") == 401
    for path in ("/models", "/workflows", "/api-description", "/ping/models", "/x/predictions/cnn"):
        assert front.ask(TOKEN, path) == 404


@pytest.mark.server
def test_refused_inputs_are_found_in_the_log_as_the_page_says(root: Path, served: Path) -> None:
    text = (root / "docs/operations.md").read_text("utf-8")
    warnings, of_model, of_request, _ = re.findall(r"^    (marwright logs .*)", text, re.MULTILINE)
    with Client(find_endpoint()) as client:
        with pytest.raises(InputRejectedError):
            client.predict("cnn", b"no picture")
        with pytest.raises(ModelNotFoundError):
            client.predict("absent", b"")
    wait_for(lambda: "/predictions/absent" in enter(served, warnings))
    assert "/predictions/cnn" not in enter(served, warnings)
    *_, line = enter(served, of_model).splitlines()  # another test may have left some before
    assert '"status": 415' in line
    assert " info " in line
    (request,) = re.findall(r'"request_id": "([^"]+)"', line)
    (shown,) = re.findall(r"--request (\S+)", of_request)
    assert enter(served, of_request.replace(shown, request)).splitlines() == [line]


@pytest.mark.server
def test_the_logs_are_read_by_their_names_when_there_is_no_server(
    root: Path, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (root / "docs/operations.md").read_text("utf-8")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    commands = re.findall(r"`(marwright logs --file .*?)`", text)
    assert len(commands) == 2
    server, supervisor = (enter(served, command) for command in commands)
    assert "cnn 1.0" in server
    assert "serving clinic" in supervisor


def test_the_options_shown_are_those_of_serve(
    root: Path, marwright: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    text = (root / "docs/operations.md").read_text("utf-8")
    (table,) = re.findall(r"\| option of `serve` \| what \|\n(.*?)\n\n", text, re.DOTALL)
    options = re.findall(r"`(--[a-z-]+)", table)
    assert len(options) > 5
    shown = re.findall(r"^  (--[a-z-]+)", marwright("serve", "--help").stdout, re.MULTILINE)
    assert set(options) <= set(shown)


@needs_nginx
def test_the_gateway_shown_can_be_used(root: Path, store: Path, tmp_path: Path) -> None:
    make_folder(tmp_path, store, find_blocks(root, "yaml")[0])
    deployment = Deployment.read(tmp_path / "deploy.yaml", starting=True)
    assert deployment.gateway is not None
    assert deployment.gateway.tokens == tmp_path / "tokens"


@needs_nginx
@pytest.mark.slow
@pytest.mark.server
def test_the_gateway_shown_asks_for_a_clients_token(
    root: Path, store: Path, tmp_path: Path, scan: bytes
) -> None:
    port = find_port()
    shown = find_blocks(root, "yaml")[0]
    make_folder(tmp_path, store, put(shown, {"models.example.org": "localhost", "8443": str(port)}))
    for _ in serve(tmp_path):
        front = Front(f"https://localhost:{port}", tmp_path / "server.pem")
        assert front.ask(TOKEN, "/ping") == 200
        assert front.ask("another", "/ping") == 401
        assert front.ask(TOKEN, "/models") == 404
        with Client(find_endpoint("clinic")) as client:
            assert client.predict("cnn", scan).status == 200
        assert (tmp_path / "logs/replica-1/server.log").exists()
