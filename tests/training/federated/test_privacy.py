from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from marwright.errors import UsageError
from marwright.training.federated.federation import Federation
from marwright.training.models import MLP, Exported
from marwright.training.settings import Settings

pytest.importorskip("opacus")

from marwright.training.federated.privacy import (
    PrivateTraining,
    check_network,
    compute_epsilon,
)


def make_training(noise: float, *, penalty: float = 0.0) -> PrivateTraining:
    torch.manual_seed(0)
    rows = torch.randn(64, 4)
    labels = (rows[:, 0] > 0).long()
    settings = Settings(
        epochs=1, batch_size=8, lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant"
    )

    def pull(model: nn.Module) -> torch.Tensor:
        return penalty * torch.stack([part.sum() for part in model.parameters()]).sum()

    return PrivateTraining(
        Exported(MLP(4, 2, widths=(8,)), mean=0.0, deviation=1.0),
        (rows, labels),
        (rows, labels),
        settings,
        Federation(noise_multiplier=noise, max_grad_norm=0.5),
        penalty=pull if penalty else None,
    )


def find_exact_epsilon(deviation: float, delta: float) -> float:
    """Return the epsilon of one Gaussian query of sensitivity 1 (Balle and Wang 2018, eq. 6)."""

    def compute_delta(epsilon: float) -> float:
        def phi(value: float) -> float:
            return math.erfc(-value / math.sqrt(2)) / 2

        half, whole = 1 / (2 * deviation), epsilon * deviation
        return phi(half - whole) - math.exp(epsilon) * phi(-half - whole)

    low, high = 0.0, 100.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if compute_delta(middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize("deviation", [1.0, 2.0, 5.0])
def test_epsilon_is_a_close_upper_bound_of_what_is_known_exactly(deviation: float) -> None:
    exact = find_exact_epsilon(deviation, 1e-5)
    # Four queries with twice the noise say as much as one.
    bound = compute_epsilon(noise_multiplier=2 * deviation, sample_rate=1.0, steps=4, delta=1e-5)
    assert exact <= bound <= 1.15 * exact


def test_epsilon_falls_with_noise_and_rises_with_steps() -> None:
    noisy, usual, long = (
        compute_epsilon(noise_multiplier=noise, sample_rate=0.1, steps=steps, delta=1e-5)
        for noise, steps in ((2.0, 100), (1.0, 100), (1.0, 400))
    )
    assert 0 < noisy < usual < long


def test_no_step_moves_further_than_the_clipped_gradients_and_no_noise_allow() -> None:
    training = make_training(noise=1e-9)
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    training._take_step(training.model, torch.arange(8), 1)
    moved = torch.cat(
        [
            (now - then).flatten()
            for now, then in zip(training.model.parameters(), before, strict=True)
        ]
    ).norm()
    # lr times clip, times the items drawn over those expected: 20 of 8 are one batch in 30,000.
    assert 0 < moved <= 0.1 * 0.5 * 20 / 8


def test_the_noise_is_not_that_of_the_seed() -> None:
    states = []
    for _ in range(2):
        training = make_training(noise=1.0)
        training.run()
        states.append(torch.cat([p.detach().flatten() for p in training.model.parameters()]))
    assert not torch.allclose(states[0], states[1])


def test_fedprox_pulls_though_the_gradients_are_clipped() -> None:
    still, pulled = make_training(noise=1e-9), make_training(noise=1e-9, penalty=100.0)
    for training in (still, pulled):
        training.run()
        training.release()
    sums = [sum(float(p.detach().sum()) for p in t.model.parameters()) for t in (still, pulled)]
    assert sums[1] < sums[0] - 10


def test_an_empty_poisson_batch_still_moves_by_noise() -> None:
    training = make_training(noise=1.0)
    training.sample_rate = 0.0
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    assert training._take_step(training.model, torch.arange(8), 1) == 0.0
    assert not any(
        torch.equal(now, then)
        for now, then in zip(training.model.parameters(), before, strict=True)
    )


def test_a_network_with_batchnorm_is_refused_by_name() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with pytest.raises(UsageError, match=r"found 1; .*ModuleValidator\.fix"):
        check_network(network)
    check_network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)))
