"""The reference that a training leaves: small, reproducible, and what handlers measure too."""

from __future__ import annotations

import io
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from marwright.archive import Archive, Run, pack_run
from marwright.training.data import DataSet, split_data
from marwright.training.loop import compute_logits
from marwright.training.network import load_network
from marwright.training.recipe import Recipe
from marwright.training.reference import make_reference, write_reference
from marwright.training.settings import Settings
from marwright.training.sources import load_data
from marwright.training.train import train_run

PARTS = {
    "format": (),
    "features": (360, 13),
    "feature_names": (13,),
    "confidence": (360,),
    "prediction": (360,),
    "embedding": (360, 10),
    "accuracy": (),
}


def read_reference(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as reference:
        return {name: reference[name] for name in reference.files}


@pytest.fixture(scope="module")
def reference(run: Run) -> dict[str, Any]:
    assert run.reference_path is not None
    return read_reference(run.reference_path)


@pytest.fixture(scope="module")
def table_run(tmp_path_factory: pytest.TempPathFactory, measurements: Path) -> Run:
    return train_run(
        tmp_path_factory.mktemp("runs") / "table",
        recipe=Recipe(dataset=f"table:{measurements}"),
        settings=Settings(epochs=2),
    )


def test_a_run_holds_the_documented_parts(reference: dict[str, Any]) -> None:
    assert {name: array.shape for name, array in reference.items()} == PARTS
    assert reference["format"] == 1
    for name in ("features", "confidence", "embedding"):
        assert reference[name].dtype == np.float32
        assert np.isfinite(reference[name]).all()


def test_its_accuracy_and_predictions_are_the_reports(run: Run, reference: dict[str, Any]) -> None:
    assert reference["accuracy"] == pytest.approx(run.report["accuracy"])
    assert set(reference["prediction"]) <= set(run.classes)
    split = split_data(load_data("digits"), seed=run.config["seed"])
    labels = np.array(run.classes)[load_data("digits").labels[split.test]]
    assert (labels == reference["prediction"]).mean() == pytest.approx(run.report["accuracy"])


def test_its_embedding_is_the_served_models_logits(run: Run, reference: dict[str, Any]) -> None:
    data = load_data("digits")
    split = split_data(data, seed=run.config["seed"])
    logits = compute_logits(load_network(run), data.inputs[split.test])
    assert reference["embedding"] == pytest.approx(logits.numpy(), abs=2e-3)
    highest = torch.softmax(logits, 1).amax(1)
    assert reference["confidence"] == pytest.approx(highest.numpy(), abs=1e-4)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_served_handler_logs_the_same_numbers_for_the_same_images(
    tmp_path: Path, run: Run, reference: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack_run(run, out=tmp_path, preflight=None)
    log = {"folder": str(tmp_path / "log"), "share": 100}
    monkeypatch.setenv("MARWRIGHT_PREDICTIONS", json.dumps(log))
    data = load_data("digits")
    test = split_data(data, seed=run.config["seed"]).test[:40].tolist()
    assert data.open_sample is not None
    images = []
    for index in test:
        buffer = io.BytesIO()
        data.open_sample(index).save(buffer, "png")
        images.append(buffer.getvalue())
    with Archive.open(packed.path) as archive, archive.load() as loaded:
        loaded.predict(images)
        deadline = time.monotonic() + 30
        while len(lines := read_lines(tmp_path / "log")) < len(images):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert len(lines) == len(images)
    names = reference["feature_names"].tolist()
    for row, line in enumerate(lines):
        live = np.array([line["features"][name] for name in names], dtype=np.float32)
        assert (live == reference["features"][row]).all()
        assert line["prediction"] == reference["prediction"][row]
        assert line["confidence"] == pytest.approx(reference["confidence"][row], abs=1e-5)
        assert line["embedding"] == pytest.approx(reference["embedding"][row], abs=1e-3)


def read_lines(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("spool/*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text("utf-8").splitlines()]


def test_a_tables_features_are_its_columns(table_run: Run, measurements: Path) -> None:
    assert table_run.reference_path is not None
    found = read_reference(table_run.reference_path)
    assert found["feature_names"].tolist() == ["length", "depth"]
    data = load_data(f"table:{measurements}")
    test = split_data(data, seed=0).test
    assert (found["features"] == data.inputs[test].numpy()).all()
    assert set(found["prediction"]) <= {"k0", "k1", "k2"}


def make_data(columns: int, classes: int, rows: int = 5000, size: int = 0) -> DataSet:
    generator = torch.Generator().manual_seed(0)
    shape = (rows, 3, size, size) if size else (rows, columns)
    inputs = (
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        if size
        else torch.randn(shape, generator=generator)
    )
    return DataSet(
        name="made",
        inputs=inputs,
        labels=torch.arange(rows) % classes,
        classes=tuple(f"a class with a long name, number {number}" for number in range(classes)),
        digest="",
        columns=() if size else tuple(f"column {number}" for number in range(columns)),
    )


@pytest.mark.parametrize(
    ("data", "rows", "features", "embedded"),
    [
        (make_data(0, 10, size=8), 2000, 13, (1000, 10)),
        (make_data(0, 1000, size=8), 2000, 13, (625, 64)),
        (make_data(64, 64), 625, 64, (625, 64)),
        (make_data(65, 2), 2000, 0, (1000, 2)),
        (make_data(3, 2, rows=50), 50, 3, (50, 2)),
    ],
    ids=["images", "1000 classes", "64 columns", "65 columns", "few rows"],
)
def test_it_stays_below_400_kilobytes_whatever_it_is_of(
    tmp_path: Path, data: DataSet, rows: int, features: int, embedded: tuple[int, int]
) -> None:
    logits = torch.randn(len(data), len(data.classes), generator=torch.Generator().manual_seed(1))
    write_reference(tmp_path / "r.npz", make_reference(data, torch.arange(len(data)), logits))
    found = read_reference(tmp_path / "r.npz")
    assert found["features"].shape == (rows, features)
    assert found["prediction"].shape == found["confidence"].shape == (rows,)
    assert found["embedding"].shape == embedded
    assert (tmp_path / "r.npz").stat().st_size < 400_000
    right = (logits.argmax(1) == data.labels)[:rows].double().mean()
    assert found["accuracy"] == pytest.approx(right.item())


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path, run: Run) -> None:
    assert run.reference_path is not None
    write_reference(tmp_path / "again.npz", read_reference(run.reference_path))
    assert (tmp_path / "again.npz").read_bytes() == run.reference_path.read_bytes()
    with zipfile.ZipFile(tmp_path / "again.npz") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_labels_that_would_be_pickled_are_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_pickle=False"):
        write_reference(tmp_path / "r.npz", {"prediction": np.array(["a", None], dtype=object)})
