"""The one token that a gateway sends to all its servers, at a real TorchServe over bare HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from urllib.parse import urlsplit

import pytest

from marwright.client.endpoint import Endpoint
from marwright.client.tokens import Purpose, TokenFile
from marwright.server import TorchServe
from marwright.server.deployment import Deployment

pytestmark = pytest.mark.server

KEY = "a.key_of-a~gateway/with+all=="
SECONDS = 30.0
# Answers the token that it was asked with.
HANDLER = """
class Handler:
    def initialize(self, context):
        pass
    def handle(self, data, context):
        given = context.get_request_header(0, "Authorization")
        return [given or "none"]
"""
Serve = Callable[..., AbstractContextManager[TorchServe]]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """Return a function that runs a server whose gateway's token is in the file that it names."""
    folder = tmp_path_factory.mktemp("gateway-key")
    (folder / "key").write_text(f"{KEY}\n")
    model = {"modelName": "echo", "modelVersion": "1.0", "handler": "echo.py"}
    with zipfile.ZipFile(folder / "echo.mar", "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps({"runtime": "python", "model": model}))
        archive.writestr("echo.py", HANDLER)

    @contextlib.contextmanager
    def run_server(key: str = "key", **properties: str) -> Iterator[TorchServe]:
        deployment = Deployment.model_validate(
            {
                "store": folder,
                "models": ["echo.mar"],
                "ports": "free",
                "access": {"gateway_key": folder / key},
                "properties": properties,
            }
        )
        with TorchServe.deploy(deployment) as server:
            yield server

    return run_server


@pytest.fixture(scope="module")
def endpoint(serve: Serve) -> Iterator[Endpoint]:
    with serve() as server:
        yield server.endpoint


def connect(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(url).netloc, timeout=SECONDS)


def ask(url: str, method: str, path: str, token: str | None, **headers: str) -> tuple[int, str]:
    """Return the status and the body of an answer."""
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    with contextlib.closing(connect(url)) as connection:
        connection.request(method, path, b"x" if method == "POST" else None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def begin(endpoint: Endpoint) -> http.client.HTTPConnection:
    """Return a connection on which all of a prediction was sent but its last byte."""
    connection = connect(endpoint.inference_url)
    connection.putrequest("POST", "/predictions/echo")
    connection.putheader("Authorization", f"Bearer {KEY}")
    connection.putheader("Content-Length", "2")
    connection.endheaders(b"x")
    return connection


def predict(endpoint: Endpoint, token: str | None = KEY) -> tuple[int, str]:
    return ask(endpoint.inference_url, "POST", "/predictions/echo", token)


def read_token(endpoint: Endpoint, purpose: Purpose = "inference") -> str:
    assert endpoint.key_file is not None
    return TokenFile(endpoint.key_file).read(purpose)


def renew(endpoint: Endpoint) -> None:
    """Let TorchServe make another inference token."""
    token = read_token(endpoint, "API")
    assert ask(endpoint.management_url, "GET", "/token?type=inference", token)[0] == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/predictions/echo"), ("POST", "/predictions/echo/1.0"), ("GET", "/ping")],
)
def test_the_key_is_as_good_as_the_server_s_token(
    endpoint: Endpoint, method: str, path: str
) -> None:
    with_key = ask(endpoint.inference_url, method, path, KEY)
    assert with_key == ask(endpoint.inference_url, method, path, read_token(endpoint))
    assert with_key[0] == 200


def test_a_model_s_code_sees_the_server_s_token_and_never_the_key(endpoint: Endpoint) -> None:
    assert predict(endpoint) == (200, f"Bearer {read_token(endpoint)}")


@pytest.mark.parametrize("token", [None, "", KEY[:-1], f"{KEY}=", KEY.upper(), f" {KEY} {KEY}"])
@pytest.mark.parametrize("path", ["/predictions/echo", "/ping"])
def test_another_token_is_refused_as_torchserve_refuses(
    endpoint: Endpoint, path: str, token: str | None
) -> None:
    status, body = ask(endpoint.inference_url, "POST", path, token)
    assert (status, json.loads(body)["type"]) == (400, "InvalidKeyException")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/models"),
        ("GET", "x/models"),
        ("GET", "/%6dodels/echo"),
        ("POST", "/models?url=echo.mar"),
        ("PUT", "/models/echo?min_worker=2"),
        ("DELETE", "/models/echo"),
        ("GET", "/token?type=inference"),
        ("GET", "/token?type=management"),
    ],
)
def test_the_key_opens_nothing_of_the_management_api(
    endpoint: Endpoint, method: str, path: str
) -> None:
    before = [read_token(endpoint, purpose) for purpose in ("inference", "management", "API")]
    assert endpoint.supervisor_key is not None
    supervisor = {"X-Marwright-Key": endpoint.supervisor_key.read_text("ascii")}
    status, body = ask(endpoint.management_url, method, path, KEY, **supervisor)
    assert (status, json.loads(body)["type"]) == (400, "InvalidKeyException")
    after = [read_token(endpoint, purpose) for purpose in ("inference", "management", "API")]
    assert after == before


def test_the_key_opens_no_path_below_models_at_the_inference_address_either(
    endpoint: Endpoint,
) -> None:
    path = "/models/echo/invoke"
    assert ask(endpoint.inference_url, "POST", path, KEY)[0] == 400
    assert ask(endpoint.inference_url, "POST", path, read_token(endpoint))[0] == 200


def test_the_server_s_tokens_are_renewed_and_the_key_goes_on_to_hold(endpoint: Endpoint) -> None:
    before = read_token(endpoint)
    with contextlib.closing(connect(endpoint.inference_url)) as connection:
        connection.request("GET", "/ping", headers={"Authorization": f"Bearer {KEY}"})
        assert connection.getresponse().read()
        renew(endpoint)
        assert predict(endpoint, before)[0] == 400
        connection.request("GET", "/ping", headers={"Authorization": f"Bearer {KEY}"})
        assert connection.getresponse().status == 200
    assert predict(endpoint) == (200, f"Bearer {read_token(endpoint)}")
    assert read_token(endpoint) != before


def test_a_token_that_is_renewed_while_a_request_arrives_does_it_no_harm(
    endpoint: Endpoint,
) -> None:
    with contextlib.closing(begin(endpoint)) as connection:
        assert predict(endpoint)[0] == 200  # the head is there: it was sent before this request
        renew(endpoint)
        connection.send(b"x")
        answer = connection.getresponse()
        assert (answer.status, answer.read().decode()) == (200, f"Bearer {read_token(endpoint)}")


def test_no_request_fails_while_tokens_are_renewed(endpoint: Endpoint) -> None:
    def ask_often(number: int) -> set[int]:
        return {predict(endpoint)[0] for _ in range(60)}

    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(ask_often, number) for number in range(4)]
        renewals = 0
        while not all(result.done() for result in results):
            renew(endpoint)
            renewals += 1
    assert [result.result() for result in results] == [{200}] * 4
    assert renewals > 3


def test_an_expired_token_is_renewed_once_for_all_requests(serve: Serve) -> None:
    with serve(token_expiration_min="0.04") as server, contextlib.ExitStack() as stack:
        endpoint = server.endpoint
        before = read_token(endpoint)
        deadline = time.monotonic() + SECONDS
        while predict(endpoint, before)[0] == 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        begun = [stack.enter_context(contextlib.closing(begin(endpoint))) for _ in range(8)]
        for connection in begun:
            connection.send(b"x")
        answers = {connection.getresponse().read().decode() for connection in begun}
        assert answers == {f"Bearer {read_token(endpoint)}"}
        assert read_token(endpoint) != before
        assert predict(endpoint, read_token(endpoint))[0] == 200


def test_where_the_file_is_missing_the_key_holds_for_nothing_and_the_log_says_so(
    serve: Serve,
) -> None:
    with serve("missing") as server:
        assert {predict(server.endpoint, token)[0] for token in (KEY, "")} == {400}
        assert ask(server.endpoint.inference_url, "GET", "/ping", None, Authorization="")[0] == 400
        assert predict(server.endpoint, read_token(server.endpoint))[0] == 200
        text = server.log_file.read_text()
        assert "the gateway gets no answer: its token cannot be read" in text
        assert KEY not in text


def test_where_no_token_is_asked_for_the_key_changes_nothing(serve: Serve) -> None:
    with serve(disable_token_authorization="true") as server:
        assert predict(server.endpoint, None) == (200, "none")
        assert predict(server.endpoint) == (200, f"Bearer {KEY}")
