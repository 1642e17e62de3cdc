from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from marwright.errors import ExportError, UsageError
from marwright.training.models import CNN, MLP, Exported, build_model
from marwright.training.optimise.prune import (
    count_nonzero,
    finish_weights,
    prune_channels,
    prune_weights,
    round_channels,
    scan_sensitivity,
)

Fit = Callable[[nn.Module, int, "nn.Module | None", float], None]
IMAGES = torch.rand(2, 3, 12, 12)


@pytest.mark.parametrize(
    ("channels", "keep", "kept"),
    [(8, 0.5, 4), (32, 0.5, 16), (64, 0.3, 16), (100, 0.5, 48), (6, 0.5, 3), (4, 0.1, 1)],
)
def test_widths_fill_vectors(channels: int, keep: float, kept: int) -> None:
    assert round_channels(channels, keep) == kept


def test_a_width_never_grows() -> None:
    assert all(round_channels(n, keep / 10) <= n for n in range(1, 70) for keep in range(1, 11))


def test_each_layer_keeps_its_share_and_the_classes_stay(trained: Exported) -> None:
    before = copy.deepcopy(trained.state_dict())
    pruned = prune_channels(trained, IMAGES, 0.5)
    shapes = {name: tuple(weights.shape) for name, weights in pruned.network.named_parameters()}
    assert shapes == {
        "conv1.weight": (4, 3, 3, 3),
        "conv1.bias": (4,),
        "conv2.weight": (8, 4, 3, 3),
        "conv2.bias": (8,),
        "fc1.weight": (16, 8 * 9),
        "fc1.bias": (16,),
        "fc2.weight": (4, 16),
        "fc2.bias": (4,),
    }
    assert pruned.temperature == trained.temperature
    for name, weights in trained.state_dict().items():
        assert torch.equal(weights, before[name]), name


def test_channels_that_do_nothing_go_first_and_the_answers_stay() -> None:
    model = Exported(CNN(4, (12, 12), (8, 16, 32))).eval()
    with torch.no_grad():
        for layer in (model.network.conv1, model.network.conv2, model.network.fc1):
            assert isinstance(layer, (nn.Conv2d, nn.Linear))
            layer.weight[1::2] = 0
            layer.bias[1::2] = 0  # type: ignore[index]  # it has one
        pruned = prune_channels(model, IMAGES, 0.5)
        torch.testing.assert_close(pruned(IMAGES), model(IMAGES))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mlp", (8,)),
        ("mlp", (3, 8, 8)),
        ("torchvision:resnet18", (3, 32, 32)),
        ("torchvision:mobilenet_v3_small", (3, 32, 32)),
        pytest.param("torchvision:vgg11", (3, 32, 32), marks=pytest.mark.slow),
        ("torchvision:squeezenet1_0", (3, 32, 32)),
    ],
)
def test_networks_of_many_kinds_shrink(name: str, shape: tuple[int, ...]) -> None:
    model = Exported(build_model(name, classes=5, input_shape=shape))
    pruned = prune_channels(model, torch.rand(2, *shape), 0.5)
    assert pruned(torch.rand(3, *shape)).shape == (3, 5)
    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, pruned))
    assert after < 0.55 * before


def test_channels_stay_together_through_batch_norm_pooling_and_flattening() -> None:
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(3)]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 5))
    pruned = prune_channels(Exported(network), IMAGES, 0.5)
    assert [tuple(weights.shape) for weights in pruned.network.parameters()] == [
        *[(8, 3, 3, 3), (8,), (8,), (8,)],
        *[(16, 72), (16,), (5, 16), (5,)],
    ]


def test_what_cannot_be_pruned_is_named_with_its_layer() -> None:
    network = build_model("torchvision:shufflenet_v2_x0_5", classes=5, input_shape=(3, 32, 32))
    with pytest.raises(ExportError, match=r"layer stage\d\.\d\.branch"):
        prune_channels(Exported(network), torch.rand(2, 3, 32, 32), 0.5)


class Fixed(nn.Module):
    """Reshapes to a width that is written down."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.tail = Tail()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.tail(self.first(rows))
        return logits


class Tail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, 2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(rows.reshape(-1, 4, 4).mul(2).reshape(-1, 16))
        return logits


def test_a_pruned_network_that_does_not_run_is_refused_with_its_layer() -> None:
    with pytest.raises(ExportError, match=r"layer network\.tail \(test_prune\.py:\d+\)"):
        prune_channels(Exported(Fixed()), torch.rand(3, 8), 0.5)


def test_a_network_without_layers_inside_is_refused() -> None:
    with pytest.raises(ExportError, match="no channel"):
        prune_channels(Exported(nn.Linear(8, 2)), torch.rand(2, 8), 0.5)


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.1, float("nan")])
def test_an_impossible_share_is_refused(trained: Exported, keep: float) -> None:
    with pytest.raises(UsageError, match="keep"):
        prune_channels(trained, IMAGES, keep)


def test_all_channels_kept_is_a_copy(trained: Exported) -> None:
    same = prune_channels(trained, IMAGES, 1.0)
    assert same is not trained
    assert torch.equal(same(IMAGES), trained(IMAGES))


def test_without_the_library_the_command_is_told(
    trained: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UsageError, match=r"pip install 'marwright\[optimise\]'"):
        prune_channels(trained, IMAGES, 0.5)


def test_zeroed_weights_are_the_smallest_and_stay_zero_while_trained(
    trained: Exported, fit: Fit
) -> None:
    model = copy.deepcopy(trained)
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    count = sum(layer.weight.numel() for layer in layers)
    prune_weights(model, 0.75)
    zeros = [layer.weight == 0 for layer in layers]
    assert sum(int(zero.sum()) for zero in zeros) == pytest.approx(0.75 * count, abs=1)
    kept = torch.cat([layer.weight[layer.weight != 0].abs() for layer in layers])
    whole = [(layer.get_parameter("weight_orig"), layer.weight == 0) for layer in layers]
    gone = torch.cat([weights[zero].abs() for weights, zero in whole])
    assert gone.max() <= kept.min()
    before = layers[0].weight.detach().clone()
    fit(model, 1, None, 1.0)
    finish_weights(model)
    assert not torch.equal(layers[0].weight, before)
    for layer, zero in zip(layers, zeros, strict=True):
        assert torch.equal(layer.weight == 0, zero)
    assert model.state_dict().keys() == trained.state_dict().keys()


def test_nonzero_parameters_are_counted() -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight[0] = 0
    assert count_nonzero(model) == 5


def test_weights_need_layers_and_a_share() -> None:
    with pytest.raises(UsageError, match="no weights"):
        prune_weights(nn.ReLU(), 0.5)
    with pytest.raises(UsageError, match="sparsity"):
        prune_weights(nn.Linear(2, 2), 1.0)


def test_the_scan_prunes_one_layer_at_a_time() -> None:
    model = Exported(MLP(4, 3, widths=(16, 32))).eval()

    def measure(pruned: nn.Module) -> float:
        return float(sum(p.numel() for p in pruned.parameters()))

    whole = 4 * 16 + 16 + 16 * 32 + 32 + 32 * 3 + 3
    assert scan_sensitivity(model, torch.rand(2, 4), measure, shares=(1.0, 0.5)) == {
        "layers.0": {1.0: whole, 0.5: whole - 8 * (4 + 1 + 32)},
        "layers.2": {1.0: whole, 0.5: whole - 16 * (16 + 1 + 3)},
    }
