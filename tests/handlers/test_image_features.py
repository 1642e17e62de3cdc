from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Import = Callable[[str], Any]
Measure = Callable[[torch.Tensor], dict[str, float]]

PIXELS = torch.Generator().manual_seed(0)


@pytest.fixture
def measure(handlers: Import) -> Measure:
    """Return a function that names the features of one image (3, H, W)."""
    module = handlers("image_features")

    def measure_one(image: torch.Tensor) -> dict[str, float]:
        (row,) = module.measure_images(image[None]).tolist()
        return dict(zip(module.IMAGE_FEATURES, row, strict=True))

    return measure_one


def make_image(height: int = 24, width: int = 24) -> torch.Tensor:
    """A bright bar on a dark ground, from the upper left to the middle."""
    image = torch.full((3, height, width), 20, dtype=torch.uint8)
    for step in range(height // 2):
        image[:, step, step : step + 3] = 220
    return image


def test_flat_colours_have_their_own_values(measure: Measure) -> None:
    red = torch.zeros(3, 8, 8, dtype=torch.uint8)
    red[0] = 255
    found = measure(red)
    assert (found["red"], found["green"], found["blue"], found["saturation"]) == (1, 0, 0, 1)
    assert found["brightness"] == pytest.approx(0.299, abs=0.003)
    for name in ("contrast", "sharpness", "noise", "edges", "tilt"):
        assert found[name] == 0
    assert found["direction"] == found["centre_x"] == found["centre_y"] == 0.5


def test_white_is_one(measure: Measure) -> None:
    assert measure(torch.full((3, 5, 5), 255, dtype=torch.uint8))["brightness"] == 1


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda image: 255 - image, {"brightness", "red", "green", "blue"}),
        (lambda image: image.flip(2), {"centre_x", "tilt"}),
        (lambda image: image.flip(1), {"centre_y", "tilt"}),
        (
            lambda image: torch.nn.functional.avg_pool2d(
                image.float()[None], 3, stride=1, padding=1
            )[0].byte(),
            {"sharpness", "edges"},
        ),
        (
            lambda image: (
                (image.int() + torch.randint(-15, 16, image.shape, generator=PIXELS))
                .clamp(0, 255)
                .byte()
            ),
            {"noise", "sharpness", "saturation"},
        ),
    ],
    ids=["inverted", "mirrored", "upside down", "blurred", "noisy"],
)
def test_a_change_moves_the_features_that_are_named_for_it(
    measure: Measure, change: Callable[[torch.Tensor], torch.Tensor], names: set[str]
) -> None:
    image = make_image()
    before, after = measure(image), measure(change(image))
    for name in names:
        assert abs(after[name] - before[name]) > 0.01, name


def test_mirrored_images_have_mirrored_places_and_the_same_colours(measure: Measure) -> None:
    image = make_image(24, 30)
    before, after = measure(image), measure(image.flip(2))
    assert after["centre_x"] == pytest.approx(1 - before["centre_x"], abs=1e-5)
    assert after["tilt"] == pytest.approx(-before["tilt"], abs=1e-5)
    for name in ("brightness", "contrast", "red", "noise", "sharpness", "edges", "direction"):
        assert after[name] == before[name]


def test_a_turned_image_has_another_direction(measure: Measure) -> None:
    stripes = torch.zeros(3, 16, 16, dtype=torch.uint8)
    stripes[:, :, ::4] = 255
    assert measure(stripes)["direction"] == 1
    assert measure(stripes.transpose(1, 2))["direction"] == 0


def test_an_image_is_measured_alike_alone_in_a_batch_and_however_it_lies(
    handlers: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = handlers("image_features")
    images = torch.randint(0, 256, (20, 3, 17, 31), dtype=torch.uint8, generator=PIXELS)
    whole = module.measure_images(images)
    assert whole.shape == (20, len(module.IMAGE_FEATURES))
    assert whole.dtype == torch.float32
    assert torch.equal(module.measure_images(images[7:8])[0], whole[7])
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(module.measure_images(last), whole)
    monkeypatch.setattr(module, "AT_ONCE", 1)
    assert torch.equal(module.measure_images(images), whole)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (3, 2), (1, 5000)])
def test_images_too_small_for_an_edge_still_have_finite_numbers(
    measure: Measure, shape: tuple[int, int]
) -> None:
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=PIXELS)
    assert all(abs(value) <= 1.0001 for value in measure(image).values())


def test_a_large_image_does_not_overflow(measure: Measure) -> None:
    found = measure(torch.full((3, 800, 4100), 255, dtype=torch.uint8))
    assert found["brightness"] == found["red"] == 1


def test_no_images_have_no_rows(handlers: Import) -> None:
    found = handlers("image_features").measure_images(torch.zeros(0, 3, 4, 4, dtype=torch.uint8))
    assert found.shape == (0, 13)


@pytest.mark.parametrize(
    "pixels", [torch.zeros(1, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)]
)
def test_what_are_no_bytes_of_images_is_refused(handlers: Import, pixels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected images \(N, 3, H, W\) uint8"):
        handlers("image_features").measure_images(pixels)


@pytest.mark.parametrize("module", ["image_features", "logits"])
def test_what_training_shares_imports_numpy_and_torch_alone(root: Path, module: str) -> None:
    tree = ast.parse((root / f"handlers/{module}.py").read_text("utf-8"))
    nodes = list(ast.walk(tree))
    names = {item.name for node in nodes if isinstance(node, ast.Import) for item in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) <= {
        "numpy",
        "torch",
    }
