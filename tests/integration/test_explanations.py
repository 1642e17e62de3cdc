"""A booted TorchServe explains: /explanations, KServe's v1 and v2 paths, JSON, arrays, pictures."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from PIL import Image

from marwright.archive import Run, Spec, pack_spec
from marwright.server import TorchServe, register

pytestmark = pytest.mark.server

Send = Callable[..., requests.Response]

LEGACY = "/explanations/cnn"
V1 = "/v1/models/cnn:explain"
V2 = "/v2/models/cnn/explain"


@pytest.fixture(scope="module")
def send(server: TorchServe, connect: Callable[[TorchServe], Send]) -> Send:
    """Return a function that posts bytes, or JSON, to a path of the server."""
    post = connect(server)

    def send_to(path: str, body: bytes | dict[str, object], accept: str = "") -> requests.Response:
        kind = "application/octet-stream"
        if isinstance(body, dict):
            body, kind = json.dumps(body).encode(), "application/json"
        return post(path, body, kind, headers={"Accept": accept})

    return send_to


def test_an_explanation_names_the_predicted_label_and_adds_up(
    server: TorchServe, send: Send, run: Run, scan: bytes
) -> None:
    response = send(LEGACY, scan)
    told = response.json()
    top = next(iter(server.client.predict("cnn", scan).json()))
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    assert (told["method"], told["target"], told["prediction"]) == (
        "integrated_gradients",
        top,
        top,
    )
    model = torch.jit.load(str(run.model_path)).eval()
    pixels = read_pixels(scan)
    gain = (model(pixels) - model(torch.zeros_like(pixels)))[0, run.classes.index(top)].item()
    assert server.client.explain("cnn", scan).json() == told
    assert np.array(told["attributions"]).shape == run.image_size
    assert np.sum(told["attributions"]) == pytest.approx(gain, abs=0.02 * abs(gain))


def read_pixels(scan: bytes) -> torch.Tensor:
    """Read a scan as a batch of one in [0, 1], as training does."""
    image = Image.open(io.BytesIO(scan)).convert("RGB").resize((24, 24), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() * (1 / 255)


@pytest.mark.parametrize("method", ["integrated_gradients", "saliency", "occlusion", "grad_cam"])
def test_every_method_explains_torchscript(send: Send, scan: bytes, method: str) -> None:
    data = base64.b64encode(scan).decode()
    told = send(LEGACY, {"data": data, "method": method, "target": "3"}).json()
    attributions = np.array(told["attributions"])
    assert (told["method"], told["target"], attributions.shape) == (method, "3", (24, 24))
    assert np.ptp(attributions) > 0


def test_kserves_paths_explain_in_their_own_forms(send: Send, scan: bytes) -> None:
    data = base64.b64encode(scan).decode()
    told = send(LEGACY, scan).json()
    v1 = send(V1, {"instances": [{"b64": data}, {"b64": data}]}).json()
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [data]}
    v2 = send(V2, {"id": "mine", "inputs": [tensor]}).json()
    attributions = next(item for item in v2["outputs"] if item["name"] == "attributions")
    assert v1["explanations"] == [told, told]
    assert (v2["id"], attributions["shape"]) == ("mine", [1, 24, 24])
    assert attributions["data"] == pytest.approx(np.ravel(told["attributions"]), rel=1e-4, abs=1e-6)


def test_a_picture_shows_the_clients_image(send: Send, scan: bytes) -> None:
    response = send(LEGACY, scan, "image/png")
    picture = Image.open(io.BytesIO(response.content))
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    assert response.headers["x-method"] == "integrated_gradients"
    assert picture.size == (224, 224)
    assert np.ptp(np.asarray(picture), axis=2).max() > 60  # there are colours


def test_npy_brings_the_numbers(send: Send, scan: bytes) -> None:
    response = send(LEGACY, scan, "application/x-npy")
    array = np.load(io.BytesIO(response.content))
    told = send(LEGACY, scan).json()["attributions"]
    assert array == pytest.approx(np.array(told), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("said", [{"method": "lime"}, {"target": "eleven"}, {"target": 99}])
def test_what_cannot_be_explained_is_refused(
    send: Send, scan: bytes, said: dict[str, object]
) -> None:
    response = send(LEGACY, {"data": base64.b64encode(scan).decode(), **said})
    assert (response.status_code, response.json()["status"]) == (422, 422)


def test_predictions_beside_explanations_are_answered_as_alone(send: Send, scan: bytes) -> None:
    alone = send("/predictions/cnn", scan).json()
    with ThreadPoolExecutor(12) as pool:
        paths = ["/predictions/cnn", LEGACY, "/predictions/cnn"] * 4
        answers = list(pool.map(lambda path: send(path, scan), paths))
    for path, answer in zip(paths, answers, strict=True):
        assert answer.status_code == 200
        if path == LEGACY:
            assert answer.json()["method"] == "integrated_gradients"
        else:
            assert answer.json() == pytest.approx(alone, abs=1e-5)


def test_an_archive_brings_what_explains_it(store: Path) -> None:
    with zipfile.ZipFile(store / "cnn.mar") as archive:
        assert {"attribution.py", "heat_map.py"} <= set(archive.namelist())


def test_arrays_are_explained_too(
    server: TorchServe, send: Send, tmp_path: Path, store: Path
) -> None:
    model = torch.nn.Linear(3, 2)
    torch.jit.script(model).save(str(tmp_path / "line.pt"))
    spec = Spec.create(name="line", handler="tensor", model="line.pt")
    packed = pack_spec(spec, folder=tmp_path, out=store / "line.mar", preflight=None)
    register(server.client, packed.path)
    try:
        told = send("/explanations/line", {"instances": [[1, 2, 4]]}).json()["explanations"][0]
        weights = model.weight[told["target"]].tolist()
        expected = [weight * value for weight, value in zip(weights, (1, 2, 4), strict=True)]
        assert told["attributions"] == pytest.approx(expected, abs=1e-5)
    finally:
        server.client.models.unregister("line", "1.0")
        packed.path.unlink()
