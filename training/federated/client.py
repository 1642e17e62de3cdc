"""The client of a federation: trains the common weights on its own data for a round.

`app` is what Flower's commands and `train_federated` run alike. A client's data are what its node
config names: `dataset`, its own; or `partition-id`, one of the shares that the plan makes of a
data set that everybody has. The weights, how many items they come from and the loss leave it.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from ..loop import Fit, Penalty, Training
from ..models import Exported
from ..settings import Settings
from .federation import Federation
from .holding import Holding, find_holding
from .network import start_model
from .plan import Plan
from .privacy import PrivateTraining, compute_epsilon, load_opacus

__all__ = ["app"]


app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer a round: the weights after training on what this client holds.

    Raises:
        UsageError: the node config names no data.
        DataError: the client's data are of other classes, or the loss exploded.
    """
    plan = Plan.read(context.run_config)
    order = message.content["config"]
    holding = find_holding(plan, dict(context.node_config), json.loads(str(order["classes"])))
    model = start_model(holding.data, holding.part, replace(plan.recipe, weights=""))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    settings = plan.make_local(int(order["server-round"]), holding.number)
    penalty = _make_penalty(model, plan.federation)
    metrics: dict[str, Any] = {"num-examples": len(holding.part)}
    if plan.federation.is_private:
        # Not the loss: it was computed without noise, and epsilon does not speak of it.
        metrics["epsilon"] = _train_privately(
            model, holding, settings, plan.federation, penalty, context
        )
    else:
        metrics["train-loss"] = _train(model, holding, settings, penalty)
    state = {name: tensor.contiguous() for name, tensor in model.cpu().state_dict().items()}
    content = RecordDict({"arrays": ArrayRecord(state), "metrics": MetricRecord(metrics)})
    return Message(content, reply_to=message)


def _make_penalty(model: Exported, federation: Federation) -> Penalty | None:
    """Return FedProx's term: half of mu times the squared distance to where the round began."""
    if federation.strategy != "fedprox" or federation.proximal_mu == 0:
        return None
    start = [parameter.detach().clone() for parameter in model.parameters()]

    def measure_distance(module: nn.Module) -> torch.Tensor:
        pairs = zip(module.parameters(), start, strict=True)
        squares = [(now - then.to(now.device)).square().sum() for now, then in pairs]
        return federation.proximal_mu / 2 * torch.stack(squares).sum()

    return measure_distance


def _train(model: Exported, holding: Holding, settings: Settings, penalty: Penalty | None) -> float:
    """Train in place, and return the last epoch's loss."""
    training = Training(model, holding.tensors, holding.probe, settings, penalty=penalty)
    return _run(training).epochs[-1].train_loss


def _train_privately(
    model: Exported,
    holding: Holding,
    settings: Settings,
    federation: Federation,
    penalty: Penalty | None,
    context: Context,
) -> float:
    """Train in place, and return what epsilon all rounds so far have come to."""
    load_opacus()
    training = PrivateTraining(
        model, holding.tensors, holding.probe, settings, federation, penalty=penalty
    )
    _run(training)
    training.release()
    # Flower keeps a client's state from round to round.
    spent = context.state.get("privacy", MetricRecord({"steps": 0}))
    steps = int(spent["steps"]) + training.steps * settings.epochs
    context.state["privacy"] = MetricRecord({"steps": steps})
    return compute_epsilon(
        noise_multiplier=federation.noise_multiplier,
        sample_rate=training.sample_rate,
        steps=steps,
        delta=federation.delta,
    )


def _run(training: Training) -> Fit:
    """Train, and leave the last weights.

    The loop leaves the best by validation, and a client has no items to spare for that; were it
    private, the choice would tell of them.
    """
    last: dict[str, torch.Tensor] = {}
    fit = training.run(on_epoch=lambda _: last.update(copy.deepcopy(training.model.state_dict())))
    training.model.load_state_dict(last)
    return fit
