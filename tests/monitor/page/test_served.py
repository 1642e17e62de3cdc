"""The page of a real TorchServe: the form, and a release that is taken back."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Served, wait_until
from tests.monitor.page.conftest import TOKEN, Shown
from tests.release.conftest import pack_echo
from tests.release.conftest import serve as serve_echo

from marwright.archive import Run, pack_run
from marwright.monitor.looks import Recorder
from marwright.monitor.page.service import Service
from marwright.monitor.page.sources import Sources
from marwright.server.ports import Ports
from marwright.server.registry import find_record

pytestmark = pytest.mark.server

FOLDERS = ("XDG_RUNTIME_DIR", "XDG_STATE_HOME")


@contextlib.contextmanager
def live_in(folder: Path) -> Iterator[None]:
    """See the servers of a folder alone; for fixtures of a module."""
    before = {name: os.environ.get(name) for name in FOLDERS}
    (folder / "runtime").mkdir(mode=0o700, exist_ok=True, parents=True)
    os.environ.update(zip(FOLDERS, (str(folder / "runtime"), str(folder / "state")), strict=True))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def show(name: str) -> Iterator[Shown]:
    record = find_record(name)
    with (
        Recorder(record, seconds=0.3) as recorder,
        Service(Sources(record, recorder), TOKEN, host="127.0.0.1", port=0) as service,
    ):
        yield Shown(service, recorder)  # type: ignore[arg-type]  # a real one


@pytest.fixture(scope="module")
def digits(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """The page of a served classifier of digits."""
    folder = tmp_path_factory.mktemp("digits")
    pack_run(run, out=folder / "store/cnn.mar", preflight=None)
    with live_in(folder):
        served = Served(folder, "digits")
        served.write(
            models=[{"archive": "cnn.mar", "workers": 1}],
            monitoring={"predictions": {"share": 100, "inputs": "whole"}},
        )
        try:
            served.start()
            with show("digits") as shown:
                yield shown
        finally:
            served.end()


def test_the_form_answers_a_scan_with_a_heat_map_by_keyboard_alone(
    digits: Shown, visit: Callable[..., Any], run: Run
) -> None:
    window = visit(digits.service, "/try?model=cnn&version=1.0")
    window.get_by_label("File: an image, or JSON").set_input_files(run.samples[0].path)
    window.get_by_label("Version").focus()
    for name in ("method", "file"):
        window.keyboard.press("Tab")
        assert window.evaluate("document.activeElement.id") == name
    window.keyboard.press("Tab")
    window.keyboard.press("Enter")
    window.wait_for_selector("#result", timeout=60_000)
    assert window.evaluate("document.activeElement.id") == "result"
    label = run.samples[0].path.name[0]
    assert f"cnn 1.0: {label}" in window.inner_text("#result h2")
    sizes = window.evaluate(
        "[...document.querySelectorAll('.pictures img')].map((i) => [i.alt, i.naturalWidth])"
    )
    assert [alt for alt, _ in sizes] == [
        "The input",
        "Heat map: red speaks for the answer, blue against it",
    ]
    assert all(width > 100 for _, width in sizes)
    assert f'"{label}"' in window.inner_text("pre")
    assert window.locator("meter").count() == 5  # as many as the handler answers
    assert window.evaluate("document.querySelector('main').innerText").count("%") >= 5


def test_a_dropped_file_is_chosen(digits: Shown, visit: Callable[..., Any], scan: bytes) -> None:
    window = visit(digits.service, "/try")
    transfer = window.evaluate_handle(
        "(bytes) => { const t = new DataTransfer(); t.items.add(new File([new Uint8Array(bytes)],"
        " 'dropped.png', {type: 'image/png'})); return t; }",
        list(scan),
    )
    window.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    window.wait_for_selector("text=dropped.png is chosen")
    window.get_by_label("Explanation").select_option("")
    window.get_by_role("button", name="Predict").click()
    window.wait_for_selector("#result")
    assert "dropped.png" in window.inner_text("#result")
    assert window.locator(".pictures img").count() == 1


def test_what_the_model_refuses_is_said(digits: Shown, visit: Callable[..., Any]) -> None:
    window = visit(digits.service, "/try")
    hostile = {"name": "a.png", "mimeType": "image/png", "buffer": b"<script>alert(1)</script>"}
    window.get_by_label("File: an image, or JSON").set_input_files(hostile)
    window.get_by_role("button", name="Predict").click()
    alert = window.wait_for_selector("[role=alert]")
    assert alert.inner_text()
    assert window.locator(".pictures img").count() == 0
    rows = wait_until(
        lambda: re.findall(r"<strong>(\d+)</strong> cnn 1.0", digits.ask("/failures").text),
        timeout=30,
    )
    assert {int(status) // 100 for status in rows} == {4}


def test_a_version_shows_its_archive_and_its_stages(
    digits: Shown, visit: Callable[..., Any]
) -> None:
    window = visit(digits.service, "/version?model=cnn&version=1.0")
    text = window.inner_text("section:has(> #archive)")
    assert "as packed" in text
    assert "Signature\nnone" in text
    window.locator("section:has(> #archive) summary").click()
    assert "image_classifier.py" in window.inner_text("section:has(> #archive) table")


@pytest.fixture(scope="module")
def echo(nginx: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Shown]]:
    """A site whose versions answer at once, and its page."""
    folder = tmp_path_factory.mktemp("echo")
    text = f"replicas: 1\ngateway: {{port: {Ports.find_free().inference}}}\n"
    with serve_echo(folder, "site", text) as served, live_in(folder), show("site") as shown:
        yield served, shown


@pytest.mark.slow
def test_a_release_is_taken_back_on_the_page(
    echo: tuple[Any, Shown], visit: Callable[..., Any], tmp_path: Path
) -> None:
    served, shown = echo
    released = served.run("release", pack_echo(tmp_path / "echo-2.0.mar", "2.0"))
    assert released.returncode == 0, released.stderr
    window = visit(shown.service, "/releases")
    passed = window.locator("li[data-state=passed] strong").all_inner_texts()
    assert passed[:3] == ["register", "warm-up", "samples"]
    assert {"shadow", "canary 20 %", "default"} <= set(passed)
    window.get_by_role("button", name="Roll back echo to 1.0").click()
    window.get_by_role("button", name="Go back to 1.0").focus()
    window.keyboard.press("Enter")
    window.wait_for_selector("text=It is taken back", timeout=90_000)
    assert served.list_versions()["1.0"] == (1, True)
    assert served.read_last("rolled back").reason == "asked for on the page"
    assert window.get_by_role("button", name="Roll back").count() == 0
    window.goto(f"{shown.url}/rollback?model=echo")
    assert "nothing to take back" in window.inner_text("main")


@pytest.mark.slow
def test_a_release_that_is_being_made_is_shown_and_stopped(
    echo: tuple[Any, Shown], visit: Callable[..., Any], tmp_path: Path
) -> None:
    served, shown = echo
    text = served.deploy.read_text("utf-8")
    served.deploy.write_text(text.replace("requests: 30", "requests: 20000"), encoding="utf-8")
    window = visit(shown.service, "/releases")
    process = served.begin("release", pack_echo(tmp_path / "echo-3.0.mar", "3.0"))
    try:
        window.wait_for_selector("li[data-state=current]:has-text('canary 20 %')", timeout=90_000)
        assert "in progress: canary 20 %" in window.inner_text("section:has(.gates) h2 >> nth=0")
        window.get_by_role("button", name="Roll back echo to 1.0").click()
        assert "being made just now" in window.inner_text("main")
        window.get_by_role("button", name="Go back to 1.0").click()
        window.wait_for_selector("text=It is taken back", timeout=90_000)
        assert process.wait(30) != 0
        assert served.read_last("returned").version == "3.0"
        assert "3.0" not in served.list_versions()
    finally:
        process.kill()
        process.communicate()
        served.deploy.write_text(text, encoding="utf-8")
        shutil.rmtree(tmp_path, ignore_errors=True)
