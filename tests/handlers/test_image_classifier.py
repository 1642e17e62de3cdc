from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from marwright.archive import Packed, Run, pack_run

# ts leaves its version file open when imported.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Packed:
    return pack_run(run, out=tmp_path_factory.mktemp("store"), preflight=None)


@pytest.fixture
def folder(tmp_path: Path, archive: Packed) -> Path:
    """The archive, unpacked as the frontend unpacks it."""
    with zipfile.ZipFile(archive.path) as packed:
        packed.extractall(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that loads an unpacked archive with TorchServe's own loader."""
    from ts.model_loader import TsModelLoader

    threads = torch.get_num_threads()

    def load_service(folder: Path, gpu_id: int | None = None) -> Any:
        forget_modules(folder)
        monkeypatch.syspath_prepend(folder)
        service = TsModelLoader().load(
            "cnn", str(folder), "image_classifier.py", gpu_id=gpu_id, batch_size=8
        )
        assert Path(sys.modules["image_input"].__file__ or "").parent == folder
        return service

    yield load_service
    torch.set_num_threads(threads)
    forget_modules(tmp_path / "model")


def forget_modules(folder: Path) -> None:
    """Forget what was imported from an archive: the next one has files of the same names."""
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


def change_settings(folder: Path, **handler: Any) -> None:
    path = folder / "model-config.yaml"
    values = yaml.safe_load(path.read_text())
    values["handler"].update(handler)
    path.write_text(yaml.safe_dump(values))


def ask(service: Any, *rows: dict[str, Any]) -> list[SimpleNamespace]:
    """Send one batch the way Service.predict does, and return each request's whole answer."""
    batch = [
        {
            "requestId": f"request-{number}".encode(),
            "headers": [],
            "parameters": [
                {"name": name, "value": value, "contentType": ""} for name, value in row.items()
            ],
        }
        for number, row in enumerate(rows)
    ]
    context = service.context
    processors, data, context.request_ids = service.retrieve_data_for_inference(batch)
    context.request_processor = processors
    answers = service._entry_point(data, context)
    assert len(answers) == len(rows)
    return [
        SimpleNamespace(
            body=json.loads(answer),
            text=answer,
            status=context.get_response_status(index)[0],
            phrase=context.get_response_status(index)[1],
            kind=context.get_response_content_type(index),
        )
        for index, answer in enumerate(answers)
    ]


def make_bad_rows(scan: bytes) -> list[tuple[dict[str, Any], int]]:
    return [
        ({"body": bytearray()}, 400),
        ({"body": bytearray(b"text named .png")}, 415),
        ({"body": bytearray(scan[: len(scan) // 2])}, 400),
        ({"body": {"data": "%%%"}}, 400),
        ({"body": {"picture": ""}}, 400),
        ({"body": 5}, 400),
        ({"a": bytearray(scan), "b": bytearray(b"no image")}, 415),
        ({}, 400),
    ]


def test_every_sample_gets_the_answer_that_training_gave(
    folder: Path, load: Callable[..., Any], run: Run
) -> None:
    rows = [{"body": bytearray(sample.path.read_bytes())} for sample in run.samples]
    answers = ask(load(folder), *rows)
    for sample, answer in zip(run.samples, answers, strict=True):
        label, probability = next(iter(answer.body.items()))
        assert label == sample.prediction
        assert probability == pytest.approx(sample.probability, abs=2e-6)
        assert (answer.status, answer.kind) == (200, "application/json")


def test_an_answer_is_five_labels_most_probable_first(
    folder: Path, load: Callable[..., Any], scan: bytes
) -> None:
    (answer,) = ask(load(folder), {"body": bytearray(scan)})
    values = list(answer.body.values())
    assert len(values) == 5
    assert values == sorted(values, reverse=True)
    assert 0 < sum(values) <= 1.00001


def test_one_image_gets_one_answer_however_it_arrives(
    folder: Path, load: Callable[..., Any], scan: bytes
) -> None:
    text = base64.b64encode(scan).decode()
    answers = ask(
        load(folder),
        {"body": bytearray(scan)},
        {"data": bytearray(scan)},
        {"picture": bytearray(scan)},
        {"body": {"data": text}},
        {"body": text},
    )
    assert len({answer.text for answer in answers}) == 1


def test_bad_requests_leave_their_neighbours_exactly_the_answers_they_get_without_them(
    folder: Path, load: Callable[..., Any], run: Run
) -> None:
    service = load(folder)
    good = [{"body": bytearray(sample.path.read_bytes())} for sample in run.samples]
    bad = make_bad_rows(run.samples[0].path.read_bytes())
    good = good[: len(bad)]
    mixed = ask(
        service, *[row for pair in zip(good, bad, strict=True) for row in (pair[0], pair[1][0])]
    )
    assert mixed[::2] == ask(service, *good)
    assert {(answer.status, answer.kind) for answer in mixed[::2]} == {(200, "application/json")}
    for (_, status), answer in zip(bad, mixed[1::2], strict=True):
        assert answer.status == answer.body["status"] == status
        assert answer.kind == "application/problem+json"
        assert answer.phrase == answer.body["title"] != ""
        assert set(answer.body) == {"title", "status", "detail"}


def test_one_good_request_among_bad_ones_gets_exactly_the_answer_it_gets_alone(
    folder: Path, load: Callable[..., Any], run: Run
) -> None:
    service = load(folder)
    bad = [row for row, _ in make_bad_rows(run.samples[0].path.read_bytes())]
    for place, sample in enumerate(run.samples[: len(bad) + 1]):
        row = {"body": bytearray(sample.path.read_bytes())}
        assert ask(service, *bad[:place], row, *bad[place:])[place] == ask(service, row)[0]


def test_the_size_of_a_batch_changes_an_answer_by_rounding_only(
    folder: Path, load: Callable[..., Any], run: Run
) -> None:
    # torch adds in another order for another batch size, so the sixth decimal may differ.
    service = load(folder)
    rows = [{"body": bytearray(sample.path.read_bytes())} for sample in run.samples]
    for row, answer in zip(rows, ask(service, *rows), strict=True):
        assert answer.body == pytest.approx(ask(service, row)[0].body, abs=2e-6)


def test_each_bad_request_is_told_its_own_reason(
    folder: Path, load: Callable[..., Any], scan: bytes
) -> None:
    answers = ask(load(folder), *[row for row, _ in make_bad_rows(scan)])
    assert len({answer.body["detail"] for answer in answers}) == len(answers)


def test_an_empty_batch_gets_no_answers(folder: Path, load: Callable[..., Any]) -> None:
    assert ask(load(folder)) == []


def test_torchserve_sends_the_status_of_each_request(
    folder: Path, load: Callable[..., Any], scan: bytes
) -> None:
    from ts.protocol.otf_message_handler import create_predict_response

    service = load(folder)
    answers = ask(service, {"body": bytearray(scan)}, {"body": bytearray(b"text")})
    context = service.context
    message = create_predict_response(
        [answer.text for answer in answers], context.request_ids, "done", 200, context=context
    )
    first, second = message.split(b"request-1")
    assert b"application/json" in first
    assert b"application/problem+json" in second
    assert b"Unsupported Media Type" in second


@pytest.mark.parametrize(("top_k", "labels"), [(1, 1), (3, 3), (10, 10), (99, 10)])
def test_top_k_is_how_many_labels_an_answer_holds(
    folder: Path, load: Callable[..., Any], scan: bytes, top_k: int, labels: int
) -> None:
    change_settings(folder, top_k=top_k)
    (answer,) = ask(load(folder), {"body": bytearray(scan)})
    assert len(answer.body) == labels


def test_the_limits_of_the_settings_hold(
    folder: Path, load: Callable[..., Any], scan: bytes
) -> None:
    change_settings(folder, max_bytes=len(scan) - 1)
    assert ask(load(folder), {"body": bytearray(scan)})[0].status == 413
    change_settings(folder, max_bytes=len(scan), max_pixels=63)
    assert ask(load(folder), {"body": bytearray(scan)})[0].status == 413
    change_settings(folder, max_pixels=64)
    assert ask(load(folder), {"body": bytearray(scan)})[0].status == 200


def test_a_worker_takes_its_share_of_the_cores_unless_told_otherwise(
    folder: Path, load: Callable[..., Any]
) -> None:
    load(folder)
    assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    change_settings(folder, threads=3)
    load(folder)
    assert torch.get_num_threads() == 3


def test_a_handler_section_left_empty_means_the_defaults(
    folder: Path, load: Callable[..., Any]
) -> None:
    (folder / "model-config.yaml").write_text("batchSize: 8\nhandler:\n")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # 224 x 224, which is not this model's
        load(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to use here")
def test_a_worker_that_was_given_a_gpu_that_torch_cannot_see_uses_the_cpu(
    folder: Path, load: Callable[..., Any], scan: bytes
) -> None:
    service = load(folder, gpu_id=0)
    assert ask(service, {"body": bytearray(scan)})[0].status == 200


def test_the_prediction_log_has_features_label_confidence_logits_and_score(
    folder: Path, load: Callable[..., Any], run: Run, tmp_path: Path
) -> None:
    log = {"folder": str(tmp_path / "log"), "share": 100, "score": "energy"}
    change_settings(folder, prediction_log=log)
    service = load(folder)
    rows = [{"body": bytearray(sample.path.read_bytes())} for sample in run.samples]
    answers = ask(service, *rows, {"body": bytearray(b"no image")})
    service._entry_point.__self__.prediction_log.close()
    (path,) = (tmp_path / "log/spool").iterdir()
    *lines, refused = (json.loads(line) for line in path.read_text("utf-8").splitlines())
    with np.load(folder / "reference.npz") as reference:
        names = reference["feature_names"].tolist()
    for sample, answer, line in zip(run.samples, answers, lines, strict=False):
        assert line["prediction"] == sample.prediction
        assert line["confidence"] == pytest.approx(next(iter(answer.body.values())), abs=2e-6)
        assert list(line["features"]) == names
        logits = torch.tensor(line["embedding"])
        assert torch.softmax(logits, 0).max() == pytest.approx(line["confidence"], abs=1e-4)
        assert line["score"] == pytest.approx(-torch.logsumexp(logits, 0).item(), abs=1e-3)
    assert (refused["status"], "features" in refused) == (415, False)


def test_a_score_is_told_in_a_header_where_it_is_asked_for(
    folder: Path, load: Callable[..., Any], scan: bytes
) -> None:
    row = {"body": bytearray(scan)}
    service = load(folder)
    (plain,) = ask(service, row)
    assert "x-ood-score" not in read_headers(service)
    change_settings(folder, ood_score="softmax")
    service = load(folder)
    (told,) = ask(service, row)
    assert told == plain  # the body is as it was
    score = float(read_headers(service)["x-ood-score"])
    assert score == pytest.approx(1 - next(iter(plain.body.values())), abs=2e-6)


def read_headers(service: Any) -> dict[str, str]:
    headers: dict[str, str] = service.context.get_response_headers(0)
    return headers


def test_all_probabilities_are_those_of_the_logits_and_the_best_are_among_them(
    folder: Path, load: Callable[..., Any]
) -> None:
    handler = load(folder)._entry_point.__self__
    (output,) = zip(*handler.infer(torch.zeros(1, 3, 24, 24, dtype=torch.uint8)), strict=True)
    probabilities = handler.make_arrays(output)["probabilities"]
    assert probabilities.sum().item() == pytest.approx(1)
    assert torch.equal(probabilities[output[2]], output[1])


def test_labels_of_another_model_are_refused_at_the_start(
    folder: Path, load: Callable[..., Any]
) -> None:
    (folder / "classes.json").write_text('["a", "b"]')
    with pytest.raises(ValueError, match=r"expected \(1, 2\) logits .* found \(1, 10\)"):
        load(folder)


def test_the_archive_needs_nothing_of_ours(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    program = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "sys.modules['marwright'] = None\n"  # an import of it raises ImportError
        "from ts.model_loader import TsModelLoader\n"
        f"TsModelLoader().load('cnn', {str(copy)!r}, 'image_classifier.py')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
