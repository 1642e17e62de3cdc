from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from marwright.errors import UsageError
from marwright.training.forms import SUFFIXES
from marwright.training.models import Exported
from marwright.training.optimise.parity import check_parity
from marwright.training.optimise.variant import DEFAULT_PLAN, Variant
from marwright.training.optimise.workshop import Workshop

Answer = Callable[..., torch.Tensor]
Fit = Callable[[nn.Module, int, "nn.Module | None", float], None]
Items = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Tuner:
    """Fine-tunes, and remembers what it was asked for."""

    fit: Fit
    calls: list[tuple[int, nn.Module | None]] = field(default_factory=list)

    def __call__(
        self, model: nn.Module, epochs: int, teacher: nn.Module | None, rate: float
    ) -> None:
        self.calls.append((epochs, teacher))
        self.fit(model, epochs, None, rate)


@pytest.fixture
def tuner(fit: Fit) -> Tuner:
    return Tuner(fit)


@pytest.fixture
def shop(trained: Exported, items: Items, tuner: Tuner) -> Workshop:
    return Workshop(trained, items[0][:2], items[0][:64], tuner)


@pytest.mark.parametrize(
    "variant",
    [
        Variant("plain"),
        Variant("dynamic", quantise="dynamic"),
        Variant("aware", quantise="aware", epochs=1),
        Variant("sparse", sparsity=0.5, epochs=1),
        Variant("half-int8", keep=0.5, quantise="static", epochs=2, distil=True),
        Variant("onnx-half", "onnx", keep=0.5, epochs=1),
        Variant("onnx-dynamic", "onnx", quantise="dynamic"),
        Variant("openvino-int8", "openvino", quantise="static"),
        pytest.param(
            Variant("aotinductor-int8", "aotinductor", quantise="static"), marks=pytest.mark.slow
        ),
    ],
    ids=lambda variant: variant.name,
)
def test_a_variant_becomes_a_file_that_answers_like_its_network(
    variant: Variant, shop: Workshop, items: Items, answer: Answer, tmp_path: Path
) -> None:
    if variant.backend == "openvino":
        pytest.importorskip("nncf")
    inputs, labels = items
    path = tmp_path / f"{variant.name}{SUFFIXES[variant.backend]}"
    built = shop.build(variant, path)
    assert {built.path, *built.companions} == set(tmp_path.iterdir())
    with torch.no_grad():
        reference = built.reference(inputs)
    answers = answer(variant.backend, built.path, inputs)
    check_parity(reference, answers, labels, quantised=bool(variant.quantise))
    assert (answers.argmax(1) == labels).float().mean() > 0.8
    assert built.parameters == sum(each.numel() for each in shop.make_network(variant).parameters())


def test_the_numbers_are_those_of_the_network_in_the_file(
    shop: Workshop, trained: Exported, tmp_path: Path
) -> None:
    whole = sum(each.numel() for each in trained.parameters())
    sparse = shop.build(Variant("sparse", sparsity=0.75), tmp_path / "sparse.pt")
    assert (sparse.parameters, sparse.companions) == (whole, ())
    assert sparse.nonzero == pytest.approx(0.25 * whole, rel=0.05)  # biases stay
    weights = torch.jit.load(tmp_path / "sparse.pt").state_dict()
    assert sum(
        int(each.count_nonzero()) for name, each in weights.items() if "network" in name
    ) == (sparse.nonzero)
    assert not [name for name in weights if "mask" in name or "orig" in name]


def test_variants_share_what_they_have_in_common(shop: Workshop, tuner: Tuner) -> None:
    half = shop.make_network(Variant("a", keep=0.5, epochs=1))
    assert shop.make_network(Variant("b", "onnx", keep=0.5, epochs=1, quantise="static")) is half
    assert shop.make_network(Variant("c", keep=0.5, epochs=2)) is not half
    assert shop.make_network(Variant("d", keep=0.5, epochs=1, sparsity=0.5)) is not half
    assert shop.make_network(Variant("e", keep=0.5, epochs=1, distil=True)) is not half
    assert shop.make_network(Variant("f")) is shop.make_network(
        Variant("g", quantise="aware", epochs=3)
    )
    assert [epochs for epochs, _ in tuner.calls] == [1, 2, 1, 1]


def test_the_teacher_is_the_network_as_it_was_trained(shop: Workshop, tuner: Tuner) -> None:
    shop.make_network(Variant("a", keep=0.5, epochs=1))
    shop.make_network(Variant("b", keep=0.5, epochs=1, distil=True))
    assert [teacher for _, teacher in tuner.calls] == [None, shop.model]


def test_no_building_changes_the_trained_network(
    shop: Workshop, trained: Exported, items: Items, tmp_path: Path
) -> None:
    before = trained(items[0])
    shop.build(Variant("a", keep=0.5, sparsity=0.5, epochs=1), tmp_path / "a.pt")
    shop.build(Variant("b", quantise="aware", epochs=1), tmp_path / "b.pt")
    assert torch.equal(shop.make_network(Variant("c"))(items[0]), before)
    assert torch.equal(trained(items[0]), before)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (
            Variant("x", "onnx", quantise="aware", epochs=1),
            "aware for onnx: expected .*torchscript",
        ),
        (Variant("x", "openvino", quantise="aware", epochs=1), "aware for openvino"),
        (Variant("x", "eager"), "not quantised for eager: expected backend torchscript or onnx"),
        (Variant("x", quantise="aware", sparsity=0.5, epochs=1), "fills its zeros"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    variant: Variant, message: str, shop: Workshop, tuner: Tuner, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        shop.build(variant, tmp_path / "file")
    assert not tuner.calls
    assert not list(tmp_path.iterdir())


def test_every_variant_of_the_default_plan_has_a_builder() -> None:
    from marwright.training.optimise import workshop

    assert {(each.backend, each.quantise) for each in DEFAULT_PLAN.variants} <= set(
        workshop._BUILDERS
    )
