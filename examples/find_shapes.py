"""Train a small detector on drawn shapes, pack it, serve it, and draw what it answers and why.

Takes some two minutes on two cores; run as `python examples/find_shapes.py [FOLDER]`.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional

from marwright.archive import Spec, pack_spec
from marwright.server import TorchServe

LABELS = ["background", "circle", "square", "triangle"]
SIZE = 128
"""Pixels, both ways, that the model takes."""
STRIDE = 8
GREY = (114, 114, 114)
STEPS = 500


class Detector(nn.Module):
    """At each eighth pixel: is a shape's middle there, of which kind, how far are its edges."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        for _ in range(4):
            layers += [nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.kinds = nn.Conv2d(64, 3, 1)
        self.edges = nn.Conv2d(64, 4, 1)
        middle = (torch.arange(SIZE // STRIDE) + 0.5) * STRIDE
        y, x = torch.meshgrid(middle, middle, indexing="ij")
        self.points = nn.Buffer(torch.stack([x, y], 2).view(1, -1, 2))

    def look(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (N, 3, 16, 16) logits and (N, 4, 16, 16) distances in pixels."""
        maps = self.body(images)
        # Minus 4: before anything is learned there is nothing anywhere.
        return self.kinds(maps) - 4, functional.softplus(self.edges(maps)) * 8

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return boxes (N, 256, 4) and scores (N, 256, 4) for (N, 3, 128, 128) in [0, 1]."""
        logits, distances = self.look(images)
        scores = torch.sigmoid(logits.flatten(2)).transpose(1, 2)
        scores = torch.cat([torch.zeros_like(scores[..., :1]), scores], 2)
        before, after = distances.flatten(2).transpose(1, 2).chunk(2, 2)
        return torch.cat([self.points - before, self.points + after], 2), scores


def draw_picture(
    generator: np.random.Generator, size: tuple[int, int]
) -> tuple[Image.Image, list[tuple[int, list[int]]]]:
    """Draw shapes that hardly overlap, on noise; return them with their kinds and boxes."""
    noise = generator.integers(0, 80, (size[1], size[0]), dtype=np.uint8)
    picture = Image.fromarray(noise).convert("RGB")
    pen = ImageDraw.Draw(picture)
    shapes: list[tuple[int, list[int]]] = []
    taken = np.zeros((size[1], size[0]), bool)
    for _ in range(int(generator.integers(3, 8))):
        side = int(generator.integers(min(size) // 8, min(size) // 3))
        x, y = (int(generator.integers(0, length - side)) for length in size)
        if taken[y : y + side, x : x + side].any():
            continue
        taken[y : y + side, x : x + side] = True
        kind = int(generator.integers(1, 4))
        colour = tuple(int(value) for value in generator.integers(90, 256, 3))
        last_x, last_y = x + side - 1, y + side - 1  # Pillow draws these too
        box = [x, y, last_x, last_y]
        if kind == 1:
            pen.ellipse(box, fill=colour)
        elif kind == 2:
            pen.rectangle(box, fill=colour)
        else:
            pen.polygon([(x, last_y), (last_x, last_y), (x + side // 2, y)], fill=colour)
        shapes.append((kind, [x, y, x + side, y + side]))
    return picture, shapes


def make_batch(
    generator: np.random.Generator, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return images, which cell holds the middle of which kind, and the distances there."""
    cells = SIZE // STRIDE
    images, kinds = torch.zeros(count, 3, SIZE, SIZE), torch.zeros(count, 3, cells, cells)
    edges = torch.zeros(count, 4, cells, cells)
    for n in range(count):
        height = int(generator.integers(SIZE // 2, SIZE + 1))
        picture, shapes = draw_picture(generator, (SIZE, height))
        framed = Image.new("RGB", (SIZE, SIZE), GREY)  # as the handler's letterbox does
        top = (SIZE - height) // 2
        framed.paste(picture, (0, top))
        images[n] = torch.from_numpy(np.array(framed)).permute(2, 0, 1) * (1 / 255)
        for kind, box in shapes:
            x1, y1, x2, y2 = (value + top * (i % 2) for i, value in enumerate(box))
            column, row = (x1 + x2) // 2 // STRIDE, (y1 + y2) // 2 // STRIDE
            x, y = (column + 0.5) * STRIDE, (row + 0.5) * STRIDE
            kinds[n, kind - 1, row, column] = 1
            edges[n, :, row, column] = torch.tensor([x - x1, y - y1, x2 - x, y2 - y])
    return images, kinds, edges


def train() -> Detector:
    """Train on pictures that are drawn as they are needed."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    model = Detector()
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=STEPS)
    for step in range(STEPS):
        images, kinds, edges = make_batch(generator, 16)
        logits, distances = model.look(images)
        surprise = functional.binary_cross_entropy_with_logits(logits, kinds, reduction="none")
        probability = torch.sigmoid(logits)
        # Cells with nothing are many and easy: they count little (focal loss).
        hardness = torch.where(kinds > 0, 1 - probability, probability) ** 2
        count = kinds.sum().clamp(min=1)
        held = kinds.sum(1, keepdim=True)
        loss = (surprise * hardness).sum() / count
        loss = loss + ((distances - edges).abs() * held).sum() / (4 * count) / STRIDE
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    return model.eval()


def write_spec(model: Detector, folder: Path) -> Spec:
    """Write the model and say what its archive is to be."""
    torch.jit.script(model).save(str(folder / "shapes.pt"))
    settings = {"image_size": [SIZE, SIZE], "letterbox": True, "score_threshold": 0.4}
    return Spec.create(
        name="shapes",
        handler="object_detector",
        model="shapes.pt",
        labels=LABELS,
        settings={"handler": settings},
    )


def draw_answer(picture: Image.Image, found: list[dict[str, Any]]) -> Image.Image:
    """Draw boxes, labels and scores over an enlarged picture."""
    drawn = picture.resize((picture.width * 2, picture.height * 2))
    pen = ImageDraw.Draw(drawn)
    for item in found:
        box = [2 * value for value in item["box"]]
        pen.rectangle(box, outline="white", width=2)
        text = f"{item['label']} {item['score']:.2f}"
        place = (box[0] + 3, max(0, box[1] - 15))
        pen.rectangle(pen.textbbox(place, text, font_size=12), fill="black")
        pen.text(place, text, fill="white", font_size=12)
    return drawn


def main() -> None:
    """Train, pack, serve, ask, draw."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/shapes")
    folder.mkdir(parents=True, exist_ok=True)
    packed = pack_spec(write_spec(train(), folder), folder=folder, out=folder, force=True)
    picture, shapes = draw_picture(np.random.default_rng(7), (300, 200))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    with TorchServe(folder, models=[packed.path.name]) as server:
        found = server.client.predict("shapes", buffer.getvalue()).json()
        why = server.client.explain("shapes", buffer.getvalue(), accept="image/png").body
    for item in found:
        print(item)
    print("drawn:", [(LABELS[kind], box) for kind, box in shapes])
    draw_answer(picture, found).save(folder / "answer.png", optimize=True)
    (folder / "why.png").write_bytes(why)  # for the first of them


if __name__ == "__main__":
    main()
