from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Callable
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

Import = Callable[[str], Any]

LABELS = ["cat", "dog", "10", "owl"]
GRADIENT_METHODS = ("integrated_gradients", "saliency", "grad_cam")


class Network(nn.Module):
    """Two convolutions; the second's output is overwritten by a ReLU, as in VGG."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.classes = nn.Linear(8 * 4 * 3, len(LABELS))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.pool(self.relu(self.first(images)))
        maps = self.relu(self.last(maps))
        logits: torch.Tensor = self.classes(maps.flatten(1))
        return logits


@pytest.fixture
def network() -> Network:
    torch.manual_seed(3)
    return Network().eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(1, 3, 8, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def explain(handlers: Import) -> Callable[..., Any]:
    """Return a function that makes an Explainer of a module, or of one without gradients."""
    make_backend = handlers("backend").Backend

    def make_explainer(module: Any, *, gradients: bool = True, batch: int = 8, **given: Any) -> Any:
        name, own = ("eager", module) if gradients else ("onnx", None)
        backend = make_backend(name, module, torch.device("cpu"), own)
        return handlers("attribution").Explainer(backend, given, batch=batch)

    return make_explainer


@pytest.fixture
def refuse(handlers: Import) -> Callable[..., Any]:
    """Return a function that gives the rejection that a call ends with."""

    def refuse_call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with pytest.raises(handlers("problem").RejectedInput) as caught:
            function(*arguments, **named)
        return caught.value

    return refuse_call


@pytest.fixture
def classify(
    handlers: Import, start: Callable[..., Any], tmp_path: Any, network: Network
) -> Callable[..., Any]:
    """Return a function that starts an image classifier with settings."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/classes.json").write_text(json.dumps(LABELS))

    def start_classifier(**settings: Any) -> Any:
        kind = handlers("image_classifier").ImageClassifier
        return start(kind, network, image_size=(8, 6), warm_up=False, **settings)

    return start_classifier


def make_png(image: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    pixels = (image[0] * 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def ask(handler: Any, *incoming: Any) -> Any:
    """Answer one request, or a batch; a JSON body parsed."""
    responses = handler.answer(incoming)
    for response in responses:
        if "json" in response.content_type:
            response.body = json.loads(response.body)
    return responses if len(incoming) > 1 else responses[0]


# The methods themselves.


def test_integrated_gradients_add_up_to_what_the_output_gains_over_black(
    network: Network, image: torch.Tensor, explain: Callable[..., Any]
) -> None:
    gain = (network(image) - network(torch.zeros_like(image)))[0, 2].item()
    (values,), delta = explain(network, explain_steps=64).attribute(
        "integrated_gradients", (image,), 2
    )
    assert abs(gain) > 0.02
    assert values.sum().item() == pytest.approx(gain, abs=0.01 * abs(gain))
    assert delta == pytest.approx(values.sum().item() - gain, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_integrated_gradients_and_their_delta_are_captums(
    network: Network, image: torch.Tensor, explain: Callable[..., Any], batch: int
) -> None:
    expected, delta = captum.attr.IntegratedGradients(network).attribute(
        image.clone().requires_grad_(), 0, 1, n_steps=20, return_convergence_delta=True
    )
    explained = explain(network, explain_steps=20, batch=batch).attribute(
        "integrated_gradients", (image,), 1
    )
    torch.testing.assert_close(explained.values[0], expected.float())
    assert explained.delta == pytest.approx(delta.item(), abs=1e-6)


def test_more_steps_make_a_smaller_delta(image: torch.Tensor, explain: Callable[..., Any]) -> None:
    def square(images: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(9 * images.flatten(1) - 3)

    few, many = (
        explain(square, explain_steps=steps).attribute("integrated_gradients", (image,), 5).delta
        for steps in (2, 32)
    )
    assert abs(many) < 1e-5 < abs(few)


def test_saliency_is_captums(
    network: Network, image: torch.Tensor, explain: Callable[..., Any]
) -> None:
    expected = captum.attr.Saliency(network).attribute(image.clone().requires_grad_(), 3)
    (values,), delta = explain(network).attribute("saliency", (image,), 3)
    assert torch.equal(values, expected)
    assert delta is None


def test_occlusion_is_what_the_output_loses_without_a_window(
    network: Network, image: torch.Tensor, explain: Callable[..., Any]
) -> None:
    explainer = explain(network, gradients=False)
    (values,), _ = explainer.attribute("occlusion", (image,), 0, windows=[(3, 2, 2)])
    hidden = image.clone()
    hidden[:, :, 2:4, 4:6] = 0
    loss = (network(image) - network(hidden))[0, 0].item()
    assert values[0, :, 2:4, 4:6].unique().tolist() == pytest.approx([loss], abs=1e-6)


def export(network: Network) -> Any:
    sizes = ({0: torch.export.Dim("n", min=1, max=64)},)
    program = torch.export.export(network, (torch.rand(2, 3, 8, 6),), dynamic_shapes=sizes)
    return program.module()


FORMS: dict[str, Callable[[Network], Any]] = {
    "eager": lambda network: network,
    "scripted": torch.jit.script,
    "traced": lambda network: torch.jit.trace(network, torch.rand(1, 3, 8, 6)),
    "exported": export,
}


@pytest.mark.parametrize("form", FORMS)
def test_grad_cam_is_captums_for_every_form_of_a_model(
    network: Network, image: torch.Tensor, explain: Callable[..., Any], form: str
) -> None:
    expected = captum.attr.LayerAttribution.interpolate(
        captum.attr.LayerGradCam(network, network.last).attribute(image, 1, relu_attributions=True),
        (8, 6),
        "bilinear",
    )
    for _ in range(3):  # TorchScript compiles in between
        (values,), _ = explain(FORMS[form](network)).attribute("grad_cam", (image,), 1)
        torch.testing.assert_close(values, expected)
    assert values.max() > 0


def test_grad_cam_passes_over_a_convolution_that_the_output_does_not_depend_on(
    network: Network, image: torch.Tensor, explain: Callable[..., Any]
) -> None:
    aside = nn.Conv2d(8, 8, 3, padding=1)

    def run(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = network(images)
        aside(torch.rand(1, 8, 4, 3))
        return logits

    expected = explain(network).attribute("grad_cam", (image,), 1).values
    torch.testing.assert_close(explain(run).attribute("grad_cam", (image,), 1).values, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["integrated_gradients", "saliency"])
def test_every_form_of_a_model_is_explained_alike(
    network: Network, image: torch.Tensor, explain: Callable[..., Any], form: str, method: str
) -> None:
    expected = explain(network).attribute(method, (image,), 1)
    found = explain(FORMS[form](network)).attribute(method, (image,), 1)
    torch.testing.assert_close(found.values, expected.values)


# What is not there.


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_backend_without_gradients_refuses_and_names_what_works(
    network: Network,
    image: torch.Tensor,
    explain: Callable[..., Any],
    refuse: Callable[..., Any],
    method: str,
) -> None:
    explainer = explain(network, gradients=False)
    rejected = refuse(explainer.attribute, method, (image,), 0)
    assert rejected.status == 501
    assert "onnx" in rejected.detail
    assert "occlusion" in rejected.detail
    assert explainer.method == "occlusion"


def test_whole_numbers_have_no_gradients(
    explain: Callable[..., Any], refuse: Callable[..., Any]
) -> None:
    words = nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 2))
    ids = torch.tensor([[1, 5, 8]])
    assert refuse(explain(words).attribute, "saliency", (ids,), 0).status == 501
    (values,), _ = explain(words).attribute("occlusion", (ids,), 0)
    assert values.shape == (1, 3)


def test_an_output_of_whole_numbers_has_no_gradients(
    image: torch.Tensor, explain: Callable[..., Any], refuse: Callable[..., Any]
) -> None:
    def classify(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).argmax(1, keepdim=True)

    for method in GRADIENT_METHODS:
        assert refuse(explain(classify).attribute, method, (image,), 0).status == 501


def test_grad_cam_without_a_convolution_is_refused(
    image: torch.Tensor, explain: Callable[..., Any], refuse: Callable[..., Any]
) -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(144, 2))
    rejected = refuse(explain(flat).attribute, "grad_cam", (image,), 0)
    assert (rejected.status, "saliency" in rejected.detail) == (501, True)


def test_without_captum_its_methods_say_how_to_get_it(
    network: Network,
    image: torch.Tensor,
    explain: Callable[..., Any],
    refuse: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    for method in ("integrated_gradients", "saliency", "occlusion"):
        rejected = refuse(explain(network).attribute, method, (image,), 0)
        assert (rejected.status, "pip install captum" in rejected.detail) == (501, True)
    assert explain(network).attribute("grad_cam", (image,), 0).values[0].shape == (1, 1, 8, 6)


# Limits.


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion"])
def test_an_explanation_asks_the_model_as_often_as_its_steps_allow(
    network: Network, image: torch.Tensor, explain: Callable[..., Any], method: str
) -> None:
    sizes = []

    def count(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return network(images)

    explain(count, explain_steps=6, batch=4).attribute(method, (image,), 0)
    assert sum(sizes) <= {"integrated_gradients": 6 + 2, "occlusion": 6 * 4 + 1}[method]
    assert max(sizes) <= 4


def test_windows_of_a_long_array_are_found_at_once(handlers: Import) -> None:
    assert handlers("attribution").choose_windows((4_000_000_000,), 3) == (1_333_333_334,)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 200))
def test_windows_are_the_smallest_that_are_few_enough(
    handlers: Import, shape: list[int], most: int
) -> None:
    def count(side: int) -> int:
        return int(np.prod([-(-size // min(side, size)) for size in shape]))

    window = handlers("attribution").choose_windows(shape, most)
    side = max(window)
    assert window == tuple(min(side, size) for size in shape)
    assert count(side) <= most or window == tuple(shape)
    assert side == 1 or count(side - 1) > most


@pytest.mark.parametrize(
    "settings", [{"explain_method": "lime"}, {"explain_steps": 0}, {"explain_steps": -3}]
)
def test_a_setting_that_means_nothing_stops_the_worker(
    network: Network, explain: Callable[..., Any], settings: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="explain_method"):
        explain(network, **settings)


# Targets.


@pytest.mark.parametrize(
    ("target", "index"), [(None, 2), ("dog", 1), (3, 3), ("0", 0), ("10", 2), (0, 0)]
)
def test_a_target_is_a_label_or_else_an_index(handlers: Import, target: Any, index: int) -> None:
    assert handlers("attribution").find_target(target, LABELS, 2) == index


@pytest.mark.parametrize("target", ["bird", 4, -1, "-1", 1.5, [1], {}, "9" * 5000, "²"])
def test_a_target_that_is_neither_is_refused(
    handlers: Import, refuse: Callable[..., Any], target: Any
) -> None:
    rejected = refuse(handlers("attribution").find_target, target, LABELS, 0)
    assert rejected.status == 422
    assert len(rejected.detail) < 200


@pytest.mark.parametrize(
    ("target", "shape", "index"),
    [(None, (4,), 2), (3, (4,), 3), ([1, 2], (2, 3), 5), (0, (), 0), ([0], (1,), 0)],
)
def test_a_place_in_an_output_is_found(
    handlers: Import, target: Any, shape: tuple[int, ...], index: int
) -> None:
    assert handlers("attribution").find_place(target, shape, 2) == index


@pytest.mark.parametrize("target", [4, -1, "1", True, [1, 1], 1.0, {}, []])
def test_a_place_that_no_output_has_is_refused(
    handlers: Import, refuse: Callable[..., Any], target: Any
) -> None:
    assert refuse(handlers("attribution").find_place, target, (4,), 0).status == 422


# The image classifier's explanations.


def test_the_predicted_label_is_explained_unless_another_is_asked_for(
    classify: Callable[..., Any], post: Callable[..., Any], image: torch.Tensor
) -> None:
    handler = classify()
    data = base64.b64encode(make_png(image)).decode()
    best = next(iter(ask(handler, post({"data": data})).body))
    told = ask(handler, post({"data": data}, explain=True)).body
    assert (told["target"], told["prediction"]) == (best, best)
    other = next(label for label in LABELS if label != best)
    told = ask(handler, post({"data": data, "target": other}, explain=True)).body
    assert (told["target"], told["prediction"]) == (other, best)


def test_an_explanation_is_summed_over_channels_and_adds_up(
    classify: Callable[..., Any], post: Callable[..., Any], network: Network, image: torch.Tensor
) -> None:
    body = {"data": base64.b64encode(make_png(image)).decode(), "target": "owl"}
    told = ask(classify(), post(body, explain=True)).body
    attributions = np.array(told["attributions"])
    pixels = (image * 255).byte().float() / 255
    gain = (network(pixels) - network(torch.zeros_like(pixels)))[0, 3].item()
    assert (told["method"], attributions.shape) == ("integrated_gradients", (8, 6))
    assert attributions.sum() == pytest.approx(gain + told["convergence_delta"], abs=1e-5)
    assert abs(told["convergence_delta"]) < 0.01


@pytest.mark.parametrize("method", ["integrated_gradients", "saliency", "occlusion", "grad_cam"])
def test_the_method_is_the_requests_or_else_the_settings(
    classify: Callable[..., Any], post: Callable[..., Any], image: torch.Tensor, method: str
) -> None:
    data = base64.b64encode(make_png(image)).decode()
    by_request = ask(classify(), post({"data": data, "method": method}, explain=True))
    by_setting = ask(classify(explain_method=method), post({"data": data}, explain=True))
    assert by_request.body == by_setting.body
    assert by_request.body["method"] == method


def test_every_protocol_may_say_method_and_target(
    classify: Callable[..., Any], post: Callable[..., Any], image: torch.Tensor
) -> None:
    data = base64.b64encode(make_png(image)).decode()
    said = {"parameters": {"method": "saliency", "target": "cat"}}
    handler = classify()
    v1 = ask(handler, post({"instances": [{"b64": data}] * 2, **said}, explain=True)).body
    tensor = {"name": "x", "shape": [1], "datatype": "BYTES", "data": [data]}
    v2 = ask(handler, post({"inputs": [tensor], **said}, explain=True)).body
    outputs = {output["name"]: output for output in v2["outputs"]}
    assert [item["target"] for item in v1["explanations"]] == ["cat", "cat"]
    assert (outputs["method"]["data"], outputs["target"]["data"]) == (["saliency"], ["cat"])
    assert outputs["attributions"]["shape"] == [1, 8, 6]


def test_an_unknown_method_is_refused(
    classify: Callable[..., Any], post: Callable[..., Any], image: torch.Tensor
) -> None:
    body = {"data": base64.b64encode(make_png(image)).decode(), "method": "lime"}
    refused = ask(classify(), post(body, explain=True))
    assert refused.status == refused.body["status"] == 422
    assert "occlusion" in refused.body["detail"]


def test_npy_holds_the_same_attributions(
    classify: Callable[..., Any], post: Callable[..., Any], image: torch.Tensor
) -> None:
    handler, png = classify(), make_png(image)
    told = ask(handler, post(png, explain=True)).body
    array = np.load(
        io.BytesIO(ask(handler, post(png, accept="application/x-npy", explain=True)).body)
    )
    assert (array.dtype, array.shape) == (np.float32, (8, 6))
    assert array == pytest.approx(np.array(told["attributions"]), rel=1e-5)


def test_predictions_beside_explanations_are_answered_as_alone(
    classify: Callable[..., Any], post: Callable[..., Any], image: torch.Tensor
) -> None:
    handler, png = classify(), make_png(image)
    alone = ask(handler, post(png)).body
    bad = {"data": base64.b64encode(png).decode(), "target": "nobody"}
    batch = ask(handler, post(png), post(bad, explain=True), post(png, explain=True), post(png))
    assert [response.status for response in batch] == [200, 422, 200, 200]
    assert batch[0].body == batch[3].body == alone
    assert batch[2].body["prediction"] == next(iter(alone))


# Pictures.


def open_picture(response: Any) -> Image.Image:
    assert (response.status, response.content_type) == (200, "image/png")
    return Image.open(io.BytesIO(response.body))


@pytest.mark.parametrize(
    ("size", "drawn"),
    [((8, 6), (299, 224)), ((300, 600), (300, 600)), ((2048, 512), (1024, 256)), ((1, 9), (1, 1))],
)
def test_a_heat_map_has_the_clients_sides_within_limits(
    classify: Callable[..., Any],
    post: Callable[..., Any],
    encode: Callable[..., bytes],
    size: tuple[int, int],
    drawn: tuple[int, int],
) -> None:
    response = ask(classify(), post(encode(size), accept="image/png", explain=True))
    picture = open_picture(response)
    assert picture.size == (drawn if drawn != (1, 1) else (114, 1024))
    assert response.headers["x-method"] == "integrated_gradients"


def test_a_heat_map_is_red_where_the_image_speaks_for_the_target_and_blue_where_against(
    handlers: Import,
) -> None:
    heat = torch.zeros(2, 3)
    heat[0, 0], heat[1, 2] = 0.5, -0.5
    pixels = torch.full((2, 3, 3), 128, dtype=torch.uint8)
    picture = Image.open(io.BytesIO(handlers("heat_map").draw_heat_map(pixels, heat)))
    width, _ = picture.size
    colours = np.asarray(picture).astype(int)
    first, middle, last = colours[3, 3], colours[-3, width // 2], colours[-3, -3]
    assert first[0] > first[2] + 80
    assert last[2] > last[0] + 80
    assert np.ptp(middle) <= 2


def test_nothing_to_show_is_a_grey_picture(handlers: Import) -> None:
    pixels = torch.zeros(4, 4, 3, dtype=torch.uint8)
    picture = handlers("heat_map").draw_heat_map(pixels, torch.zeros(2, 2))
    assert Image.open(io.BytesIO(picture)).getextrema() == ((102, 102),) * 3


def test_several_images_make_no_picture(
    classify: Callable[..., Any], post: Callable[..., Any], image: torch.Tensor
) -> None:
    data = base64.b64encode(make_png(image)).decode()
    body = {"instances": [{"b64": data}, {"b64": data}]}
    assert ask(classify(), post(body, accept="image/png", explain=True)).status == 406


# The tensor handler's explanations.


class Price(nn.Module):
    """A line through two inputs, and a second output that is no line."""

    def forward(self, rooms: torch.Tensor, age: torch.Tensor) -> dict[str, torch.Tensor]:
        price = 3 * rooms[:, 0] - 2 * rooms[:, 1] + age[:, 0]
        return {"price": price, "shares": torch.stack([rooms, rooms * rooms], dim=1)}


def test_a_lines_attributions_are_its_terms(
    handlers: Import, start: Callable[..., Any], post: Callable[..., Any]
) -> None:
    handler = start(handlers("tensor").TensorHandler, Price())
    instance = {"rooms": [5, 7], "age": [11]}
    told = ask(handler, post({"instances": [instance]}, explain=True)).body["explanations"][0]
    assert told["attributions"]["rooms"] == pytest.approx([15, -14], abs=1e-4)
    assert told["attributions"]["age"] == pytest.approx([11], abs=1e-4)
    assert told["convergence_delta"] == pytest.approx(0, abs=1e-4)
    assert (told["target"], told["prediction"]) == (0, 12)


@pytest.mark.parametrize("method", ["integrated_gradients", "saliency", "occlusion"])
def test_one_number_of_one_output_is_explained(
    handlers: Import, start: Callable[..., Any], post: Callable[..., Any], method: str
) -> None:
    handler = start(handlers("tensor").TensorHandler, Price())
    said = {"output": "shares", "target": [1, 0], "method": method}
    body = {"instances": [{"rooms": [5, 7], "age": [11]}], "parameters": said}
    told = ask(handler, post(body, explain=True)).body["explanations"][0]
    expected = 10 if method == "saliency" else 25
    assert told["attributions"]["rooms"] == pytest.approx([expected, 0], abs=1e-3)
    assert (told["target"], told["prediction"]) == ([1, 0], 25)


@pytest.mark.parametrize("said", [{"output": "none"}, {"output": []}, {"target": 1}])
def test_a_number_that_is_not_there_is_refused(
    handlers: Import, start: Callable[..., Any], post: Callable[..., Any], said: dict[str, Any]
) -> None:
    handler = start(handlers("tensor").TensorHandler, Price())
    body = {"instances": [{"rooms": [5, 7], "age": [11]}], "parameters": said}
    assert ask(handler, post(body, explain=True)).status == 422


def test_arrays_are_explained_as_arrays(
    handlers: Import, start: Callable[..., Any], post: Callable[..., Any]
) -> None:
    model = nn.Linear(4, 3)
    handler = start(handlers("tensor").TensorHandler, model, inputs=[{"shape": [4]}])
    buffer = io.BytesIO()
    row = np.array([1, -2, 0, 4], np.float32)
    np.save(buffer, row)
    answer = ask(handler, post(buffer.getvalue(), accept="application/x-npy", explain=True))
    best = int(model(torch.from_numpy(row)).argmax())
    expected = model.weight[best].detach().numpy() * row
    assert np.load(io.BytesIO(answer.body)) == pytest.approx(expected, abs=1e-5)
