from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from marwright.archive import Archive
from marwright.archive.worker import Model, Request
from marwright.errors import ArchiveError, HandlerError, StorageError, UsageError

Unpacked = Callable[..., Path]

FACTS = """
import os, pathlib
STARTS = pathlib.Path("starts")
class Facts:
    def initialize(self, context):
        self.system = dict(context.system_properties)
        STARTS.write_text((STARTS.read_text() if STARTS.exists() else "") + "x")
    def handle(self, data, context):
        self.system["here"] = os.path.samefile(os.getcwd(), self.system["model_dir"])
        self.system["manifest"] = context.manifest["model"]["modelName"]
        self.system["config"] = context.model_yaml_config
        self.system["starts"] = len(STARTS.read_text())
        if data[0].get("body") == b"die":
            raise SystemExit(3)
        return [self.system for row in data]
"""


def zip_folder(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder), "zip", folder))


def test_an_opened_archive_loads(unpacked: Unpacked) -> None:
    with Archive.open(unpacked()) as archive, archive.load() as model:
        assert model.predict([b"", Request("{}", content_type="application/json")])[1].json() == {
            "body": {}
        }


def test_a_folder_is_used_where_it_stands(
    unpacked: Unpacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    folder = unpacked()
    before = sorted(folder.rglob("*"))
    with Model(folder) as model:
        assert model.folder == folder.resolve()
        assert model.unpack_seconds == 0
    assert sorted(folder.rglob("*")) == before  # no __pycache__ either


def test_a_file_is_unpacked_into_a_folder_that_does_not_stay(
    unpacked: Unpacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = zip_folder(unpacked())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with Model(archive) as model:
        assert model.unpack_seconds > 0
        assert model.folder.parents[1] == (tmp_path / "temporary").resolve()
    assert not list((tmp_path / "temporary").iterdir())


def test_the_folder_does_not_stay_where_loading_fails(
    unpacked: Unpacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = zip_folder(unpacked("raise ValueError('no luck')"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with pytest.raises(HandlerError, match="no luck"):
        Model(archive)
    assert not list((tmp_path / "temporary").iterdir())


def test_the_handler_sees_what_a_worker_would_show_it(unpacked: Unpacked) -> None:
    with Model(unpacked(FACTS, config="batchSize: 4\nhandler: {top_k: 2}")) as model:
        facts = model.predict([b""])[0].json()
    assert facts["batch_size"] == 4
    assert facts["server_name"] == "MMS"
    assert facts["here"] is True
    assert facts["manifest"] == "tiny"
    assert facts["config"] == {"batchSize": 4, "handler": {"top_k": 2}}


@pytest.mark.parametrize("config", [None, "", "batchSize: many", "batchSize: 0"])
def test_without_a_usable_batch_size_it_is_one(unpacked: Unpacked, config: str | None) -> None:
    with Model(unpacked(FACTS, config=config)) as model:
        assert model.predict([b""])[0].json()["batch_size"] == 1


def test_batch_size_and_gpu_can_be_said(unpacked: Unpacked) -> None:
    with Model(unpacked(FACTS), batch_size=3, gpu=1) as model:
        facts = model.predict([b""])[0].json()
    assert (facts["batch_size"], facts["gpu_id"]) == (3, 1)


def test_a_model_that_died_is_loaded_again(unpacked: Unpacked) -> None:
    with Model(unpacked(FACTS)) as model:
        assert model.predict([b""])[0].json()["starts"] == 1
        died = model.predict([b"die"])[0]
        assert (died.status, died.json()["message"]) == (500, "Worker died.")
        assert model.predict([b""])[0].json()["starts"] == 2


def test_another_handler_is_used_where_it_stands(unpacked: Unpacked, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    handler = tmp_path / "new/mine.py"
    handler.write_text(
        "import beside\ndef handle(data, context): return ['new' for _ in data or ()]"
    )
    (tmp_path / "new/beside.py").write_text("")
    with Model(unpacked(), handler=handler) as model:
        assert model.predict([b""])[0].body == b"new"
        assert {path.name for path in model.sources} == {"mine.py", "beside.py"}
    assert "beside" not in sys.modules


def test_a_missing_handler_is_named(unpacked: Unpacked, tmp_path: Path) -> None:
    with pytest.raises(HandlerError, match="no handler file"):
        Model(unpacked(), handler=tmp_path / "absent.py")


def test_a_missing_input_is_named(unpacked: Unpacked) -> None:
    with Model(unpacked()) as model, pytest.raises(StorageError, match=r"cannot read absent\.png"):
        model.predict([Path("absent.png")])


def test_a_closed_model_refuses(unpacked: Unpacked) -> None:
    with Model(unpacked()) as model:
        pass
    with pytest.raises(UsageError, match="closed"):
        model.predict([b""])


def test_no_input_is_no_answer(unpacked: Unpacked) -> None:
    with Model(unpacked()) as model:
        assert model.predict([]) == []


def test_an_archive_that_answers_asynchronously_is_refused(unpacked: Unpacked) -> None:
    with pytest.raises(ArchiveError, match="only a server"):
        Model(unpacked(config="asyncCommunication: true"))


def test_what_the_frontend_answers_does_not_reach_the_handler(unpacked: Unpacked) -> None:
    form = Request(b"a=%zz", content_type="application/x-www-form-urlencoded")
    with Model(unpacked(), max_request_bytes=10) as model:
        answers = model.predict([b"0123456789", b"0123456789a", form])
    assert [answer.status for answer in answers] == [200, 413, 500]
    assert "Invalid hex byte" in answers[2].json()["message"]


def test_an_answer_may_be_as_large_as_the_server_allows(unpacked: Unpacked) -> None:
    source = "def handle(data, context): return [b'x' * 100 for _ in data or ()]"
    with Model(unpacked(source), max_response_bytes=100) as model:
        assert model.predict([b""])[0].status == 200
    with Model(unpacked(source), max_response_bytes=99) as model:
        answer = model.predict([b""])[0]
    assert answer.status == 500
    assert answer.failure is not None
    assert "max_response_size is 99" in answer.failure.message


def test_an_answer_that_is_no_json_says_so(unpacked: Unpacked) -> None:
    with Model(unpacked("def handle(data, context): return ['x']")) as model:
        answer = model.predict([b""])[0]
    with pytest.raises(ArchiveError, match="found 'x'"):
        answer.json()


def test_ctrl_c_is_not_the_handlers_failure(unpacked: Unpacked) -> None:
    source = "def handle(data, context):\n    if data: raise KeyboardInterrupt"
    with Model(unpacked(source)) as model, pytest.raises(KeyboardInterrupt):
        model.predict([b""])
    assert "handler" not in sys.modules


def test_threads_do_not_see_each_others_modules(unpacked: Unpacked) -> None:
    source = (
        "def handle(data, context):\n    import name\n    return [name.NAME for _ in data or ()]"
    )
    folders = [
        unpacked({"handler.py": source, "name.py": f"NAME = '{name}'"}, folder=name)
        for name in ("one", "two")
    ]
    wrong: list[object] = []

    def ask(model: Model, name: str) -> None:
        wrong.extend(
            answer for _ in range(20) for answer in model.predict([b""]) if answer.body != name
        )

    with Model(folders[0]) as one, Model(folders[1]) as two:
        pairs = ((one, b"one"), (two, b"two")) * 2
        threads = [threading.Thread(target=ask, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_streaming_handlers_parts_are_joined(unpacked: Unpacked) -> None:
    source = """
from ts.handler_utils.utils import send_intermediate_predict_response
def handle(data, context):
    if data:
        send_intermediate_predict_response(["a"] * 2, context.request_ids, "", 200, context)
        return ["b", "c"]
"""
    with Model(unpacked(source)) as model:
        answers = model.predict([b"", b""])
    assert [answer.body for answer in answers] == [b"ab", b"ac"]
    assert answers[0].headers["transfer-encoding"] == "chunked"


@pytest.mark.skipif(
    find_spec("openvino") is not None, reason="beside OpenVINO ts.torch_handler imports what warns"
)
def test_a_stock_handler_is_torchserves_own(unpacked: Unpacked) -> None:
    # Its own rule: a name without a file in the archive is looked for in ts.torch_handler.
    with pytest.raises(HandlerError) as caught:
        Model(unpacked({}, handler="base_handler"))
    assert "base_handler.py" in str(caught.value)
    assert 'ts/torch_handler/base_handler.py", line' in caught.value.detail


def test_json_reaches_and_leaves_a_handler(unpacked: Unpacked) -> None:
    request = Request(json.dumps({"a": "ü"}), content_type="application/json")
    with Model(unpacked()) as model:
        answer = model.predict([request])[0]
    assert answer.json() == {"body": {"a": "ü"}}
    assert answer.content_type == ""
