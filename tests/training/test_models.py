from __future__ import annotations

from pathlib import Path

import pytest
import torch

from marwright.training.models import CNN, Exported
from marwright.training.report import count_parameters


def test_the_layers_have_the_documented_shapes() -> None:
    shapes = {name: tuple(weights.shape) for name, weights in CNN(7).named_parameters()}
    assert shapes == {
        "conv1.weight": (32, 3, 3, 3),
        "conv1.bias": (32,),
        "conv2.weight": (64, 32, 3, 3),
        "conv2.bias": (64,),
        "fc1.weight": (128, 2304),
        "fc1.bias": (128,),
        "fc2.weight": (7, 128),
        "fc2.bias": (7,),
    }


@pytest.mark.parametrize("batch", [1, 2, 33])
@pytest.mark.parametrize("classes", [2, 10])
def test_one_logit_for_each_image_and_class_comes_out(batch: int, classes: int) -> None:
    logits = CNN(classes)(torch.rand(batch, 3, 24, 24))
    assert logits.shape == (batch, classes)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 3, 28, 28), (1, 1, 24, 24)])
def test_images_of_another_size_are_refused_by_torch(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError):
        CNN()(torch.rand(shape))


def test_an_exported_model_normalises_inside() -> None:
    network = CNN().eval()
    pixels = torch.rand(4, 3, 24, 24)
    expected = network((pixels - 0.5) / 0.5)
    assert torch.equal(Exported(network)(pixels), expected)
    assert not torch.equal(Exported(network, mean=0.1, deviation=0.2)(pixels), expected)


def test_an_exported_model_computes_the_same_as_torchscript(tmp_path: Path) -> None:
    model = Exported(CNN()).eval()
    torch.jit.save(torch.jit.script(model), str(tmp_path / "model.pt"))
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    for batch in (1, 5):
        pixels = torch.rand(batch, 3, 24, 24)
        torch.testing.assert_close(loaded(pixels), model(pixels), rtol=1e-5, atol=1e-6)


def test_parameters_are_all_counted() -> None:
    expected = (3 * 9 + 1) * 32 + (32 * 9 + 1) * 64 + (2304 + 1) * 128 + (128 + 1) * 10
    assert count_parameters(CNN()) == count_parameters(Exported(CNN())) == expected
