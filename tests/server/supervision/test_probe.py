from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from marwright.archive import Packed
from marwright.client import Client
from marwright.client.results import Answer
from marwright.errors import InputRejectedError, OverloadedError
from marwright.server.deployment import Deployment, ModelEntry
from marwright.server.samples import read_sample
from marwright.server.supervision.probe import Probe
from marwright.server.wanted import Wanted, read_wanted


class Model:
    """Answers as it is told, and keeps what it was asked."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[Any] = []

    def predict(self, name: str, data: Any, *, version: str, timeout: float) -> Answer:
        self.asked.append((name, version, data))
        if isinstance(self.answer, Exception):
            raise self.answer
        return cast(Answer, SimpleNamespace(status=200, body=json.dumps(self.answer).encode()))


@pytest.fixture
def probe() -> Iterator[Probe]:
    probe = Probe(every=1000)
    yield probe
    probe.close()


@pytest.fixture
def wanted(packed: Packed) -> Wanted:
    return read_wanted(Deployment(store=packed.path.parent), ModelEntry(archive="cnn.mar"))


def ask(probe: Probe, model: Model, wanted: Wanted) -> str | None:
    """Ask, and return the result once the answer is there."""
    probe.ask(cast(Client, model), wanted.path.parent, [wanted])
    deadline = time.monotonic() + 10
    while not model.asked or any(target.busy for target in probe._latest.values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return probe.read(wanted.key)


def test_the_archives_own_sample_is_sent_once_and_its_answer_is_right(
    probe: Probe, wanted: Wanted
) -> None:
    found = read_sample(wanted.path)
    assert found
    body, sample = found
    model = Model(sample.answer)
    assert probe.read(wanted.key) is None
    assert ask(probe, model, wanted) == ""
    assert ask(probe, model, wanted) == ""
    assert model.asked == [("cnn", "1.0", body)]
    assert body.startswith(b"\x89PNG")


def test_another_answer_is_told(probe: Probe, wanted: Wanted) -> None:
    assert "sample" in (ask(probe, Model({"label": "?"}), wanted) or "")


def test_a_refusal_is_told(probe: Probe, wanted: Wanted) -> None:
    model = Model(InputRejectedError("no image", status=400))
    assert "no image" in (ask(probe, model, wanted) or "")


def test_a_busy_server_has_not_answered_wrongly(probe: Probe, wanted: Wanted) -> None:
    assert ask(probe, Model(OverloadedError("full", status=503)), wanted) is None
    found = read_sample(wanted.path)
    assert found
    probe.forget()
    model = Model(found[1].answer)
    assert ask(probe, model, wanted) == ""
    model.answer = OverloadedError("full", status=503)
    for target in probe._latest.values():
        target.due = 0
    model.asked.clear()
    assert ask(probe, model, wanted) == ""


def test_an_archive_without_samples_needs_no_answer(
    probe: Probe, wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("marwright.server.supervision.probe.read_sample", lambda path: None)
    probe.ask(cast(Client, Model(None)), wanted.path.parent, [wanted])
    assert probe.read(wanted.key) == ""


def test_what_is_no_archive_has_no_sample(tmp_path: Path) -> None:
    (tmp_path / "none.mar").write_text("no archive", encoding="utf-8")
    assert read_sample(tmp_path / "none.mar") is None
    assert read_sample(tmp_path / "absent.mar") is None
