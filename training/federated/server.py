"""The server of a federation: averages what the clients answer, and writes the run.

`app` is what Flower's commands run; `train_federated` does the same on one machine. The server
needs data of its own, by which it measures: the validation and test parts of the recipe's.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from marwright.archive.run import REPORT_NAME, Run
from marwright.errors import RunError

from ..data import DataSet, Split
from ..loop import Epoch, Fit, Progress, Tensors, find_device, measure
from ..models import Exported
from ..report import describe_commit
from ..run_files import Trained, write_json, write_run
from ..train import open_run, reproducible
from .holding import read_data
from .network import name_model, start_model
from .plan import Plan
from .privacy import check_network
from .strategy import Record, Screened, make_strategy

__all__ = ["app", "conduct", "Conducted", "write_federated"]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation by Flower's commands; `out` of the run config says where the run goes.

    Raises:
        MarwrightError: as `train_federated` does.
    """
    config = dict(context.run_config)
    out, force = Path(str(config.pop("out", "runs/federated"))), bool(config.pop("force", False))
    write_federated(out, grid, Plan.read(config), force=force)


@dataclass(frozen=True)
class Conducted:
    """What a federation has come to."""

    data: DataSet
    split: Split
    model: Exported
    """With the weights of the best round by validation."""
    fit: Fit
    """An epoch is a round."""
    accuracies: tuple[float, ...]
    """On the test part, by round; the choice of the best round does not see them."""
    strategy: Screened


class Judge:
    """Measures the common weights after each round, and keeps the best."""

    def __init__(
        self, model: Exported, data: DataSet, split: Split, plan: Plan, progress: Progress
    ) -> None:
        self.model = model
        self.plan = plan
        self.progress = progress
        self.validation: Tensors = data.inputs[split.validation], data.labels[split.validation]
        self.test: Tensors = data.inputs[split.test], data.labels[split.test]
        self.strategy: Screened | None = None
        self.epochs: list[Epoch] = []
        self.accuracies: list[float] = []
        self.best_state = copy.deepcopy(model.state_dict())
        self.before = time.perf_counter()

    def __call__(self, number: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Measure the weights after a round; Flower also asks before the first."""
        if number == 0:
            return None
        assert self.strategy is not None
        self.model.load_state_dict(arrays.to_torch_state_dict())
        loss, accuracy = measure(self.model, self.validation)
        self.accuracies.append(measure(self.model, self.test)[1])
        now = time.perf_counter()
        self.epochs.append(
            Epoch(
                epoch=number,
                # Private clients do not tell theirs, and a round may have had no answer.
                train_loss=self.strategy.losses.get(number, loss),
                validation_loss=loss,
                validation_accuracy=accuracy,
                lr=self.plan.compute_rate(number),
                seconds=now - self.before,
            )
        )
        self.before = now
        if accuracy >= max(epoch.validation_accuracy for epoch in self.epochs):
            self.best_state = copy.deepcopy(self.model.state_dict())
        self.progress(number, self.plan.federation.rounds, self.epochs[-1].train_loss, accuracy)
        return MetricRecord({"validation-loss": loss, "validation-accuracy": accuracy})


def conduct(
    grid: Grid, plan: Plan, progress: Progress = lambda *_: None, *, screen: bool = True
) -> Conducted:
    """Run all rounds over a grid of clients.

    Raises:
        RunError: no round had answers enough to be averaged.
        UsageError: no such model or device, or one that cannot be trained privately.
        DataError: the server's data cannot be used.
    """
    started = time.perf_counter()
    find_device(plan.settings.device)
    data, split = read_data(plan.recipe, plan.settings.seed)
    model = start_model(data, split.validation, plan.recipe)
    if plan.federation.is_private:
        check_network(model.network)
    judge = Judge(model, data, split, plan, progress)
    strategy = judge.strategy = make_strategy(plan.federation, screen=screen)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    strategy.start(
        grid,
        ArrayRecord(state),
        num_rounds=plan.federation.rounds,
        timeout=plan.federation.timeout,
        train_config=ConfigRecord({"classes": json.dumps(list(data.classes))}),
        evaluate_fn=judge,
    )
    records = strategy.records
    if not any(record.answered for record in records.values()):
        raise RunError(
            "no client's answer could be used",
            found=_name_reason(records),
            detail="\n".join(f"{node}: {_list_reasons(item)}" for node, item in records.items()),
        )
    model.load_state_dict(judge.best_state)
    best = max(reversed(judge.epochs), key=lambda epoch: epoch.validation_accuracy)
    seconds = time.perf_counter() - started
    items = sum(item.items * len(item.answered) for item in records.values())
    rate = items * plan.federation.local_epochs / max(seconds, 1e-9)
    fit = Fit(tuple(judge.epochs), best, seconds, rate)
    return Conducted(data, split, model, fit, tuple(judge.accuracies), strategy)


def write_federated(
    out: Path,
    grid: Grid,
    plan: Plan,
    *,
    force: bool = False,
    progress: Progress | None = None,
    labels: Sequence[Sequence[int]] = (),
) -> Run:
    """Run a federation and write its run folder, which appears only when it is whole.

    `labels` are how many of each class each client has, where that is known: in a trial.

    Raises:
        MarwrightError: as `conduct` does, and StorageError where `out` cannot be written.
    """
    started = time.perf_counter()
    with open_run(out, force=force) as folder:
        commit = describe_commit(Path())  # now: the files may change during the training
        with reproducible(plan.settings):
            done = conduct(grid, plan, progress or (lambda *_: None))
            settings = replace(plan.settings, epochs=plan.federation.local_epochs)
            trained = Trained(
                done.data,
                done.split,
                done.model,
                done.fit,
                name_model(plan.recipe, done.data),
                settings,
            )
            report = write_run(folder, trained, {"git": commit} if commit else {})
        report.update(describe_federation(plan, done, labels))
        report["seconds"] = round(time.perf_counter() - started, 3)
        write_json(folder / REPORT_NAME, report)
    return Run.open(out)


def describe_federation(
    plan: Plan, done: Conducted, labels: Sequence[Sequence[int]] = ()
) -> dict[str, Any]:
    """Return what report.json says of a federation: strategy, clients, accuracy by round."""
    federation, records = plan.federation, done.strategy.records
    facts: dict[str, Any] = {
        "federated": {
            "strategy": federation.strategy,
            **({"proximal_mu": federation.proximal_mu} if federation.strategy == "fedprox" else {}),
            "rounds": federation.rounds,
            "local_epochs": federation.local_epochs,
            "alpha": federation.alpha,
            "clients": [
                {
                    "node": node,
                    "items": sum(known) if known else record.items,
                    **({"labels": list(known)} if known else {}),
                    "answered": len(record.answered),
                    "refused": len(record.refused),
                    "failed": len(record.failed),
                    "silent": record.silent,
                    "reasons": sorted({*record.refused.values(), *record.failed.values()}),
                    **({"epsilon": record.epsilon} if federation.is_private else {}),
                }
                for (node, record), known in zip_longest(sorted(records.items()), labels)
            ],
            "accuracy_by_round": list(done.accuracies),
        }
    }
    if federation.is_private:
        facts["privacy"] = {
            "epsilon": max(record.epsilon for record in records.values()),
            "delta": federation.delta,
            "noise_multiplier": federation.noise_multiplier,
            "max_grad_norm": federation.max_grad_norm,
        }
    return facts


def _list_reasons(record: Record) -> str:
    return "; ".join(sorted({*record.failed.values(), *record.refused.values()})) or "no answer"


def _name_reason(records: dict[int, Record]) -> str:
    reasons = [_list_reasons(record) for record in records.values()]
    return max(reasons, key=reasons.count)
