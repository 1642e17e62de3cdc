from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from marwright.errors import ExportError, UsageError
from marwright.training.forms import export_model
from marwright.training.models import Exported
from marwright.training.optimise.quantise import (
    quantise_aware,
    quantise_dynamic,
    quantise_onnx,
    quantise_onnx_dynamic,
    quantise_openvino,
    quantise_program,
    quantise_static,
)

Answer = Callable[..., torch.Tensor]
Fit = Callable[[nn.Module, int, "nn.Module | None", float], None]
Items = tuple[torch.Tensor, torch.Tensor]


def agree(model: nn.Module, answers: torch.Tensor, inputs: torch.Tensor) -> float:
    """Return the share of items that a file and a network put into the same class."""
    with torch.no_grad():
        return float((model(inputs).argmax(1) == answers.argmax(1)).float().mean())


def weigh(path: Path) -> int:
    return path.stat().st_size


@pytest.mark.parametrize("form", ["dynamic", "static", "aware"])
def test_scripts_of_int8_networks_answer_alike_where_they_are_loaded(
    form: str,
    trained: Exported,
    items: Items,
    fit: Fit,
    answer: Answer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    inputs = items[0]
    before = copy.deepcopy(trained.state_dict())
    if form == "dynamic":
        quantised: nn.Module = quantise_dynamic(trained)
    elif form == "static":
        quantised = quantise_static(trained, inputs[:64], inputs[:2])
    else:
        quantised = quantise_aware(trained, lambda model: fit(model, 1, None, 1.0), inputs[:2])
    with caplog.at_level(logging.INFO):
        export_model(quantised, "torchscript", tmp_path / "int8.pt", inputs)
    assert not caplog.records  # scripted, not traced
    export_model(trained, "torchscript", tmp_path / "float.pt", inputs)
    assert weigh(tmp_path / "int8.pt") < weigh(tmp_path / "float.pt")
    assert agree(trained, answer("torchscript", tmp_path / "int8.pt", inputs), inputs) >= 0.97
    for name, weights in trained.state_dict().items():
        assert torch.equal(weights, before[name]), name


def test_static_quantisation_leaves_normalisation_and_temperature_in_float(
    trained: Exported, items: Items
) -> None:
    quantised = quantise_static(trained, items[0][:64], items[0][:2])
    calls = [node.name for node in quantised.graph.nodes if node.op.startswith("call")]
    assert calls[:3] == ["sub", "truediv", "quantize_per_tensor"]
    assert [name.partition("_")[0] for name in calls[-2:]] == ["dequantize", "truediv"]


def test_static_quantisation_reads_its_ranges_from_the_calibration(
    trained: Exported, items: Items
) -> None:
    inputs = items[0]
    dark = quantise_static(trained, torch.full_like(inputs[:32], 0.5), inputs[:2])
    with torch.no_grad():
        assert agree(trained, dark(inputs), inputs) < 0.9


def test_dynamic_quantisation_needs_linear_layers() -> None:
    with pytest.raises(ExportError, match="linear layers"):
        quantise_dynamic(nn.Conv2d(3, 3, 3))


def test_fine_tuning_trains_rounded_weights(trained: Exported, items: Items) -> None:
    seen: list[bool] = []

    def fit(model: nn.Module) -> None:
        outcome = model(items[0][:8])
        seen.append(model.training and outcome.requires_grad)

    quantise_aware(trained, fit, items[0][:2])
    assert seen == [True]


def test_exported_programs_of_int8_answer_alike_where_they_are_loaded(
    trained: Exported, items: Items, answer: Answer, tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    inputs = items[0]
    quantised = quantise_program(trained, inputs[:64], inputs[:1])
    export_model(quantised, "exported", tmp_path / "int8.pt2", inputs)
    weights = [each for each in torch.export.load(tmp_path / "int8.pt2").state_dict.values()]
    assert {each.dtype for each in weights if each.ndim > 1} == {torch.int8}
    answers = answer("exported", tmp_path / "int8.pt2", inputs, batch=50)
    assert agree(trained, answers, inputs) >= 0.97
    with torch.no_grad():
        assert not torch.equal(answers, trained(inputs))


@pytest.fixture(scope="module")
def floats(trained: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained network as an ONNX file."""
    path = tmp_path_factory.mktemp("onnx") / "float.onnx"
    export_model(trained, "onnx", path, torch.rand(1, 3, 12, 12))
    return path


def read_onnx(path: Path) -> Any:
    return pytest.importorskip("onnx").load(path)


def test_static_onnx_files_hold_int8_weights_a_scale_for_each_channel(
    trained: Exported, floats: Path, items: Items, answer: Answer, tmp_path: Path
) -> None:
    inputs, path = items[0], tmp_path / "int8.onnx"
    quantise_onnx(floats, path, inputs[:64])
    graph = read_onnx(path).graph
    numpy_helper = pytest.importorskip("onnx.numpy_helper")
    arrays = [numpy_helper.to_array(item) for item in graph.initializer]
    weights = [array for array in arrays if array.dtype == "int8" and array.ndim > 1]
    assert sorted(array.shape for array in weights)[0] == (4, 32)
    assert len(weights) == 4
    # Seven bits: what processors without VNNI add up without overflow.
    assert max(abs(int(array.min())) for array in weights) <= 64
    assert any(array.dtype == "float32" and array.shape == (16,) for array in arrays)
    assert agree(trained, answer("onnx", path, inputs), inputs) >= 0.97


def test_dynamic_onnx_files_quantise_the_linear_layers_alone(
    trained: Exported, floats: Path, items: Items, answer: Answer, tmp_path: Path
) -> None:
    inputs, path = items[0], tmp_path / "int8.onnx"
    quantise_onnx_dynamic(floats, path)
    kinds = [node.op_type for node in read_onnx(path).graph.node]
    assert kinds.count("MatMulInteger") == 2
    assert sum(kind in ("Conv", "FusedConv") for kind in kinds) == 2
    assert agree(trained, answer("onnx", path, inputs), inputs) >= 0.97


def test_a_file_that_is_no_onnx_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"no model")
    with pytest.raises(ExportError, match="onnxruntime cannot quantise"):
        quantise_onnx_dynamic(tmp_path / "source", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


class Branching(nn.Module):
    """Chooses its way by its input: what no tracer can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.sum() > 0:
            rows = -rows
        logits: torch.Tensor = self.layer(rows)
        return logits


@pytest.mark.parametrize(
    "quantise",
    [
        lambda model, rows: quantise_static(model, rows, rows),
        lambda model, rows: quantise_aware(model, lambda _: None, rows),
        lambda model, rows: quantise_program(model, rows, rows),
    ],
    ids=["static", "aware", "program"],
)
def test_what_cannot_be_followed_is_named_with_its_layer(quantise: Callable[..., Any]) -> None:
    model = Exported(Branching()).eval()
    with pytest.raises(ExportError, match=r"layer network \(test_quantise\.py:\d+\)"):
        quantise(model, torch.rand(2, 4))


class Residual(nn.Module):
    """Calls one ReLU twice, as torchvision's residual networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(3 * 36, 4)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        inner = self.second(self.relu(self.first(maps)))
        logits: torch.Tensor = self.head(self.relu(inner + maps).flatten(1))
        return logits


@pytest.mark.parametrize("backend", ["torchscript", "exported"])
def test_residual_networks_can_be_quantised(backend: str, answer: Answer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Exported(Residual()).eval(), torch.rand(64, 3, 6, 6)
    quantise = quantise_static if backend == "torchscript" else quantise_program
    export_model(quantise(model, inputs, inputs[:2]), backend, tmp_path / "int8", inputs)
    assert agree(model, answer(backend, tmp_path / "int8", inputs), inputs) >= 0.9


@pytest.mark.parametrize(
    ("library", "quantise"),
    [
        ("onnx", lambda model, rows: quantise_onnx(Path("source"), Path("target"), rows)),
        ("torchao", lambda model, rows: quantise_program(model, rows, rows)),
        ("nncf", lambda model, rows: quantise_openvino(None, rows)),
    ],
)
def test_without_a_library_the_command_is_told(
    library: str,
    quantise: Callable[..., Any],
    trained: Exported,
    items: Items,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)
    with pytest.raises(UsageError, match=rf"needs {library}; pip install 'marwright\["):
        quantise(trained, items[0][:32])


@pytest.mark.parametrize("count", [7, 33, 63])
def test_any_number_of_items_calibrates_an_onnx_file(
    count: int, trained: Exported, items: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    export_model(trained, "onnx", tmp_path / "float.onnx", items[0][:2])
    quantise_onnx(tmp_path / "float.onnx", tmp_path / "int8.onnx", items[0][:count])
    assert (tmp_path / "int8.onnx").stat().st_size < (tmp_path / "float.onnx").stat().st_size
