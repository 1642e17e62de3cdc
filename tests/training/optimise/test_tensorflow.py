"""SavedModel and TFLite against torch: these run where TensorFlow is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from marwright.errors import ExportError, StorageError, UsageError
from marwright.training.models import CNN, MLP, Exported, build_model
from marwright.training.optimise.tensorflow import (
    convert_saved_model,
    export_saved_model,
    export_tflite,
    run_saved_model,
    run_tflite,
)

HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None
HAS_LITERT = importlib.util.find_spec("ai_edge_litert") is not None
needs_tensorflow = pytest.mark.skipif(not HAS_TENSORFLOW, reason="TensorFlow is not installed")
needs_litert = pytest.mark.skipif(not HAS_LITERT, reason="ai-edge-litert is not installed")

LOAD = """
import json, sys
import numpy as np
import tensorflow as tf
serve = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
inputs = np.load(sys.argv[2])
np.save(sys.argv[3], serve(inputs=tf.constant(inputs))["outputs"].numpy())
taken, given = serve.structured_input_signature[1]["inputs"], serve.structured_outputs["outputs"]
print(json.dumps({
    "inputs": [taken.name, taken.dtype.name, taken.shape.as_list()],
    "outputs": [given.name, given.dtype.name, given.shape.as_list()],
    "names": [list(serve.structured_input_signature[1]), list(serve.structured_outputs)],
    "modules": [name for name in ("torch", "marwright") if name in sys.modules],
}))
"""


class Pools(nn.Module):
    """Pooling as torch counts it: padding in or out, windows over the edge, uneven bins."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        functional = nn.functional
        parts = [
            functional.avg_pool2d(maps, 3, 2, padding=1),
            functional.avg_pool2d(maps, 3, 2, padding=1, count_include_pad=False),
            functional.avg_pool2d(maps, 3, 2, padding=1, ceil_mode=True),
            functional.avg_pool2d(maps, 2, 3, ceil_mode=True, count_include_pad=False),
            functional.avg_pool2d(maps, 2, divisor_override=3),
            functional.max_pool2d(-maps - 1, 3, 2, padding=1),
            functional.max_pool2d(-maps - 1, 3, 2, ceil_mode=True),
            functional.adaptive_avg_pool2d(maps, (3, 4)),
            functional.adaptive_avg_pool2d(maps, (11, 1)),
            functional.pad(maps, (1, 2, 0, 3), value=0.5),
        ]
        return torch.cat([part.flatten(1) for part in parts], 1)


class Convolutions(nn.Module):
    """Convolutions whose padding is not TensorFlow's SAME, in groups, dilated, between shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=4)
        self.depthwise = nn.Conv2d(12, 24, 5, stride=2, padding=2, groups=12)
        self.lone = nn.BatchNorm2d(24)
        self.uneven = nn.Conv2d(24, 6, (3, 1), stride=(1, 2), padding=(0, 1))
        self.layer = nn.LayerNorm(6)
        for norm in (self.norm, self.lone):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.bias, -1, 1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        functional = nn.functional
        maps = functional.hardswish(self.norm(self.strided(maps)))
        first, second = self.grouped(maps).chunk(2, 1)
        maps = torch.cat([second.sigmoid(), functional.silu(first)], 1)
        maps = self.lone(functional.gelu(self.depthwise(maps)))
        maps = maps * functional.hardsigmoid(maps.mean((2, 3), keepdim=True))
        maps = functional.leaky_relu(self.uneven(maps)).clamp(-0.5, 6)
        rows = self.layer(maps.permute(0, 2, 3, 1))[:, 1:, :, ::2]  # (N, H - 1, W, 3)
        return (
            1
            - functional.softmax(rows.transpose(1, 2).flatten(1), 1)
            + maps[:, 0].mean((1, 2))[:, None]
        )


class Sorting(nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.sort(1).values.cumsum(1)


def _make(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a network ready to export, and the shape of one input."""
    torch.manual_seed(0)
    if name == "mlp":
        mean, deviation = torch.rand(12), torch.rand(12) + 0.5
        return Exported(MLP(12, 3), mean=mean, deviation=deviation).eval(), (12,)
    if name == "cnn":
        mean, deviation = torch.rand(3, 1, 1), torch.rand(3, 1, 1) + 0.5
        return Exported(CNN(10), mean=mean, deviation=deviation).eval(), (3, 24, 24)
    if name.startswith("torchvision:"):
        return Exported(build_model(name, classes=5, input_shape=(3, 32, 32))).eval(), (3, 32, 32)
    return {"pools": Pools, "convolutions": Convolutions}[name]().eval(), (3, 19, 22)


def _run_torch(model: nn.Module, inputs: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return model(inputs).numpy()


def _check(answers: np.ndarray, expected: np.ndarray) -> None:
    """Compare at 1e-4, or at that share of what a network with random weights answers."""
    assert (expected != expected[0, 0]).any()
    tolerance = 1e-4 * min(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(answers, expected, rtol=0, atol=tolerance)


@needs_tensorflow
@pytest.mark.parametrize(
    "name",
    ["cnn", "mlp", "pools", "convolutions", "torchvision:squeezenet1_1", "torchvision:resnet18"],
)
def test_one_saved_model_answers_as_torch_does_in_every_batch(name: str, tmp_path: Path) -> None:
    model, shape = _make(name)
    export_saved_model(model, torch.rand(1, *shape), tmp_path / "model")
    for batch in (1, 3, 32):
        inputs = torch.rand(batch, *shape)
        answers = run_saved_model(tmp_path / "model", inputs.numpy(), batch=20)
        _check(answers, _run_torch(model, inputs))


@pytest.mark.slow
@needs_tensorflow
@needs_litert
@pytest.mark.parametrize(
    "name",
    ["mobilenet_v3_small", "efficientnet_b0", "densenet121", "shufflenet_v2_x1_0", "vgg11"],
)
def test_the_other_torchvision_networks_answer_as_torch_does(name: str, tmp_path: Path) -> None:
    model, shape = _make(f"torchvision:{name}")
    export_saved_model(model, torch.rand(1, *shape), tmp_path / "model")
    convert_saved_model(tmp_path / "model", tmp_path / "model.tflite")
    for batch in (1, 3):
        inputs = torch.rand(batch, *shape)
        expected = _run_torch(model, inputs)
        answers = run_saved_model(tmp_path / "model", inputs.numpy())
        _check(answers, expected)
        answers = run_tflite(tmp_path / "model.tflite", inputs.numpy())
        _check(answers, expected)


@needs_tensorflow
@needs_litert
@pytest.mark.parametrize("name", ["cnn", "mlp", "pools", "convolutions"])
def test_a_tflite_file_answers_as_torch_does_in_every_batch(name: str, tmp_path: Path) -> None:
    model, shape = _make(name)
    export_tflite(model, torch.rand(2, *shape), tmp_path / "model.tflite")
    for batch in (1, 5):
        inputs = torch.rand(batch, *shape)
        answers = run_tflite(tmp_path / "model.tflite", inputs.numpy(), batch=3)
        _check(answers, _run_torch(model, inputs))


@needs_tensorflow
def test_a_process_without_torch_serves_the_saved_model_under_its_names(tmp_path: Path) -> None:
    model, shape = _make("cnn")
    folder = tmp_path / "cnn" / "1"
    export_saved_model(model, torch.rand(1, *shape), folder, classes=["naught", "one"])
    inputs = torch.rand(4, *shape)
    np.save(tmp_path / "inputs.npy", inputs.numpy())
    paths = [str(path) for path in (folder, tmp_path / "inputs.npy", tmp_path / "outputs.npy")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, *paths],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "inputs": ["inputs", "float32", [None, 3, 24, 24]],
        "outputs": ["outputs", "float32", [None, 10]],
        "names": [["inputs"], ["outputs"]],
        "modules": [],
    }
    answers = np.load(tmp_path / "outputs.npy")
    _check(answers, _run_torch(model, inputs))
    classes = (folder / "assets.extra" / "classes.json").read_text(encoding="utf-8")
    assert json.loads(classes) == ["naught", "one"]


@needs_tensorflow
def test_every_operator_without_a_translation_is_named_with_its_layer(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Sorting(), nn.Linear(4, 2))
    with pytest.raises(ExportError) as caught:
        export_saved_model(model, torch.rand(1, 4), tmp_path / "model")
    assert "aten.sort.default in 1 (Sorting)" in str(caught.value)
    assert "aten.cumsum.default in 1 (Sorting)" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@needs_tensorflow
def test_a_form_of_an_operator_without_a_translation_is_named_with_its_layer(
    tmp_path: Path,
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 3))
    with pytest.raises(ExportError, match=r"convolution\.default in 1 \(ConvTranspose2d\)"):
        export_saved_model(model, torch.rand(1, 3, 8, 8), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@needs_tensorflow
def test_a_network_that_branches_on_values_is_refused(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows if rows.sum() > 0 else -rows

    with pytest.raises(ExportError, match=r"torch\.export cannot read this network"):
        export_saved_model(Branching(), torch.rand(1, 4), tmp_path / "model")


@needs_tensorflow
def test_a_folder_that_exists_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(StorageError, match="exists"):
        export_saved_model(MLP(4, 2), torch.rand(1, 4), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


@needs_tensorflow
@needs_litert
def test_what_is_no_model_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "model.tflite").write_bytes(b"no model at all")
    with pytest.raises(ExportError, match="is no TFLite file"):
        run_tflite(tmp_path / "model.tflite", np.zeros((1, 4), np.float32))
    with pytest.raises(ExportError, match="is no SavedModel"):
        run_saved_model(tmp_path, np.zeros((1, 4), np.float32))


@needs_tensorflow
def test_an_export_says_nothing_and_leaves_the_environment(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = dict(os.environ)
    export_saved_model(MLP(4, 2), torch.rand(1, 4), tmp_path / "model")
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == before


@pytest.mark.parametrize("module", ["tensorflow", "ai_edge_litert.interpreter"])
def test_a_missing_package_is_named_with_the_command_that_brings_it(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as Python has it where an import failed
    if module == "tensorflow":
        with pytest.raises(UsageError, match=r"pip install 'marwright\[tf\]'"):
            export_tflite(MLP(4, 2), torch.rand(1, 4), tmp_path / "model.tflite")
    else:
        with pytest.raises(UsageError, match=r"pip install 'marwright\[litert\]'"):
            run_tflite(tmp_path / "model.tflite", np.zeros((1, 4), np.float32))
    assert list(tmp_path.iterdir()) == []
