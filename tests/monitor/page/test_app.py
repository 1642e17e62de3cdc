from __future__ import annotations

import errno
import json
import logging
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from tests.conftest import wait_until
from tests.monitor.page.conftest import TOKEN, Shown, Told, make_model

from marwright.errors import PortTakenError
from marwright.monitor.page import access, service
from marwright.monitor.page.stream import Frame, Topic
from marwright.release.history import HISTORY_NAME, History, Line, make_line

SCRIPT = '<script>alert("x")</script>\'"&'
PAGES = (
    "/",
    "/version?model=cnn&version=1.0",
    "/releases",
    "/failures",
    "/try",
    "/api/look",
    "/api/events",
    "/pictures/x",
    "/rollback?model=cnn",
)


def sign_in(shown: Shown) -> requests.Session:
    session = requests.Session()
    answer = session.post(f"{shown.url}/login", {"token": TOKEN}, allow_redirects=False, timeout=20)
    assert answer.status_code == 303
    return session


def read_code(text: str) -> str:
    found = re.search(r'name="code" value="([0-9a-f]{64})"', text)
    assert found
    return found[1]


@pytest.mark.parametrize("path", PAGES)
def test_nothing_is_told_without_the_token(shown: Shown, path: str) -> None:
    answer = requests.get(shown.url + path, timeout=20, allow_redirects=False)
    assert answer.status_code == 401
    assert "cnn 1.0" not in answer.text
    assert "serving" not in answer.text
    if path.startswith("/api/"):
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    else:
        assert 'type="password"' in answer.text


def test_a_wrong_token_is_answered_401_and_slowly(
    shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "FIRST_PAUSE", 0.2)
    began = time.monotonic()
    answer = requests.post(f"{shown.url}/login", {"token": "wrong"}, timeout=20)
    assert answer.status_code == 401
    assert "That is not the token" in answer.text
    assert "set-cookie" not in answer.headers
    bearer = requests.get(f"{shown.url}/", headers={"Authorization": "Bearer wrong"}, timeout=20)
    assert bearer.status_code == 401
    assert time.monotonic() - began > 0.55
    assert sign_in(shown).get(f"{shown.url}/", timeout=20).status_code == 200


def test_the_session_is_a_cookie_that_no_script_and_no_other_site_has(shown: Shown) -> None:
    answer = requests.post(
        f"{shown.url}/login", {"token": TOKEN}, allow_redirects=False, timeout=20
    )
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"marwright-{shown.service.port}=")
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert TOKEN not in cookie


def test_signing_out_ends_the_session(shown: Shown) -> None:
    session = sign_in(shown)
    kept = dict(session.cookies)
    code = read_code(session.get(f"{shown.url}/", timeout=20).text)
    session.post(f"{shown.url}/logout", {"code": code}, timeout=20)
    answer = requests.get(f"{shown.url}/", cookies=kept, timeout=20)
    assert answer.status_code == 401


@pytest.mark.parametrize(
    ("asked", "target"),
    [
        ("/releases", "/releases"),
        ("/version?model=a&version=b", "/version?model=a&version=b"),
        ("//evil.example", "/"),
        ("/\\evil.example", "/"),
        ("/\t/evil.example", "/"),
        ("https://evil.example", "/"),
        ("javascript:alert(1)", "/"),
        ("http://[", "/"),
        ("", "/"),
    ],
)
def test_signing_in_leads_to_this_page_only(shown: Shown, asked: str, target: str) -> None:
    answer = requests.post(
        f"{shown.url}/login", {"token": TOKEN, "next": asked}, allow_redirects=False, timeout=20
    )
    assert answer.headers["location"] == target


@pytest.mark.parametrize("path", ["/", "/login", "/static/page.js", "/api/look", "/nothing"])
def test_every_answer_carries_the_headers_that_protect_it(shown: Shown, path: str) -> None:
    headers = shown.ask(path).headers
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert ("no-store" in headers["cache-control"]) is not path.startswith("/static/")
    assert "server" not in headers


def test_no_page_has_an_inline_script_or_style_or_another_host(shown: Shown) -> None:
    for path in PAGES[:5]:
        text = shown.ask(path).text
        assert not re.search(r"<style|style=|\son\w+=|javascript:", text)
        assert re.findall(r"<script[^>]*>", text) == re.findall(r"<script src=[^>]*>", text)
        addresses = re.findall(r'(?:src|href|action)="([^"]*)"', text)
        assert all(re.match(r"/(?!/)|#|data:,$", one) for one in addresses), addresses


@pytest.mark.parametrize("path", ["/rollback", "/try", "/logout", "/login"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "null", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://127.0.0.1:1", "Sec-Fetch-Site": "same-site"},
        {"Origin": "http://evil.example"},
    ],
)
def test_what_another_site_sends_is_refused(
    shown: Shown, path: str, headers: dict[str, str]
) -> None:
    session = sign_in(shown)
    code = read_code(session.get(f"{shown.url}/", timeout=20).text)
    form = {"code": code, "model": "cnn", "token": TOKEN}
    answer = session.post(
        shown.url + path, form, headers=headers, allow_redirects=False, timeout=20
    )
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("path", ["/rollback", "/try", "/logout"])
def test_a_form_without_the_sessions_code_is_refused(shown: Shown, path: str) -> None:
    session, other = sign_in(shown), sign_in(shown)
    code = read_code(other.get(f"{shown.url}/", timeout=20).text)
    for form in ({"model": "cnn"}, {"model": "cnn", "code": code}):
        answer = session.post(shown.url + path, form, allow_redirects=False, timeout=20)
        assert answer.status_code == 403
        assert "nothing was done" in answer.text
    assert session.get(f"{shown.url}/", timeout=20).status_code == 200


def test_a_name_that_leads_here_is_not_enough(shown: Shown) -> None:
    answer = shown.ask("/", headers={"Host": f"evil.example:{shown.service.port}"})
    assert answer.status_code == 421
    assert "cnn" not in answer.text
    assert shown.ask("/", headers={"Host": "localhost:9000"}).status_code == 200


def test_uploads_are_bounded_by_the_servers_own_limit(shown: Shown) -> None:
    files = {"file": ("a.png", b"x" * 200_000)}
    answer = shown.ask("/try", "POST", files=files)
    assert answer.status_code == 413
    assert "limits.request_bytes" in answer.text

    def stream() -> Any:
        for _ in range(64):
            yield b"x" * 65536

    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    chunked = shown.ask("/try", "POST", data=stream(), headers=kind)
    assert chunked.status_code in {400, 413}
    assert shown.ask("/rollback", "POST", data={"model": "x" * 100_000}).status_code == 413


def test_errors_of_json_routes_are_problems(shown: Shown) -> None:
    for path, status in (("/api/nothing", 404), ("/api/events?topic=x", 404)):
        answer = shown.ask(path)
        assert (answer.status_code, answer.json()["status"]) == (status, status)
        assert answer.headers["content-type"] == "application/problem+json"
    assert shown.ask("/api/events?topic=version&model=no&version=1").status_code == 404


def test_there_is_no_openapi_page(shown: Shown) -> None:
    assert {shown.ask(path).status_code for path in ("/docs", "/redoc", "/openapi.json")} == {404}


def test_a_mistake_of_ours_is_a_page_and_no_traceback(
    shown: Shown, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Told, "looks", property(lambda self: 1 / 0))
    with caplog.at_level(logging.CRITICAL):
        answer = shown.ask("/")
    assert answer.status_code == 500
    assert "Traceback" not in answer.text
    assert "ZeroDivision" not in answer.text
    assert answer.headers["x-frame-options"] == "DENY"


def test_scripts_in_names_are_escaped_everywhere(open_page: Callable[..., Shown]) -> None:
    def change(told: Told) -> None:
        told.models = [
            make_model(SCRIPT, SCRIPT, problem=SCRIPT, detail=SCRIPT),
            make_model(SCRIPT, "1.0"),
        ]
        told.values = {"problems": [SCRIPT], "config": SCRIPT}

    shown = open_page(change)
    query = requests.Request(
        "GET", "http://x/version", params={"model": SCRIPT, "version": SCRIPT}
    ).prepare()
    for path in ("/", "/try", "/releases", query.path_url, "/?q=%3Cscript%3Ealert"):
        answer = shown.ask(path)
        assert answer.status_code == 200
        assert "alert" in answer.text
        assert "<script>alert" not in answer.text
        assert not re.search(r"=\"[^\"]*<script>", answer.text)
    events = read_events(shown, "/api/events?topic=overview", 1)
    assert "<script>" not in json.dumps(events[0]["html"])
    assert f"{SCRIPT} {SCRIPT}" in events[0]["rows"]


def read_events(shown: Shown, path: str, count: int) -> list[dict[str, Any]]:
    found = []
    with shown.ask(path, stream=True) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith(b"data: "):
                found.append(json.loads(line[6:]))
                if len(found) >= count:
                    break
    return found


def test_the_first_event_tells_all_and_the_next_ones_what_is_new(shown: Shown) -> None:
    first, second = read_events(shown, "/api/events?topic=overview", 2)
    assert first["rows"]["cnn 1.0"][:3] == ["good", "ready", "2 of 2"]
    assert set(first["html"]) >= {"traffic-drawing", "latency-rows"}
    assert "<polyline" in first["html"]["latency-drawing"]
    assert second["rows"] == {}
    assert first["stamp"] == second["stamp"]
    page = shown.ask("/").text
    assert f'data-stamp="{first["stamp"]}"' in page


@pytest.mark.parametrize("is_left", [True, False])
def test_a_stream_ends_with_its_session(
    shown: Shown, monkeypatch: pytest.MonkeyPatch, is_left: bool
) -> None:
    session = sign_in(shown)
    with session.get(f"{shown.url}/api/events", stream=True, timeout=10) as answer:
        lines = answer.iter_lines()
        assert next(line for line in lines if line.startswith(b"data: "))
        if is_left:
            code = read_code(session.get(f"{shown.url}/", timeout=20).text)
            session.post(f"{shown.url}/logout", {"code": code}, timeout=20)
        else:
            kept = shown.service.access._sessions
            monkeypatch.setattr(shown.service.access, "_sessions", dict.fromkeys(kept, 0.0))
        began = time.monotonic()
        assert any(time.monotonic() - began > 5 for _ in lines) is False
    wait_until(lambda: shown.service._broadcast.count == 0, timeout=10)


def test_a_change_of_state_is_told_in_words(shown: Shown) -> None:
    with shown.ask("/api/events", stream=True) as answer:
        lines = (json.loads(x[6:]) for x in answer.iter_lines() if x.startswith(b"data: "))
        next(lines)
        shown.recorder.models = [make_model(), make_model(version="2.0", problem="it has ended")]
        found = next(item for item in lines if item["notes"])
    assert found["notes"] == ["cnn 2.0: not ready: it has ended."]
    assert found["rows"]["cnn 2.0"][0] == "bad"


def test_a_dead_server_is_told_and_its_return_too(shown: Shown) -> None:
    shown.recorder.problem = "nobody listens"
    text = wait_until(lambda: "nobody listens" in (t := shown.ask("/").text) and t, timeout=10)
    assert "The server does not answer" in text
    assert "unknown: no answer" in text
    assert "/version?" in text, "versions are shown as they were"
    assert shown.ask("/version?model=cnn&version=1.0").status_code == 200
    shown.recorder.problem = ""
    wait_until(lambda: "nobody listens" not in shown.ask("/").text, timeout=10)


def test_viewers_beyond_the_bound_are_refused(open_page: Callable[..., Shown]) -> None:
    shown = open_page(viewers=3)
    streams = [shown.ask("/api/events", stream=True) for _ in range(3)]
    assert {one.status_code for one in streams} == {200}
    refused = shown.ask("/api/events")
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "30"
    assert "3 viewers" in refused.json()["detail"]
    assert shown.ask("/").status_code == 200
    for one in streams:
        one.close()
    wait_until(lambda: shown.ask("/api/events", stream=True).status_code == 200, timeout=15)


def test_a_hundred_viewers_are_drawn_for_once(
    open_page: Callable[..., Shown], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = open_page()
    drawn: list[float] = []
    broadcast = shown.service._broadcast
    draw = broadcast._draw

    def draw_and_count(topic: Topic) -> Frame:
        drawn.append(time.time())
        return draw(topic)

    monkeypatch.setattr(broadcast, "_draw", draw_and_count)
    streams = [shown.ask("/api/events", stream=True) for _ in range(100)]
    looks = len(shown.recorder.looks)
    events = [one.iter_lines() for one in streams]
    for lines in events:
        assert [next(line for line in lines if line.startswith(b"data: ")) for _ in range(2)]
    assert len(drawn) <= len(shown.recorder.looks) - looks + 20
    assert broadcast.count == 100
    for one in streams:
        one.close()
    wait_until(lambda: broadcast.count == 0, timeout=20)


def test_a_viewer_that_does_not_read_is_dropped(open_page: Callable[..., Shown]) -> None:
    def change(told: Told) -> None:
        told.models = [make_model(f"model-{n}", "1.0") for n in range(200)]

    shown = open_page(change)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", shown.service.port))
    head = f"GET /api/events HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
    sock.sendall(head.encode())
    wait_until(lambda: shown.service._broadcast.count == 1, timeout=10)

    def is_dropped() -> bool:
        shown.recorder.models = [  # each look is another one, so that much is sent
            make_model(f"model-{n}", "1.0", memory_bytes=int(time.time() * 50 + n) << 20)
            for n in range(200)
        ]
        return shown.service._broadcast.count == 0

    wait_until(is_dropped, timeout=60, what="the slow viewer to be dropped")
    assert shown.ask("/").status_code == 200
    sock.close()


def test_the_page_ends_although_somebody_watches(open_page: Callable[..., Shown]) -> None:
    shown = open_page()
    stream = shown.ask("/api/events", stream=True)
    began = time.monotonic()
    shown.service.__exit__(None, None, None)
    assert time.monotonic() - began < 3
    stream.close()


def test_a_taken_port_is_said(
    record: Any, open_page: Callable[..., Shown], taken_port: int
) -> None:
    with pytest.raises(PortTakenError, match="--port 0"):
        open_page(port=taken_port)


def test_a_kind_of_address_that_this_machine_has_not_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(family: int) -> Any:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    with monkeypatch.context() as patch:
        patch.setattr(service.socket, "socket", fail)
        with pytest.raises(PortTakenError, match="Address family not supported"):
            service._listen("::1", 0)


def test_two_hundred_versions_are_folded_by_model_and_sorted(
    open_page: Callable[..., Shown],
) -> None:
    def change(told: Told) -> None:
        told.models = [
            make_model(f"model-{m:02}", f"{v}.0", default=v == 1)
            for v in range(20)
            for m in range(10)
        ]

    shown = open_page(change)
    text = shown.ask("/").text
    assert text.count("<tr data-key=") == 200
    assert text.count('<details class="group"') == 10
    assert 'group" id="group1" open' not in text
    assert len(text) < 150_000
    versions = re.findall(r'data-key="model-00 ([0-9.]+)"', text)
    assert versions == [f"{v}.0" for v in range(19, -1, -1)]
    found = shown.ask("/?q=model-03").text
    assert found.count("<tr data-key=") == 20
    assert "open" in found
    assert "20 versions" in found


def write_release(shown: Shown, *events: tuple[str, str, dict[str, Any]]) -> None:
    folder = Path(shown.recorder.record.config).parent
    history = History(folder / HISTORY_NAME)
    begun = history.add(
        Line("2026-11-28T07:00:00Z", "cnn-2.0-x", "begun", "cnn", "2.0", "1.0", user=SCRIPT)
    )
    for event, step, values in events:
        history.add(make_line(begun, event, step=step, **values))  # type: ignore[arg-type]


def test_gates_are_shown_with_their_figures(shown: Shown) -> None:
    write_release(
        shown,
        ("step", "register", {}),
        ("passed", "register", {"figures": {"workers": 2}}),
        ("step", "canary 10 %", {}),
        (
            "failed",
            "canary 10 %",
            {"reason": SCRIPT, "figures": {"errors": {"verdict": "worse", "low": 0.01}}},
        ),
        ("returned", "", {"reason": SCRIPT}),
    )
    text = shown.ask("/releases").text
    assert 'register</strong> <span class="state">passed' in text
    assert 'canary 10 %</strong> <span class="state">failed' in text
    assert "verdict worse, low 0.01" in text
    assert "<script>alert" not in text
    assert "Roll back" not in text, "it went back already"


def test_an_interrupted_release_can_be_taken_back(shown: Shown) -> None:
    write_release(shown, ("step", "shadow", {}))
    text = shown.ask("/releases").text
    assert "interrupted: shadow" in text
    assert "Roll back cnn to 1.0" in text
    assert "See its gates" in shown.ask("/").text
    question = shown.ask("/rollback?model=cnn").text
    assert "Go back to 1.0" in question
    # There is no server behind this page: what speaks against it is said, and nothing is done.
    answer = shown.ask("/rollback", "POST", data={"model": "cnn"})
    assert answer.status_code == 409
    assert 'role="alert"' in answer.text


def test_a_model_without_releases_has_no_question(shown: Shown) -> None:
    assert shown.ask("/rollback?model=cnn").status_code == 404
    assert shown.ask("/version?model=cnn&version=9").status_code == 404


def test_the_form_says_what_it_misses(shown: Shown) -> None:
    empty = shown.ask("/try", "POST", data={"choice": '["cnn", "1.0"]', "method": ""})
    assert empty.status_code == 422
    assert "choose a file first" in empty.text
    files = {"file": ("a.png", b"x")}
    away = shown.ask("/try", "POST", files=files, data={"choice": '["cnn", "1.0"]'})
    assert away.status_code == 502
    assert "has not started yet" in away.text
    for choice in ("", "x", "[1]", '["a"]', "[" * 5000):
        assert shown.ask("/try", "POST", files=files, data={"choice": choice}).status_code in {
            400,
            502,
        }
