from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from marwright.training.calibration import compute_ece, count_bins, fit_temperature


def make_rows(values: list[list[float]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draw_answers(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits, and labels drawn from their very probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 4, generator=generator) * 2
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()
    return logits, labels


def test_the_calibration_error_is_that_computed_by_hand() -> None:
    probabilities = make_rows([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55]])
    labels = torch.tensor([0, 1, 1, 0])
    bins = count_bins(probabilities, labels, bins=2)
    assert [item.count for item in bins] == [0, 4]
    assert bins[1].confidence == pytest.approx((0.9 + 0.8 + 0.7 + 0.55) / 4)
    assert bins[1].accuracy == 0.5
    assert compute_ece(bins) == pytest.approx(0.7375 - 0.5)
    # Of ten, each answer is in an interval of its own; 0.9, 0.8, 0.7 close theirs.
    parts = count_bins(probabilities, labels, bins=10)
    assert [item.count for item in parts] == [0, 0, 0, 0, 0, 1, 1, 1, 1, 0]
    assert compute_ece(parts) == pytest.approx((0.1 + 0.8 + 0.3 + 0.55) / 4)


def test_sure_and_right_answers_have_no_error() -> None:
    labels = torch.arange(6) % 3
    assert compute_ece(count_bins(functional.one_hot(labels).float(), labels)) == 0.0
    wrong = functional.one_hot((labels + 1) % 3).float()
    assert compute_ece(count_bins(wrong, labels)) == 1.0


def test_no_answers_have_no_error() -> None:
    assert compute_ece(count_bins(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))) == 0.0


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_known_temperature_is_found_again(temperature: float) -> None:
    logits, labels = draw_answers(20_000)
    found = fit_temperature(logits * temperature, labels)
    assert found == pytest.approx(temperature, rel=0.05)


def test_a_temperature_lowers_the_error_of_answers_that_are_too_sure() -> None:
    logits, labels = draw_answers(5_000)
    sure = logits * 5
    divided = sure / fit_temperature(sure, labels)
    before, after = (compute_ece(count_bins(item.softmax(1), labels)) for item in (sure, divided))
    assert after < 0.03 < 0.2 < before
    assert torch.equal(divided.argmax(1), sure.argmax(1))


def test_the_temperature_stays_within_bounds_whatever_the_answers() -> None:
    labels = torch.arange(100) % 2
    right = functional.one_hot(labels).float()
    assert 0.05 <= fit_temperature(right, labels) < 0.06
    assert fit_temperature(1 - right, labels) == 20.0
    assert fit_temperature(torch.full((100, 2), torch.nan), labels) == 1.0


def test_it_is_found_for_what_inference_gave() -> None:
    logits, labels = draw_answers(200)
    with torch.inference_mode():
        given = logits * 1
    with torch.no_grad():
        assert 0.5 < fit_temperature(given, labels) < 2


def test_too_few_items_fit_no_temperature() -> None:
    logits, labels = torch.randn(99, 3) * 9, torch.zeros(99, dtype=torch.int64)
    assert fit_temperature(logits, labels) == 1.0
