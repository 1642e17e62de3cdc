"""Ask a served model why, by every method, and draw the answers side by side.

Needs a run (`marwright train`) and Captum (`pip install 'marwright[explain]'`); run as
`python examples/explain_digits.py [RUN [PICTURE]]`.
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from marwright.archive import Run, pack_run
from marwright.client import Answer
from marwright.server import TorchServe

METHODS = ("integrated_gradients", "saliency", "occlusion", "grad_cam")
DIGITS = ("3", "8")
SIDE = 224


def explain(server: TorchServe, image: bytes, accept: str, **said: str) -> Answer:
    """Ask /explanations of the model `digits`."""
    asked = {"data": base64.b64encode(image).decode(), **said}
    return server.client.explain("digits", asked, accept=accept, timeout=60)


def draw(rows: list[list[bytes]]) -> Image.Image:
    """Draw rows of pictures under their names."""
    gap, top = 8, 24
    width = (len(METHODS) + 1) * (SIDE + gap) - gap
    sheet = Image.new("RGB", (width, top + len(rows) * (SIDE + gap) - gap), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(("the scan", *METHODS)):
        pen.text((column * (SIDE + gap) + 4, 4), title, fill="black", font_size=14)
    for row, pictures in enumerate(rows):
        for column, png in enumerate(pictures):
            image = Image.open(io.BytesIO(png)).convert("RGB").resize((SIDE, SIDE))
            sheet.paste(image, (column * (SIDE + gap), top + row * (SIDE + gap)))
    return sheet


def main() -> None:
    """Serve a run, explain two of its samples."""
    run = Run.open(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/digits"))
    picture = Path(sys.argv[2] if len(sys.argv) > 2 else "explanations.png")
    packed = pack_run(run, out=run.path / "archives", name="digits", force=True)
    with TorchServe(packed.path.parent, models=[packed.path.name]) as server:
        rows = []
        for sample in (item for item in run.samples if item.label in DIGITS):
            scan = sample.path.read_bytes()
            pictures = [explain(server, scan, "image/png", method=name).body for name in METHODS]
            rows.append([scan, *pictures])
        told = explain(server, rows[0][0], "application/json").json()
    print({key: value for key, value in told.items() if key != "attributions"})
    print(f"{sum(map(sum, told['attributions'])):.4f} is their sum")
    draw(rows).save(picture, optimize=True)


if __name__ == "__main__":
    main()
