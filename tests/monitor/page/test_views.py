from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from tests.monitor.page.conftest import Told

from marwright.monitor.page.sources import Sources
from marwright.monitor.page.views import Views


@pytest.fixture
def views(record: Any) -> Views:
    told = Told(record)
    told.look()
    return Views(Sources(record, told))


def run_beside(work: Callable[[], Any]) -> bool:
    """Tell whether something ends while others are kept waiting."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(5)
    return not thread.is_alive()


@pytest.mark.parametrize("kept", ["read_failures", "read_metrics"])
def test_a_slow_disk_or_server_keeps_no_other_page_waiting(
    views: Views, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    begun, going_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> list[Any]:
        begun.set()
        going_on.wait(30)
        return []

    monkeypatch.setattr(Sources, kept, wait)
    page = {
        "read_failures": views.show_failures,
        "read_metrics": lambda: views.show_version("cnn", "1.0"),
    }[kept]
    slow = threading.Thread(target=page)
    slow.start()
    try:
        assert begun.wait(10)
        assert run_beside(views.show_overview)
        assert run_beside(views.show_releases)
    finally:
        going_on.set()
        slow.join()


def test_metrics_are_fetched_once_for_all_viewers_of_a_look(
    views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[int] = []

    def fetch(_: Sources) -> list[Any]:
        fetched.append(1)
        return []

    monkeypatch.setattr(Sources, "read_metrics", fetch)
    for _ in range(3):
        assert views.show_version("cnn", "1.0") is not None
    assert len(fetched) == 1
    recorder = views.sources.recorder
    assert isinstance(recorder, Told)
    recorder.look()
    assert views.show_version("cnn", "1.0") is not None
    assert len(fetched) == 2
