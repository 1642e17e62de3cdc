from __future__ import annotations

from typing import Any

import pytest

from marwright.errors import UsageError
from marwright.training.federated.federation import Federation
from marwright.training.federated.plan import Plan
from marwright.training.recipe import Recipe
from marwright.training.settings import Settings


def test_all_impossible_values_are_told_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        Federation(clients=1, rounds=0, strategy="krum", alpha=0, delta=1, noise_multiplier=-1)
    for fact in ("clients 1", "rounds 0", "'krum'", "alpha 0", "delta 1", "noise multiplier -1"):
        assert fact in caught.value.found


@pytest.mark.parametrize(
    ("failing", "why"),
    [
        ({"drop_out": (5,)}, "no client 5, from 0 to 4"),
        ({"garbage": (-1,)}, "no client -1"),
        ({"drop_out": (0, 1), "garbage": (2, 3)}, "4 of 5 clients fail"),
    ],
)
def test_a_trial_leaves_two_clients_that_work(failing: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Federation(**failing)


@pytest.mark.parametrize(
    ("choices", "why"),
    [
        ({"recipe": Recipe(teacher="runs/large")}, "a teacher"),
        ({"settings": Settings(schedule="onecycle")}, "onecycle"),
        ({"settings": Settings(patience=3)}, "patience"),
        (
            {"settings": Settings(clip=1.0), "federation": Federation(noise_multiplier=1.0)},
            "max grad norm already clips",
        ),
    ],
)
def test_what_a_federation_cannot_do_is_refused(choices: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Plan(**choices)


def test_a_plan_survives_flowers_run_config() -> None:
    plan = Plan(
        Recipe(dataset="table:rows.csv", label="kind"),
        Settings(lr=0.05, optimizer="adam"),
        Federation(clients=7, drop_out=(1, 3), garbage=(2,), strategy="fedprox"),
    )
    config = plan.write()
    assert all(isinstance(value, bool | int | float | str) for value in config.values())
    assert Plan.read(config) == plan


def test_whole_numbers_of_toml_are_taken_for_others() -> None:
    assert Plan.read({"settings.lr": 1, "federation.alpha": 2}).settings.lr == 1.0


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"settings.rate": 0.1}, "settings.rate"),
        ({"other.lr": 0.1}, "other.lr"),
        ({"settings.lr": "fast"}, "found 'fast'"),
        ({"federation.rounds": 2.5}, "found 2.5"),
        ({"federation.drop_out": "one"}, "found 'one'"),
    ],
)
def test_a_run_config_that_means_nothing_is_refused(config: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Plan.read(config)


def test_the_schedule_runs_over_the_rounds_and_not_within_one() -> None:
    plan = Plan(settings=Settings(lr=0.2, epochs=50), federation=Federation(rounds=4))
    rates = [plan.compute_rate(number) for number in (1, 2, 3, 4)]
    assert rates[0] == 0.2
    assert rates == sorted(rates, reverse=True)
    local = plan.make_local(3, 1)
    assert (local.epochs, local.schedule, local.lr) == (2, "constant", pytest.approx(0.1))


def test_no_two_clients_and_no_two_rounds_share_a_seed() -> None:
    plan = Plan()
    seeds = {plan.make_local(number, client).seed for number in range(1, 11) for client in range(5)}
    assert len(seeds) == 50
