from __future__ import annotations

from pathlib import Path

import pytest
import torch

from marwright.errors import DataError, UsageError
from marwright.training.federated.federation import Federation
from marwright.training.federated.holding import find_holding, list_shares, read_data
from marwright.training.federated.plan import Plan
from marwright.training.recipe import Recipe

KINDS = ("k0", "k1", "k2")


@pytest.fixture
def plan(measurements: Path) -> Plan:
    return Plan(Recipe(dataset=f"table:{measurements}"), federation=Federation(clients=3))


def write_table(folder: Path, *kinds: str) -> str:
    lines = ["length,depth,kind", *(f"{row},{row},{kind}" for row, kind in enumerate(kinds))]
    path = folder / "own.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"table:{path}"


def test_the_shares_are_the_training_part_and_leave_the_others_alone(plan: Plan) -> None:
    _, split = read_data(plan.recipe, plan.settings.seed)
    shares = torch.cat(list_shares(plan))
    assert shares.sort().values.tolist() == split.train.sort().values.tolist()


def test_a_partition_is_one_of_the_shares(plan: Plan) -> None:
    holding = find_holding(plan, {"partition-id": 1}, KINDS)
    assert holding.number == 1
    assert torch.equal(holding.part, list_shares(plan)[1])
    assert len(holding.tensors[0]) == len(holding.part)


def test_own_data_keep_the_federations_labels_though_a_class_is_missing(
    plan: Plan, tmp_path: Path
) -> None:
    own = write_table(tmp_path, "k2", "k1", "k2", "k2", "k1", "k1")
    holding = find_holding(plan, {"dataset": own}, KINDS)
    assert holding.data.classes == KINDS
    assert holding.tensors[1].tolist() == [2, 1, 2, 2, 1, 1]


def test_own_data_with_other_classes_are_refused(plan: Plan, tmp_path: Path) -> None:
    own = write_table(tmp_path, *("k2", "k1", "k9") * 3)
    with pytest.raises(DataError, match="found k9"):
        find_holding(plan, {"dataset": own}, KINDS)


@pytest.mark.parametrize("config", [{}, {"partition-id": 3}, {"partition-id": -1}])
def test_a_node_config_that_names_no_data_is_refused(plan: Plan, config: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="partition-id from 0 to 2, or dataset"):
        find_holding(plan, config, KINDS)
