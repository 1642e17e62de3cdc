"""What a federation reaches beside central training: two strategies, bad clients, privacy.

Run as `make bench WHAT=federated` where flwr and opacus are installed (`pip install
'marwright[federated,private]'`); writes benchmarks/results/federated.json and
docs/pictures/federated.png. Everything is the accuracy on the test part of the digits after each
round, one seed; takes ten minutes on two cores.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from marwright.training.federated import screen
from marwright.training.federated.federation import Federation
from marwright.training.federated.flower import load_flower, quieten_flower
from marwright.training.federated.plan import Plan
from marwright.training.recipe import Recipe
from marwright.training.settings import Settings
from marwright.training.train import train_run

RESULTS = Path(__file__).parent / "results/federated.json"
PICTURE = Path(__file__).parents[1] / "docs/pictures/federated.png"
ROUNDS = 15
SETTINGS = Settings(lr=0.02, batch_size=16)
USUAL = Federation(rounds=ROUNDS)
BAD = replace(USUAL, drop_out=(4,), garbage=(0,))
FEDERATIONS = {
    "FedAvg": USUAL,
    "FedProx, mu 0.1": replace(USUAL, strategy="fedprox"),
    "FedAvg, two bad clients": BAD,
    "FedProx, two bad clients": replace(BAD, strategy="fedprox"),
}
UNCHECKED = "FedAvg, two bad clients, unchecked"
PRIVATE_SETTINGS = replace(SETTINGS, lr=0.1, batch_size=64, weight_decay=0.0)
NOISES = (0.6, 1.0, 2.0)


def main() -> None:
    """Measure everything, write the result and draw it."""
    load_flower()
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {name: version(name) for name in ("marwright", "torch", "flwr", "opacus")},
        "python": platform.python_version(),
        "rounds": ROUNDS,
        "local_epochs": USUAL.local_epochs,
        "alpha": USUAL.alpha,
        "central": measure_central(),
        "federated": {
            name: measure(Plan(Recipe(), SETTINGS, f)) for name, f in FEDERATIONS.items()
        },
    }
    result["federated"][UNCHECKED] = measure(Plan(Recipe(), SETTINGS, BAD), checked=False)
    result["private"] = {
        f"{noise:g}": measure(
            Plan(Recipe(), PRIVATE_SETTINGS, replace(USUAL, noise_multiplier=noise))
        )
        for noise in NOISES
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))
    draw(result)


def measure_central() -> dict[str, Any]:
    """Train on all training items in one place, over as many epochs."""
    settings = replace(SETTINGS, epochs=ROUNDS * USUAL.local_epochs)
    with tempfile.TemporaryDirectory(prefix="marwright-bench-") as name:
        report = train_run(Path(name) / "run", settings=settings).report
    return {"accuracy": round(report["accuracy"], 4), "seconds": report["train_seconds"]}


def measure(plan: Plan, *, checked: bool = True) -> dict[str, Any]:
    """Run a federation and return accuracy by round, of the best round by validation, and time."""
    import torch

    from marwright.training.federated.client import app
    from marwright.training.federated.local import LocalGrid
    from marwright.training.federated.server import conduct

    torch.manual_seed(plan.settings.seed)
    torch.set_num_threads(plan.settings.threads)
    longest = watch_updates(plan.federation)
    started = time.perf_counter()
    with quieten_flower():
        done = conduct(LocalGrid(app, plan), plan, screen=checked)
    seconds = time.perf_counter() - started
    records = done.strategy.records.values()
    result = {
        "accuracy": round(done.accuracies[done.fit.best.epoch - 1], 4),
        "best_round": done.fit.best.epoch,
        "by_round": [round(accuracy, 4) for accuracy in done.accuracies],
        "seconds": round(seconds, 1),
        "items": [record.items for record in records],
        "averaged": [len(record.answered) for record in records],
        "refused": [len(record.refused) for record in records],
        "longest_honest_update": round(max(longest), 2) if longest else None,
    }
    if plan.federation.is_private:
        result["epsilon"] = round(max(record.epsilon for record in records), 2)
    print(result, flush=True)
    return result


def watch_updates(federation: Federation) -> list[float]:
    """Return a list that fills with the honest updates' lengths, in medians of a round."""
    import statistics

    from marwright.training.federated import strategy

    found: list[float] = []

    def watch(reference: Any, answers: Any) -> dict[int, str]:
        refused = screen.screen_answers(reference, answers)
        norms = {
            node: screen.measure_update(reference, answer.arrays)
            for node, answer in answers.items()
            if node - 2 not in federation.garbage  # node 2 is client 0
        }
        usual = statistics.median(norms.values())
        found.append(max(norms.values()) / usual)
        return refused

    strategy.screen_answers = watch
    return found


def draw(result: dict[str, Any]) -> None:
    """Draw the accuracy by round."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    central = result["central"]["accuracy"]
    axes.axhline(central, color="black", linewidth=1, linestyle="--", label="central training")
    axes.axhspan(central - 0.03, central, color="black", alpha=0.08, label="within 3 points of it")
    styles = {
        "FedAvg": ("tab:blue", "-"),
        "FedProx, mu 0.1": ("tab:orange", "-"),
        "FedAvg, two bad clients": ("tab:blue", ":"),
        "FedProx, two bad clients": ("tab:orange", ":"),
        UNCHECKED: ("tab:red", "-"),
    }
    rounds = range(1, result["rounds"] + 1)
    for name, (colour, line) in styles.items():
        axes.plot(rounds, result["federated"][name]["by_round"], line, color=colour, label=name)
    axes.set(xlabel="round", ylabel="test accuracy", ylim=(0, 1.02), xlim=(1, result["rounds"]))
    axes.grid(alpha=0.3)
    axes.legend(loc="center right", fontsize=8)
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
