from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import requests

from marwright.client import Client, Endpoint
from marwright.errors import AnswerError, ClientError, StorageError, UsageError


def test_an_answer_carries_what_the_model_said(service: Any, client: Client, reply: Any) -> None:
    headers = {"Content-Type": "application/json", "x-request-id": "abc"}
    service.answer(reply(body=b'{"label": 7}', headers=headers))
    answer = client.predict("cnn", b"scan")
    assert answer.json() == {"label": 7}
    assert (answer.status, answer.content_type) == (200, "application/json")
    assert (answer.body, answer.request_id) == (b'{"label": 7}', "abc")
    assert 0 < answer.seconds < 5


def test_bytes_and_a_files_bytes_are_the_body_as_they_are(
    service: Any, client: Client, tmp_path: Path, reply: Any
) -> None:
    service.answer(reply())
    (tmp_path / "scan.png").write_bytes(b"\x89PNG")
    client.predict("cnn", b"\x89PNG")
    client.predict("cnn", tmp_path / "scan.png", version="2.0")
    assert service.lines == ["POST /predictions/cnn", "POST /predictions/cnn/2.0"]
    assert [asked.body for asked in service.asked] == [b"\x89PNG"] * 2
    assert service.asked[0].headers["Content-Type"] == "application/octet-stream"


def test_a_dict_is_sent_as_json(service: Any, client: Client, reply: Any) -> None:
    service.answer(reply())
    client.predict("cnn", {"text": "ü"})
    assert service.asked[0].headers["Content-Type"] == "application/json"
    assert service.asked[0].body in (b'{"text": "\\u00fc"}', '{"text": "ü"}'.encode())


def test_an_explanation_is_asked_for_in_the_form_that_is_wanted(
    service: Any, client: Client, reply: Any
) -> None:
    service.answer(reply())
    client.explain("cnn", b"scan")
    client.explain("cnn", {"data": "c2Nhbg=="}, version="2.0", accept="image/png")
    assert service.lines == ["POST /explanations/cnn", "POST /explanations/cnn/2.0"]
    accepts = [asked.headers["Accept"] for asked in service.asked]
    assert accepts == ["application/json", "image/png"]
    assert service.asked[1].headers["Content-Type"] == "application/json"


def test_parts_are_sent_under_their_names(service: Any, client: Client, reply: Any) -> None:
    service.answer(reply())
    client.predict_parts("cnn", {"left": b"one", "right": b"two"})
    assert service.asked[0].headers["Content-Type"].startswith("multipart/form-data; boundary=")
    assert b'name="left"' in service.asked[0].body
    assert b"\r\n\r\ntwo\r\n" in service.asked[0].body


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, float("nan"), Path("x")])
def test_a_dict_that_is_no_json_is_a_usage_error_and_not_sent(
    service: Any, client: Client, value: object
) -> None:
    with pytest.raises(UsageError, match="JSON"):
        client.predict("cnn", {"data": value})
    assert service.asked == []


def test_a_file_that_is_missing_is_a_storage_error(client: Client, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"gone\.png"):
        client.predict("cnn", tmp_path / "gone.png")


@pytest.mark.parametrize(
    ("status", "healthy"), [("Healthy", True), ("Partial Healthy", False), ("Unhealthy", False)]
)
def test_health_is_what_ping_says(service: Any, client: Client, status: str, healthy: bool) -> None:
    service.answer({"status": status})
    assert (client.health().status, client.health().healthy) == (status, healthy)
    assert service.lines[0] == "GET /ping"


def test_a_500_of_ping_is_unhealthy(service: Any, client: Client, reply: Any) -> None:
    service.answer(reply(500, b'{"status": "Unhealthy"}'))
    assert client.health().status == "Unhealthy"


def test_another_error_of_ping_is_an_error(service: Any, client: Client, reply: Any) -> None:
    service.answer(reply(502))
    with pytest.raises(AnswerError):
        client.health()


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"7", b'{"no": "status"}', b"\xff"])
def test_a_ping_of_something_else_is_a_client_error(
    service: Any, client: Client, reply: Any, body: bytes
) -> None:
    service.answer(reply(body=body))
    with pytest.raises(ClientError, match="TorchServe"):
        client.health()


class WatchedSession(requests.Session):
    closed = False

    def close(self) -> None:
        self.closed = True
        super().close()


def test_an_injected_session_stays_open_and_keeps_its_settings(endpoint: Endpoint) -> None:
    session = WatchedSession()
    with Client(endpoint, session=session):
        pass
    assert not session.closed
    assert session.trust_env
    session.close()


def test_our_own_session_is_closed_and_ignores_proxies(
    service: Any, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "Session", WatchedSession)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    service.answer({"status": "Healthy"})
    with Client(endpoint) as client:
        assert client.health().healthy
    assert client._session.closed  # type: ignore[attr-defined]


def test_a_slash_at_an_addresss_end_changes_nothing(service: Any) -> None:
    service.answer({"status": "Healthy"})
    with Client(Endpoint(service.url + "/", service.url + "/")) as client:
        client.health()
    assert service.lines == ["GET /ping"]
