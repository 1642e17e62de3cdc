"""The door in front of a real TorchServe, over bare sockets: no client mends what it is sent."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import wait_until

from marwright.server.frontend import FrontendSettings, write_classes
from marwright.server.java import find_java
from marwright.server.log import LogLine, read_log
from marwright.server.ports import Ports

pytestmark = pytest.mark.server

HANDLER = """
import sys, time
from ts.handler_utils.utils import send_intermediate_predict_response
class Handler:
    def initialize(self, context):
        pass
    def handle(self, data, context):
        answers = []
        for index, row in enumerate(data):
            body = bytes(row.get("body") or b"").decode("utf-8", "surrogateescape")
            word, _, rest = body.partition(" ")
            if word == "wait":
                time.sleep(float(rest))
            if word == "stream":
                for part in rest.split():
                    ids = context.request_ids
                    send_intermediate_predict_response([part], ids, "part", 200, context)
            if word == "status":
                context.set_response_status(int(rest), "as asked", index)
            if word == "say":
                sys.stdout.buffer.write(rest.encode("utf-8", "surrogateescape") + b"\\n")
                sys.stdout.buffer.flush()
            answers.append(body.encode("utf-8", "surrogateescape"))
        return answers
"""
KEY = "a-key_of-43-letters"
DEADLINE = 60.0


def write_archive(path: Path, name: str) -> None:
    model = {"modelName": name, "handler": "plain.py"}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps({"runtime": "python", "model": model}))
        archive.writestr("plain.py", HANDLER)


@dataclass(frozen=True)
class Answer:
    """One answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def type(self) -> str:
        return str(json.loads(self.body)["type"])


class Connection:
    """One connection; its requests are sent as they are written."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
        self.stream = self.socket.makefile("rb")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self, *, head: bool = False) -> Answer:
        """Return the next answer."""
        first = self.stream.readline()
        assert first.startswith(b"HTTP/1.1 "), first
        headers = {}
        while line := self.stream.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        status = int(first.split()[1])
        if "chunked" in headers.get("transfer-encoding", ""):
            return Answer(status, headers, self.read_chunks())
        length = 0 if head or status == 100 else int(headers["content-length"])
        return Answer(status, headers, self.stream.read(length))

    def read_chunks(self) -> bytes:
        """Return the parts of a body without a length, a slash before each."""
        body = b""
        while length := int(self.stream.readline(), 16):
            body += b"/" + self.stream.read(length)
            self.stream.readline()
        self.stream.readline()
        return body

    def is_closed(self) -> bool:
        """Wait for the server to close, and say whether it did so without another byte."""
        with contextlib.suppress(ConnectionResetError):
            return self.stream.read() == b""
        return True


@dataclass
class Server:
    """A TorchServe whose Java was started as server/torchserve.py starts it."""

    process: subprocess.Popen[bytes]
    folder: Path
    ports: Ports
    tokens: dict[str, str] = field(default_factory=dict)

    def render(
        self, method: str, target: str, body: bytes = b"", *, of: str = "inference", **headers: str
    ) -> bytes:
        """Return the bytes of a request with its token; `x_y` names the header X-Y."""
        lines = [f"{method} {target} HTTP/1.1", "Host: here"]
        if token := self.tokens.get(of):
            lines.append(f"Authorization: Bearer {token}")
        if body:
            headers.setdefault("content_length", str(len(body)))
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode() + body

    def connect(self, of: str = "inference") -> Connection:
        return Connection(getattr(self.ports, "management" if of == "token" else of))

    def ask(
        self, method: str, target: str, body: bytes = b"", *, of: str = "inference", **headers: str
    ) -> Answer:
        """Return the answer to one request on a connection of its own."""
        with self.connect(of) as connection:
            connection.send(self.render(method, target, body, of=of, **headers))
            return connection.read(head=method == "HEAD")

    def predict(self, body: bytes = b"x") -> Answer:
        return self.ask("POST", "/predictions/plain", body)

    def read_log(self) -> list[LogLine]:
        return list(read_log(self.folder / "server.log"))

    def find_lines(self, is_wanted: Callable[[LogLine], bool]) -> list[LogLine]:
        """Return the log's lines that are wanted, as soon as there are some."""
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            if found := [line for line in self.read_log() if is_wanted(line)]:
                return found
            time.sleep(0.05)
        raise AssertionError("no such line")

    def scale(self, model: str, workers: int) -> None:
        """Give a model so many workers, and wait for them."""
        target = f"/models/{model}?min_worker={workers}&synchronous=true"
        answer = self.ask("PUT", target, of="management", x_marwright_key=KEY)
        assert answer.status == 200, answer.body

    def find_worker(self, model: str) -> int:
        """Return the process of a model's only worker."""
        description = json.loads(self.ask("GET", f"/models/{model}", of="management").body)
        return int(description[0]["workers"][0]["pid"])


@contextlib.contextmanager
def boot(folder: Path, settings: FrontendSettings, *, door: bool = True) -> Iterator[Server]:
    """Run a TorchServe with the models plain, and lonely.mar beside it in the store."""
    spec = find_spec("ts")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    store = folder / "store"
    store.mkdir(parents=True)
    write_archive(store / "plain.mar", "plain")
    write_archive(store / "lonely.mar", "lonely")
    write_archive(store / "tokeniser.mar", "tokeniser")
    write_archive(store / "patient.mar", "patient")
    ports = Ports.find_free()
    properties = {
        **ports.to_properties(),
        "model_store": str(store),
        "load_models": "plain.mar",
        "workflow_store": str(folder),
        "enable_model_api": "true",
        "default_workers_per_model": "1",
        "default_response_timeout": "60",
        "metrics_mode": "prometheus",
        "max_request_size": "100000",
    }
    text = "".join(f"{key}={value}\n" for key, value in properties.items())
    (folder / "config.properties").write_text(text)
    classes = folder / "classes"
    applied = write_classes(
        package / "frontend/model-server.jar", classes, eager_batches=False, door=door
    )
    assert applied == (("door", "gRPC gate", "gRPC jobs", "held requests") if door else ())
    log = Path(str(resources.files("marwright.server") / "log4j2.xml"))
    environment = {**os.environ, "LOG_LOCATION": str(folder), "METRICS_LOCATION": str(folder)}
    environment |= {"TMPDIR": str(folder), "TEMP": str(folder)}
    with (folder / "output.log").open("wb") as output:
        process = subprocess.Popen(
            [
                str(find_java().path),
                f"-Dmodel_server_home={package.parent}",
                f"-Djava.io.tmpdir={folder}",
                f"-Dlog4j.configurationFile={log.as_uri()}",
                "-XX:+UseSerialGC",
                *settings.to_arguments(),
                *("-cp", os.pathsep.join([str(classes), str(package / "frontend/*")])),
                *("org.pytorch.serve.ModelServer", "--python", sys.executable),
                *("-f", str(folder / "config.properties"), "-ncs"),
            ],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Server(process, folder, ports)
    try:
        deadline = time.monotonic() + DEADLINE
        while True:
            with contextlib.suppress(OSError, ValueError, AssertionError, KeyError):
                keys = json.loads((folder / "key_file.json").read_text())
                server.tokens = {kind: keys[kind]["key"] for kind in ("inference", "management")}
                server.tokens["token"] = keys["API"]["key"]
                if server.predict().status == 200:
                    break
            assert process.poll() is None, (folder / "output.log").read_text()
            assert time.monotonic() < deadline, (folder / "output.log").read_text()
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for a socket below it."""
    path = Path("/tmp") / f"marwright-door-{os.getpid()}"
    path.mkdir(mode=0o700)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def guarded(folder: Path) -> Iterator[Server]:
    """A server behind a door that refuses as much as it can."""
    key_file = folder / "key"
    key_file.write_text(KEY + "\n")
    settings = FrontendSettings(
        key_file=key_file,
        deny=("/workflows", "/wfpredict/", "hidden"),
        request_seconds=2,
        max_connections=10,
        retry_after=7,
        log_requests="all",
    )
    with boot(folder / "guarded", settings) as server:
        yield server


@pytest.fixture(scope="module")
def bare(folder: Path) -> Iterator[Server]:
    """The same without a door."""
    settings = FrontendSettings(log_file_bytes=100_000, log_files=3)
    with boot(folder / "bare", settings, door=False) as server:
        yield server


def test_answers_are_the_same_bytes_with_and_without_the_door(
    guarded: Server, bare: Server
) -> None:
    requests = [
        ("POST", "/predictions/plain", b"hello"),
        ("POST", "/predictions/plain", b"status 418"),
        ("POST", "/predictions/plain", b"stream one two"),
        ("POST", "/predictions/none", b"x"),
        ("GET", "/ping", b""),
        ("HEAD", "/ping", b""),
        ("OPTIONS", "/", b""),
        ("OPTIONS", "/predictions/plain", b""),
        ("PATCH", "/nowhere", b"x"),
        ("GET", "/predictions/%zz", b""),
        ("POST", "/predictions/plain", bytes(200_000)),
        ("POST", "/models/plain/invoke", b"x"),
    ]
    for request in requests:
        ours, theirs = guarded.ask(*request), bare.ask(*request)
        for headers in (ours.headers, theirs.headers):
            headers.pop("x-request-id", None)
        assert ours == theirs, request


def test_a_connection_carries_hundreds_of_requests(guarded: Server) -> None:
    with guarded.connect() as connection:
        for number in range(300):
            body = b"%d" % number
            connection.send(guarded.render("POST", "/predictions/plain", body))
            answer = connection.read()
            assert (answer.status, answer.body) == (200, body)
    with guarded.connect("management") as connection:
        for _ in range(100):
            connection.send(guarded.render("GET", "/models", of="management"))
            assert connection.read().status == 200


@pytest.mark.parametrize(
    "target",
    [
        "/workflows",
        "/workflows/",
        "/workflows?x=1",
        "/workflows#x",
        "/workflows/one",
        "//workflows",
        "/./workflows",
        "/models/../workflows",
        "/%77orkflows",
        "/%2e/workflows",
        "x/workflows",  # TorchServe does not look at what stands before the first slash
        "http:/workflows",
        "/wfpredict/one",
        "/hidden",
    ],
)
@pytest.mark.parametrize("of", ["inference", "management", "metrics"])
def test_denied_paths_answer_404_everywhere_and_however_they_are_written(
    guarded: Server, of: str, target: str
) -> None:
    answer = guarded.ask("POST", target, b"x", of=of)
    assert (answer.status, answer.type) == (404, "ResourceNotFoundException")
    assert json.loads(answer.body)["code"] == 404
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize("target", ["/predictions/workflows", "/predictions/hidden"])
def test_other_paths_are_not_denied(guarded: Server, target: str) -> None:
    answer = guarded.ask("GET", target)
    assert (answer.status, answer.type) != (404, "ResourceNotFoundException")


def test_without_the_door_workflows_answer(bare: Server) -> None:
    assert bare.ask("GET", "/workflows", of="management").status == 200
    assert bare.ask("GET", "x/workflows", of="management").status == 200


def test_a_refused_body_does_not_hide_the_answer(guarded: Server) -> None:
    with guarded.connect() as connection:
        connection.send(guarded.render("POST", "/workflows", bytes(4_000_000)))
        assert connection.read().status == 404
        assert connection.is_closed()


def test_a_refused_request_is_not_asked_to_continue(guarded: Server) -> None:
    asked: dict[str, Any] = {"content_length": "5", "expect": "100-continue"}
    with guarded.connect() as connection:
        connection.send(guarded.render("POST", "/predictions/plain", **asked))
        assert connection.read().status == 100
        connection.send(b"hello")
        answer = connection.read()
        assert answer.body == b"hello"
        connection.send(guarded.render("POST", "/workflows", **asked))
        assert connection.read().status == 404
        assert connection.is_closed()
    wanted = answer.headers["x-request-id"]
    (line,) = guarded.find_lines(lambda line: line.request_id == wanted)
    assert json.loads(line.message)["path"] == "/predictions/plain"


def test_head_gets_no_body_from_the_door_either(guarded: Server) -> None:
    with guarded.connect() as connection:
        connection.send(guarded.render("HEAD", "/workflows"))
        assert connection.read(head=True).status == 404
        assert connection.is_closed()


def test_pipelined_requests_are_answered_one_by_one_in_their_order(guarded: Server) -> None:
    bodies = [b"wait 0.3", b"second", b"third"]
    pipeline = [guarded.render("POST", "/predictions/plain", body) for body in bodies]
    with guarded.connect() as connection:
        for _ in range(2):
            connection.send(b"".join(pipeline))
            assert [connection.read().body for _ in pipeline] == bodies
        pipeline += [guarded.render("GET", "/ping"), guarded.render("GET", "/workflows")]
        connection.send(b"".join([*pipeline, guarded.render("GET", "/ping")]))
        answers = [connection.read() for _ in pipeline]
        assert [answer.body for answer in answers[:3]] == bodies
        assert [answer.status for answer in answers[3:]] == [200, 404]
        assert connection.is_closed()


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/models?url=lonely.mar"),
        ("PUT", "/models/plain?min_worker=0"),
        ("PUT", "/models/plain/1.0/set-default"),
        ("DELETE", "/models/plain"),
        ("DELETE", "x/models/plain"),
        ("DELETE", "/%6dodels/plain"),
        ("PATCH", "/models/plain"),
        ("PUT", "/models/plain/invoke"),
    ],
)
@pytest.mark.parametrize("key", ["", "wrong", KEY[:-1], KEY + "x"])
def test_models_are_not_changed_without_the_key(
    guarded: Server, method: str, target: str, key: str
) -> None:
    headers: dict[str, Any] = {"x_marwright_key": key} if key else {}
    answer = guarded.ask(method, target, of="management", **headers)
    assert (answer.status, answer.type) == (405, "MethodNotAllowedException")
    message = json.loads(answer.body)["message"]
    assert "X-Marwright-Key" in message
    assert "access.models: token" in message
    assert guarded.predict().status == 200


def test_models_are_read_without_the_key_and_with_the_token_alone(guarded: Server) -> None:
    assert guarded.ask("GET", "/models/plain", of="management").status == 200
    assert guarded.ask("OPTIONS", "/models/plain", of="management").status == 200
    with guarded.connect("management") as connection:
        connection.send(f"GET /models HTTP/1.1\r\nX-Marwright-Key: {KEY}\r\n\r\n".encode())
        assert connection.read().status == 400


def test_the_key_alone_is_not_enough(guarded: Server) -> None:
    url = "/models?url=lonely.mar"
    with guarded.connect("management") as connection:
        connection.send(f"POST {url} HTTP/1.1\r\nX-Marwright-Key: {KEY}\r\n\r\n".encode())
        assert connection.read().status == 400


def test_who_has_the_key_changes_models_and_busy_answers_say_when_to_come_back(
    guarded: Server, bare: Server
) -> None:
    target = "/models?url=lonely.mar&initial_workers=0"
    for server in (guarded, bare):
        answer = server.ask("POST", target, of="management", x_marwright_key=KEY)
        assert answer.status == 200, answer.body
    refused = guarded.ask("POST", "/predictions/lonely", b"x")
    assert (refused.status, refused.headers["retry-after"]) == (503, "7")
    assert "retry-after" not in bare.ask("POST", "/predictions/lonely", b"x").headers
    busy = guarded.predict(b"status 429")
    assert (busy.status, busy.headers["retry-after"]) == (429, "7")
    assert "retry-after" not in guarded.predict().headers


def test_a_model_may_have_token_in_its_name_and_a_browser_may_come_from_such_a_page(
    guarded: Server, bare: Server
) -> None:
    for server in (guarded, bare):
        answer = server.ask(
            "POST", "/models?url=tokeniser.mar", of="management", x_marwright_key=KEY
        )
        assert answer.status == 200, answer.body
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/models/tokeniser", {}),
        ("/models", {"referer": "http://here/token?type=inference"}),
    ]
    for target, headers in requests:
        assert guarded.ask("GET", target, of="management", **headers).status == 200
        assert bare.ask("GET", target, of="management", **headers).status == 400


def test_tokens_are_still_renewed(guarded: Server) -> None:
    assert guarded.ask("GET", "/token?type=inference", of="token").status == 200
    keys = json.loads((guarded.folder / "key_file.json").read_text())
    assert keys["inference"]["key"] != guarded.tokens["inference"]
    guarded.tokens["inference"] = keys["inference"]["key"]
    assert guarded.predict().status == 200


@pytest.mark.parametrize(
    "begin",
    [
        b"G",
        b"GET /ping HTTP/1.1\r\nX-Slow: ",
        b"POST /predictions/plain HTTP/1.1\r\nContent-Length: 100\r\n\r\nx",
        b"POST /predictions/plain HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
    ],
)
def test_a_request_that_drips_is_answered_408_and_closed(guarded: Server, begin: bytes) -> None:
    with guarded.connect() as connection:
        began = time.monotonic()
        connection.send(begin)
        connection.socket.settimeout(0.3)
        while time.monotonic() < began + DEADLINE:
            with contextlib.suppress(TimeoutError):
                assert connection.socket.recv(1, socket.MSG_PEEK) == b"H"
                break
            connection.send(b"a")
        assert time.monotonic() - began > 1.5
        connection.socket.settimeout(DEADLINE)
        with connection.socket.makefile("rb") as connection.stream:
            answer = connection.read()
            assert (answer.status, answer.type) == (408, "RequestTimeoutException")
            assert b"did not arrive whole within 2.0 s" in answer.body
            assert connection.is_closed()


def test_an_idle_connection_and_a_slow_model_are_left_alone(guarded: Server) -> None:
    with guarded.connect() as idle, guarded.connect() as connection:
        connection.send(guarded.render("POST", "/predictions/plain", b"wait 3"))
        assert connection.read().status == 200
        time.sleep(2.5)
        for used in (idle, connection):
            used.send(guarded.render("GET", "/ping"))
            assert used.read().status == 200


@pytest.mark.parametrize("more", ["\r\nContent-Length: 9\r\n\r\nx", "\r\nHost:"])
def test_a_second_request_that_drips_behind_a_slow_one_does_not_disturb_its_answer(
    guarded: Server, more: str
) -> None:
    with guarded.connect() as connection:
        connection.send(guarded.render("POST", "/predictions/plain", b"wait 3"))
        time.sleep(0.2)
        connection.send(f"POST /predictions/plain HTTP/1.1{more}".encode())
        assert connection.read().status == 200
        assert connection.read().status == 408
        assert connection.is_closed()


def test_without_the_door_a_request_may_drip_for_ever(bare: Server) -> None:
    with bare.connect() as connection:
        connection.send(b"GET /ping HTTP/1.1\r\nX-Slow: ")
        connection.socket.settimeout(3)
        with pytest.raises(TimeoutError):
            connection.socket.recv(1)


def test_more_connections_than_allowed_are_told_so_and_closed(guarded: Server) -> None:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(guarded.connect()) for _ in range(10)]
        for connection in held:
            connection.send(guarded.render("GET", "/ping"))
            assert connection.read().status == 200
        for of in ("inference", "metrics"):
            with guarded.connect(of) as surplus:
                surplus.send(guarded.render("POST", "/predictions/plain", bytes(50_000)))
                answer = surplus.read()
                assert (answer.status, answer.headers["retry-after"]) == (503, "7")
                assert answer.type == "ServiceUnavailableException"
                assert surplus.is_closed()
        with guarded.connect() as silent:
            assert silent.read().status == 503
            assert silent.is_closed()
        held[0].send(guarded.render("GET", "/ping"))
        assert held[0].read().status == 200
    deadline = time.monotonic() + DEADLINE
    while guarded.predict().status == 503 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert guarded.predict().status == 200


def test_every_answer_leaves_one_line_without_its_query(guarded: Server) -> None:
    answer = guarded.ask("POST", "/predictions/plain?secret=1", b"status 418")
    request_id = answer.headers["x-request-id"]
    (line,) = guarded.find_lines(lambda line: line.request_id == request_id)
    record = json.loads(line.message)
    assert record.pop("milliseconds") >= 0
    assert record == {
        "method": "POST",
        "path": "/predictions/plain",
        "status": 418,
        "request_id": request_id,
    }
    assert (line.logger, line.level) == ("marwright.requests", "warning")
    denied = guarded.ask("GET", '/workflows/"%22\u00e9').headers["x-request-id"]
    (line,) = guarded.find_lines(lambda line: line.request_id == denied)
    assert json.loads(line.message)["status"] == 404
    text = (guarded.folder / "server.log").read_text()
    assert "secret" not in text
    assert not any(token in text for token in [KEY, *guarded.tokens.values()])


def test_the_bare_server_logs_no_request(bare: Server) -> None:
    bare.predict()
    assert not [line for line in bare.read_log() if line.logger == "marwright.requests"]


def test_what_a_worker_writes_is_one_object_a_line_whatever_it_is(guarded: Server) -> None:
    odd = 'say "quoted" \\ back {"a": 1} \t\x07\x1b[31m %d ${env:HOME} \u00e9\U0001f600\u2028 bad:'
    assert guarded.predict(odd.encode() + b"\xff\xfe end").status == 200
    (line,) = guarded.find_lines(lambda line: '"quoted"' in line.message)
    # Java's Scanner takes U+2028 for a line's end.
    assert (
        line.message == '"quoted" \\ back {"a": 1} \t\x07\x1b[31m %d ${env:HOME} \u00e9\U0001f600'
    )
    assert (line.model, line.version, line.stream) == ("plain", "1.0", "stdout")
    guarded.find_lines(lambda line: line.message == " bad:\ufffd\ufffd end")


def test_javas_exceptions_stand_inside_their_object(guarded: Server) -> None:
    # IllegalArgumentException: TorchServe logs it with its trace.
    assert guarded.ask("GET", "/predictions/%zz").status == 403
    (line, *_) = guarded.find_lines(lambda line: bool(line.exception))
    assert "IllegalArgumentException" in line.exception
    assert line.exception.count("\n\tat ") > 3
    for text in (guarded.folder / "server.log").read_bytes().split(b"\n")[:-1]:
        fields = json.loads(text)
        assert set(fields) - {"exception"} == {"time", "level", "thread", "logger", "message"}
        assert re.fullmatch(
            r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}(Z|[+-]\d\d:\d\d)", fields["time"]
        )


def test_what_every_worker_says_is_left_out(guarded: Server) -> None:
    messages = [line.message for line in guarded.read_log()]
    assert any(message.startswith("[PID]") for message in messages)
    assert not any("Backend received inference" in message for message in messages)
    assert not any("Python runtime" in message for message in messages)


def test_the_log_is_rotated_and_bounded(bare: Server) -> None:
    for _ in range(40):
        assert bare.predict(b"say " + b"x" * 20_000).status == 200
    logs = sorted(path.name for path in bare.folder.glob("server*.log"))
    assert logs == ["server.1.log", "server.2.log", "server.log"]
    assert sum((bare.folder / name).stat().st_size for name in logs) < 450_000
    for name in logs:
        for text in (bare.folder / name).read_bytes().split(b"\n")[:-1]:
            json.loads(text)


def test_a_full_disk_stops_no_prediction(folder: Path) -> None:
    log = folder / "full/server.log"
    log.parent.mkdir()
    log.symlink_to("/dev/full")
    with boot(log.parent, FrontendSettings(log_requests="all")) as server:
        for _ in range(50):
            assert server.predict(b"say something").status == 200
        assert "No space left on device" in (log.parent / "output.log").read_text()
    assert log.is_symlink()


@contextlib.contextmanager
def hold_request(server: Server) -> Iterator[Connection]:
    """Send a request that a worker takes from the queue, to wait for another one for its batch."""
    size = "batch_size=2&max_batch_delay=3600000&initial_workers=1&synchronous=true"
    target = f"/models?url=patient.mar&{size}"
    answer = server.ask("POST", target, of="management", x_marwright_key=KEY)
    assert answer.status == 200, answer.body
    try:
        with server.connect() as connection:
            connection.send(server.render("POST", "/predictions/patient", b"x"))
            queued = -1
            while queued != 0:  # sent, and taken
                time.sleep(0.5)
                text = server.ask("GET", "/models/patient", of="management").body
                queued = json.loads(text)[0]["jobQueueStatus"]["pendingRequests"]
            yield connection
    finally:
        server.ask("DELETE", "/models/patient", of="management", x_marwright_key=KEY)


def ask_twice(server: Server) -> list[Answer]:
    """Fill a batch."""
    with server.connect() as first, server.connect() as second:
        for connection in (first, second):
            connection.send(server.render("POST", "/predictions/patient", b"x"))
        return [first.read(), second.read()]


def test_a_request_that_a_killed_worker_held_is_answered_503_at_once(guarded: Server) -> None:
    with hold_request(guarded) as connection:
        os.kill(guarded.find_worker("patient"), signal.SIGKILL)
        began = time.monotonic()
        answer = connection.read()
        assert time.monotonic() - began < 5
        assert (answer.status, answer.headers["retry-after"]) == (503, "7")
        assert b"ended before it began with the request" in answer.body
        # The worker comes back, and none is forgotten.
        assert [answer.status for answer in ask_twice(guarded)] == [200, 200]


def test_without_the_door_it_is_never_answered(bare: Server) -> None:
    with hold_request(bare) as connection:
        killed = bare.find_worker("patient")
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: bare.find_worker("patient") not in (killed, -1))
        assert [answer.status for answer in ask_twice(bare)] == [200, 200]
        connection.socket.settimeout(3)
        with pytest.raises(TimeoutError):
            connection.socket.recv(1)


def test_a_request_that_a_worker_held_when_it_was_taken_away_is_answered(guarded: Server) -> None:
    with hold_request(guarded) as connection:
        guarded.scale("patient", 0)
        guarded.scale("patient", 1)
        with guarded.connect() as second:
            second.send(guarded.render("POST", "/predictions/patient", b"x"))
            # 200 where TorchServe put it back into the queue before the worker's thread awoke.
            assert connection.read().status in (200, 503)
