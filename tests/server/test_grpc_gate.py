"""What stands in front of TorchServe's gRPC services, and what answers there, on a real server."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from marwright.client.endpoint import Endpoint
from marwright.client.grpc_async_client import AsyncGrpcClient
from marwright.client.grpc_client import GrpcClient
from marwright.client.grpc_protocol import read_protocol
from marwright.client.tokens import TokenFile
from marwright.errors import AnswerError
from marwright.server import TorchServe
from marwright.server.deployment import Deployment
from marwright.server.sections import AccessSettings

pytestmark = pytest.mark.server

SEQUENCES = """\
minWorkers: 1
maxWorkers: 1
batchSize: 1
maxNumSequence: 8
sequenceMaxIdleMSec: 1000
maxSequenceJobQueueSize: 10
sequenceBatching: true
"""
CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("RegisterModel", {"url": "talker.mar", "model_name": "again", "initial_workers": 1}),
    ("ScaleWorker", {"model_name": "talker", "min_worker": 2}),
    ("SetDefault", {"model_name": "talker", "model_version": "1.0"}),
    ("UnregisterModel", {"model_name": "talker"}),
]
SECONDS = 30
"""A call's time: well below what a lost worker takes to be missed."""


def write_store(folder: Path, root: Path, *names: str) -> Path:
    """Write archives of a handler that does what its input says."""
    for name in names:
        model = {"modelName": name, "handler": "talker.py", "modelVersion": "1.0"}
        with zipfile.ZipFile(folder / f"{name}.mar", "w") as archive:
            if name == "sequence":
                model["configFile"] = "model-config.yaml"
                archive.writestr("model-config.yaml", SEQUENCES)
            manifest = {"runtime": "python", "model": model}
            archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
            archive.write(root / "tests/client/talker.py", "talker.py")
    return folder


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[Endpoint]:
    """A server that asks for the key."""
    store = write_store(tmp_path_factory.mktemp("store"), root, "talker", "sequence")
    with TorchServe(store, models=["talker.mar", "sequence.mar"]) as server:
        yield server.endpoint


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a call brought: the answers' text, and the status."""

    answers: list[str]
    code: str = "OK"
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Caller:
    """Calls a server without any client of ours."""

    endpoint: Endpoint

    def send(
        self, name: str, *messages: dict[str, Any], key: str = "", token: bool = True
    ) -> Reply:
        """Send a call, or all inputs of a sequence at once."""
        method = read_protocol().find(name)
        metadata = [("x-marwright-key", key)] if key else []
        if token:
            assert self.endpoint.key_file is not None
            secret = TokenFile(self.endpoint.key_file).read(method.purpose)
            metadata.append(("authorization", f"Bearer {secret}"))
        answers = []
        with grpc.insecure_channel(getattr(self.endpoint, f"grpc_{method.purpose}")) as channel:
            make: Any = channel.stream_stream if method.streams_requests else channel.unary_stream
            open_call = make(
                method.path,
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.response.FromString,
            )
            requests = [method.request(**message) for message in messages]
            argument = iter(requests) if method.streams_requests else requests[0]
            try:
                for answer in open_call(argument, metadata=metadata, timeout=SECONDS):
                    body = getattr(answer, "prediction", b"").decode()
                    answers.append(body or getattr(answer, "msg", ""))
            except grpc.RpcError as exc:
                return Reply(answers, exc.code().name, exc.details() or "")
        return Reply(answers)

    def predict(self, text: str, name: str = "Predictions") -> Reply:
        return self.send(name, make_input("talker", text))

    def list_models(self) -> Reply:
        return self.send("ListModels", {"limit": 100})

    def describe(self) -> list[Any]:
        """Return the talker's workers."""
        (described,) = json.loads(self.send("DescribeModel", {"model_name": "talker"}).answers[0])
        return [(worker["id"], worker["pid"]) for worker in described["workers"]]


def make_input(model: str, text: str, sequence: str = "") -> dict[str, Any]:
    fields = {"model_name": model, "input": {"body": text.encode()}}
    return {**fields, "sequence_id": sequence} if sequence else fields


@pytest.fixture(scope="module")
def caller(endpoint: Endpoint) -> Caller:
    return Caller(endpoint)


@pytest.fixture(scope="module")
def key(endpoint: Endpoint) -> str:
    assert endpoint.supervisor_key is not None
    return endpoint.supervisor_key.read_text("ascii").strip()


@pytest.fixture
def spared(caller: Caller, endpoint: Endpoint) -> Iterator[None]:
    """After the test both models answer, and from the same workers as before it."""

    def find_workers() -> list[str]:
        with GrpcClient(endpoint, timeout=SECONDS) as client:
            (answer,) = client.predict_sequence("sequence", [b"hi"])
        answers = [*caller.predict("hi").answers, answer.body.decode()]
        assert len(answers) == 2
        return [answer.split()[0] for answer in answers]

    before = find_workers()
    yield
    assert find_workers() == before


@pytest.mark.parametrize(("method", "fields"), CHANGES)
@pytest.mark.parametrize("spoil", ["", "{}x", " {:.20}"])
def test_models_are_not_changed_without_the_key(
    caller: Caller, key: str, method: str, fields: dict[str, Any], spoil: str
) -> None:
    before = caller.describe()
    reply = caller.send(method, fields, key=spoil.format(key))
    assert reply.code == "PERMISSION_DENIED"
    assert "which send the key (x-marwright-key)" in reply.text
    assert caller.describe() == before
    assert "again" not in caller.list_models().answers[0]


@pytest.mark.parametrize(("method", "fields"), CHANGES)
def test_the_key_alone_is_not_enough(
    caller: Caller, key: str, method: str, fields: dict[str, Any]
) -> None:
    reply = caller.send(method, fields, key=key, token=False)
    assert reply.code == "PERMISSION_DENIED"
    assert "Token Authorization failed" in reply.text


def test_models_are_read_with_the_token_alone(caller: Caller) -> None:
    assert "talker" in caller.list_models().answers[0]
    assert caller.send("ListModels", {"limit": 1}, token=False).code == "PERMISSION_DENIED"
    assert caller.describe()


def test_who_has_the_key_changes_models(caller: Caller, key: str) -> None:
    fields = {"model_name": "talker", "model_version": "1.0"}
    assert caller.send("SetDefault", fields, key=key).code == "OK"
    reply = caller.send("ScaleWorker", {**fields, "min_worker": 1}, key=key)
    assert (reply.code, reply.text) == ("OK", "")


def test_our_clients_send_the_key(endpoint: Endpoint) -> None:
    with GrpcClient(endpoint, timeout=SECONDS) as client:
        client.models.scale("talker", 1)
        client.models.set_default("talker", "1.0")

    async def change() -> None:
        async with AsyncGrpcClient(endpoint, timeout=SECONDS) as client:
            await client.models.scale("talker", 1)

    asyncio.run(change())


def test_our_clients_say_that_the_key_is_missing(endpoint: Endpoint) -> None:
    without = dataclasses.replace(endpoint, supervisor_key=None)
    with (
        GrpcClient(without, timeout=SECONDS) as client,
        pytest.raises(AnswerError, match="which send the key"),
    ):
        client.models.scale("talker", 1)


def test_a_server_without_a_key_asks_for_none(tmp_path: Path, root: Path) -> None:
    access = AccessSettings(models="token")
    deployment = Deployment(store=write_store(tmp_path, root, "talker"), access=access)
    with TorchServe.deploy(deployment) as server:
        fields = {"model_name": "talker", "min_worker": 1}
        assert Caller(server.endpoint).send("ScaleWorker", fields).code == "OK"


@pytest.mark.usefixtures("spared")
def test_a_whole_answer_is_a_stream_of_one_part(caller: Caller) -> None:
    for _ in range(3):
        reply = caller.predict("whole", "StreamPredictions")
        assert (reply.code, len(reply.answers)) == ("OK", 1)
        assert reply.answers[0].endswith(" whole")
    assert caller.predict("tell:1,2,3", "StreamPredictions").answers == ["1", "2", "3"]


@pytest.mark.usefixtures("spared")
def test_who_asks_for_a_whole_answer_is_told_of_parts(caller: Caller) -> None:
    for _ in range(3):
        reply = caller.predict("tell:1,2,3")
        assert (reply.answers, reply.code) == ([], "FAILED_PRECONDITION")
        assert reply.text == "The handler answers in parts: call StreamPredictions"


@pytest.mark.usefixtures("spared")
def test_a_sequence_is_refused_by_a_model_that_knows_none(caller: Caller) -> None:
    inputs = [make_input("talker", text, "some") for text in ("a", "b")]
    reply = caller.send("StreamPredictions2", *inputs)
    assert (reply.answers, reply.code) == ([], "FAILED_PRECONDITION")
    assert "talker is not configured for sequences" in reply.text
    reply = caller.send("StreamPredictions2", make_input("nobody", "a", "some"))
    assert (reply.code, reply.text) == ("NOT_FOUND", "Model not found: nobody")


@pytest.mark.usefixtures("spared")
def test_a_sequence_outlives_an_input_at_which_its_handler_raises(endpoint: Endpoint) -> None:
    with GrpcClient(endpoint, timeout=SECONDS) as client:
        answers = client.predict_sequence("sequence", [b"a", b"raise:boo"])
        assert next(answers).body.endswith(b" a")
        with pytest.raises(AnswerError, match="Prediction failed"):
            next(answers)


@pytest.mark.usefixtures("spared")
def test_a_sequence_that_ends_too_early_loses_its_answers_alone(caller: Caller) -> None:
    inputs = [make_input("sequence", "sleep:0.5", "hasty"), make_input("sequence", "b", "hasty")]
    assert caller.send("StreamPredictions2", *inputs).answers == []
