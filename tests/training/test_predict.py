from __future__ import annotations

import pytest
import torch
from PIL import Image

from marwright.archive import Run
from marwright.training.data import make_transform, scale
from marwright.training.predict import predict_images, predict_inputs
from marwright.training.sources import load_data


def open_scans(count: int) -> list[Image.Image]:
    data = load_data("digits")
    assert data.open_sample is not None
    return [data.open_sample(index) for index in range(count)]


def test_probabilities_are_those_of_the_model_itself(run: Run) -> None:
    scans = open_scans(20)
    found = predict_images(run.model_path, scans, run.image_size)
    model = torch.jit.load(str(run.model_path)).eval()
    with torch.inference_mode():
        pixels = torch.stack([make_transform(run.image_size)(scan) for scan in scans])
        expected = model(scale(pixels)).softmax(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(predict_inputs(run.model_path, load_data("digits").inputs[:20]), found)


def test_each_row_is_a_distribution_over_the_classes(run: Run) -> None:
    scans = open_scans(300)  # more than one batch
    found = predict_images(run.model_path, scans, run.image_size)
    assert found.shape == (300, len(run.classes))
    assert found.dtype == torch.float32
    assert found.min() >= 0
    torch.testing.assert_close(found.sum(1), torch.ones(300))


def test_samples_of_a_run_get_the_answers_written_beside_them(run: Run) -> None:
    images = [Image.open(sample.path) for sample in run.samples]
    found = predict_images(run.model_path, images, run.image_size)
    for row, sample in zip(found, run.samples, strict=True):
        assert run.classes[int(row.argmax())] == sample.prediction
        assert row.max().item() == pytest.approx(sample.probability, abs=2e-6)
