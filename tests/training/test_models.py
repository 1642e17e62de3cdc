from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from marwright.errors import DataError, RunError, StorageError, UsageError
from marwright.training.models import CNN, MLP, Exported, build_model, load_weights
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


def test_a_network_is_built_by_its_name() -> None:
    assert isinstance(build_model("cnn", classes=4, input_shape=(3, 9, 12)), CNN)
    assert isinstance(build_model("mlp", classes=4, input_shape=(5,)), MLP)
    for name, shape in (("cnn", (3, 9, 12)), ("mlp", (3, 9, 12)), ("mlp", (5,))):
        network = build_model(name, classes=4, input_shape=shape)
        assert network.training
        assert network(torch.rand(2, *shape)).shape == (2, 4)


def test_a_network_of_torchvision_has_a_head_for_the_classes() -> None:
    network = build_model("torchvision:resnet18", classes=3, input_shape=(3, 32, 32))
    assert network.state_dict()["fc.weight"].shape[0] == 3
    assert network.eval()(torch.rand(1, 3, 40, 40)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("transformer", (3, 9, 9), "there is no model 'transformer': expected cnn"),
        ("", (3, 9, 9), "there is no model ''"),
        ("cnn", (5,), "there is no model 'cnn' for a table"),
        ("torchvision:", (3, 9, 9), "there is no model 'torchvision:'"),
        ("torchvision:resnet19", (3, 9, 9), r"no classifier 'resnet19'.*resnet18"),
        ("no_such_module:Net", (3, 9, 9), "cannot make the model no_such_module:Net"),
        ("math:Net", (3, 9, 9), "cannot make the model math:Net.*AttributeError"),
        ("cnn", (3, 3, 9), "3 x 9 pixels are too small.*--height and --width"),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        build_model(name, classes=3, input_shape=shape)


def test_images_too_small_for_a_network_are_refused_in_one_line() -> None:
    with pytest.raises(DataError, match=r"alexnet cannot take .*\[3, 8, 8\].*larger --h") as caught:
        build_model("torchvision:alexnet", classes=3, input_shape=(3, 8, 8))
    assert "\n" not in str(caught.value)


MINE = """
from torch import nn

class Whole(nn.Module):
    def __init__(self, classes, input_shape):
        super().__init__()
        self.layer = nn.Linear(input_shape[0], classes)

    def forward(self, rows):
        return self.layer(rows)

class Fixed(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)

class Pair(Whole):
    def forward(self, rows):
        return self.layer(rows), rows

def make(classes):
    return nn.Linear(4, classes)

def make_nothing():
    return 5

class Demanding(Whole):
    def __init__(self, depth):
        ...
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A current folder with a module of networks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_networks.py").write_text(MINE, encoding="utf-8")
    (tmp_path / "broken_networks.py").write_text("class Net(", encoding="utf-8")
    path = list(sys.path)
    yield
    sys.path[:] = path
    sys.modules.pop("my_networks", None)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("name", ["Whole", "make"])
def test_a_class_of_ones_own_is_called_with_what_it_takes(name: str) -> None:
    network = build_model(f"my_networks:{name}", classes=3, input_shape=(4,))
    assert network(torch.rand(2, 4)).shape == (2, 3)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        ("my_networks:Fixed", DataError, r"expected \[N, 3\], found \[2, 2\]"),
        ("my_networks:Pair", DataError, "found tuple"),
        ("my_networks:make_nothing", UsageError, "is no network.*found int"),
        ("my_networks:Demanding", UsageError, "cannot make the model.*TypeError.*depth"),
        ("my_networks:Absent", UsageError, "cannot make the model.*AttributeError"),
        ("broken_networks:Net", UsageError, "cannot make the model.*SyntaxError"),
    ],
)
def test_a_class_that_cannot_serve_is_refused(name: str, kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        build_model(name, classes=3, input_shape=(4,))


def save(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


def test_weights_are_loaded(tmp_path: Path) -> None:
    network, other = MLP(4, 3), MLP(4, 3)
    path = save(tmp_path / "w.pt", network.state_dict())
    assert load_weights(other, path) == ()
    rows = torch.rand(5, 4)
    assert torch.equal(network(rows), other(rows))


def test_weights_of_a_run_and_of_a_checkpoint_fit_the_bare_network(tmp_path: Path) -> None:
    model = Exported(MLP(4, 3))
    for state in (model.state_dict(), {"model": model.state_dict(), "step": 3}):
        other = MLP(4, 3)
        assert load_weights(other, save(tmp_path / "w.pt", state)) == ()
        weights = (network.state_dict()["layers.0.weight"] for network in (other, model.network))
        assert torch.equal(*weights)


def test_a_head_for_other_classes_stays_random_and_is_listed(tmp_path: Path) -> None:
    network, other = MLP(4, 3), MLP(4, 7)
    before = other.state_dict()["layers.4.weight"].clone()
    path = save(tmp_path / "w.pt", network.state_dict())
    assert load_weights(other, path) == ("layers.4.bias", "layers.4.weight")
    found, given = other.state_dict(), network.state_dict()
    assert torch.equal(found["layers.4.weight"], before)
    assert torch.equal(found["layers.0.weight"], given["layers.0.weight"])


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (MLP(5, 3).state_dict(), r"layers.0.weight is \[64, 5\], not \[64, 4\]"),
        (MLP(4, 3, widths=(64,)).state_dict(), "layers.4.bias is missing; layers.4.weight is m"),
        (MLP(4, 3, widths=(64, 64, 64)).state_dict(), "layers.6.bias is not known"),
        (CNN().state_dict(), "; 9 more"),
    ],
)
def test_weights_of_another_architecture_are_refused_with_what_differs(
    tmp_path: Path, state: object, told: str
) -> None:
    network = MLP(4, 3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(RunError, match=f"of another architecture.*{told}"):
        load_weights(network, save(tmp_path / "w.pt", state))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


class _Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    for state in (_Trap(tmp_path / "ran"), {"layers.0.weight": _Trap(tmp_path / "ran")}, MLP(4, 3)):
        with pytest.raises(RunError, match="no weights that can be read safely") as caught:
            load_weights(MLP(4, 3), save(tmp_path / "w.pt", state))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_files_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(RunError, match="no weights that can be read safely"):
        load_weights(MLP(4, 3), tmp_path / "text.pt")
    with pytest.raises(RunError, match="holds no state dict: found list"):
        load_weights(MLP(4, 3), save(tmp_path / "list.pt", [1, 2]))
    with pytest.raises(RunError, match="holds no state dict"):
        load_weights(MLP(4, 3), save(tmp_path / "number.pt", {"epoch": 3}))
    with pytest.raises(StorageError, match=r"cannot read the weights .*absent"):
        load_weights(MLP(4, 3), tmp_path / "absent.pt")


def test_the_temperature_divides_the_logits_inside() -> None:
    model = Exported(MLP(4, 3), mean=torch.arange(4.0), deviation=torch.full((4,), 2.0))
    rows = torch.rand(5, 4)
    before = model(rows)
    model.temperature.fill_(2.5)
    torch.testing.assert_close(model(rows), before / 2.5)
    torch.testing.assert_close(before, model.network((rows - torch.arange(4.0)) / 2))
