"""A booted TorchServe finds objects, with torchvision's operator brought by the archive itself."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from marwright.archive import Packed, Spec, pack_spec
from marwright.errors import AnswerError, InputRejectedError
from marwright.server import TorchServe, register

pytestmark = pytest.mark.server

# Gives the box around all bright pixels and one a pixel off, of which torchvision::nms leaves one.
# Built in a process of its own: a TorchScript file that names the operator.
BUILD = """
import torch
import vision_operators

vision_operators.define_missing()

class Finder(torch.nn.Module):
    def find(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        if image.mean() > 0.95:
            raise ValueError("too bright")
        bright = image.amin(0) > 0.7
        rows, columns = bright.any(1).nonzero()[:, 0], bright.any(0).nonzero()[:, 0]
        if len(rows) == 0:
            none = torch.zeros(0)
            return {"boxes": torch.zeros(0, 4), "labels": none.long(), "scores": none}
        box = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
        boxes, scores = torch.stack([box, box + 1]), torch.tensor([0.9, 0.8])
        kept = torch.ops.torchvision.nms(boxes, scores, 0.5)
        labels = torch.ones(len(kept), dtype=torch.int64)
        return {"boxes": boxes[kept], "labels": labels, "scores": scores[kept]}

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [self.find(image) for image in images]

torch.jit.script(Finder()).save("finder.pt")
"""


@pytest.fixture(scope="module")
def finder(
    root: Path, server: TorchServe, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Packed]:
    """The detector, packed with its preflight, and registered."""
    folder = tmp_path_factory.mktemp("finder")
    (folder / "build.py").write_text(BUILD)
    path = {**os.environ, "PYTHONPATH": str(root / "handlers")}
    subprocess.run([sys.executable, "build.py"], cwd=folder, env=path, check=True)
    (folder / "sample.png").write_bytes(draw((60, 40), (10, 20, 30, 35)))
    found = [{"label": "box", "score": 0.9, "box": [10, 20, 30, 35]}]
    spec = Spec.create(
        name="finder",
        handler="object_detector",
        model="finder.pt",
        labels=["nothing", "box"],
        settings={"batchSize": 8},
        samples=[{"file": "sample.png", "answer": found}],
    )
    packed = pack_spec(spec, folder=folder, out=store / "finder.mar")
    register(server.client, packed.path)
    yield packed
    server.client.models.unregister("finder", "1.0")
    packed.path.unlink()


def draw(size: tuple[int, int], box: tuple[int, int, int, int]) -> bytes:
    """Draw a white box on black."""
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), box)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def test_a_packed_detector_passed_its_preflight(finder: Packed) -> None:
    assert finder.figures
    assert finder.findings == ()


def test_a_box_is_told_in_the_clients_pixels(server: TorchServe, finder: Packed) -> None:
    answer = server.client.predict(finder.name, draw((300, 200), (17, 31, 250, 64)))
    assert answer.json() == [{"label": "box", "score": 0.9, "box": [17, 31, 250, 64]}]
    assert answer.content_type == "application/json"


def test_an_image_without_objects_has_an_empty_list(server: TorchServe, finder: Packed) -> None:
    assert server.client.predict(finder.name, draw((30, 20), (0, 0, 0, 0))).json() == []


def test_an_image_that_makes_inference_fail_fails_alone(server: TorchServe, finder: Packed) -> None:
    good, bright, text = draw((64, 64), (1, 2, 3, 4)), draw((64, 64), (0, 0, 64, 64)), b"no image"

    def send(body: bytes) -> object:
        try:
            return server.client.predict(finder.name, body).json()[0]["box"]
        except (AnswerError, InputRejectedError) as exc:
            return exc.status

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(send, [good, bright, good, text] * 5))
    assert answers == [[1, 2, 3, 4], 500, [1, 2, 3, 4], 415] * 5
