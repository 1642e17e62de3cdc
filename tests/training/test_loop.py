from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from marwright.errors import DataError, UsageError
from marwright.training.loop import Fit, compute_logits, find_device, measure, train_model
from marwright.training.loop import _shift as shift_images
from marwright.training.settings import Settings

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


def test_a_training_learns() -> None:
    model = make_model()
    before = measure(model, make_data())
    fit = fit_model(model, Settings(epochs=20, batch_size=16, shift=0, lr=0.05))
    assert fit.best.validation_accuracy == 1.0
    assert measure(model, make_data())[0] < before[0]


def test_the_weights_kept_are_those_of_the_best_epoch() -> None:
    # So high a rate that the first epoch is the best.
    model = make_model()
    fit = fit_model(model, Settings(epochs=3, batch_size=10, lr=0.4, weight_decay=0.0))
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


@pytest.mark.parametrize("optimizer", ["gd", "sgd", "adam", "adamw"])
@pytest.mark.parametrize("schedule", ["cosine", "constant", "step", "onecycle"])
def test_every_optimiser_learns_with_every_schedule(optimizer: str, schedule: str) -> None:
    settings = Settings(
        epochs=30, batch_size=16, lr=0.02, shift=0, optimizer=optimizer, schedule=schedule
    )
    fit = fit_model(make_model(), settings)
    assert fit.epochs[-1].train_loss < 0.97 * fit.epochs[0].train_loss


def test_gd_takes_one_step_an_epoch_over_everything() -> None:
    told: list[int] = []
    settings = Settings(epochs=3, batch_size=10, optimizer="gd", shift=0, lr=0.01, weight_decay=0.0)
    model = make_model()
    images, labels = make_data()
    functional.cross_entropy(model(images), labels).backward()
    assert isinstance(model[1], nn.Linear)  # type: ignore[index]
    linear = model[1]  # type: ignore[index]
    assert linear.weight.grad is not None
    expected = linear.weight.detach() - 0.01 * linear.weight.grad
    fit = train_model(model, make_data(), make_data(), Settings(**{**vars(settings), "epochs": 1}))
    torch.testing.assert_close(linear.weight.detach(), expected)
    assert len(fit.epochs) == 1
    fit_model(make_model(), settings, progress=lambda done, *_: told.append(done))
    assert told == [1, 2, 3]


def test_smoothed_labels_leave_the_answers_less_sure() -> None:
    sure = []
    for smoothing in (0.0, 0.3):
        model = make_model()
        settings = Settings(epochs=40, lr=0.1, shift=0, label_smoothing=smoothing)
        fit_model(model, settings)
        sure.append(compute_logits(model, make_data()[0]).softmax(1).max(1).values.mean())
    assert sure[1] < 0.9 < sure[0]


def test_the_reported_loss_is_that_of_smoothed_labels() -> None:
    model = make_model()
    images, labels = make_data()
    expected = functional.cross_entropy(model(images), labels, label_smoothing=0.2).item()
    settings = Settings(epochs=1, lr=1e-12, shift=0, label_smoothing=0.2)
    assert fit_model(model, settings).epochs[0].train_loss == pytest.approx(expected, rel=1e-5)


def test_a_step_is_no_longer_than_the_clipped_gradient_allows() -> None:
    model = make_model()
    before = torch.cat([tensor.flatten().clone() for tensor in model.state_dict().values()])
    settings = Settings(
        epochs=1, optimizer="gd", lr=1.0, clip=0.01, weight_decay=0.0, schedule="constant", shift=0
    )
    fit_model(model, settings)
    after = torch.cat([tensor.flatten() for tensor in model.state_dict().values()])
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_patience_ends_a_training_that_no_longer_improves() -> None:
    # So high a rate that the validation loss rises after a while.
    settings = Settings(
        epochs=30, batch_size=10, lr=0.3, weight_decay=0.0, schedule="constant", patience=2
    )
    fit = fit_model(make_model(), settings)
    losses = [epoch.validation_loss for epoch in fit.epochs]
    assert len(losses) < 30
    assert len(losses) - 1 - losses.index(min(losses)) == 2


def test_without_patience_every_epoch_is_trained() -> None:
    settings = Settings(epochs=30, batch_size=10, lr=0.3, weight_decay=0.0, schedule="constant")
    assert len(fit_model(make_model(), settings).epochs) == 30


def test_bfloat16_trains_and_leaves_float32_weights() -> None:
    model = make_model()
    fit = fit_model(model, Settings(epochs=20, lr=0.05, shift=0, precision="bfloat16"))
    assert fit.best.validation_accuracy == 1.0
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    other = make_model()
    fit_model(other, Settings(epochs=20, lr=0.05, shift=0))
    assert not torch.equal(model[1].weight, other[1].weight)  # type: ignore[index]


def test_a_loss_that_explodes_is_a_data_error() -> None:
    settings = Settings(epochs=3, batch_size=10, lr=1e6, weight_decay=0.0, shift=0)
    with pytest.raises(DataError, match=r"loss explodes: .* in epoch 1.*lower --lr"):
        fit_model(make_model(), settings)


def test_a_penalty_is_learnt_from_but_not_reported() -> None:
    model = make_model()
    expected = measure(model, make_data())[0]
    settings = Settings(epochs=1, batch_size=50, lr=0.1, shift=0, weight_decay=0.0)
    data = make_data()

    def penalise(network: nn.Module) -> torch.Tensor:
        return 2 * torch.stack([tensor.square().sum() for tensor in network.parameters()]).sum()

    fit = train_model(model, data, data, settings, penalty=penalise)
    other = make_model()
    fit_model(other, settings)
    assert fit.epochs[0].train_loss == pytest.approx(expected, rel=1e-5)
    assert model[1].weight.norm() < other[1].weight.norm()  # type: ignore[index]


def test_pixels_of_bytes_are_learnt_from_as_from_0_to_1() -> None:
    images, labels = make_data()
    pixels = (images * 255).round().to(torch.uint8)
    models = [make_model(), make_model()]
    for model, inputs in zip(models, (pixels, pixels.float() * (1 / 255)), strict=True):
        train_model(model, (inputs, labels), (inputs, labels), SMALL)
    assert torch.equal(models[0][1].weight, models[1][1].weight)  # type: ignore[index]


def test_rows_are_not_shifted() -> None:
    rows = torch.rand(30, 4)
    data = (rows, torch.arange(30) % 2)
    weights = []
    for shift in (0, 5):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        train_model(model, data, data, Settings(epochs=1, shift=shift))
        weights.append(model.weight)
    assert torch.equal(*weights)


def test_augmented_images_are_other_images() -> None:
    models = [make_model(), make_model(), make_model()]
    for model, augment in zip(models, ("", "flip", "flip"), strict=True):
        fit_model(model, Settings(epochs=2, shift=0, augment=augment))
    weights = [model[1].weight for model in models]  # type: ignore[index]
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_missing_device_is_refused_and_auto_takes_what_there_is() -> None:
    with pytest.raises(UsageError, match="no CUDA device here; pass --device cpu, or auto"):
        find_device("cuda")
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
