"""Differential privacy at a client: Opacus's DP-SGD (Abadi et al. 2016) in the same loop.

Whoever sees what a client sends learns little of any single item: each item's gradient is clipped,
noise is added to their sum, and the accountant says how little, as epsilon at a delta. The noise
and the choice of items come from a seed that nobody else knows, so a private training is the one
kind that no seed repeats.
"""

from __future__ import annotations

import secrets
import warnings
from typing import Any

import torch
from torch import nn

from marwright.errors import UsageError

from ..loop import Penalty, Tensors, Training
from ..models import Exported
from ..settings import Settings
from .federation import Federation

__all__ = ["check_network", "compute_epsilon", "load_opacus", "PrivateTraining"]


def load_opacus() -> None:
    """Import Opacus.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import opacus  # noqa: F401  # whether it is there
    except ImportError as exc:
        raise UsageError(
            "differential privacy needs Opacus",
            found=str(exc),
            remedy="pip install 'marwright[private]'",
        ) from exc


def check_network(network: nn.Module) -> None:
    """Refuse a network with layers that mix the items of a batch, or that Opacus does not know.

    Raises:
        UsageError: there is such a layer; all are named.
    """
    load_opacus()
    from opacus.validators import ModuleValidator

    if not ModuleValidator.validate(network.train(), strict=False):
        return
    mixing = (nn.modules.batchnorm._BatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d)
    names = [name for name, layer in network.named_modules() if isinstance(layer, mixing)]
    problems = [str(problem) for problem in ModuleValidator.validate(network, strict=False)]
    raise UsageError(
        "this network cannot be trained with differential privacy",
        expected="layers that treat each item by itself",
        found=", ".join(names) if names else "; ".join(problems),
        remedy="pass a module:Class that returns opacus.validators.ModuleValidator.fix(network), "
        "which puts GroupNorm in BatchNorm's place",
    )


def compute_epsilon(
    *, noise_multiplier: float, sample_rate: float, steps: int, delta: float
) -> float:
    """Return the epsilon of so many steps of DP-SGD, an upper bound by Rényi's accountant.

    Opacus's other accountant (PRV) is tighter by a tenth and fails for some arguments.
    """
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    with warnings.catch_warnings():
        # Of an order at the end of its list: the bound is then loose, and still a bound.
        warnings.simplefilter("ignore", UserWarning)
        return float(accountant.get_epsilon(delta=delta))


class PrivateTraining(Training):
    """The loop with Poisson batches, each item's gradient clipped, and noise on their sum."""

    def __init__(
        self,
        model: Exported,
        train: Tensors,
        validation: Tensors,
        settings: Settings,
        federation: Federation,
        *,
        penalty: Penalty | None = None,
    ) -> None:
        # Opacus's gradients are contiguous; channels last they would be copied in each step.
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # no stub
        super().__init__(model, train, validation, settings)
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        self.secret = torch.Generator(self.device).manual_seed(secrets.randbits(63))
        self.sample_rate = 1 / self.steps
        """With which each item is in a batch, whatever the others are: what is accounted for."""
        self.pull = penalty
        self.samples = GradSampleModule(self.model, strict=False)  # ours has constant buffers
        private = DPOptimizer(
            self.optimizer,
            noise_multiplier=federation.noise_multiplier,
            max_grad_norm=federation.max_grad_norm,
            expected_batch_size=len(self.labels) / self.steps,
            generator=self.secret,
        )
        private.attach_step_hook(self._add_pull)
        self.optimizer = private

    def release(self) -> None:
        """Take Opacus's hooks off the model."""
        self.samples.to_standard_module()

    def _make_batch(self, chosen: torch.Tensor, epoch: int) -> Tensors:
        """Return a batch that takes gradients: without, torch's hooks warn in the first layer."""
        batch, labels = super()._make_batch(chosen, epoch)
        return batch.requires_grad_(), labels

    def _take_step(self, parallel: nn.Module, chosen: torch.Tensor, epoch: int) -> float:
        """Learn from a Poisson sample in place of the batch that the order has."""
        drawn = torch.rand(len(self.labels), generator=self.secret, device=self.device)
        sample = (drawn < self.sample_rate).nonzero().flatten().cpu()
        if len(sample):
            return super()._take_step(self.samples, sample, epoch)
        self.optimizer.zero_grad()  # nobody was drawn: the noise comes all the same
        batch, _ = self._make_batch(sample, epoch)
        self.samples(batch).sum().backward()
        self.optimizer.step()
        self.schedule.step()
        return 0.0

    def _add_pull(self, optimizer: Any) -> None:
        """Add the penalty's gradient behind the noise: it knows no item, and clipping drops it."""
        if self.pull is None:
            return
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(self.pull(self.model), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
