from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import random
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Import = Callable[[str], Any]

# ts leaves its version file open when imported.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

UNLUCKY = 1313
"""The model fails for it."""
BROKEN = 1414
"""A step of the handler fails for it."""
OFF = 415
"""What the handler under test says to anything but lists."""


class Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.fixture
def numbers(handlers: Import) -> Any:
    """A handler of lists of numbers; `seen` are the shapes that its model got."""
    problem = handlers("problem")
    base: Any = handlers("batch_handler").BatchHandler

    class Numbers(base):
        room = 1_000_000
        seen: list[tuple[int, ...]]

        def configure(self) -> None:
            self.seen = []

        def decode(self, part: Any) -> Any:
            if not isinstance(part.value, list):
                raise problem.RejectedInput(OFF, "expected a list")
            return part.value

        def make_tensor(self, decoded: Any) -> torch.Tensor:
            return torch.tensor(decoded, dtype=torch.float32)

        def infer(self, *batch: torch.Tensor) -> Any:
            (numbers,) = batch
            self.seen.append(tuple(numbers.shape))
            if len(numbers) > self.room:
                raise MemoryError("all of it")
            if (numbers == UNLUCKY).any():
                raise RuntimeError("secret of the model")
            return self.backend.run(numbers)

    return Numbers


@pytest.fixture
def double(numbers: Any, start: Callable[..., Any]) -> Any:
    return start(numbers, Double())


def ask(handler: Any, *requests: Any) -> list[SimpleNamespace]:
    """Return each request's answer with its body parsed."""
    answers = handler.answer(requests)
    assert len(answers) == len(requests)
    for answer in answers:
        good = answer.status == 200
        assert answer.content_type == ("application/json" if good else "application/problem+json")
    return [SimpleNamespace(status=a.status, body=json.loads(a.body), raw=a) for a in answers]


def read_log(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    lines = [record.getMessage() for record in caplog.records]
    assert not any("\n" in line for line in lines)
    return [json.loads(line) for line in lines]


def test_each_request_gets_its_own_answer_in_order(double: Any, post: Callable[..., Any]) -> None:
    bodies = [[number, number + 1] for number in range(32)]
    random.Random(0).shuffle(bodies)
    assert [answer.body for answer in ask(double, *map(post, bodies))] == [
        [2 * first, 2 * second] for first, second in bodies
    ]
    assert double.seen == [(32, 2)]


def test_an_empty_batch_gets_no_answers(double: Any) -> None:
    assert double.answer([]) == []


def test_things_of_many_requests_are_inferred_together_and_scattered(
    double: Any, post: Callable[..., Any]
) -> None:
    requests = [post({"instances": [[n, k] for k in range(n)]}) for n in (1, 3, 2)]
    answers = ask(double, post([9, 9]), *requests)
    assert double.seen == [(7, 2)]
    assert [answer.body for answer in answers[1:]] == [
        {"predictions": [[2 * n, 2 * k] for k in range(n)]} for n in (1, 3, 2)
    ]


@pytest.mark.parametrize("place", range(8))
def test_a_request_that_makes_inference_fail_is_the_only_one_to_fail(
    double: Any, post: Callable[..., Any], place: int
) -> None:
    bodies = [[n, n] for n in range(8)]
    bodies[place] = [UNLUCKY, 0]
    answers = ask(double, *map(post, bodies))
    for number, answer in enumerate(answers):
        if number == place:
            assert answer.status == 500
        else:
            assert (answer.status, answer.body) == (200, [2 * number, 2 * number])
    # 8, then two halves at each of three steps: no more than it takes to find one.
    assert len(double.seen) == 7


@pytest.mark.parametrize("places", [(0, 7), (3, 4), (0, 1, 2), tuple(range(8))])
def test_several_that_make_inference_fail_are_all_found(
    double: Any, post: Callable[..., Any], places: tuple[int, ...]
) -> None:
    bodies = [[UNLUCKY if n in places else n] for n in range(8)]
    statuses = [answer.status for answer in ask(double, *map(post, bodies))]
    assert statuses == [500 if n in places else 200 for n in range(8)]


def test_a_request_of_several_things_fails_by_one_of_them_and_alone(
    double: Any, post: Callable[..., Any]
) -> None:
    first, second = ask(double, post({"instances": [[1], [UNLUCKY], [2]]}), post([3]))
    assert first.status == 500
    assert (second.status, second.body) == (200, [6])


@pytest.mark.parametrize(("room", "shapes"), [(8, [8]), (4, [8, 4, 4]), (3, [8, 4, 2, 2, 4, 2, 2])])
def test_out_of_memory_halves_the_batch(
    double: Any, post: Callable[..., Any], room: int, shapes: list[int]
) -> None:
    double.room = room
    answers = ask(double, *(post([n]) for n in range(8)))
    assert [answer.body for answer in answers] == [[2 * n] for n in range(8)]
    assert [shape[0] for shape in double.seen] == shapes


def test_a_batch_that_failed_holds_no_memory_while_its_halves_are_tried(
    double: Any, post: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The exception's traceback would hold what infer had made until then.
    made: list[weakref.ref[torch.Tensor]] = []
    alive = []

    def infer(numbers: torch.Tensor) -> torch.Tensor:
        alive.append(sum(reference() is not None for reference in made))
        intermediate = numbers * 2
        made.append(weakref.ref(intermediate))
        if len(numbers) > 1:
            raise MemoryError("all of it")
        return intermediate

    monkeypatch.setattr(double, "infer", infer)
    answers = ask(double, *(post([n]) for n in range(4)))
    assert [answer.body for answer in answers] == [[0], [2], [4], [6]]
    assert alive[:3] == [0, 0, 0]  # of 4, 2, 1


def exhaust_torch() -> None:
    torch.empty(2**60)


def exhaust_python() -> None:
    bytes(2**62)


def exhaust_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("exhaust", [exhaust_torch, exhaust_python, exhaust_cuda])
@pytest.mark.parametrize("step", ["decode", "make_tensor", "infer", "make_answer"])
def test_a_request_that_alone_needs_more_memory_than_there_is_gets_507(
    double: Any,
    post: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    exhaust: Callable[[], None],
) -> None:
    monkeypatch.setattr(double, step, lambda *_: exhaust())
    (answer,) = ask(double, post([1]))
    assert (answer.status, answer.body["title"]) == (507, "Insufficient Storage")
    assert answer.body["instance"].startswith("urn:uuid:")


def test_what_fails_together_is_made_for_each_request_by_itself(
    double: Any, post: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def make_tensors(decoded: list[Any]) -> list[torch.Tensor]:
        calls.append(len(decoded))
        if [UNLUCKY] in decoded:
            raise RuntimeError("secret of the model")
        return [torch.tensor(item, dtype=torch.float32) for item in decoded]

    monkeypatch.setattr(double, "make_tensors", make_tensors)
    answers = ask(double, *map(post, ([1], [UNLUCKY], [3])))
    assert [answer.status for answer in answers] == [200, 500, 200]
    assert [answers[0].body, answers[2].body] == [[2], [6]]
    assert calls == [3, 1, 1, 1]
    calls.clear()
    assert [answer.body for answer in ask(double, post([1]), post([2]))] == [[2], [4]]
    assert calls == [2]


def test_shapes_that_differ_are_inferred_apart(double: Any, post: Callable[..., Any]) -> None:
    bodies = [[1], [1, 2], [[1, 2]], [3], [3, 4]]
    answers = ask(double, *map(post, bodies))
    assert [answer.body for answer in answers] == [[2], [2, 4], [[2, 4]], [6], [6, 8]]
    assert Counter(double.seen) == Counter([(2, 1), (2, 2), (1, 1, 2)])


def test_shapes_that_differ_are_padded_where_the_settings_say_so(
    numbers: Any, start: Callable[..., Any], post: Callable[..., Any]
) -> None:
    handler = start(numbers, Double(), collate="pad", pad_value=-1)
    answers = ask(handler, *map(post, ([1], [[1, 2], [3, 4]], [1, 2, 3], [[5]])))
    assert [answer.body for answer in answers] == [
        [2, -2, -2],
        [[2, 4], [6, 8]],
        [2, 4, 6],
        [[10, -2], [-2, -2]],
    ]
    assert Counter(handler.seen) == Counter([(2, 3), (2, 2, 2)])  # another rank cannot be padded


def test_a_long_thing_does_not_blow_up_its_neighbours(
    numbers: Any, start: Callable[..., Any], post: Callable[..., Any]
) -> None:
    handler = start(numbers, Double(), collate="pad")
    long, wide, high = [7] * 100, [[1] * 50], [[1]] * 50
    answers = ask(handler, *map(post, ([1], [1, 2], long, [1, 2, 3], wide, high)))
    assert [answer.body for answer in answers] == [
        [2, 0, 0],
        [2, 4, 0],
        [14] * 100,
        [2, 4, 6],
        [[2] * 50],
        [[2]] * 50,
    ]
    assert Counter(handler.seen) == Counter([(1, 100), (3, 3), (1, 1, 50), (1, 50, 1)])


def test_shapes_that_differ_are_refused_where_the_settings_say_so(
    numbers: Any, start: Callable[..., Any], post: Callable[..., Any]
) -> None:
    numbers.make_example = lambda self: torch.zeros(2)
    handler = start(numbers, Double(), collate="refuse")
    good, bad = ask(handler, post([1, 2]), post([1, 2, 3]))
    assert (good.status, bad.status) == (200, 422)
    assert bad.body["detail"] == "expected shapes [(2,)], found [(3,)]"


def test_a_collation_that_cannot_be_is_told_at_the_start(
    numbers: Any, start: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=r"collate to be one of .* found 'mix'"):
        start(numbers, Double(), collate="mix")
    with pytest.raises(ValueError, match="knows its shapes"):
        start(numbers, Double(), collate="refuse")


def test_types_that_differ_are_inferred_apart(
    double: Any, post: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(double, "make_tensor", torch.tensor)
    assert [a.body for a in ask(double, post([1]), post([1.5]))] == [[2], [3.0]]
    assert double.seen == [(1, 1), (1, 1)]


def test_no_more_than_max_batch_are_inferred_at_once(
    numbers: Any, start: Callable[..., Any], post: Callable[..., Any]
) -> None:
    handler = start(numbers, Double(), max_batch=3)
    answers = ask(handler, *(post([n]) for n in range(8)))
    assert [answer.body for answer in answers] == [[2 * n] for n in range(8)]
    assert [shape[0] for shape in handler.seen] == [3, 3, 2]


STEPS = ["read", "decode", "make_tensor", "infer", "make_answer"]


@pytest.mark.parametrize("step", STEPS)
def test_what_nobody_expected_is_500_with_an_id_that_leads_to_the_traceback(
    numbers: Any,
    start: Callable[..., Any],
    post: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    step: str,
) -> None:
    handler = start(break_for(numbers, step, KeyError("secret")), Double())
    caplog.clear()
    bad, good = ask(handler, post([BROKEN], number=4), post([1]))
    assert (good.status, good.body) == (200, [2])
    assert (bad.status, "secret" in bad.raw.body.decode()) == (500, False)
    (line,) = read_log(caplog)
    assert line["instance"] == bad.body["instance"]
    assert (line["request_id"], line["status"]) == ("request-4", 500)
    assert (line["event"], line["model"], line["version"]) == ("request_failed", "m", "1.0")
    assert line["reason"] == "KeyError: 'secret'"
    assert f"in broken_{step}" in line["traceback"]


@pytest.mark.parametrize("step", STEPS)
def test_each_step_may_refuse_one_request(
    handlers: Import,
    numbers: Any,
    start: Callable[..., Any],
    post: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    step: str,
) -> None:
    refusal = handlers("problem").RejectedInput(422, "not this one")
    handler = start(break_for(numbers, step, refusal), Double())
    caplog.clear()
    bad, good = ask(handler, post([BROKEN]), post([1]))
    assert (good.status, good.body) == (200, [2])
    assert bad.body == {
        "title": "Unprocessable Content",
        "status": 422,
        "detail": "not this one",
    }
    (line,) = read_log(caplog)
    assert line["reason"] == "not this one"
    assert "traceback" not in line


def break_for(kind: Any, step: str, error: Exception) -> Any:
    """Return a handler whose step raises where it meets the broken number."""

    def holds_it(value: Any) -> bool:
        if isinstance(value, torch.Tensor):  # what infer gets, or make_answer
            return bool((value == (2 * BROKEN if step == "make_answer" else BROKEN)).any())
        if hasattr(value, "parts"):
            return any(part.value == [BROKEN] for part in value.parts)
        return getattr(value, "value", value) == [BROKEN]

    whole = getattr(kind, step)

    def broken(self: Any, value: Any) -> Any:
        if holds_it(value):
            raise error
        return whole(self, value)

    broken.__code__ = broken.__code__.replace(co_name=f"broken_{step}")
    return type(kind.__name__, (kind,), {step: broken})


def test_good_requests_leave_no_line_and_each_failed_one_leaves_one(
    double: Any, post: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    ask(double, *(post([n]) for n in range(8)))
    assert not caplog.records
    ask(double, post([1]), post(b"[", "application/json", number=1), post(b"x", number=2))
    assert [(line["request_id"], line["status"]) for line in read_log(caplog)] == [
        ("request-1", 400),
        ("request-2", OFF),
    ]


def test_what_a_request_brings_cannot_forge_a_line_of_the_log(
    double: Any, post: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    key = 'x\n{"event": "request_failed"}\n[METRICS]'
    ask(double, post({"inputs": {key: 1}}), post(parts={key: b"1"}))
    assert len(read_log(caplog)) == 2


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (lambda x: {"a": x, "b": x + 1}, {"a": [1], "b": [2]}),
        (lambda x: (x, x + 1), [[1], [2]]),
        (lambda x: (x, {"b": x}), [[1], {"b": [1]}]),
        (lambda x: [5, 6], 5),
        (lambda x: [{"label": "a"}, {"label": "b"}], {"label": "a"}),
    ],
)
def test_outputs_are_split_whatever_holds_them(
    double: Any,
    post: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    outputs: Any,
    expected: Any,
) -> None:
    def show(output: Any) -> Any:
        if isinstance(output, dict):
            return {name: show(value) for name, value in output.items()}
        if isinstance(output, tuple):
            return [show(value) for value in output]
        return output.tolist() if isinstance(output, torch.Tensor) else output

    monkeypatch.setattr(double, "infer", outputs)
    monkeypatch.setattr(double, "make_answer", show)
    first, _ = ask(double, post([1]), post([2]))
    assert first.body == expected


@pytest.mark.parametrize(
    "outputs",
    [
        lambda x: x[:-1],
        lambda x: torch.cat([x, x]),
        lambda x: torch.tensor(1.0),
        lambda x: None,
        lambda x: (x, x[:-1]),
        lambda x: (),
        lambda x: [],
        lambda x: {"a": x[:0]},
    ],
)
def test_a_model_without_one_output_for_each_input_fails_each_request(
    double: Any, post: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, outputs: Any
) -> None:
    monkeypatch.setattr(double, "infer", outputs)
    assert {answer.status for answer in ask(double, post([1]), post([2]), post([3]))} == {500}


def test_a_model_that_answers_nan_fails(
    double: Any, post: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(double, "infer", lambda x: x / 0)
    assert [answer.status for answer in ask(double, post([1]))] == [500]


def test_inference_runs_without_gradients(
    double: Any, post: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    def infer(x: torch.Tensor) -> torch.Tensor:
        modes.append(torch.is_inference_mode_enabled())
        return x

    monkeypatch.setattr(double, "infer", infer)
    ask(double, post([1]))
    assert modes == [True]


def test_a_request_to_explain_is_explained_and_not_inferred(
    handlers: Import, double: Any, post: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = ask(double, post([1], explain=True), post([2]))
    assert (first.status, second.body) == (501, [4])
    assert double.seen == [(1, 1)]
    response = handlers("inference_response").InferenceResponse
    monkeypatch.setattr(
        double,
        "explain",
        lambda request, inputs: response(200, "application/json", str(len(inputs)).encode()),
    )
    assert ask(double, post({"instances": [[1], [2]]}, explain=True))[0].body == 2


@pytest.mark.parametrize(("count", "status"), [(0, 400), (1, 200), (3, 200), (4, 413)])
def test_the_things_that_a_request_turns_out_to_hold_are_counted(
    numbers: Any, start: Callable[..., Any], post: Callable[..., Any], count: int, status: int
) -> None:
    numbers.read = lambda self, request: [[n] for n in range(request.parts[0].value)]
    handler = start(numbers, Double(), max_items=3)
    assert ask(handler, post(count))[0].status == status


def test_the_limits_of_the_settings_hold(
    numbers: Any, start: Callable[..., Any], post: Callable[..., Any]
) -> None:
    handler = start(numbers, Double(), max_bytes=10, max_items=2)
    answers = ask(handler, post([1, 2]), post([1.234567, 2]), post({"instances": [[1], [2], [3]]}))
    assert [answer.status for answer in answers] == [200, 413, 413]
    handler = start(numbers, Double(), max_items=2)
    assert ask(handler, post({"instances": [[1], [2], [3]]}))[0].status == 413


def test_the_archives_schema_refuses_what_it_does_not_allow(
    numbers: Any, start: Callable[..., Any], post: Callable[..., Any], tmp_path: Path
) -> None:
    spec = {"input": {"schema": {"items": {"maximum": 5}}}}
    (tmp_path / "model/MAR-INF").mkdir(parents=True)
    (tmp_path / "model/MAR-INF/spec.json").write_text(json.dumps(spec))
    bad, good = ask(start(numbers, Double()), post([1, 6]), post([1, 5]))
    assert (bad.status, good.status) == (422, 200)
    assert "[1]: 6 is greater than the maximum of 5" in bad.body["detail"]


def test_stages_statuses_and_sizes_are_counted(
    numbers: Any, start: Callable[..., Any], post: Callable[..., Any]
) -> None:
    counted = []

    class Cache:
        def get_metric(self, name: str) -> Any:
            return SimpleNamespace(add_or_update=lambda *call: counted.append((name, *call)))

    handler = start(numbers, Double(), metrics=Cache())
    ask(handler, post([1]), post(b"x"), post([UNLUCKY]))
    handler.metrics.flush()
    found = {(name, *labels): value for name, value, labels in counted}
    assert found["marwright_batch_size_sum", "m", "1.0"] == 3
    for status in ("200", "415", "500"):
        assert found["marwright_requests_total", "m", "1.0", status] == 1
    for stage in ("decode", "preprocess", "infer", "postprocess"):
        assert found["marwright_stage_seconds_count", "m", "1.0", stage] == 1


@pytest.mark.parametrize(
    ("batch_size", "settings", "sizes"),
    [(8, {}, [1, 1, 2, 2, 8, 8]), (1, {}, [1, 1, 2, 2]), (8, {"warm_up": False}, [])],
)
def test_the_model_is_warmed_up_at_the_batch_sizes_to_come(
    numbers: Any,
    start: Callable[..., Any],
    batch_size: int,
    settings: dict[str, Any],
    sizes: list[int],
) -> None:
    numbers.make_example = lambda self: torch.zeros(2)
    handler = start(numbers, Double(), batch_size=batch_size, **settings)
    assert handler.seen == [(size, 2) for size in sizes]


@pytest.mark.parametrize(
    ("config", "settings", "threads"),
    [
        ({}, {}, 8),
        ({"minWorkers": 2, "maxWorkers": 2}, {}, 4),
        ({"minWorkers": 1, "maxWorkers": 4}, {}, 2),
        ({"maxWorkers": 2}, {"threads": 3}, 3),
    ],
)
def test_a_worker_computes_with_its_share_of_the_cores(
    handlers: Import,
    numbers: Any,
    start: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    settings: dict[str, Any],
    threads: int,
) -> None:
    monkeypatch.setattr(handlers("cpu_share"), "count_cores", lambda: 8)
    start(numbers, Double(), config=config, **settings)
    assert torch.get_num_threads() == threads


def test_torchserves_contract_is_kept(double: Any, handlers: Import) -> None:
    from ts.context import Context, RequestProcessor

    context = Context("m", "", {}, 8, None, "0.12.0")
    rows = [{"body": [1]}, {"body": bytearray(b"[2]")}, {"body": b"["}, {"body": [UNLUCKY]}]
    kinds = ["application/json", "Application/JSON", "application/json", "application/json"]
    context.request_ids = {number: f"id-{number}" for number in range(4)}
    context.request_processor = [
        RequestProcessor({"Content-Type": kind, "body": {"content-type": kind}}) for kind in kinds
    ]
    bodies = double.handle(rows, context)
    assert bodies[:2] == [b"[2.0]", b"[4.0]"]
    assert [context.get_response_status(number)[0] for number in range(4)] == [200, 200, 400, 500]
    assert context.get_response_status(2)[1] == "Bad Request"
    assert context.get_response_content_type(0) == "application/json"
    assert context.get_response_content_type(3) == "application/problem+json"


def test_handle_takes_the_clients_wishes_from_the_headers(double: Any) -> None:
    from ts.context import Context, RequestProcessor

    context = Context("m", "", {}, 8, None, "0.12.0")
    context.request_ids = {0: "a", 1: "b"}
    context.request_processor = [
        RequestProcessor({"ACCEPT": "application/octet-stream"}),
        RequestProcessor({"explain": "True"}),
    ]
    raw, _ = double.handle([{"body": [1]}, {"body": [1]}], context)
    assert raw == b"\x00\x00\x00\x40"
    assert context.get_response_headers(0)["x-array-dtype"] == "float32"
    assert context.get_response_status(1)[0] == 501


def test_a_subclass_that_decodes_nothing_answers_500(
    handlers: Import, start: Callable[..., Any], post: Callable[..., Any]
) -> None:
    handler = start(handlers("batch_handler").BatchHandler, Double())
    assert ask(handler, post([1]))[0].status == 500


# What a request holds, and what it must get whatever stands beside it.
KINDS: dict[str, tuple[Any, int]] = {
    "good": ([1, 2], 200),
    "other shape": ([[3]], 200),
    "several": ({"instances": [[1, 2], [3]]}, 200),
    "unlucky": ([UNLUCKY, 0], 500),
    "unlucky among several": ({"instances": [[1, 2], [UNLUCKY]]}, 500),
    "refused": (5, OFF),
    "ragged": ([[1], [2, 3]], 500),
    "no JSON": (b"", 400),
}


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    names=st.lists(st.sampled_from(sorted(KINDS)), max_size=12),
    room=st.sampled_from([1, 2, 3, math.inf]),
)
def test_a_request_is_answered_as_alone_whatever_stands_beside_it(
    double: Any, post: Callable[..., Any], names: list[str], room: float
) -> None:
    double.room = room
    answers = ask(double, *(post(KINDS[name][0]) for name in names))
    for name, answer in zip(names, answers, strict=True):
        (alone,) = ask(double, post(KINDS[name][0]))
        assert answer.status == alone.status == KINDS[name][1]
        if answer.status == 200:
            assert answer.body == alone.body


def read_spool(folder: Path) -> list[dict[str, Any]]:
    (path,) = (folder / "spool").iterdir()
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def logging_handler(
    handlers: Import, numbers: Any, start: Callable[..., Any], tmp_path: Path
) -> Any:
    """Logs everything that it is asked; tells the first number as its prediction."""
    observation = handlers("prediction_log").Observation

    class Telling(numbers):
        def describe(self, inputs: Any, outputs: Any) -> Any:
            return [
                observation(features={"first": tensor[0].item()}, prediction=str(output.tolist()))
                for (tensor,), output in zip(inputs, outputs, strict=True)
            ]

    log = {"folder": str(tmp_path / "log"), "share": 100}
    return start(Telling, Double(), prediction_log=log)


def test_every_thing_has_a_line_and_a_request_that_failed_has_one(
    logging_handler: Any, post: Callable[..., Any], tmp_path: Path
) -> None:
    requests = [
        post([1, 2], number=0),
        post({"instances": [[3], [4]]}, number=1),
        post(b"no list", number=2),
        post([UNLUCKY], number=3),
    ]
    logging_handler.answer(requests)
    logging_handler.prediction_log.close()
    lines = read_spool(tmp_path / "log")
    found = [
        (line["request"], line["item"], line["status"], line.get("prediction")) for line in lines
    ]
    assert found == [
        ("request-0", 0, 200, "[2.0, 4.0]"),
        ("request-1", 0, 200, "[6.0]"),
        ("request-1", 1, 200, "[8.0]"),
        ("request-2", 0, OFF, None),
        ("request-3", 0, 500, None),
    ]
    assert [line.get("features") for line in lines[:3]] == [{"first": n} for n in (1.0, 3.0, 4.0)]
    assert all(0 < line["seconds"] < 10 and line["model"] == "m" for line in lines)
    assert lines[3]["digest"] == hashlib.sha256(b"no list").hexdigest()


def test_only_the_share_is_logged_and_answers_are_the_same(
    logging_handler: Any, double: Any, post: Callable[..., Any], tmp_path: Path
) -> None:
    log = logging_handler.prediction_log
    log._least = 1000  # 10 percent
    requests = [post([n], number=n) for n in range(500)]
    wanted = [request.id for request in requests if log.takes(request.id)]
    answers = [answer.body for answer in ask(logging_handler, *requests)]
    assert answers == [answer.body for answer in ask(double, *requests)]
    log.close()
    assert [line["request"] for line in read_spool(tmp_path / "log")] == wanted
    assert 20 < len(wanted) < 80


def test_what_is_logged_holds_no_batch_in_memory(
    logging_handler: Any, post: Callable[..., Any]
) -> None:
    kept: list[Any] = []
    logging_handler.prediction_log.keep = kept.extend
    # As image_classifier does it: each thing's tensor is a view of the batch's.
    logging_handler.make_tensors = lambda decoded: list(torch.tensor(decoded).float())
    logging_handler.answer([post([n, n]) for n in range(8)])
    assert len(kept) == 8
    assert all(tensor.untyped_storage().nbytes() == 8 for note in kept for tensor in note.tensors)


def test_an_output_that_is_logged_holds_no_batch_in_memory_either(
    logging_handler: Any, post: Callable[..., Any]
) -> None:
    kept: list[Any] = []
    logging_handler.prediction_log.keep = kept.extend
    infer = logging_handler.infer

    def infer_several(*batch: Any) -> Any:
        found = infer(*batch)
        return {"all": found, "pair": (found, found.numpy())}

    logging_handler.infer = infer_several
    logging_handler.make_answer = lambda output: output["all"].tolist()
    logging_handler.answer([post([n, n]) for n in range(8)])
    assert len(kept) == 8
    for note in kept:
        tensor, (other, array) = note.output["all"], note.output["pair"]
        assert tensor.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 8
        assert array.base is None


def test_what_cannot_be_noted_costs_no_answer_and_is_counted(
    logging_handler: Any,
    post: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(logging_handler.metrics, "count_predictions", lambda *n: told.append(n))

    def fail(self: Any, notes: Any) -> None:
        raise MemoryError("no room for a copy")

    monkeypatch.setattr(type(logging_handler.prediction_log), "keep", fail)
    requests = [post([1]), post({"instances": [[3], [4]]}), post([1], explain=True), post(b"no")]
    for _ in range(2):
        answers = logging_handler.answer(requests)
        assert [answer.status for answer in answers] == [200, 200, 501, OFF]
    assert told == [(0, 4), (0, 4)]
    assert caplog.text.count("predictions cannot be noted: MemoryError: no room for a copy") == 1


def test_explanations_are_not_logged(logging_handler: Any, post: Callable[..., Any]) -> None:
    kept: list[Any] = []
    logging_handler.prediction_log.keep = kept.extend
    logging_handler.answer([post([1], explain=True), post([1])])
    assert len(kept) == 1


def test_a_renewal_writes_what_waits(
    logging_handler: Any, post: Callable[..., Any], tmp_path: Path
) -> None:
    logging_handler.answer([post([1])])
    logging_handler._flush()
    assert len(read_spool(tmp_path / "log")) == 1


def test_a_handler_that_tells_nothing_still_has_lines(
    numbers: Any, start: Callable[..., Any], post: Callable[..., Any], tmp_path: Path
) -> None:
    log = {"folder": str(tmp_path / "log"), "share": 100, "score": "energy"}
    handler = start(numbers, Double(), prediction_log=log)
    handler.answer([post([1])])
    handler.prediction_log.close()
    (line,) = read_spool(tmp_path / "log")
    assert not {"prediction", "features", "score"} & set(line)


def test_a_score_that_the_handler_cannot_tell_is_refused_at_the_start(
    numbers: Any, start: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match="ood_score: Numbers has no score"):
        start(numbers, Double(), ood_score="energy")
    with pytest.raises(ValueError, match=r"handler\.ood_score to be one of"):
        start(numbers, Double(), ood_score="best")


def test_files_and_base64_have_the_digest_of_their_bytes(
    logging_handler: Any, post: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging_handler, "decode", lambda part: [len(part.read_bytes())])
    text = base64.b64encode(b"bytes").decode()
    logging_handler.answer(
        [
            post(b"bytes", "image/png"),
            post({"data": text}),
            post({"instances": [{"b64": text}]}),
            post(parts={"a": b"bytes", "b": b"bytes"}),
        ]
    )
    logging_handler.prediction_log.close()
    lines = read_spool(tmp_path / "log")
    assert [line["digest"] for line in lines] == [hashlib.sha256(b"bytes").hexdigest()] * 5
    assert [line.get("content_type") for line in lines] == ["image/png", *[None] * 4]
