from __future__ import annotations

import dataclasses
import http.client
import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from marwright.errors import PortTakenError
from marwright.server.registry import KEY_HEADER, announce_folder
from marwright.server.sections import PortSettings
from marwright.server.supervision.health import Health, open_health
from marwright.server.supervision.status import Status, VersionStatus

READY = VersionStatus("cnn", "1.0", default=True, workers=1, ready_workers=1)
LACKING = dataclasses.replace(READY, ready_workers=0, problem="0 of 1 workers are READY")
SERVING = Status(phase="serving", models=(READY,), started=True)


class Source:
    """What the endpoints read."""

    status = SERVING

    def __call__(self) -> Status:
        return self.status


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def health(source: Source) -> Iterator[Health]:
    with Health(source, port=0, key="secret") as health:
        yield health


def ask(
    health: Health, path: str, method: str = "GET", key: str | None = None
) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection(urlsplit(health.url).netloc, timeout=10)
    connection.request(method, path, headers={} if key is None else {KEY_HEADER: key})
    answer = connection.getresponse()
    result = answer.status, answer.headers["Content-Type"], answer.read()
    connection.close()
    return result


@pytest.mark.parametrize(
    ("status", "live", "ready", "started"),
    [
        (SERVING, 200, 200, 200),
        (dataclasses.replace(SERVING, models=(READY, LACKING)), 200, 503, 200),
        (dataclasses.replace(SERVING, models=(LACKING,), started=False), 200, 503, 503),
        (dataclasses.replace(SERVING, phase="restarting"), 503, 503, 200),
        (dataclasses.replace(SERVING, phase="stopping"), 503, 503, 200),
        (dataclasses.replace(SERVING, problems=("it hangs",)), 503, 503, 200),
        (Status(phase="starting"), 200, 503, 503),
    ],
)
def test_each_question_has_its_own_answer(
    health: Health, source: Source, status: Status, live: int, ready: int, started: int
) -> None:
    source.status = status
    for path, code in (("/live", live), ("/ready", ready), ("/started", started)):
        assert ask(health, path)[:2] == (code, "application/health+json")
        assert ask(health, path, "HEAD") == (code, "application/health+json", b"")


def test_a_no_says_why(health: Health, source: Source) -> None:
    source.status = dataclasses.replace(SERVING, models=(LACKING,))
    body = json.loads(ask(health, "/ready?verbose=1")[2])
    assert body["status"] == "fail"
    assert body["notes"] == ["cnn 1.0: 0 of 1 workers are READY"]


def test_status_is_what_the_command_prints(health: Health) -> None:
    code, kind, body = ask(health, "/status")
    assert (code, kind) == (200, "application/json")
    assert json.loads(body) == json.loads(json.dumps(SERVING.to_json()))
    assert json.loads(body)["ready"] is True


@pytest.mark.parametrize(("key", "told"), [("secret", True), ("secre", False), ("", False)])
def test_paths_and_tracebacks_are_told_only_to_who_has_the_key(
    health: Health, source: Source, key: str, told: bool
) -> None:
    version = dataclasses.replace(LACKING, detail="Traceback: a secret of the model's")
    source.status = dataclasses.replace(
        SERVING,
        name="one",
        address="http://127.0.0.1:1",
        models=(version,),
        config="/home/one/deploy.yaml",
        log="/home/one/server.log",
    )
    body = ask(health, "/status", key=key)[2]
    endpoint = str(announce_folder() / "one.json") if told else ""
    assert json.loads(body)["endpoint"] == endpoint
    assert [text in body for text in (b"Traceback", b"/home/one")] == [told, told]
    assert json.loads(body)["models"][0]["problem"] == LACKING.problem
    with Health(source, port=0) as keyless:
        assert b"Traceback" not in ask(keyless, "/status", key="")[2]


@pytest.mark.parametrize("current", [True, False])
def test_who_has_the_key_may_have_the_server_looked_at(current: bool) -> None:
    answers = {"/current": lambda asked: {"current": current}}
    with Health(Source(), port=0, key="secret", answers=answers) as health:
        code, _, body = ask(health, "/current", key="secret")
        assert (code, json.loads(body)) == (200, {"current": current})
        assert ask(health, "/current")[0] == 404


def test_another_path_names_the_right_ones(health: Health) -> None:
    code, _, body = ask(health, "/healthz")
    assert code == 404
    assert json.loads(body)["paths"] == ["/live", "/metrics", "/ready", "/started", "/status"]


def test_only_this_machine_is_answered(health: Health) -> None:
    assert urlsplit(health.url).hostname == "127.0.0.1"


def test_a_connection_that_says_nothing_keeps_nobody_waiting(health: Health) -> None:
    address = urlsplit(health.url)
    with socket.create_connection((address.hostname, address.port or 0)):
        assert ask(health, "/live")[0] == 200


def test_a_taken_port_that_was_chosen_is_an_error(source: Source, taken_port: int) -> None:
    with pytest.raises(PortTakenError, match=f"{taken_port} \\(health\\)"):
        open_health(source, PortSettings(health=taken_port))


def test_a_taken_port_that_nobody_chose_gives_way_to_a_free_one(
    source: Source, taken_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = PortSettings.model_construct(_fields_set=set(), health=taken_port)
    with open_health(source, ports) as health:
        assert ask(health, "/live")[0] == 200
    with open_health(source, "free", last=taken_port) as health:
        assert urlsplit(health.url).port != taken_port
