"""What all contestants share: one trained CNN, two pictures, and the archives made of them."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from marwright.archive import Run, Spec, pack_run, pack_spec
from marwright.errors import MarwrightError
from marwright.training.data import scale, split_data
from marwright.training.predict import predict_images
from marwright.training.settings import Settings
from marwright.training.sources import load_data
from marwright.training.train import train_run

__all__ = [
    "borrow_onnxruntime",
    "ContestantError",
    "hide_simplejpeg",
    "make_materials",
    "Materials",
    "Picture",
]

HERE = Path(__file__).parent
SETTINGS = Settings(epochs=4)
CALIBRATION = 512
"""Scans of the training split."""
SERVING = {"minWorkers": 2, "maxWorkers": 2, "batchSize": 32, "maxBatchDelay": 1}
"""marwright's side of model-config.yaml."""


class ContestantError(Exception):
    """Why a contestant cannot take part, in one line."""


@dataclass(frozen=True)
class Picture:
    """One request's image, and what has to be answered."""

    name: str
    path: Path
    envelope: Path
    """The same image inside a request of the V2 protocol."""
    label: str
    probability: float

    def make_request(self, *, in_envelope: bool) -> tuple[Path, str]:
        """Return the file to post, and its content type."""
        return (self.envelope, "application/json") if in_envelope else (self.path, "image/jpeg")


@dataclass(frozen=True)
class Materials:
    """See the module."""

    run: Run
    store: Path
    """The archives: NAME.mar for each marwright contestant, plain.mar for both plain ones."""
    pictures: tuple[Picture, ...]
    optimized: bool = False
    """Whether the peers' TorchScript goes through optimize_for_inference, as marwright's does."""
    failures: dict[str, str] = field(default_factory=dict)
    """Contestants whose archive could not be made, with the reason."""
    accuracy: dict[str, float] = field(default_factory=dict)
    """Of the model in each form that it is served in, on the test split."""


def make_materials(
    folder: Path, find_venv: Callable[[str], Path], *, optimized: bool = False
) -> Materials:
    """Train, draw and pack; an archive that cannot be made is that contestant's failure."""
    run = train_run(folder / "run", settings=SETTINGS)
    store = folder / "store"
    store.mkdir()
    pictures = (
        make_picture(run, folder, "small", size=(64, 64), noise=12.0),
        make_picture(run, folder, "large", size=(640, 480), noise=8.0),
    )
    materials = Materials(run, store, pictures, optimized)
    pack_plain(run, store, folder)
    makers: dict[str, Callable[[Path], object]] = {
        "marwright": lambda out: pack_run(run, out=out, settings=SERVING),
        "marwright_scaled": lambda out: pack_run(
            run, out=out, settings={**SERVING, "handler": {"scaled_decoding": True}}
        ),
        "marwright_onnx": lambda out: pack_onnx(materials, out, find_venv("onnx"), "float32"),
        "marwright_int8": lambda out: pack_onnx(materials, out, find_venv("onnx"), "int8"),
    }
    for name, make in makers.items():
        try:
            make(store / f"{name}.mar")
        except (MarwrightError, ContestantError) as error:
            reason = " ".join(str(error).split()).replace(f"{folder}/", "")
            materials.failures[name] = reason[:300]
    return materials


def make_picture(
    run: Run, folder: Path, name: str, *, size: tuple[int, int], noise: float
) -> Picture:
    """Draw a scanned 3 as a photo would show it: smooth, coloured, with a sensor's noise."""
    digits = load_data("digits")
    assert digits.open_sample is not None  # they are images
    scan = digits.open_sample(3).convert("RGB")
    smooth = np.asarray(scan.resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
    colours = 20 + smooth * (0.8, 0.72, 0.64)
    colours += np.random.default_rng(0).normal(0, noise, colours.shape)
    buffer = io.BytesIO()
    Image.fromarray(colours.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    path = folder / f"{name}.jpg"
    path.write_bytes(buffer.getvalue())
    image = {
        "name": "image",
        "shape": [1, 1],
        "datatype": "BYTES",
        "parameters": {"content_type": "base64"},
        "data": [base64.b64encode(buffer.getvalue()).decode()],
    }
    envelope = folder / f"{name}.json"
    envelope.write_text(json.dumps({"inputs": [image]}), encoding="utf-8")
    with Image.open(path) as opened:
        best = predict_images(run.model_path, [opened], run.image_size)[0].max(0)
    return Picture(name, path, envelope, run.classes[int(best.indices)], best.values.item())


def pack_plain(run: Run, store: Path, folder: Path) -> None:
    """Pack as TorchServe's documentation teaches."""
    names = {str(index): label for index, label in enumerate(run.classes)}
    (folder / "index_to_name.json").write_text(json.dumps(names), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("torch-model-archiver"))]
    command += ["--model-name", "plain", "--version", "1.0", "--export-path", str(store)]
    command += ["--serialized-file", str(run.model_path)]
    command += ["--handler", str(HERE / "torchserve_handler.py")]
    command += ["--extra-files", str(folder / "index_to_name.json")]
    subprocess.run(command, check=True)


def pack_onnx(materials: Materials, out: Path, venv: Path, form: str) -> None:
    """Build an archive of the run's model as ONNX, `float32` or `int8`, and note its accuracy.

    Export and quantisation happen in the venv `onnx`; the handler's ONNX backend reads the rest.
    """
    run, folder = materials.run, materials.run.path.parent
    if not materials.accuracy:
        materials.accuracy.update(export_onnx(run, folder, venv))
    handler: dict[str, Any] = {"backend": "onnx", "image_size": list(run.image_size)}
    spec = Spec.create(
        name="cnn",
        backend="onnx",
        model=str(folder / f"{form}.onnx"),
        labels=list(run.classes),
        settings={**SERVING, "handler": handler},
    )
    with borrow_onnxruntime(venv):
        pack_spec(spec, folder=folder, out=out)


def export_onnx(run: Run, folder: Path, venv: Path) -> dict[str, float]:
    """Write float32.onnx and int8.onnx; return each form's accuracy on the test split."""
    images = load_data("digits", image_size=run.image_size)
    split = split_data(images, seed=SETTINGS.seed)
    arrays = {
        name: scale(images.inputs[part]).contiguous().numpy()
        for name, part in (("calibration", split.train[:CALIBRATION]), ("test", split.test))
    }
    data = folder / "onnx.npz"
    labels = images.labels[split.test].numpy()
    np.savez(data, labels=labels, calibration=arrays["calibration"], test=arrays["test"])
    program = [str(venv / "bin/python"), str(HERE / "export_onnx.py")]
    answer = subprocess.run(
        [*program, str(run.model_path), str(data), str(folder)], capture_output=True, text=True
    )
    if answer.returncode:
        lines = answer.stderr.strip().splitlines() or ["it said nothing"]
        raise ContestantError(f"export_onnx.py failed: {lines[-1]}")
    accuracy: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return accuracy


def borrow_onnxruntime(venv: Path) -> AbstractContextManager[None]:
    """Let the programs started meanwhile import ONNX Runtime where this project has none."""
    if importlib.util.find_spec("onnxruntime") is not None:
        return contextlib.nullcontext()
    [packages] = venv.glob("lib/python3*/site-packages")
    return put_on_path(packages)


@contextmanager
def hide_simplejpeg() -> Iterator[None]:
    """Keep the programs started meanwhile from importing simplejpeg, as if it were missing."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder:
        (Path(folder) / "simplejpeg.py").write_text("raise ImportError\n", encoding="utf-8")
        with put_on_path(Path(folder)):
            yield


@contextmanager
def put_on_path(folder: Path) -> Iterator[None]:
    """Let the programs started meanwhile find a folder's modules first."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), before)))
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH", None)
        if before is not None:
            os.environ["PYTHONPATH"] = before
