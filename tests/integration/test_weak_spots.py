"""Weak spots of TorchServe 0.12.0, each seen on the plain server and closed on ours, or said to be.

docs/security.md tells the same in words. Plain is what `torchserve` starts by itself; `opened` is
one with run-time registration, which most that register models have to turn on.
"""

from __future__ import annotations

import ast
import http.server
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import requests

from marwright.client.grpc_protocol import read_protocol
from marwright.client.tokens import TokenFile
from marwright.errors import ArchiveError
from marwright.server import Ports, TorchServe

pytestmark = pytest.mark.server

MANIFEST = {
    "runtime": "python",
    "model": {"modelName": "spy", "handler": "spy.py", "modelVersion": "1.0"},
    "archiverVersion": "0.12.0",
}
SPY = """\
import os
import torch

def handle(data, context):
    return data and [look(bytes(item.get("body") or item.get("data"))) for item in data]

def look(question):
    if question == b"tensor":
        return torch.ones(1)
    with open(f"/proc/{os.getppid()}/environ", "rb") as stream:
        server = stream.read().decode(errors="replace")
    return {"worker": dict(os.environ), "server": server}
"""
SECRET = "correct horse battery staple"
SECRETS = dict.fromkeys(("API_KEY", "DB_PASSWORD"), SECRET)
SETTINGS = {"inference_address", "management_address", "metrics_address"}
GRPC_PORTS = {"grpc_inference_port", "grpc_management_port"}


@dataclass
class Side:
    """One running server, as somebody with its tokens sees it."""

    addresses: dict[str, str]
    key_file: Path
    store: Path
    folder: Path
    """Where it writes."""
    supervisor_key: Path | None = None

    def ask(
        self, api: str, path: str, method: str = "GET", *, key: bool = False, **options: Any
    ) -> requests.Response:
        """Send a request with the API's token; `key` adds what ours wants to change models."""
        purpose: Any = "inference" if api == "inference" else "management"
        headers = {"Authorization": f"Bearer {TokenFile(self.key_file).read(purpose)}"}
        if key and self.supervisor_key is not None:
            headers["X-Marwright-Key"] = self.supervisor_key.read_text("utf-8").strip()
        headers |= options.pop("headers", {})
        with requests.Session() as session:
            session.trust_env = False
            url = self.addresses[f"{api}_address"] + path
            return session.request(method, url, headers=headers, timeout=60, **options)


def write_archive(path: Path, **members: bytes) -> Path:
    """Write an archive of the spying handler; it names what it is asked for."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(MANIFEST))
        archive.writestr("spy.py", SPY)
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@contextmanager
def boot_plain(*, models: str = "", **properties: str) -> Iterator[Side]:
    """Run `torchserve` with its own defaults, at free ports and in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="plain-", dir="/tmp") as name:
        folder = Path(name)
        (folder / "store").mkdir()
        write_archive(folder / "store/spy.mar")
        ports = Ports.find_free().to_properties()
        lines = [f"{key}={value}" for key, value in {**ports, **properties}.items()]
        (folder / "config.properties").write_text("\n".join(lines))
        command = [str(Path(sys.executable).with_name("torchserve")), "--foreground", "--ncs"]
        command += ["--ts-config", "config.properties", "--model-store", "store"]
        with (folder / "output.log").open("wb") as output:
            process = subprocess.Popen(
                [*command, *(["--models", models] if models else [])],
                cwd=folder,
                env={**os.environ, "TMPDIR": name, "TEMP": name, **SECRETS},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        side = Side(ports, folder / "key_file.json", folder / "store", folder)
        try:
            wait_until(lambda: b"Model server started" in (folder / "output.log").read_bytes())
            if models:
                wait_until(lambda: "READY" in side.ask("management", "/models/spy").text)
            yield side
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)
            wait_until(lambda: not is_alive(process.pid))


def is_alive(group: int) -> bool:
    """Return whether a process group has members left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(is_true: Callable[[], bool], timeout: float = 90.0) -> None:
    deadline = time.monotonic() + timeout
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def plain() -> Iterator[Side]:
    with boot_plain() as side:
        yield side


@pytest.fixture(scope="module")
def opened(elsewhere: Elsewhere) -> Iterator[Side]:
    """Models may be registered at run time, from one address alone."""
    urls = f"http://127.0.0.1:{elsewhere.port}/allowed/.*"
    with boot_plain(
        models="spy.mar",
        enable_model_api="true",
        allowed_urls=urls,
        blacklist_env_vars=".*PASSWORD.*",
        default_workers_per_model="1",
    ) as side:
        yield side


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    store = tmp_path_factory.mktemp("store")
    write_archive(store / "spy.mar")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        with TorchServe(store, models=["spy.mar"]) as server:
            endpoint = server.endpoint
            assert endpoint.key_file is not None
            yield Side(
                {
                    "inference_address": endpoint.inference_url,
                    "management_address": endpoint.management_url,
                    "metrics_address": endpoint.metrics_url,
                    "grpc_inference_port": endpoint.grpc_inference.rpartition(":")[2],
                    "grpc_management_port": endpoint.grpc_management.rpartition(":")[2],
                },
                endpoint.key_file,
                store,
                server.run_folder,
                endpoint.supervisor_key,
            )


class Elsewhere(http.server.ThreadingHTTPServer):
    """A web server that somebody else runs; it redirects from /allowed to /other."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.port = self.server_address[1]
        self.asked: list[str] = []


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Elsewhere)
        self.server.asked.append(self.path)
        if self.path.startswith("/allowed/"):
            self.send_response(302)
            place = f"http://localhost:{self.server.port}/other/{Path(self.path).name}"
            self.send_header("Location", place)
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"anything at all")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Elsewhere]:
    with Elsewhere() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def register_url(side: Side, url: str | Path, **options: Any) -> requests.Response:
    parameters = {"url": str(url), "model_name": "planted", "initial_workers": "0"}
    return side.ask("management", "/models", "POST", params=parameters, **options)


# 1. POST /workflows is not covered by enable_model_api.


def test_workflows_put_files_into_the_plain_store_with_the_model_api_off(
    plain: Side, elsewhere: Elsewhere
) -> None:
    refused = register_url(plain, f"http://127.0.0.1:{elsewhere.port}/other/planted.mar")
    assert refused.status_code == 405
    url = f"http://127.0.0.1:{elsewhere.port}/other/../planted.mar"
    answer = plain.ask("management", "/workflows", "POST", params={"url": url})
    assert "Relative path is not allowed" in answer.text  # it says so once it has the file
    assert (plain.store / "planted.mar").read_bytes() == b"anything at all"


@pytest.mark.parametrize("key", [False, True])
@pytest.mark.parametrize(
    "path", ["/workflows", "/workflows/planted", "//workflows", "/%77orkflows"]
)
def test_there_are_no_workflows_on_ours(
    ours: Side, elsewhere: Elsewhere, path: str, key: bool
) -> None:
    before = len(elsewhere.asked)
    for method in ("GET", "POST", "PUT", "DELETE"):
        url = f"http://127.0.0.1:{elsewhere.port}/other/../planted.mar"
        answer = ours.ask("management", path, method, params={"url": url}, key=key)
        assert answer.status_code == 404
    assert len(elsewhere.asked) == before
    assert ours.ask("inference", "/wfpredict/planted", "POST", data=b"1").status_code == 404


# 2. allowed_urls does not cover paths: a folder of the machine loads as a model.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder outside the store that somebody may write to."""
    (tmp_path / "MAR-INF").mkdir()
    (tmp_path / "MAR-INF/MANIFEST.json").write_text(json.dumps(MANIFEST))
    (tmp_path / "spy.py").write_text(SPY)
    return tmp_path


def test_any_folder_loads_as_a_model_on_plain(opened: Side, folder: Path) -> None:
    assert register_url(opened, folder).status_code == 200
    assert opened.ask("management", "/models/planted", "DELETE").status_code == 200


def test_a_folder_does_not_load_on_ours_with_the_token_alone(ours: Side, folder: Path) -> None:
    assert register_url(ours, folder).status_code == 405
    assert ours.ask("management", "/models/planted").status_code == 404


def call_grpc(side: Side, method: str, **fields: Any) -> str:
    """Call gRPC's management with the token alone; return what it says, or the error's code."""
    found = read_protocol().find(method)
    token = TokenFile(side.key_file).read("management")
    with grpc.insecure_channel(f"127.0.0.1:{side.addresses['grpc_management_port']}") as channel:
        call = channel.unary_unary(
            found.path,
            request_serializer=found.request.SerializeToString,
            response_deserializer=found.response.FromString,
        )
        try:
            metadata = (("authorization", f"Bearer {token}"),)
            return str(call(found.request(**fields), metadata=metadata, timeout=60))
        except grpc.RpcError as exc:
            return str(exc.code())


def test_any_folder_loads_as_a_model_on_plain_by_grpc(
    plain: Side, opened: Side, folder: Path
) -> None:
    fields = {"url": str(folder), "model_name": "by_grpc"}
    assert call_grpc(plain, "RegisterModel", **fields) == "StatusCode.PERMISSION_DENIED"
    assert not call_grpc(opened, "RegisterModel", **fields).startswith("StatusCode")
    assert "by_grpc" in opened.ask("management", "/models").text


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("RegisterModel", {"model_name": "by_grpc"}),
        ("ScaleWorker", {"model_name": "spy", "min_worker": 1}),
        ("SetDefault", {"model_name": "spy", "model_version": "1.0"}),
        ("UnregisterModel", {"model_name": "by_grpc"}),
    ],
)
def test_ours_changes_no_model_by_grpc_with_the_token_alone(
    ours: Side, folder: Path, method: str, fields: dict[str, Any]
) -> None:
    if method == "RegisterModel":
        fields = {**fields, "url": str(folder)}
    assert call_grpc(ours, method, **fields) in (
        "StatusCode.PERMISSION_DENIED",
        "StatusCode.UNAUTHENTICATED",
    )
    assert "by_grpc" not in ours.ask("management", "/models").text
    assert "spy" in call_grpc(ours, "ListModels", limit=100)


# 3. Tokens of 48 bits in the working folder; metrics without any.


def test_plain_tokens_have_48_bits_and_lie_where_it_was_started(plain: Side) -> None:
    assert len(TokenFile(plain.key_file).read("management")) * 6 == 48
    assert plain.key_file.parent == plain.folder


def test_ours_wants_a_long_key_too_before_models_change(ours: Side) -> None:
    assert ours.supervisor_key is not None
    assert len(ours.supervisor_key.read_text("utf-8").strip()) * 6 >= 128
    for file in (ours.supervisor_key, ours.key_file):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        # Nobody else came near while it was written.
        assert stat.S_IMODE(ours.folder.stat().st_mode) == 0o700
        assert file.is_relative_to(ours.folder)
    headers = {"X-Marwright-Key": "A" * 43}
    for method, path in (
        ("POST", "/models?url=spy.mar"),
        ("PUT", "/models/spy?min_worker=0"),
        ("PUT", "/models/spy/1.0/set-default"),
        ("DELETE", "/models/spy"),
    ):
        assert ours.ask("management", path, method).status_code == 405
        assert ours.ask("management", path, method, headers=headers).status_code == 405
    assert "READY" in ours.ask("management", "/models/spy").text


@pytest.mark.parametrize("name", ["plain", "ours"])
def test_metrics_want_no_token_on_either(name: str, request: pytest.FixtureRequest) -> None:
    side: Side = request.getfixturevalue(name)
    answer = requests.get(side.addresses["metrics_address"] + "/metrics", timeout=30)
    assert answer.status_code == 200  # not closed: only this machine reaches it


@pytest.mark.parametrize("name", ["plain", "ours"])
def test_only_this_machine_reaches_either(name: str, request: pytest.FixtureRequest) -> None:
    side: Side = request.getfixturevalue(name)
    own = {int(side.addresses[key].rpartition(":")[2]) for key in (*SETTINGS, *GRPC_PORTS)}
    wait_until(lambda: own <= {address.port for address in find_listening()})
    addresses = {address.ip for address in find_listening()}
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def find_listening() -> list[Any]:
    """Return where this process' children, and theirs, listen."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended meanwhile, and listens no more
            found += process.net_connections("inet")
    return [item.laddr for item in found if item.status == psutil.CONN_LISTEN]


# 4. Unpacking has no limit of size.


def write_bomb(path: Path, megabytes: int) -> Path:
    """Write an archive with so many megabytes of zeros, a thousandth as large."""
    write_archive(path)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("weights.pt", "w", force_zip64=True) as member,
    ):
        for _ in range(megabytes // 16):
            member.write(bytes(16 << 20))
    return path


def test_plain_unpacks_whatever_there_is(opened: Side) -> None:
    bomb = write_bomb(opened.store / "bomb.mar", 64)
    assert bomb.stat().st_size < 200_000
    assert register_url(opened, bomb.name).status_code == 200
    (unpacked,) = opened.folder.rglob("weights.pt")
    assert unpacked.stat().st_size == 64 << 20
    assert opened.ask("management", "/models/planted", "DELETE").status_code == 200


def test_ours_refuses_what_unpacks_to_hundreds_of_times_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What any archive may unpack to is 1 GiB, which would take a minute to write.
    monkeypatch.setattr("marwright.archive.limits.FREE_BYTES", 1 << 20)
    write_bomb(tmp_path / "bomb.mar", 64)
    with pytest.raises(ArchiveError, match="S110"), TorchServe(tmp_path, models=["bomb.mar"]):
        pass


def test_both_refuse_a_name_that_leads_out(opened: Side, tmp_path: Path) -> None:
    write_archive(opened.store / "slip.mar", **{"../../../slipped": b"x"})
    assert register_url(opened, "slip.mar").status_code >= 400  # since 0.9.0
    assert not list(opened.folder.rglob("slipped"))
    slip = write_archive(tmp_path / "slip.mar", **{"../../../slipped": b"x"})
    with pytest.raises(ArchiveError, match="S101"), TorchServe(tmp_path, models=[slip.name]):
        pass


# 5. Pickles, of models and of answers.


@pytest.mark.parametrize("name", ["opened", "ours"])
def test_a_tensor_is_answered_as_a_pickle(name: str, request: pytest.FixtureRequest) -> None:
    side: Side = request.getfixturevalue(name)
    answer = side.ask("inference", "/predictions/spy", "POST", data=b"tensor")
    assert b"data.pkl" in answer.content  # not closed for other people's handlers


def test_our_handlers_load_no_pickle_of_more_than_tensors(root: Path) -> None:
    calls = [
        (path.name, node)
        for path in (root / "handlers").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.loads")
    ]
    assert calls
    for name, call in calls:
        arguments = {item.arg: ast.unparse(item.value) for item in call.keywords}
        assert arguments.get("weights_only") == "True", name


# 6. Downloads follow redirects, past allowed_urls, and nothing is compared with anything.


def test_a_redirect_leads_plain_past_its_allowed_urls(opened: Side, elsewhere: Elsewhere) -> None:
    direct = f"http://localhost:{elsewhere.port}/other/direct.mar"
    assert "does not match any allowed URL" in register_url(opened, direct).text
    allowed = f"http://127.0.0.1:{elsewhere.port}/allowed/turned.mar"
    register_url(opened, allowed)
    assert "/other/turned.mar" in elsewhere.asked
    assert "/other/direct.mar" not in elsewhere.asked


@pytest.mark.parametrize("key", [False, True])
@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:{}/other/fetched.mar", "HTTP://localhost:{}/fetched.mar", "file://{}"]
)
def test_ours_fetches_nothing(
    ours: Side, elsewhere: Elsewhere, tmp_path: Path, url: str, key: bool
) -> None:
    place = tmp_path / "fetched.mar" if url.startswith("file") else elsewhere.port
    write_archive(tmp_path / "fetched.mar")
    before = len(elsewhere.asked)
    status = register_url(ours, url.format(place), key=key).status_code
    # With the key it gets past the door: then it is TorchServe that refuses the address.
    assert 400 <= status < 500
    assert (status == 405) is not key
    assert len(elsewhere.asked) == before
    assert not list(ours.folder.rglob("fetched.mar"))
    assert not list(ours.store.rglob("fetched.mar"))


# 7. "/token" anywhere in a management request makes it one for a token.


REFERER = {"Referer": "https://site.example/tokens"}


def test_a_referer_that_holds_token_breaks_a_call_on_plain(plain: Side) -> None:
    assert plain.ask("management", "/models").status_code == 200
    assert plain.ask("management", "/models", headers=REFERER).status_code == 400


@pytest.mark.parametrize("path", ["/models", "/models/spy", "/models/spy?customized=/token"])
def test_ours_knows_a_request_for_a_token_by_its_path_alone(ours: Side, path: str) -> None:
    answer = ours.ask("management", path, headers=REFERER)
    assert answer.status_code == 200
    assert "spy" in answer.text


# 8. A model's code is anybody's Python; on plain it sees every environment variable.


def look(side: Side) -> dict[str, Any]:
    answer = side.ask("inference", "/predictions/spy", "POST", data=b"environment")
    found: dict[str, Any] = answer.json()
    return found


def test_a_models_code_sees_the_secrets_of_plain(opened: Side) -> None:
    found = look(opened)
    assert found["worker"]["API_KEY"] == SECRET
    # The pattern hides this one from the worker; its parent's environment is there to be read.
    assert "DB_PASSWORD" not in found["worker"]
    assert f"DB_PASSWORD={SECRET}" in found["server"]


def test_a_models_code_sees_no_secret_of_ours(ours: Side) -> None:
    found = look(ours)
    assert "PATH" in found["worker"]
    assert not {"API_KEY", "DB_PASSWORD"} & set(found["worker"])
    assert SECRET not in json.dumps(found)  # nor in the environment of the worker's parent
