"""Both clients against a real TorchServe."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from marwright.archive import Run
from marwright.client import Answer
from marwright.errors import (
    AnswerError,
    ConflictError,
    InputRejectedError,
    ModelNotFoundError,
    NotReadyError,
)
from marwright.server import TorchServe

pytestmark = pytest.mark.server


@pytest.fixture
def served(server: TorchServe, connect: Callable[..., Any]) -> Any:
    return connect(server.endpoint, timeout=60)


def test_every_form_of_input_gets_the_same_answer(served: Any, run: Run) -> None:
    sample = run.samples[0]
    scan = sample.path.read_bytes()
    expected = served.predict("cnn", scan).json()
    assert next(iter(expected)) == sample.prediction
    assert served.predict("cnn", sample.path, version="1.0").json() == expected
    assert served.predict_parts("cnn", {"scan": sample.path}).json() == expected
    assert served.predict_parts("cnn", {"a": scan, "b": sample.path}).json() == [expected] * 2
    assert served.predict_v1("cnn", [scan, sample.path]) == [expected] * 2
    assert served.predict_v1("cnn", [scan], version="1.0") == [expected]
    array = served.predict("cnn", scan, accept="application/x-npy").numpy()
    assert array.max() == pytest.approx(expected[sample.prediction], abs=1e-4)


@pytest.mark.parametrize("version", [None, "1.0"])
def test_arrays_go_in_and_come_out_by_v2(served: Any, run: Run, version: str | None) -> None:
    paths = [sample.path for sample in run.samples[:3]]
    answer = served.infer("cnn", {"image": paths}, id="mine", version=version)
    assert (answer.model, answer.version, answer.id) == ("cnn", "1.0", "mine")
    assert answer["probabilities"].shape == (3, 10)
    assert answer["probabilities"].dtype == np.float32
    labels = [sample.prediction for sample in run.samples[:3]]
    assert answer["label"].ravel().tolist() == labels


def test_explanations_are_given_or_refused_in_words(served: Any, scan: bytes) -> None:
    pytest.importorskip("captum")
    assert "attributions" in served.explain("cnn", scan).json()
    (one,) = served.explain_v1("cnn", [scan])
    assert "attributions" in one
    picture = served.explain("cnn", scan, accept="image/png")
    assert picture.body.startswith(b"\x89PNG")


def test_refusals_are_typed(served: Any, scan: bytes) -> None:
    with pytest.raises(InputRejectedError):
        served.predict("cnn", b"no picture")
    with pytest.raises(ModelNotFoundError):
        served.predict("nobody", scan)
    with pytest.raises(ModelNotFoundError):
        served.infer("nobody", {"image": [scan]})
    with pytest.raises(AnswerError):
        served.predict("cnn", scan, version="9.9")


def test_the_server_describes_itself(served: Any) -> None:
    assert "/predictions/{model_name}" in served.openapi()["paths"]
    assert "/models/{model_name}" in served.openapi("management")["paths"]
    assert "cnn" in served.openapi(model="cnn")["info"]["title"]
    assert served.health().healthy


def test_metrics_count_what_was_asked(served: Any, scan: bytes) -> None:
    name = "ts_inference_requests_total"
    before = served.metrics().total(name, model_name="cnn")
    served.predict("cnn", scan)
    assert served.metrics().total(name, model_name="cnn") == before + 1
    assert {family.name for family in served.metrics(names=[name]).families} == {name[:-6]}


def test_models_are_managed_from_registration_to_the_end(
    served: Any, server: TorchServe, store: Path
) -> None:
    models = served.models
    folder = server.endpoint.staging  # TorchServe reads what was staged there
    assert folder is not None
    shutil.copy(store / "cnn-2.0.mar", folder)
    made = models.register("cnn-2.0.mar", batch_size=2, max_batch_delay_ms=7)
    try:
        assert (made.version, made.batch_size, made.max_batch_delay_ms) == ("2.0", 2, 7)
        assert models.scale("cnn", 0, version="2.0").workers == ()
        with pytest.raises(NotReadyError, match=r"cnn 2\.0 was not ready within 0\.3 s.*0 of 0"):
            models.wait_until_ready("cnn", "2.0", timeout=0.3)
        models.scale("cnn", 1, version="2.0", synchronous=False)
        assert models.wait_until_ready("cnn", "2.0", timeout=120).ready_workers == 1
        assert [version.version for version in models.versions("cnn")] == ["1.0", "2.0"]
        models.set_default("cnn", "2.0")
        assert models.describe("cnn").version == "2.0"
        with pytest.raises(ConflictError):
            models.register("cnn-2.0.mar", workers=0)
    finally:
        models.set_default("cnn", "1.0")
        models.unregister("cnn", "2.0")
    first = models.list_page(limit=1)
    assert [model.name for model in first.models] == ["cnn"]
    assert "cnn" in [model.name for model in models.list()]


def test_a_batch_is_answered_whole(served: Any, run: Run) -> None:
    paths = [sample.path for sample in run.samples]
    labels = {sample.path: sample.prediction for sample in run.samples}
    for path, answer in served.predict_many("cnn", paths * 5, in_flight=16):
        assert isinstance(answer, Answer)
        assert next(iter(answer.json())) == labels[path]


def test_a_killed_worker_is_not_noticed(served: Any, server: TorchServe, scan: bytes) -> None:
    """Eight in flight; the only worker is killed twice, with requests in its hands."""
    kills = 0
    answered = 0
    for _, answer in served.predict_many("cnn", [scan] * 300, in_flight=8):
        assert isinstance(answer, Answer), answer
        answered += 1
        if answered in {50, 150}:
            os.kill(server.client.models.describe("cnn").workers[0].pid, signal.SIGKILL)
            kills += 1
    assert (answered, kills) == (300, 2)
    server.client.models.wait_until_ready("cnn", timeout=60)
