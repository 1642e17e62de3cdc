from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from marwright.errors import DataError, UsageError
from marwright.training.loop import Fit, Settings, measure, train_model
from marwright.training.loop import _shift as shift_images

SMALL = Settings(epochs=2, batch_size=16, shift=1)


def make_data(count: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images whose mean brightness is their class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    images = torch.rand(count, 3, 6, 6, generator=generator) * 0.3 + labels.view(-1, 1, 1, 1) * 0.6
    return images, labels


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 2))


def fit_model(model: nn.Module, settings: Settings = SMALL, progress: Any = None) -> Fit:
    data = make_data()
    return train_model(model, data, data, settings, progress or (lambda *_: None))


def test_all_impossible_numbers_are_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        Settings(epochs=0, batch_size=0, lr=0.0, momentum=1.0, weight_decay=-1.0, shift=-1, seed=-1)
    problems = caught.value.found.split("; ")
    assert [problem.split(",")[0] for problem in problems] == [
        "epochs 0",
        "batch size 0",
        "learning rate 0.0",
        "momentum 1.0",
        "weight decay -1.0",
        "shift -1",
        "seed -1",
    ]


@pytest.mark.parametrize(
    "values",
    [
        {"lr": math.nan},
        {"lr": math.inf},
        {"momentum": math.nan},
        {"weight_decay": math.nan},
        {"momentum": -0.1},
        {"weight_decay": 1.0},
        {"seed": 1 << 32},
    ],
)
def test_a_number_just_outside_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="these settings cannot be used"):
        Settings(**values)  # type: ignore[arg-type]


def test_the_outermost_numbers_are_taken() -> None:
    Settings(
        epochs=1, batch_size=1, lr=1e-9, momentum=0, weight_decay=0, shift=0, seed=(1 << 32) - 1
    )


def test_a_training_learns() -> None:
    model = make_model()
    before = measure(model, make_data())
    fit = fit_model(model, Settings(epochs=20, batch_size=16, shift=0, lr=0.05))
    assert fit.best.validation_accuracy == 1.0
    assert measure(model, make_data())[0] < before[0]


def test_the_weights_kept_are_those_of_the_best_epoch() -> None:
    # So high a rate that the first epoch is the best.
    model = make_model()
    fit = fit_model(model, Settings(epochs=4, batch_size=10, lr=0.3, weight_decay=0.0))
    assert fit.best == max(fit.epochs, key=lambda epoch: epoch.validation_accuracy)
    assert fit.best.validation_accuracy > fit.epochs[-1].validation_accuracy
    assert measure(model, make_data()) == (fit.best.validation_loss, fit.best.validation_accuracy)


def test_of_equally_good_epochs_the_last_is_kept() -> None:
    model = make_model()
    fit = fit_model(model, Settings(epochs=3, batch_size=50, lr=1e-6, shift=0))
    assert len({epoch.validation_accuracy for epoch in fit.epochs}) == 1
    assert fit.best == fit.epochs[-1]
    assert measure(model, make_data())[0] == fit.best.validation_loss


def test_epochs_tell_their_number_and_a_rate_that_falls_along_a_cosine() -> None:
    fit = fit_model(make_model(), Settings(epochs=4, batch_size=25, lr=0.1))
    assert [epoch.epoch for epoch in fit.epochs] == [1, 2, 3, 4]
    expected = [0.05 * (1 + math.cos(math.pi * done / 4)) for done in range(4)]
    assert [epoch.lr for epoch in fit.epochs] == pytest.approx(expected)
    assert all(epoch.seconds > 0 for epoch in fit.epochs)
    assert fit.seconds >= sum(epoch.seconds for epoch in fit.epochs)


def test_the_same_seed_gives_the_same_weights_bit_for_bit() -> None:
    first, again, other = make_model(), make_model(), make_model()
    fit_model(first)
    torch.rand(3)  # somebody else draws numbers in between
    fit_model(again)
    fit_model(other, Settings(epochs=2, batch_size=16, shift=1, seed=1))
    assert torch.equal(first[1].weight, again[1].weight)  # type: ignore[index]
    assert not torch.equal(first[1].weight, other[1].weight)  # type: ignore[index]


def test_progress_is_told_after_each_batch() -> None:
    told: list[tuple[int, int, float, float]] = []
    fit = fit_model(make_model(), progress=lambda *values: told.append(values))
    assert [(done, whole) for done, whole, *_ in told] == [(n, 8) for n in range(1, 9)]
    assert all(math.isnan(accuracy) for *_, accuracy in told[:4])
    assert {accuracy for *_, accuracy in told[4:]} == {fit.epochs[0].validation_accuracy}


def test_an_error_in_progress_ends_the_training() -> None:
    def stop(*_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_model(make_model(), progress=stop)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_a_data_error(value: float) -> None:
    images, labels = make_data()
    data = (torch.full_like(images, value), labels)
    with pytest.raises(DataError, match=r"training loss is nan in epoch 1.*lower --lr"):
        train_model(make_model(), data, make_data(), SMALL, lambda *_: None)


def test_weights_that_the_last_batch_ruined_are_a_data_error() -> None:
    # One batch an epoch: its loss is measured before the step that makes the weights infinite.
    settings = Settings(epochs=1, batch_size=50, lr=1e38, momentum=0.9, weight_decay=0.0)
    with pytest.raises(DataError, match=r"validation loss is (nan|inf) in epoch 1"):
        fit_model(make_model(), settings)


@pytest.mark.parametrize("batch_size", [1, 7, 50, 1000])
def test_the_training_loss_is_the_mean_over_images_whatever_the_batches(batch_size: int) -> None:
    model = make_model()
    expected = measure(model, make_data())[0]
    settings = Settings(epochs=1, batch_size=batch_size, lr=1e-12, shift=0)
    assert fit_model(model, settings).epochs[0].train_loss == pytest.approx(expected, rel=1e-5)


def test_measuring_equals_one_pass_over_everything() -> None:
    images, labels = make_data(600)
    model = nn.Sequential(nn.Dropout(0.5), *make_model())  # type: ignore[misc]
    loss, accuracy = measure(model, (images, labels))
    logits = model.eval()(images)
    assert loss == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_a_shifted_batch_is_a_window_on_black() -> None:
    images = make_data(4)[0] + 1
    seen = set()
    for seed in range(60):
        shifted = shift_images(images, 1, torch.Generator().manual_seed(seed))
        assert shifted.shape == images.shape
        padded = functional.pad(images, (1, 1, 1, 1))
        places = [
            (down, right)
            for down in range(3)
            for right in range(3)
            if torch.equal(padded[:, :, down : down + 6, right : right + 6], shifted)
        ]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) == 9


def test_a_shift_of_0_moves_nothing() -> None:
    images = make_data(4)[0]
    assert torch.equal(shift_images(images, 0, torch.Generator()), images)
