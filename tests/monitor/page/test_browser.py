"""The page in a real Chromium: what people see, hear, and can do."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.conftest import wait_until
from tests.monitor.page.conftest import TOKEN, Shown, Told, make_model

SCRIPT = "<script>window.hurt=1</script><img src=x onerror=window.hurt=1>'\"&"
PATHS = ("/", "/version?model=cnn&version=1.0", "/releases", "/failures", "/try")

# Colours of texts and what is behind them, as a person sees them (WCAG 2.2, 1.4.3).
FIND_FAINT = """() => {
  const read = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map(
      (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = read(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const found = [];
  let seen = 0;
  for (const node of document.body.querySelectorAll("*")) {
    const own = [...node.childNodes].some((c) => c.nodeType === 3 && c.textContent.trim());
    if (!own || !node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const front = node instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(read(front).slice(0, 3)), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    seen += 1;
    if (ratio < 4.5) found.push(`${node.tagName} ${node.textContent.slice(0, 30)} ${ratio}`);
  }
  return [seen, found];
}"""

# What a screen reader needs: names, one h1, headings in order, landmarks, ids that are single.
FIND_UNNAMED = """() => {
  const found = [];
  const name = (node) => node.getAttribute("aria-label") || node.textContent.trim()
    || (node.getAttribute("aria-labelledby") || "").split(" ").map(
      (id) => (document.getElementById(id) || {textContent: ""}).textContent).join("").trim();
  for (const node of document.querySelectorAll("input:not([type=hidden]), select, textarea"))
    if (!node.labels.length && !node.getAttribute("aria-label")) found.push(node.outerHTML);
  const named = "button, a, summary, nav, [role=img], [role=region]";
  for (const node of document.querySelectorAll(named))
    if (!name(node)) found.push(node.outerHTML.slice(0, 80));
  for (const node of document.querySelectorAll("img")) if (!node.alt) found.push(node.outerHTML);
  for (const node of document.querySelectorAll("table")) if (!node.querySelector("th[scope]"))
    found.push("a table without headers");
  const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
  if (new Set(ids).size < ids.length) found.push("an id twice: " + ids);
  for (const key of ["aria-labelledby", "aria-describedby"])
    for (const node of document.querySelectorAll(`[${key}]`))
      for (const id of node.getAttribute(key).split(" "))
        if (!document.getElementById(id)) found.push("no such id " + id);
  const levels = [...document.querySelectorAll("h1, h2, h3")].map((h) => Number(h.tagName[1]));
  if (levels.filter((level) => level === 1).length !== 1) found.push("h1s: " + levels);
  if (levels.some((level, n) => n && level > levels[n - 1] + 1)) found.push("order: " + levels);
  if (document.querySelectorAll("main").length !== 1) found.push("main");
  if (!document.documentElement.lang || !document.title.trim()) found.push("lang or title");
  return found;
}"""

FIND_OVERFLOW = (
    """() => document.documentElement.scrollWidth - document.documentElement.clientWidth"""
)


def list_paths(service: Any) -> Iterator[str]:
    yield from (service.url.rstrip("/") + path for path in PATHS)


def test_the_printed_address_signs_in_once_and_leaves_no_trace(shown: Shown, chromium: Any) -> None:
    address = shown.service.make_address()
    ticket = address.partition("#")[2]
    context = chromium.new_context()
    asked: list[str] = []
    window = context.new_page()
    window.on("request", lambda request: asked.append(f"{request.url} {request.headers}"))
    window.goto(address)
    window.wait_for_selector("main[data-topic=overview]")
    assert ticket not in window.url
    assert not [text for text in asked if ticket in text]
    assert ticket not in window.evaluate("JSON.stringify(history.state) + document.referrer")
    window.go_back()
    assert ticket not in window.url
    context.clear_cookies()
    window.goto("about:blank")
    window.goto(address)
    window.wait_for_selector("text=That is not the token")
    window.get_by_label("Token").fill(TOKEN)
    window.keyboard.press("Enter")
    window.wait_for_selector("main[data-topic=overview]")
    context.close()


def test_a_wrong_token_is_said_and_what_was_asked_for_comes_after_the_right_one(
    shown: Shown, chromium: Any
) -> None:
    context = chromium.new_context()
    window = context.new_page()
    window.goto(f"{shown.url}/releases")
    window.get_by_label("Token").fill("wrong")
    window.get_by_role("button", name="Sign in").click()
    window.wait_for_selector("[role=alert]")
    window.get_by_label("Token").fill(TOKEN)
    window.get_by_role("button", name="Sign in").click()
    window.wait_for_selector("main[data-topic=releases]")
    context.close()


def test_every_page_is_named_and_in_order_for_who_does_not_see_it(
    shown: Shown, visit: Callable[..., Any]
) -> None:
    window = visit(shown.service)
    for path in list_paths(shown.service):
        window.goto(path)
        assert window.evaluate(FIND_UNNAMED) == [], path
        assert window.locator("nav [aria-current=page]").count() == (0 if "version" in path else 1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough_in_both_schemes(
    open_page: Callable[..., Shown], visit: Callable[..., Any], scheme: str
) -> None:
    def change(told: Told) -> None:
        told.models = [
            make_model(),
            make_model(version="2.0", problem="its worker has ended", detail="Traceback"),
            make_model(version="3.0", problem="its sample is not answered yet"),
            make_model(version="4.0", workers=0),
        ]
        told.values = {"problems": ["a problem"], "ready": False}

    shown = open_page(change)
    window = visit(shown.service, color_scheme=scheme)
    grounds = set()
    for path in [*list_paths(shown.service), f"{shown.url}/version?model=cnn&version=2.0"]:
        window.goto(path)
        window.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        seen, faint = window.evaluate(FIND_FAINT)
        assert seen > 15
        assert faint == [], path
        grounds.add(window.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == {"rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 29)"}


def test_a_phone_needs_no_scrolling_sideways(
    open_page: Callable[..., Shown], visit: Callable[..., Any]
) -> None:
    def change(told: Told) -> None:
        told.models = [make_model(), make_model("m" * 80, "v" * 80, problem="p" * 300)]
        told.values = {"config": "/a" * 100, "problems": ["x" * 200]}

    shown = open_page(change)
    window = visit(shown.service, viewport={"width": 360, "height": 740}, is_mobile=True)
    for path in [*list_paths(shown.service), f"{shown.url}/?q=m"]:
        window.goto(path)
        window.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert window.evaluate(FIND_OVERFLOW) == 0, path


def test_all_of_it_is_reached_by_keyboard(shown: Shown, visit: Callable[..., Any]) -> None:
    window = visit(shown.service)
    window.evaluate("document.activeElement.blur()")
    names = []
    for _ in range(14):
        window.keyboard.press("Tab")
        names.append(window.evaluate("document.activeElement.textContent.trim().slice(0, 24)"))
        assert window.evaluate(
            "getComputedStyle(document.activeElement).outline.includes('solid 3px')"
        ), names[-1]
    assert names[:6] == [
        "Skip to the content",
        "Overview",
        "Releases",
        "Failures",
        "Try it",
        "Sign out",
    ]
    assert {"Filter", "1.0", "2.0"} <= set(names)
    window.goto(shown.url + "/")
    window.keyboard.press("Tab")
    window.keyboard.press("Enter")
    assert window.evaluate("document.activeElement.id") == "main"
    for _ in range(8):
        window.keyboard.press("Tab")
        if window.evaluate("document.activeElement.textContent") == "2.0":
            break
    window.keyboard.press("Enter")
    window.wait_for_selector("main[data-topic=version]")
    assert "cnn 2.0" in window.inner_text("h1")


def test_a_plot_can_be_read_as_a_table_by_keyboard(shown: Shown, visit: Callable[..., Any]) -> None:
    window = visit(shown.service)
    summary = window.locator("figure summary").nth(1)
    summary.focus()
    window.keyboard.press("Enter")
    rows = window.locator("[data-html=latency-rows] tr")
    wait_until(lambda: "4.00 ms" in rows.first.inner_text(), timeout=10)
    assert window.locator("svg[role=img] desc").first.text_content().startswith("The last")
    # It stays open, and goes on, while looks come in.
    first = rows.first.inner_text()
    wait_until(lambda: rows.first.inner_text() != first, timeout=10)
    assert window.locator("figure details").nth(1).get_attribute("open") is not None


def test_numbers_follow_and_only_states_are_said_aloud(
    shown: Shown, visit: Callable[..., Any]
) -> None:
    window = visit(shown.service)
    window.wait_for_selector("text=It follows by itself")
    row = window.locator("tr[data-key='cnn 2.0']")
    shown.recorder.models = [
        make_model(),
        make_model(version="2.0", memory_bytes=999 << 20, ready_workers=1, problem="one has ended"),
    ]
    wait_until(lambda: "999 MiB" in row.inner_text(), timeout=10)
    assert row.get_attribute("data-mood") == "bad"
    notes = window.locator("#notes")
    assert notes.get_attribute("aria-live") == "polite"
    wait_until(lambda: notes.text_content() == "cnn 2.0: not ready: one has ended.", timeout=10)
    live = window.evaluate(
        "[...document.querySelectorAll('[aria-live] *, [aria-live]')]"
        ".some((n) => n.matches('[data-live], tr'))"
    )
    assert not live


def test_what_comes_and_goes_is_shown_without_losing_ones_place(
    shown: Shown, visit: Callable[..., Any]
) -> None:
    window = visit(shown.service)
    window.wait_for_selector("text=It follows by itself")
    box = window.get_by_label("Model or version")
    box.fill("cnn")
    shown.recorder.models = [make_model(), make_model("cnn", "3.0"), make_model("other", "1.0")]
    window.wait_for_selector("tr[data-key='cnn 3.0']")
    assert box.input_value() == "cnn"
    assert window.evaluate("document.activeElement.id") == "filter"
    assert not window.locator("tr[data-key='other 1.0']").is_visible()
    assert window.locator("tr[data-key='cnn 2.0']").count() == 0
    box.fill("")
    assert window.locator("tr[data-key='other 1.0']").is_visible()


def test_a_dead_server_leaves_the_page_and_comes_back(
    shown: Shown, visit: Callable[..., Any]
) -> None:
    window = visit(shown.service)
    window.wait_for_selector("text=It follows by itself")
    shown.recorder.problem = "its supervisor does not answer"
    window.wait_for_selector("text=The server does not answer: its supervisor does not answer")
    assert "unknown: no answer" in window.locator("tr[data-key='cnn 1.0']").inner_text()
    wait_until(lambda: "no answer" in window.locator("#notes").text_content(), timeout=10)
    shown.recorder.problem = ""
    window.wait_for_selector("tr[data-key='cnn 1.0'][data-mood=good]")
    wait_until(lambda: window.locator(".problems").count() == 0, timeout=10)


def test_a_dead_page_is_said_by_the_page(shown: Shown, visit: Callable[..., Any]) -> None:
    window = visit(shown.service)
    window.wait_for_selector("text=It follows by itself")
    shown.service.__exit__(None, None, None)
    window.wait_for_selector("text=it is tried again")
    assert window.locator("tr[data-key='cnn 1.0']").is_visible()
    window.errors[:] = [text for text in window.errors if "ERR_" not in text]


def test_two_hundred_versions_are_filtered_as_one_types(
    open_page: Callable[..., Shown], visit: Callable[..., Any]
) -> None:
    def change(told: Told) -> None:
        told.models = [
            make_model(f"model-{m:02}", f"{v}.0", default=v == 1)
            for v in range(20)
            for m in range(10)
        ]

    shown = open_page(change)
    window = visit(shown.service)
    assert window.locator("details.group[open]").count() == 0
    assert window.evaluate("document.documentElement.scrollHeight") < 2500
    window.get_by_label("Model or version").press_sequentially("model-07 1.")
    wait_until(lambda: window.inner_text("#found") == "1 version", timeout=10)
    rows = window.locator("tr[data-key]:visible")
    assert rows.count() == 1
    assert "1.0" in rows.first.inner_text()
    window.locator("tr[data-key]:visible a").click()
    window.wait_for_selector("main[data-topic=version]")


def test_a_script_in_a_name_does_nothing(
    open_page: Callable[..., Shown], visit: Callable[..., Any]
) -> None:
    def change(told: Told) -> None:
        told.models = [make_model(SCRIPT, SCRIPT, problem=SCRIPT, detail=SCRIPT), make_model()]
        told.values = {"problems": [SCRIPT]}

    shown = open_page(change)
    window = visit(shown.service)
    window.wait_for_selector("text=It follows by itself")
    assert SCRIPT in window.inner_text(".problems")
    row = window.locator("tbody tr").first
    assert SCRIPT in row.inner_text()
    shown.recorder.models = [
        make_model(SCRIPT, SCRIPT, problem=f"other {SCRIPT}", detail=SCRIPT),
        make_model(),
    ]
    wait_until(lambda: f"other {SCRIPT}" in row.inner_text(), timeout=10)
    wait_until(lambda: SCRIPT in window.locator("#notes").text_content(), timeout=10)
    row.locator("a").click()
    window.wait_for_selector("main[data-topic=version]")
    assert SCRIPT in window.inner_text("h1")
    window.goto(f"{shown.url}/try")
    assert SCRIPT in window.locator("option").first.text_content()
    assert window.evaluate("window.hurt") is None


@pytest.fixture
def elsewhere() -> Iterator[Callable[[str], str]]:
    """Return a function that serves HTML from another port, and returns its address."""
    text = ""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()

        def serve(content: str) -> str:
            nonlocal text
            text = content
            return f"http://127.0.0.1:{server.server_address[1]}/"

        yield serve
        server.shutdown()
        thread.join()


def test_another_sites_page_can_neither_send_nor_frame_anything(
    shown: Shown, visit: Callable[..., Any], elsewhere: Callable[[str], str]
) -> None:
    window = visit(shown.service)
    # 127.0.0.1 at another port is the same site to cookies: only the origin tells it apart.
    window.goto(
        elsewhere(
            f'<form method="post" action="{shown.url}/rollback"><input name="model" value="cnn">'
            "<button>Win a prize</button></form>"
        )
    )
    window.get_by_role("button").click()
    window.wait_for_selector("h1:has-text('Refused')")
    window.goto(elsewhere(f'<iframe src="{shown.url}/"></iframe>'))
    frame = window.frames[1]
    wait_until(lambda: frame.url.startswith("chrome-error"), timeout=10)
    answer = window.evaluate(
        f"fetch('{shown.url}/api/look', {{credentials: 'include'}})"
        ".then(() => 'read', () => 'refused')"
    )
    assert answer == "refused"
    window.errors.clear()  # the browser has said why


def test_without_a_script_all_is_there(shown: Shown, chromium: Any) -> None:
    context = chromium.new_context(java_script_enabled=False)
    window = context.new_page()
    window.goto(shown.url + "/")
    window.get_by_label("Token").fill(TOKEN)
    window.get_by_role("button", name="Sign in").click()
    assert "2.0" in window.inner_text("main")
    assert "reload it" in window.inner_text("footer")
    window.get_by_label("Model or version").fill("2.0")
    window.get_by_role("button", name="Filter").click()
    assert "q=2.0" in window.url
    assert window.locator("tr[data-key]").count() == 1
    context.close()


def test_the_first_page_is_small_and_from_here_alone(
    shown: Shown, visit: Callable[..., Any]
) -> None:
    window = visit(shown.service)
    answers: list[Any] = []
    window.on("response", lambda answer: answers.append(answer))
    window.reload(wait_until="load")
    watched = shown.url + "/api/events"
    found = [answer for answer in list(answers) if not answer.url.startswith(watched)]
    sizes = {answer.url: len(answer.body()) for answer in found}
    assert all(url.startswith((shown.url, "data:")) for url in sizes)
    assert len(sizes) >= 3
    assert sum(sizes.values()) < 150_000
