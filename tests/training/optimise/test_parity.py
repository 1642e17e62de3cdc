from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from marwright.errors import ExportError
from marwright.training.forms import quieten
from marwright.training.models import MLP, Exported
from marwright.training.optimise.parity import check_parity

Answer = Callable[[str, Path, torch.Tensor], torch.Tensor]
REFERENCE = torch.linspace(-10, 10, 400).reshape(100, 4).roll(1, 0) * torch.tensor([1, -1, 1, -1])
LABELS = REFERENCE.argmax(1)


@pytest.mark.parametrize("quantised", [False, True])
def test_the_same_answers_differ_by_nothing(quantised: bool) -> None:
    parity = check_parity(REFERENCE, REFERENCE.clone(), LABELS, quantised=quantised)
    assert (parity.worst, parity.mean, parity.agreement) == (0, 0, 1)


def test_differences_are_measured() -> None:
    answers = REFERENCE.clone()
    answers[3, 1] += 0.008
    parity = check_parity(REFERENCE, answers, LABELS, quantised=False)
    assert parity.worst == pytest.approx(0.008, rel=1e-3)
    assert parity.mean == pytest.approx(0.008 / 400, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_float_file_may_differ_by_a_thousandth_of_the_largest_logit(scale: float) -> None:
    near, far = REFERENCE.clone(), REFERENCE.clone()
    near[0, 0] += 0.009
    far[0, 0] += 0.011
    check_parity(scale * REFERENCE, scale * near, LABELS, quantised=False)
    with pytest.raises(ExportError, match="too far from the network's"):
        check_parity(scale * REFERENCE, scale * far, LABELS, quantised=False)


@pytest.mark.parametrize(("changed", "is_fine"), [(10, True), (11, False)])
def test_a_quantised_file_may_answer_a_tenth_otherwise(changed: int, is_fine: bool) -> None:
    answers = REFERENCE.clone() + 0.5
    answers[:changed] = -answers[:changed]
    if is_fine:
        assert check_parity(REFERENCE, answers, LABELS, quantised=True).agreement == 0.9
    else:
        with pytest.raises(ExportError, match=r"89\.0%, accuracy 100\.0% before and 89\.0% after"):
            check_parity(REFERENCE, answers, LABELS, quantised=True)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused(value: float, quantised: bool) -> None:
    answers = REFERENCE.clone()
    answers[7, 2] = value
    with pytest.raises(ExportError, match="no numbers: found 1 of 100 rows"):
        check_parity(REFERENCE, answers, LABELS, quantised=quantised)


def test_one_answer_to_everything_is_refused_even_where_most_items_are_of_that_class() -> None:
    reference = torch.cat([REFERENCE[:1].repeat(99, 1) + torch.rand(99, 1), REFERENCE[50:51]])
    answers = REFERENCE[:1].repeat(100, 1)
    with pytest.raises(ExportError, match="same for every input"):
        check_parity(reference, answers, LABELS, quantised=True)


def test_another_shape_is_refused() -> None:
    with pytest.raises(ExportError, match=r"expected \[100, 4\], found \[99, 4\]"):
        check_parity(REFERENCE, REFERENCE[:99], LABELS, quantised=True)


def test_a_file_that_lost_its_weights_on_the_way_is_refused(tmp_path: Path, answer: Answer) -> None:
    """Scripted, torchao's weights are saved as zeros, and loaded so, without any error."""
    with quieten():
        torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = Exported(MLP(16, 4, widths=(32,))).eval()
    inputs = torch.rand(64, 16)
    with torch.no_grad():
        reference = model(inputs)
        with quieten():
            torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
            memory = model(inputs)
            torch.jit.script(model).save(str(tmp_path / "model.pt"))
    labels = reference.argmax(1)
    check_parity(reference, memory, labels, quantised=True)  # nothing is wrong before it is saved
    loaded = answer("torchscript", tmp_path / "model.pt", inputs)
    with pytest.raises(ExportError, match="same for every input"):
        check_parity(reference, loaded, labels, quantised=True)
