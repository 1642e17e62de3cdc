"""Both gRPC clients against a real TorchServe, in the same tests."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from marwright.client import Endpoint
from marwright.client.grpc_async_client import AsyncGrpcClient, AsyncGrpcModels
from marwright.client.grpc_client import GrpcClient, GrpcModels
from marwright.client.retries import Retries
from marwright.errors import (
    AnswerError,
    ConflictError,
    InputRejectedError,
    ModelNotFoundError,
    OverloadedError,
    RequestTimeoutError,
    TokenRejectedError,
    UsageError,
    WorkerLostError,
)
from marwright.server import TorchServe
from marwright.server.properties import read_properties

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


class Talk:
    """One client, sync or async, asked in one way."""

    def __init__(self, client: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.client = client
        self.loop = loop

    def do(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return what a method gives; of a stream a list."""
        result = method(*arguments, **options)
        if inspect.isasyncgen(result):
            return self.loop.run_until_complete(collect(result))
        if inspect.iscoroutine(result):
            return self.loop.run_until_complete(result)
        return list(result) if inspect.isgenerator(result) else result

    def predict(self, text: str, name: str = "talker", **options: Any) -> str:
        return self.do(self.client.predict, name, text.encode(), **options).body.decode()

    def tell(self, text: str, name: str = "talker", **options: Any) -> list[str]:
        answers = self.do(self.client.predict_stream, name, text.encode(), **options)
        return [answer.body.decode() for answer in answers]

    def open(self, **options: Any) -> Talk:
        """Return another client of the same kind."""
        return Talk(type(self.client)(self.client.endpoint, **options), self.loop)


async def collect(stream: Any) -> list[Any]:
    return [item async for item in stream]


def pack(store: Path, name: str, version: str, *, config: str = "") -> str:
    """Write an archive of the talker into a store, and return its file name."""
    model = {"modelName": name, "handler": "talker.py", "modelVersion": version}
    file = f"{name}-{version}.mar"
    with zipfile.ZipFile(store / file, "w") as archive:
        if config:
            model["configFile"] = "model-config.yaml"
            archive.writestr("model-config.yaml", config)
        manifest = {"runtime": "python", "model": model, "archiverVersion": "0.12.0"}
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        archive.write(Path(__file__).with_name("talker.py"), "talker.py")
    return file


@pytest.fixture(scope="module")
def properties(server: TorchServe) -> dict[str, str]:
    """What TorchServe was told."""
    return read_properties(server.run_folder / "config.properties")


@pytest.fixture(scope="module")
def folder(properties: dict[str, str]) -> Path:
    """Where TorchServe looks for archives."""
    return Path(properties["model_store"])


@pytest.fixture(scope="module")
def endpoint(server: TorchServe, properties: dict[str, str]) -> Endpoint:
    """The server's endpoint with the addresses of its two gRPC services."""
    return dataclasses.replace(
        server.endpoint,
        grpc_inference=f"127.0.0.1:{properties['grpc_inference_port']}",
        grpc_management=f"127.0.0.1:{properties['grpc_management_port']}",
    )


@pytest.fixture(scope="module", autouse=True)
def talker(folder: Path, endpoint: Endpoint) -> Iterator[None]:
    """The talker, registered over gRPC, and gone afterwards."""
    files = [
        pack(folder, "talker", "1.0"),
        pack(folder, "sequence", "1.0", config=SEQUENCES),
    ]
    with GrpcClient(endpoint) as client:
        registered = client.models.register(files[0])
        assert registered is not None
        assert registered.ready_workers == 1
        client.models.register(files[1])
        yield
        client.models.unregister("talker", "1.0")
        client.models.unregister("sequence", "1.0")
    for file in files:
        (folder / file).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(params=[GrpcClient, AsyncGrpcClient])
def talk(
    request: pytest.FixtureRequest, endpoint: Endpoint, loop: asyncio.AbstractEventLoop
) -> Iterator[Talk]:
    talk = Talk(request.param(endpoint), loop)
    yield talk
    talk.do(talk.client.close)


def test_both_clients_have_one_shape() -> None:
    def describe(kind: type) -> dict[str, Any]:
        return {
            name: [
                (p.name, p.kind, p.default) for p in inspect.signature(value).parameters.values()
            ]
            for name, value in vars(kind).items()
            if callable(value) and (not name.startswith("_") or name == "__init__")
        }

    assert describe(GrpcClient) == describe(AsyncGrpcClient)
    assert describe(GrpcModels) == describe(AsyncGrpcModels)


def test_an_image_is_classified(talk: Talk, scan: bytes, server: TorchServe) -> None:
    answer = talk.do(talk.client.predict, "cnn", scan)
    assert answer.json() == server.client.predict("cnn", scan).json()
    assert answer.seconds > 0


def test_a_dict_arrives_as_json(talk: Talk) -> None:
    answer = talk.do(talk.client.predict, "talker", {"a": 1})
    assert answer.body.endswith(b'{"a": 1}')


def test_parts_arrive_under_their_names(talk: Talk) -> None:
    answer = talk.do(talk.client.predict_parts, "talker", {"one": b"1", "two": b"2"})
    assert answer.body == b"one=1,two=2"


def test_the_server_is_healthy(talk: Talk) -> None:
    assert talk.do(talk.client.health).healthy


def test_parts_of_an_answer_come_in_order(talk: Talk) -> None:
    assert talk.tell("tell:once,upon,a time") == ["once", "upon", "a time"]


def test_a_part_comes_before_the_last_is_made(talk: Talk) -> None:
    answers = talk.do(talk.client.predict_stream, "talker", b"slowly:1,2,3,4")
    assert answers[0].seconds + 0.6 < answers[-1].seconds


def test_a_stream_that_is_left_is_cancelled_and_costs_no_worker(talk: Talk) -> None:
    pid = talk.predict("hi").split()[0]

    async def take_one(stream: Any) -> Any:
        first = await anext_of(stream)
        await stream.aclose()
        return first

    stream = talk.client.predict_stream("talker", b"slowly:1,2,3")
    if inspect.isasyncgen(stream):
        first = talk.loop.run_until_complete(take_one(stream))
    else:
        first = next(stream)
        stream.close()
    assert first.body == b"1"
    assert talk.predict("hi").split()[0] == pid  # pytorch/serve#1888 is no longer so


async def anext_of(stream: Any) -> Any:
    return await stream.__anext__()


def test_a_call_that_is_given_up_costs_no_worker(talk: Talk) -> None:
    pid = talk.predict("hi").split()[0]
    with pytest.raises(RequestTimeoutError, match="no answer to Predictions"):
        talk.predict("sleep:1", timeout=0.3)
    assert talk.predict("hi").split()[0] == pid


def test_a_cancelled_task_costs_no_worker(
    endpoint: Endpoint, loop: asyncio.AbstractEventLoop
) -> None:
    async def cancel() -> tuple[bytes, bytes]:
        async with AsyncGrpcClient(endpoint) as client:
            before = await client.predict("talker", b"hi")
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.predict("talker", b"sleep:1"), 0.3)
            return before.body, (await client.predict("talker", b"hi")).body

    before, after = loop.run_until_complete(cancel())
    assert before == after


def test_inputs_of_a_sequence_are_answered_in_turn(talk: Talk) -> None:
    inputs = [b"a", b"b", b"c"]
    for _ in range(2):  # the worker outlives the first sequence
        answers = talk.do(talk.client.predict_sequence, "sequence", inputs)
        assert [answer.body.split()[1] for answer in answers] == inputs
    assert talk.do(talk.client.predict_sequence, "sequence", []) == []


def test_an_error_ends_a_sequence(talk: Talk) -> None:
    # A handler that raises costs TorchServe 0.12 the worker, and nobody is told.
    with pytest.raises(InputRejectedError, match="so it was told"):
        talk.do(talk.client.predict_sequence, "sequence", [b"a", b"problem:422", b"c"])
    with pytest.raises(AnswerError, match="configured for sequences"):
        talk.do(talk.client.predict_sequence, "talker", [b"a", b"b"])
    with pytest.raises(ModelNotFoundError):
        talk.do(talk.client.predict_sequence, "nobody", [b"a"])


def test_a_missing_model_is_told(talk: Talk) -> None:
    with pytest.raises(ModelNotFoundError, match="Model not found: nobody"):
        talk.predict("hi", name="nobody")
    with pytest.raises(ModelNotFoundError, match="version: 9"):
        talk.predict("hi", version="9")
    with pytest.raises(ModelNotFoundError):
        talk.tell("hi", name="nobody")
    with pytest.raises(UsageError):
        talk.predict("hi", version="")


def test_a_handler_that_raises_is_told_and_not_asked_again(talk: Talk) -> None:
    with pytest.raises(AnswerError, match="Prediction failed") as caught:
        talk.predict("raise:boo")
    assert caught.value.status == 503
    assert not isinstance(caught.value, OverloadedError)


def test_a_problem_that_a_handler_writes_is_an_error(talk: Talk, scan: bytes) -> None:
    with pytest.raises(InputRejectedError, match="so it was told") as caught:
        talk.predict("problem:422")
    assert caught.value.status == 422
    with pytest.raises(AnswerError, match="the handler answered 500"):
        talk.predict("problem:500")
    with pytest.raises(InputRejectedError):
        talk.do(talk.client.predict, "cnn", b"no image")


def test_a_bare_status_of_a_handler_does_not_travel(talk: Talk) -> None:
    assert talk.predict("status:422").endswith("status:422")


def test_a_lost_worker_is_told(talk: Talk) -> None:
    patient = talk.open(retries=Retries(after_loss=0))
    with pytest.raises(WorkerLostError, match="Worker died"):
        patient.predict("exit")
    patient.do(patient.client.close)
    assert talk.predict("hi", timeout=60)  # waits for the next worker


def test_too_much_is_refused(talk: Talk) -> None:
    with pytest.raises(InputRejectedError) as caught:
        talk.do(talk.client.predict, "talker", b"x" * 7_000_000)
    assert caught.value.status == 413


def test_more_than_grpcs_own_limit_is_received(talk: Talk) -> None:
    assert len(talk.predict("big:5000000")) == 5_000_000
    small = talk.open(max_message_bytes=1 << 20)
    with pytest.raises(AnswerError, match="larger than max"):
        small.predict("big:5000000")
    small.do(small.client.close)


def test_a_wrong_token_is_told(talk: Talk, endpoint: Endpoint, write_keys: Any) -> None:
    path = write_keys(inference="wrong", management="wrong")
    wrong = dataclasses.replace(endpoint, key_file=path, management_url="")
    for point in (wrong, dataclasses.replace(endpoint, key_file=None)):
        client = type(talk.client)(point)
        with pytest.raises(TokenRejectedError):
            talk.do(client.predict, "talker", b"hi")
        with pytest.raises(TokenRejectedError):
            talk.do(client.models.list)
        talk.do(client.close)


def test_models_are_listed_and_described(talk: Talk) -> None:
    models = talk.client.models
    names = {model.name: model.archive for model in talk.do(models.list)}
    assert names["cnn"] == "cnn.mar"
    described = talk.do(models.describe, "talker")
    assert (described.name, described.version) == ("talker", "1.0")
    assert talk.do(models.describe, "talker", "1.0") == described
    with pytest.raises(ModelNotFoundError):
        talk.do(models.describe, "nobody")


def test_a_version_comes_and_goes(talk: Talk, folder: Path) -> None:
    models = talk.client.models
    pack(folder, "talker", "2.0")
    registered = talk.do(models.register, "talker-2.0.mar")
    try:
        assert (registered.version, registered.ready_workers) == ("2.0", 1)
        assert [version.version for version in talk.do(models.versions, "talker")] == ["1.0", "2.0"]
        assert talk.do(models.scale, "talker", 2, version="2.0").ready_workers == 2
        assert talk.do(models.scale, "talker", 1, version="2.0").max_workers == 1
        with pytest.raises(ConflictError, match=r"registered already: talker 2\.0"):
            talk.do(models.register, "talker-2.0.mar")
        with pytest.raises(ConflictError, match="is the default version"):
            talk.do(models.unregister, "talker", "1.0")
        talk.do(models.set_default, "talker", "2.0")
        assert talk.do(models.describe, "talker").version == "2.0"
        talk.do(models.set_default, "talker", "1.0")
    finally:
        talk.do(models.set_default, "talker", "1.0")
        talk.do(models.unregister, "talker", "2.0")
    (folder / "talker-2.0.mar").unlink(missing_ok=True)
    with pytest.raises(ModelNotFoundError):
        talk.do(models.describe, "talker", "2.0")


def test_what_cannot_be_registered_is_told(talk: Talk) -> None:
    models = talk.client.models
    with pytest.raises(ModelNotFoundError):
        talk.do(models.register, "nothing.mar")
    with pytest.raises(InputRejectedError, match="url is required"):
        talk.do(models.register, "")
    for ask in (
        lambda: talk.do(models.register, "talker-2.0.mar", workers=0),
        lambda: talk.do(models.scale, "talker", 0),
        lambda: talk.do(models.unregister, "talker", ""),
    ):
        with pytest.raises(UsageError):
            ask()
    with pytest.raises(ModelNotFoundError):
        talk.do(models.unregister, "talker", "2.0")


def test_a_closed_client_says_so(talk: Talk) -> None:
    talk.do(talk.client.close)
    with pytest.raises(UsageError, match="closed"):
        talk.predict("hi")


def test_threads_share_a_client(endpoint: Endpoint) -> None:
    answers: list[bytes] = []
    with GrpcClient(endpoint) as client:

        def ask(number: int) -> None:
            answers.append(client.predict("talker", f"{number}".encode()).body.split()[1])

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(answers) == [f"{number}".encode() for number in range(8)]
