"""Distillation: a small network learns the answers of a larger one besides the labels."""

from __future__ import annotations

import torch
from torch.nn import functional

__all__ = ["compute_distillation_loss"]

TEMPERATURE = 4.0
TEACHER_SHARE = 0.7
"""Of the loss; the labels have the rest."""


def compute_distillation_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the divergence of the student's softened answers from the teacher's, a value an item.

    Both are (N, classes) logits. By Hinton, Vinyals and Dean 2015; times the temperature squared,
    so that its gradient is as large as the labels' (section 2.1 there).
    """
    return TEMPERATURE**2 * functional.kl_div(
        functional.log_softmax(student / TEMPERATURE, dim=1),
        functional.log_softmax(teacher / TEMPERATURE, dim=1),
        reduction="none",
        log_target=True,
    ).sum(1)
