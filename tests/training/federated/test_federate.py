from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from marwright.archive import Run, pack_run
from marwright.errors import DataError, RunError, UsageError
from marwright.training.federated.federate import train_federated
from marwright.training.federated.federation import Federation
from marwright.training.federated.holding import read_data
from marwright.training.federated.network import start_model
from marwright.training.recipe import Recipe
from marwright.training.settings import Settings
from marwright.training.train import train_run

has_flower = pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="needs flwr")


@pytest.fixture(scope="module")
def recipe(measurements: Path) -> Recipe:
    return Recipe(dataset=f"table:{measurements}")


QUICK = Settings(lr=0.1, batch_size=8)
THREE = Federation(clients=3, rounds=8, alpha=1.0)


def read_rounds(run: Run) -> list[dict[str, float]]:
    lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_without_flower_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flwr.app", None)  # Python then finds none
    with pytest.raises(UsageError, match=r"pip install 'marwright\[federated\]'"):
        train_federated(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@has_flower
def test_a_federation_learns_and_leaves_an_ordinary_run(tmp_path: Path, recipe: Recipe) -> None:
    seen: list[tuple[int, int]] = []
    run = train_federated(
        tmp_path / "run",
        recipe=recipe,
        settings=QUICK,
        federation=THREE,
        progress=lambda done, total, *_: seen.append((done, total)),
    )
    assert run.report["accuracy"] >= 0.9
    assert seen == [(number, 8) for number in range(1, 9)]
    rounds = read_rounds(run)
    assert [line["epoch"] for line in rounds] == list(range(1, 9))
    assert rounds[0]["train_loss"] > rounds[-1]["train_loss"] > 0
    federated = run.report["federated"]
    assert [client["answered"] for client in federated["clients"]] == [8, 8, 8]
    assert sum(client["items"] for client in federated["clients"]) == run.config["items"]["train"]
    assert len(federated["accuracy_by_round"]) == 8
    assert "privacy" not in run.report
    assert pack_run(run, out=tmp_path / "store", preflight=None).path.is_file()


@has_flower
def test_a_seed_gives_the_same_weights_again(tmp_path: Path, recipe: Recipe) -> None:
    federation = Federation(clients=3, rounds=2)
    states = [
        torch.load(
            train_federated(
                tmp_path / name, recipe=recipe, settings=QUICK, federation=federation
            ).weights_path,
            weights_only=True,
        )
        for name in ("first", "second")
    ]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@has_flower
def test_the_bad_do_no_harm_and_are_counted(tmp_path: Path, recipe: Recipe) -> None:
    federation = Federation(clients=4, rounds=8, alpha=10.0, drop_out=(0,), garbage=(3,))
    run = train_federated(tmp_path / "run", recipe=recipe, settings=QUICK, federation=federation)
    assert run.report["accuracy"] >= 0.9
    gone, *good, liar = run.report["federated"]["clients"]
    assert (gone["answered"], gone["refused"], gone["silent"]) == (1, 0, 7)
    assert [(client["answered"], client["refused"]) for client in good] == [(8, 0), (8, 0)]
    assert (liar["answered"], liar["refused"]) == (0, 8)
    reasons = " ".join(liar["reasons"])
    assert "not finite" in reasons
    assert "as long as the median's" in reasons
    assert "not float32" in reasons


@has_flower
def test_fedprox_stays_nearer_to_where_a_round_began(tmp_path: Path, recipe: Recipe) -> None:
    def measure_distance(strategy: str) -> float:
        run = train_federated(
            tmp_path / strategy,
            recipe=recipe,
            settings=QUICK,
            federation=Federation(clients=3, rounds=1, strategy=strategy, proximal_mu=5.0),
        )
        torch.manual_seed(QUICK.seed)  # the same seed, the same weights to begin with
        data, split = read_data(recipe, QUICK.seed)
        begun = start_model(data, split.validation, recipe).state_dict()
        state = torch.load(run.weights_path, weights_only=True)
        names = [name for name in begun if name.startswith("network.")]
        return math.sqrt(sum(float((state[n] - begun[n]).square().sum()) for n in names))

    assert 0 < measure_distance("fedprox") < 0.8 * measure_distance("fedavg")


@has_flower
def test_a_network_with_batchnorm_is_averaged_whole(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "normed.py").write_text(
        "from torch import nn\n"
        "def Normed(classes, input_shape):\n"
        "    return nn.Sequential(nn.Linear(*input_shape, 16), nn.BatchNorm1d(16), nn.ReLU(),\n"
        "                         nn.Linear(16, classes))\n",
        encoding="utf-8",
    )
    sys.path.insert(0, str(tmp_path))
    try:
        own = Recipe(dataset=recipe.dataset, model="normed:Normed")
        run = train_federated(tmp_path / "run", recipe=own, settings=QUICK, federation=THREE)
    finally:
        sys.path.remove(str(tmp_path))
    assert run.report["accuracy"] >= 0.9
    state = torch.load(run.weights_path, weights_only=True)
    assert state["network.1.num_batches_tracked"].dtype == torch.int64
    assert state["network.1.running_var"].min() > 0


@has_flower
def test_too_few_items_leave_no_folder(tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(DataError, match="too few for 30 clients"):
        train_federated(tmp_path / "run", recipe=recipe, federation=Federation(clients=30))
    assert not (tmp_path / "run").exists()


@has_flower
def test_clients_that_all_fail_say_why(tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(RunError, match="no client's answer could be used: found DataError: the"):
        train_federated(
            tmp_path / "run",
            recipe=recipe,
            settings=Settings(lr=1e9, batch_size=8),
            federation=Federation(clients=2, rounds=1),
        )
    assert not (tmp_path / "run").exists()


@has_flower
def test_private_clients_report_epsilon_and_no_loss(tmp_path: Path, recipe: Recipe) -> None:
    pytest.importorskip("opacus")
    epsilons = []
    for noise in (1.0, 2.0):
        federation = Federation(clients=2, rounds=2, alpha=10.0, noise_multiplier=noise)
        run = train_federated(
            tmp_path / str(noise), recipe=recipe, settings=QUICK, federation=federation
        )
        epsilons.append(run.report["privacy"]["epsilon"])
        clients = run.report["federated"]["clients"]
        assert epsilons[-1] == max(client["epsilon"] for client in clients)
        assert all(line["train_loss"] == line["validation_loss"] for line in read_rounds(run))
    assert 0 < epsilons[1] < epsilons[0]
    assert run.report["privacy"]["delta"] == 1e-5


@has_flower
def test_a_network_that_cannot_be_private_is_refused_before_anybody_trains(
    tmp_path: Path, recipe: Recipe
) -> None:
    pytest.importorskip("opacus")
    own = Recipe(dataset="digits", model="torchvision:resnet18")
    with pytest.raises(UsageError, match="found bn1"):
        train_federated(tmp_path / "run", recipe=own, federation=Federation(noise_multiplier=1.0))


@has_flower
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "fedprox"])
def test_digits_come_within_3_points_of_central_training(tmp_path: Path, strategy: str) -> None:
    settings = Settings(lr=0.02, batch_size=16)
    central = train_run(tmp_path / "central", settings=replace(settings, epochs=30))
    federation = Federation(rounds=15, strategy=strategy, drop_out=(4,), garbage=(0,))
    run = train_federated(tmp_path / "run", settings=settings, federation=federation)
    assert run.report["accuracy"] >= central.report["accuracy"] - 0.03
    clients = run.report["federated"]["clients"]
    assert [client["answered"] for client in clients] == [0, 15, 15, 15, 1]
    assert clients[0]["refused"] == 15
