from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from marwright.archive import Run, pack_run
from marwright.errors import RunError, StorageError
from marwright.storage import hold_path
from marwright.training.optimise.gates import Gates
from marwright.training.optimise.optimise import Optimised, optimise_run, prepare_run
from marwright.training.optimise.variant import Plan, Variant
from marwright.training.recipe import Recipe
from marwright.training.settings import Settings
from marwright.training.train import train_run

PLAN = Plan(
    (
        Variant("torchscript"),
        Variant("onnx", backend="onnx"),
        Variant("onnx-int8", backend="onnx", quantise="static"),
        Variant("torchscript-half", keep=0.5, epochs=1),
    ),
    rounds=2,
)


@pytest.fixture(scope="module")
def small(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of the session's run, to be optimised."""
    path = tmp_path_factory.mktemp("optimise") / "run"
    shutil.copytree(run.path, path)
    return Run.open(path)


@pytest.fixture(scope="module")
def optimised(small: Run) -> Optimised:
    return optimise_run(small, plan=PLAN, gates=Gates(max_accuracy_drop=0.05))


def find(report: dict[str, Any], name: str) -> dict[str, Any]:
    entry: dict[str, Any] = next(
        entry for entry in report["results"] if entry["variant"]["name"] == name
    )
    return entry


def test_every_variant_is_built_compared_and_measured(small: Run, optimised: Optimised) -> None:
    for variant in PLAN.variants:
        entry = find(optimised.report, variant.name)
        assert entry["failure"] == ""
        assert entry["accuracy"] > 0.8
        assert entry["size_bytes"] == (optimised.folder / entry["file"]).stat().st_size
        assert [timing["batch"] for timing in entry["timings"]] == [1, 32]
        assert entry["memory_bytes"] > 0
    plain = find(optimised.report, "onnx")
    assert plain["parity"]["worst"] < 1e-3
    assert plain["accuracy"] == find(optimised.report, "eager")["accuracy"]


def test_pruning_shrinks_and_int8_shrinks(optimised: Optimised) -> None:
    whole, half = (find(optimised.report, name) for name in ("torchscript", "torchscript-half"))
    assert half["parameters"] < 0.4 * whole["parameters"]
    assert half["size_bytes"] < 0.5 * whole["size_bytes"]
    full, int8 = (find(optimised.report, name) for name in ("onnx", "onnx-int8"))
    assert int8["size_bytes"] < 0.4 * full["size_bytes"]


def test_the_folder_holds_report_page_pictures_and_choice(small: Run, optimised: Optimised) -> None:
    names = {path.name for path in optimised.folder.iterdir()}
    assert {"report.json", "report.html", "pareto.png", "sensitivity.png"} <= names
    assert not [name for name in names if name.startswith(".")]
    choice = small.read_choice()
    assert choice is not None
    assert choice.name == optimised.report["decision"]["chosen"]
    assert choice.name in optimised.decision.line
    stored = json.loads((optimised.folder / "report.json").read_text(encoding="utf-8"))
    assert stored["decision"] == optimised.report["decision"]


def test_what_was_chosen_is_packed_and_answers_in_the_preflight(
    small: Run, optimised: Optimised, tmp_path: Path
) -> None:
    packed = pack_run(small, out=tmp_path, name="fast", optimised=True)
    own = pack_run(small, out=tmp_path, name="own")
    assert packed.figures
    assert packed.root_digest != own.root_digest


def test_a_second_time_nothing_is_built_again(
    small: Run, optimised: Optimised, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = find(optimised.report, "onnx")["build_seconds"]
    monkeypatch.setattr(
        "marwright.training.optimise.workshop.Workshop.build", lambda *_: pytest.fail("built")
    )
    again = optimise_run(small, plan=PLAN, gates=Gates(max_accuracy_drop=0.05))
    assert find(again.report, "onnx")["build_seconds"] == built
    assert find(again.report, "onnx")["timings"] != find(optimised.report, "onnx")["timings"]


@pytest.mark.parametrize(
    "damage",
    ["file", *(pytest.param(name, marks=pytest.mark.slow) for name in ("note", "gone"))],
)
def test_what_was_changed_since_is_built_again(
    small: Run, optimised: Optimised, damage: str
) -> None:
    file, note = (optimised.folder / f"onnx{suffix}" for suffix in (".onnx", ".json"))
    before = file.read_bytes()
    if damage == "file":
        file.write_bytes(b"other")
    elif damage == "note":
        note.write_text("{", encoding="utf-8")
    else:
        file.unlink()
    plan = Plan((Variant("onnx", backend="onnx"),), rounds=1)
    again = optimise_run(small, plan=plan, gates=Gates(max_accuracy_drop=0.05))
    assert find(again.report, "onnx")["failure"] == ""
    assert len(file.read_bytes()) == pytest.approx(len(before), rel=0.01)


@pytest.mark.slow
def test_a_variant_that_cannot_be_built_is_reported_and_the_others_go_on(
    small: Run, optimised: Optimised, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime.quantization", None)
    plan = Plan(
        (Variant("onnx-other", backend="onnx", quantise="static"), Variant("torchscript")), rounds=1
    )
    result = optimise_run(small, plan=plan, gates=Gates(max_accuracy_drop=0.05))
    failed = find(result.report, "onnx-other")
    assert "pip install" in failed["failure"]
    assert not list(result.folder.glob("onnx-other*"))
    assert result.report["decision"]["chosen"] == "torchscript"


@pytest.mark.slow
def test_nothing_is_chosen_where_nothing_passes(small: Run, optimised: Optimised) -> None:
    plan = Plan((Variant("torchscript"),), rounds=1)
    result = optimise_run(small, plan=plan, gates=Gates(max_size_bytes=10))
    assert result.decision.chosen is None
    assert small.read_choice() is None
    optimise_run(small, plan=plan, gates=Gates())
    assert small.read_choice() is not None


def test_a_run_whose_data_have_changed_is_refused(small: Run, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(small.path, path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(
        json.dumps({**config, "data_digest": "0" * 64}), encoding="utf-8"
    )
    with pytest.raises(RunError, match="no longer the data"):
        prepare_run(Run.open(path))


def test_a_run_without_weights_is_refused(small: Run, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(small.path, path)
    (path / "weights.pt").unlink()
    with pytest.raises(RunError, match="train again"):
        optimise_run(Run.open(path), plan=PLAN)


def test_weights_of_another_network_are_refused(small: Run, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(small.path, path)
    torch.save({"network.conv1.weight": torch.zeros(1)}, path / "weights.pt")
    with pytest.raises(RunError, match="another architecture"):
        optimise_run(Run.open(path), plan=PLAN)


def _hold(path: Path, held: Any, done: Any) -> None:
    with hold_path(path):
        held.set()
        done.wait(30)


def test_a_run_that_another_process_optimises_is_refused(small: Run) -> None:
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(small.path / "optimised", held, done))
    process.start()
    try:
        assert held.wait(60)
        with pytest.raises(StorageError, match=f"in use.*process {process.pid}"):
            optimise_run(small, plan=PLAN)
    finally:
        done.set()
        process.join()


@pytest.mark.slow
def test_a_table_is_optimised_too(measurements: Path, tmp_path: Path) -> None:
    run = train_run(
        tmp_path / "run",
        recipe=Recipe(dataset=f"table:{measurements}"),
        settings=Settings(epochs=8, batch_size=8),
    )
    plan = Plan(
        (
            Variant("onnx", backend="onnx"),
            Variant("half", backend="onnx", keep=0.5, epochs=2),
            Variant("torchscript-int8-dynamic", quantise="dynamic"),
        ),
        rounds=1,
    )
    result = optimise_run(run, plan=plan, gates=Gates(max_accuracy_drop=0.2))
    assert [find(result.report, variant.name)["failure"] for variant in plan.variants] == [""] * 3
    assert result.decision.chosen is not None
    packed = pack_run(run, out=tmp_path / "store", name="table", optimised=True)
    assert packed.figures
