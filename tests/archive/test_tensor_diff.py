from __future__ import annotations

import io
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marwright.archive import tensor_diff
from marwright.archive.tensor_diff import TensorChange, WeightsChange, compare_weights
from marwright.archive.tensors import Weights, read_weights


def load(state: Any) -> Weights:
    stream = io.BytesIO()
    torch.save(state, stream)
    return read_weights(stream, "model.pt")


def compare(before: Any, after: Any) -> WeightsChange:
    return compare_weights("model.pt", load(before), load(after))


def compare_one(before: torch.Tensor, after: torch.Tensor) -> TensorChange:
    (change,) = compare({"w": before}, {"w": after}).tensors
    return change


def test_every_kind_of_change_is_told_with_its_figures() -> None:
    same, before = torch.ones(2), torch.tensor([[1.0, -4.0], [2.0, 0.5]])
    after = before.clone()
    after[1, 0] = 2.5
    change = compare(
        {"same": same, "gone": same, "w": before, "shape": same, "kind": same},
        {"same": same, "new": same, "w": after, "shape": torch.ones(3), "kind": same.half()},
    )
    assert (change.format, change.equal, change.note) == ("torch.save", 1, "")
    assert change.tensors == (
        TensorChange("gone", "removed", "float32 [2]", ""),
        TensorChange("kind", "dtype", "float32 [2]", "float16 [2]", 0.0, 0.0, 0, 2),
        TensorChange("new", "added", "", "float32 [2]"),
        TensorChange("shape", "shape", "float32 [2]", "float32 [3]"),
        TensorChange("w", "values", "float32 [2, 2]", "float32 [2, 2]", 0.5, 0.125, 1, 4),
    )


@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=40),
    others=st.lists(st.floats(width=32), min_size=40, max_size=40),
    columns=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_figures_are_those_that_torch_computes_on_the_whole(
    values: list[float], others: list[float], columns: int
) -> None:
    before = torch.tensor(values).repeat(columns, 1)
    after = torch.tensor(others[: len(values)]).repeat(columns, 1)
    change = compare({"w": before}, {"w": after})
    same = (before == after) | (before.isnan() & after.isnan())
    if same.all():
        assert not change.tensors
        return
    gaps = (after.double() - before.double())[~same].abs()
    expected = float(gaps.nan_to_num(nan=math.inf, posinf=math.inf).max())
    assert change.tensors[0].max_abs == expected
    assert change.tensors[0].changed == int((~same).sum())


def test_blocks_do_not_change_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = torch.randn(7, 9), torch.randn(7, 9)
    whole = compare_one(before, after.t().contiguous().t())
    monkeypatch.setattr(tensor_diff, "BLOCK_NUMBERS", 5)
    monkeypatch.setattr(tensor_diff, "BLOCK_BYTES", 3)
    assert compare_one(before, after.t().contiguous().t()) == whole
    assert compare_one(before, after) == whole


def test_the_same_numbers_in_another_order_of_memory_are_equal() -> None:
    weight = torch.randn(3, 4)
    change = compare({"w": weight}, {"w": weight.t().contiguous().t()})
    assert (change.tensors, change.equal) == ((), 1)
    assert change.note == "the bytes differ, the tensors do not"


@pytest.mark.parametrize(
    ("before", "after", "max_abs", "max_rel"),
    [
        ([0.0], [math.nan], math.inf, math.inf),
        ([math.inf], [1.0], math.inf, math.inf),
        ([0.0], [1e-3], 1e-3, math.inf),
        ([2**53 + 1], [2**53], 1.0, 2.0**-53),
        ([True, False], [True, True], 1.0, 1.0),
        ([3 + 4j], [3 + 0j], 4.0, 0.8),
    ],
)
def test_numbers_of_every_kind_are_compared(
    before: list[Any], after: list[Any], max_abs: float, max_rel: float
) -> None:
    change = compare_one(torch.tensor(before), torch.tensor(after))
    assert change.max_abs == pytest.approx(max_abs)
    assert change.max_rel == pytest.approx(max_rel)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "uint16"])
def test_small_numbers_are_compared(kind: str) -> None:
    before = torch.tensor([1.0, 2.0]).to(getattr(torch, kind))
    after = torch.tensor([1.0, 4.0]).to(getattr(torch, kind))
    change = compare_one(before, after)
    assert (change.before, change.max_abs, change.changed) == (f"{kind} [2]", 2.0, 1)


def test_values_beside_the_tensors_are_told() -> None:
    nan = float("nan")
    change = compare({"epoch": 3, "loss": nan, "ok": 1}, {"epoch": 4, "loss": nan, "ok": True})
    assert change.values == (("epoch", 3, 4), ("ok", 1, True))


def test_code_that_changed_is_told() -> None:
    before, after = (Weights(io.BytesIO(), "TorchScript", {}, {}, {"code/a.py": n}) for n in (1, 2))
    assert compare_weights("model.pt", before, after).parts == ("code/a.py",)


def test_equal_weights_need_no_torch() -> None:
    script = (
        "import io, sys; from marwright.archive.tensor_diff import compare_weights\n"
        "from marwright.archive.tensors import Tensor, Weights\n"
        "one, other = (Weights(io.BytesIO(bytes(8)), 'x', {'w': Tensor('float32', (2,), (1,), 0)})"
        " for _ in '12')\n"
        "print(compare_weights('m', one, other).equal, 'torch' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "1 False\n"
