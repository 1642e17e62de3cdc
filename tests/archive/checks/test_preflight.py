"""What the preflight finds in answers: real handlers in TorchServe's own service, in this process.

What only a process of its own can show stands in test_trial.py.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from marwright.archive.checks import preflight
from marwright.archive.checks.findings import Finding
from marwright.archive.checks.preflight import plan_batches, run_preflight
from marwright.archive.checks.trial import Batch, Trial, parse_events
from marwright.archive.checks.trial_worker import Teller, answer_batches, load_model
from marwright.errors import ArchiveError

Find = Callable[..., list[Finding]]
SETTINGS = "batchSize: 4\n"


def try_here(
    folder: Path,
    *,
    samples: Sequence[tuple[Path, str | None]],
    batches: Sequence[Batch],
    timeout: float,
) -> Trial:
    """Do what a trial does in its process, in this one: torch need not be imported again."""
    plan: dict[str, Any] = {
        "folder": str(folder),
        "samples": [(str(path), content_type) for path, content_type in samples],
        "batches": [(batch.requests, batch.is_optional) for batch in batches],
        "timeout": timeout,
    }
    events = folder.parent / "events"
    descriptor = os.open(events, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    try:
        teller = Teller(descriptor)
        model = load_model(plan, teller)
        if model is not None and answer_batches(model, plan, teller):
            teller.tell("done")
    finally:
        os.close(descriptor)
    return Trial(parse_events(events.read_bytes()), status=0, stack="", output="")


@pytest.fixture
def find(
    unpacked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[Finding]]:
    """Return a function that makes a handler of a `handle` body and returns what is found."""
    monkeypatch.setattr(preflight, "try_worker", try_here)

    def find_all(body: str, *, above: str = "", **options: Any) -> list[Finding]:
        source = f"import json\n{above}\ndef handle(data, context):\n    if data is None: return\n"
        source += "    texts = [bytes(row['body']).decode('latin-1') for row in data]\n"
        options.setdefault("samples", ("sample zero", "sample one", "sample two"))
        options.setdefault("settings", SETTINGS)
        made = unpacked(source + textwrap.indent(body, "    "), **options)
        return list(run_preflight(*made).findings)

    return find_all


REFUSE = """\
for index, text in enumerate(texts):
    if not text.startswith('sample ') or len(text) < 8:
        context.set_response_status(400, 'Bad Request', index)
        texts[index] = 'refused'
"""


def ids(findings: list[Finding]) -> list[str]:
    return [f"{item.severity} {item.rule.id}" for item in findings]


def test_a_handler_without_fault_has_no_findings(find: Find) -> None:
    assert find(REFUSE + "return [json.dumps({'length': len(text)}) for text in texts]") == []


@pytest.mark.parametrize(
    ("body", "expected", "words"),
    [
        ("return texts[:1]", "error W511", "1 answers to 2 requests (batch size 2, 4)"),
        (
            "return 'text'",
            "error W511",
            "str instead of a list with 1 answers (batch size 1, 2, 4)",
        ),
        ("return [*texts, '']", "error W511", "2 answers to 1 requests"),
        ("return [{1, 2} for text in texts]", "error W512", "set is not JSON serializable"),
        ("raise ValueError('no way')", "error W513", "ValueError: no way (batch size 1, 2, 4)"),
        ("return [texts[i] for i in (0, 2)[:len(texts)]]", "error W513", "IndexError"),
        ("raise SystemExit(3)", "error W503", "SystemExit: 3"),
    ],
    ids=["one answer", "no list", "too many", "set", "exception", "in batches", "exit"],
)
def test_a_batch_without_answers_is_an_error(
    find: Find, body: str, expected: str, words: str
) -> None:
    found = find(REFUSE + body)
    assert ids(found)[0] == expected
    assert words in found[0].found


def test_an_exception_comes_with_its_place_and_without_torchserves_frames(find: Find) -> None:
    (found,) = [item for item in find("raise ValueError('no way')") if item.rule.id == "W513"]
    assert found.place == "handler.py:6"
    assert 'File "handler.py", line 6, in handle' in found.detail
    assert "ts/service.py" not in found.detail


def test_what_fails_only_beyond_the_archives_batch_size_is_a_warning(find: Find) -> None:
    found = find(REFUSE + "return texts[:1]", settings="batchSize: 1\n")
    assert ids(found) == ["warning W511"]
    assert ids(find(REFUSE + "return texts[:1]", settings="")) == ["warning W511"]


def test_a_broken_request_that_fails_its_neighbours_is_a_warning(find: Find) -> None:
    (found,) = find("return [str(text.index('sample')) for text in texts]")
    assert ids([found]) == ["warning W517"]
    assert found.found.startswith("an empty body, the first half of a body, random bytes fails the")
    assert found.found.endswith("ValueError: substring not found (batch size 2, 4)")
    assert found.place == "handler.py:6"


def test_a_broken_request_that_fails_alone_is_a_note(find: Find) -> None:
    body = """\
    if any(not text.startswith('sample ') for text in texts) and len(texts) == 1:
        raise ValueError('broken')
    """
    found = find(REFUSE + textwrap.dedent(body) + "return texts")
    assert ids(found) == ["note W518"]
    assert "is answered with 503" in found[0].found


def test_without_batches_a_broken_request_has_no_neighbours(find: Find) -> None:
    body = "return [str(text.index('sample')) for text in texts]"
    assert ids(find(body, settings="batchSize: 1\n")) == ["note W517"]


def test_a_broken_request_that_is_answered_like_others_is_a_note(find: Find) -> None:
    (found,) = find("return [str(len(text)) for text in texts]")
    assert ids([found]) == ["note W519"]
    assert found.found == (
        "an empty body, the first half of a body, random bytes is answered with 200"
    )


def test_a_broken_request_that_ends_the_worker_is_an_error(find: Find) -> None:
    body = "if '' in texts: raise SystemExit(1)\n"
    (found,) = find(body + REFUSE + "return texts")
    assert ids([found]) == ["error W503"]
    assert found.found.startswith("an empty body ends the worker: SystemExit: 1")
    assert found.place == "handler.py:6"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return [json.dumps(len(texts)) for text in texts]", "error W516"),
        ("return [texts[0]] * len(texts)", "warning W516"),
        ("return [json.dumps({'p': 0.5 + 0.002 * len(texts)}) for text in texts]", "warning W516"),
        ("return [json.dumps({'p': 0.5 + 1e-6 * len(texts)}) for text in texts]", None),
        ("return [json.dumps({'p': 1, str(len(texts)): 1e-7}) for text in texts]", None),
        ("return [json.dumps({'p': 1, str(len(texts)): 0.5}) for text in texts]", "error W516"),
    ],
    ids=["other value", "other text", "a little", "arithmetic", "tail", "other label"],
)
def test_answers_that_depend_on_the_batch_are_found(
    find: Find, body: str, expected: str | None
) -> None:
    assert ids(find(REFUSE + body)) == ([expected] if expected else [])


def test_answers_that_differ_from_time_to_time_are_not_compared(find: Find) -> None:
    above = "import itertools\ncount = itertools.count()"
    found = find(REFUSE + "return [json.dumps(next(count)) for text in texts]", above=above)
    assert ids(found) == ["note W520"]


def test_a_neighbour_that_changes_an_answer_is_found(find: Find) -> None:
    body = "bad = 'refused' in texts\n"
    body += "return [json.dumps(bad) if text != 'refused' else text for text in texts]"
    found = find(REFUSE + body)
    assert ids(found) == ["error W516"]
    assert "beside a broken request" in found[0].found


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"p": 0.25}, None),
        ({"p": 0.25001}, None),
        ({"p": 0.2505}, "warning W515"),
        ({"p": 0.5}, "error W515"),
        ({"q": 0.25}, "error W515"),
        ([1], "error W515"),
    ],
    ids=["same", "arithmetic", "a little", "other", "absent key", "other kind"],
)
def test_an_answer_is_compared_with_the_recorded_one(
    find: Find, answer: Any, expected: str | None
) -> None:
    body = "return [json.dumps({'p': 0.25, 'more': 'x'}) for text in texts]"
    found = find(REFUSE + body, samples=(("sample x", answer),))
    assert ids(found) == ([expected] if expected else [])


def test_an_answer_that_is_no_json_is_compared_as_text(find: Find) -> None:
    body = REFUSE + "return texts"
    assert find(body, samples=(("sample x", "sample x"),)) == []
    assert ids(find(body, samples=(("sample x", "y"),))) == ["error W515"]


@pytest.mark.parametrize(
    ("status", "expected"), [(400, []), (200, ["error W514"]), (415, ["error W514"])]
)
def test_a_sample_must_be_answered_with_its_status(
    find: Find, status: int, expected: list[str]
) -> None:
    samples = ({"text": "sample x"}, {"text": "nonsense", "status": status})
    found = find(REFUSE + "return texts", samples=samples)
    assert ids(found) == expected
    assert all(item.found.startswith("1.txt is answered with 400 instead") for item in found)


def test_a_content_type_reaches_the_handler(find: Find) -> None:
    samples = ({"text": '"x"', "content_type": "application/json"},)
    assert (
        "TypeError: string argument without an encoding"
        in find("return texts", samples=samples)[0].found
    )


def test_a_missing_module_is_an_error_with_the_requirement(find: Find) -> None:
    (found,) = find("return texts", above="import cv2")
    assert ids([found]) == ["error W502"]
    assert found.place == "handler.py:2"
    assert "add opencv-python-headless to --requirements-file" in found.remedy


@pytest.mark.parametrize("requirement", ["opencv-python-headless", "some-unknown-distribution"])
def test_a_missing_module_that_a_requirement_may_bring_is_a_warning(
    find: Find, requirement: str
) -> None:
    found = find("return texts", above="import cv2", requirements=requirement)
    assert ids(found) == ["warning W505"]


def test_what_a_stock_handler_lacks_here_is_a_warning(find: Find) -> None:
    name = "vllm_handler"
    (found,) = find("return texts", handler=name)
    assert ids([found]) == ["warning W505"]
    assert found.remedy.startswith("pip install ")
    above = f"from ts.torch_handler import {name}"
    assert ids(find("return texts", above=above)) == ["warning W505"]


@pytest.mark.skipif(
    find_spec("openvino") is not None, reason="beside OpenVINO ts.torch_handler imports what warns"
)
def test_a_stock_handler_that_finds_no_weights_is_an_error(find: Find) -> None:
    assert ids(find("return texts", handler="base_handler")) == ["error W501"]


@pytest.mark.parametrize(
    ("above", "words", "place"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero", "handler.py:2"),
        ("from json import nonsense", "ImportError: cannot import name 'nonsense'", "handler.py:2"),
        ("import helper", "RuntimeError: in the helper", "helper.py:1"),
        ("x = (", "SyntaxError: '(' was never closed", "handler.py:2"),
        ("raise SystemExit(4)", "SystemExit: 4", "handler.py:2"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_an_error_with_its_place(
    find: Find, above: str, words: str, place: str
) -> None:
    (found,) = find("return texts", above=above, helper="raise RuntimeError('in the helper')")
    assert ids([found]) == ["error W501"]
    assert words in found.found
    assert found.place == place


def test_a_model_that_only_a_server_can_run_is_a_warning(find: Find) -> None:
    found = find("return texts", settings="asyncCommunication: true\n")
    assert ids(found) == ["warning W505"]


def test_without_samples_only_loading_is_proved(find: Find) -> None:
    assert ids(find("return texts", samples=())) == ["note W531"]


def test_files_are_tried_besides_the_archives_samples(
    unpacked: Callable[..., Any], find: Find, tmp_path: Path
) -> None:
    made = unpacked("def handle(data, context):\n    return data and ['x']", samples=("a",))
    (tmp_path / "more.bin").write_bytes(b"more")
    report = run_preflight(*made, samples=[tmp_path / "more.bin"])
    assert "seconds_per_request" in report.figures
    with pytest.raises(ArchiveError, match=r"no sample .*absent\.bin"):
        run_preflight(*made, samples=[tmp_path / "absent.bin"])


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", '[{"file": 1}]', '[{"file": "../../handler.py"}]', '[{"file": "absent"}]'],
)
def test_samples_that_cannot_be_read_are_an_error(
    unpacked: Callable[..., Any], find: Find, text: str
) -> None:
    folder, manifest = unpacked("def handle(data, context):\n    return ['x']")
    (folder / "MAR-INF/samples.json").write_text(text)
    assert ids(list(run_preflight(folder, manifest).findings)) == ["error W532", "note W531"]


def test_loading_that_takes_half_of_the_time_limit_is_a_warning(find: Find) -> None:
    above = "import time\ntime.sleep(0.6)"
    settings = "startupTimeout: 1\n" + SETTINGS
    found = find(REFUSE + "return texts", above=above, settings=settings)
    assert ids(found) == ["warning W534"]
    assert "startupTimeout is 1 s" in found[0].found


def test_the_figures_tell_time_and_memory(unpacked: Callable[..., Any], find: Find) -> None:
    made = unpacked(
        "import time\ndef handle(data, context):\n    if data is None: return time.sleep(0.1)\n"
        "    time.sleep(0.01)\n    return ['x' for row in data]",
        samples=("a", "b"),
        settings=SETTINGS,
    )
    figures = run_preflight(*made).figures
    assert 0.1 <= figures["initialize_seconds"] <= figures["load_seconds"]
    assert set(figures["seconds_per_request"]) == {1, 2, 4}
    assert 0.01 <= figures["seconds_per_request"][1] < 0.1
    assert 0.0025 <= figures["seconds_per_request"][4] < 0.01
    assert figures["peak_memory_bytes"] > 10_000_000


def test_the_most_telling_batches_come_first_and_the_others_may_be_left_out() -> None:
    plan = plan_batches(3, 4)
    sizes = [len(batch.requests) for batch in plan if not batch.is_optional]
    assert sizes == [1, 1, 2, 4, 1, 1, 1, 2, 2, 2, 4]
    assert [batch.is_optional for batch in plan] == sorted(batch.is_optional for batch in plan)
    tried = {number for batch in plan for number, kind in batch.requests if kind == "whole"}
    assert tried == {0, 1, 2}
    assert plan_batches(0, 4) == []


def test_what_is_left_out_for_time_is_told(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        preflight, "try_worker", lambda *a, **k: try_here(*a, **{**k, "timeout": 0})
    )
    assert ids(find(REFUSE + "return texts")) == ["note W533"]
