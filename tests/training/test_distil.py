from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from marwright.training.distil import TEMPERATURE, compute_distillation_loss
from marwright.training.loop import compute_logits, train_model
from marwright.training.settings import Settings


def make_teacher() -> nn.Module:
    teacher = nn.Linear(2, 3)
    with torch.no_grad():
        teacher.weight.copy_(torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, -4.0]]))
        teacher.bias.zero_()
    return teacher


def test_equal_answers_lose_nothing() -> None:
    logits = torch.randn(5, 4)
    loss = compute_distillation_loss(logits, logits.clone())
    assert loss.shape == (5,)
    torch.testing.assert_close(loss, torch.zeros(5), rtol=0, atol=1e-6)
    # A constant on all logits changes no answer.
    torch.testing.assert_close(
        compute_distillation_loss(logits + 3, logits), torch.zeros(5), rtol=0, atol=1e-5
    )


def test_value_and_gradient_are_those_computed_by_hand() -> None:
    # Softened by 4, logits of 4 ln 3 and 0 are 3/4 and 1/4; equal ones are halves.
    teacher = torch.tensor([[4 * math.log(3), 0.0]])
    student = torch.zeros(1, 2, requires_grad=True)
    loss = compute_distillation_loss(student, teacher)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert TEMPERATURE == 4
    assert loss.item() == pytest.approx(16 * expected, rel=1e-5)
    loss.sum().backward()
    # T^2 times (student's share - teacher's) / T, which is 4 * (0.5 - 0.75).
    assert student.grad is not None
    assert student.grad[0].tolist() == pytest.approx([-1.0, 1.0], rel=1e-5)


def test_a_student_comes_closer_to_its_teacher_than_without_it() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(120, 2, generator=generator)
    teacher = make_teacher()
    labels = compute_logits(teacher, rows).argmax(1)
    noisy = torch.where(torch.rand(120, generator=generator) < 0.3, (labels + 1) % 3, labels)
    distances = []
    for own in (None, teacher):
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
        settings = Settings(epochs=15, batch_size=20, lr=0.05)
        train_model(student, (rows, noisy), (rows, noisy), settings, teacher=own)
        answers = compute_logits(student, rows)
        distances.append(compute_distillation_loss(answers, compute_logits(teacher, rows)).mean())
    assert distances[1] < distances[0] / 2


def test_the_teacher_stays_as_it_is() -> None:
    teacher = make_teacher()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    rows = torch.randn(20, 2)
    data = (rows, torch.arange(20) % 3)
    train_model(nn.Linear(2, 3), data, data, Settings(epochs=1), teacher=teacher)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not any(parameter.grad is not None for parameter in teacher.parameters())
