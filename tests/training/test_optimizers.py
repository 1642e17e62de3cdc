from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from marwright.training.optimizers import make_optimizer, make_schedule
from marwright.training.settings import Settings


def step_once(settings: Settings, *, steps: int = 1) -> float:
    """Return where a weight of 1 is after steps down a gradient of 2."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = make_optimizer([weight], settings)
    for _ in range(steps):
        weight.grad = torch.full((1,), 2.0)
        optimizer.step()
    return weight.item()


def list_rates(schedule: str, steps: int) -> list[float]:
    settings = Settings(schedule=schedule, lr=0.1, optimizer="gd")
    weight = nn.Parameter(torch.ones(1))
    optimizer = make_optimizer([weight], settings)
    made = make_schedule(optimizer, settings, steps)
    rates = []
    for _ in range(steps):
        rates.append(float(made.get_last_lr()[0]))
        optimizer.step()
        made.step()
    return rates


def test_gd_goes_straight_down_the_gradient() -> None:
    settings = Settings(optimizer="gd", lr=0.1, momentum=0.9, weight_decay=0.0)
    assert step_once(settings, steps=2) == pytest.approx(1 - 2 * 0.1 * 2)


def test_sgd_has_nesterovs_momentum() -> None:
    settings = Settings(optimizer="sgd", lr=0.1, momentum=0.5, weight_decay=0.0)
    # Velocity 2, then 0.5 * 2 + 2; each step is gradient + momentum * velocity.
    expected = 1 - 0.1 * (2 + 0.5 * 2) - 0.1 * (2 + 0.5 * 3)
    assert step_once(settings, steps=2) == pytest.approx(expected)
    plain = Settings(optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0)
    assert step_once(plain) == pytest.approx(0.8)


def test_adams_first_step_is_as_long_as_the_rate() -> None:
    for name in ("adam", "adamw"):
        settings = Settings(optimizer=name, lr=0.1, weight_decay=0.0)
        assert step_once(settings) == pytest.approx(0.9, abs=1e-6)


def test_adamw_takes_the_weight_decay_out_of_the_gradient() -> None:
    decayed = {
        name: step_once(Settings(optimizer=name, lr=0.1, weight_decay=0.5))
        for name in ("adam", "adamw")
    }
    assert decayed["adamw"] == pytest.approx(1 * (1 - 0.1 * 0.5) - 0.1, abs=1e-6)
    assert decayed["adam"] == pytest.approx(0.9, abs=1e-6)  # in the gradient it only scales


def test_momentum_is_beta1_of_adam() -> None:
    optimizer = make_optimizer([nn.Parameter(torch.ones(1))], Settings(optimizer="adam"))
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_a_cosine_falls_to_nothing() -> None:
    rates = list_rates("cosine", 8)
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * n / 8)) for n in range(8)])


def test_a_constant_rate_stays() -> None:
    assert list_rates("constant", 12) == [0.1] * 12


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 10])
def test_steps_leave_a_tenth_after_each_third(steps: int) -> None:
    rates = list_rates("step", steps)
    third = math.ceil(steps / 3)
    assert rates == pytest.approx([0.1 * 0.1 ** (n // third) for n in range(steps)])
    assert rates[-1] >= 0.1 * 0.1**2 * 0.99


def test_one_cycle_rises_to_the_rate_and_falls_below_its_start() -> None:
    rates = list_rates("onecycle", 40)
    assert rates[0] == pytest.approx(0.1 / 25)
    assert max(rates) == pytest.approx(0.1, rel=0.01)
    assert rates[-1] < rates[0]


@pytest.mark.parametrize("schedule", ["cosine", "constant", "step", "onecycle"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_suffice_for_a_schedule(schedule: str, steps: int) -> None:
    assert all(0 < rate <= 0.1 + 1e-9 for rate in list_rates(schedule, steps))
