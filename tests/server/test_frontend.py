from __future__ import annotations

import json
import logging
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import pytest

from marwright.errors import UsageError
from marwright.server import TorchServe, register
from marwright.server.frontend import PATCHES, FrontendSettings, write_classes

MODEL_CLASS, INITIALIZER_CLASS, SERVER_CLASS, INFERENCE_CLASS, *AGGREGATORS = (
    member for patch in PATCHES for member in patch.classes
)
DOORS = ("door", "gRPC gate", "gRPC jobs", "held requests")
# Answers how many requests shared its batch, which takes a while.
HANDLER = """
import time
class Handler:
    def initialize(self, context):
        pass
    def handle(self, data, context):
        time.sleep(0.1)
        return [str(len(data))] * len(data)
"""
DELAY = 3000
"""maxBatchDelay: milliseconds to TorchServe, microseconds with eager batches."""


@pytest.fixture(scope="module")
def jar() -> Path:
    """TorchServe's own."""
    spec = find_spec("ts")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "frontend/model-server.jar"


def write_jar(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def encode(name: str) -> bytes:
    return len(name).to_bytes(2, "big") + name.encode()


def list_written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_one_word_of_the_class_is_changed_and_nothing_else(jar: Path, tmp_path: Path) -> None:
    folder = tmp_path / "classes"
    assert write_classes(jar, folder, door=False) == ("eager batches",)
    assert list_written(folder) == {MODEL_CLASS}
    with zipfile.ZipFile(jar) as archive:
        before = archive.read(MODEL_CLASS)
    after = (folder / MODEL_CLASS).read_bytes()
    assert after != before
    assert after.replace(b"MICROSECONDS", b"MILLISECONDS") == before
    changed = [place for place in range(len(before)) if before[place] != after[place]]
    assert changed[-1] - changed[0] < len("MICROSECONDS")


@pytest.mark.parametrize(
    ("member", "theirs", "ours"),
    [
        (INITIALIZER_CLASS, "io/netty/handler/codec/http/HttpServerCodec", "marwright/Door"),
        (SERVER_CLASS, "org/pytorch/serve/grpcimpl/GRPCInterceptor", "marwright/GrpcGate"),
        (INFERENCE_CLASS, "org/pytorch/serve/job/GRPCJob", "marwright/GrpcJob"),
        *(
            (member, "org/pytorch/serve/wlm/BatchAggregator", "marwright/Aggregator")
            for member in AGGREGATORS
        ),
    ],
)
def test_the_doors_take_others_places_and_bring_their_classes(
    jar: Path, tmp_path: Path, member: str, theirs: str, ours: str
) -> None:
    folder = tmp_path / "classes"
    assert write_classes(jar, folder, eager_batches=False) == DOORS
    written = list_written(folder)
    assert {member, f"{ours}.class", "marwright/Gate.class"} <= written
    assert all(name.endswith(".class") for name in written)
    with zipfile.ZipFile(jar) as archive:
        before = archive.read(member)
    after = (folder / member).read_bytes()
    assert after != before
    assert after.replace(encode(ours), encode(theirs)) == before


def test_the_classes_are_what_their_source_compiles_to(jar: Path, tmp_path: Path) -> None:
    javac = shutil.which("javac")
    if javac is None:
        pytest.skip("needs javac")
    version = subprocess.run([javac, "-version"], capture_output=True, text=True, check=True)
    if not (version.stdout + version.stderr).startswith("javac 17."):
        pytest.skip("other compilers than 17 write other bytes")
    door = Path(str(resources.files("marwright.server") / "door"))
    sources = sorted(map(str, door.glob("*.java")))
    command = [javac, "--release", "17", "-cp", str(jar), "-d", str(tmp_path), *sources]
    subprocess.run(command, check=True, capture_output=True)
    compiled = {path.name: path.read_bytes() for path in (tmp_path / "marwright").iterdir()}
    assert compiled == {path.name: path.read_bytes() for path in door.glob("*.class")}


def test_both_or_neither_may_be_asked_for(jar: Path, tmp_path: Path) -> None:
    assert write_classes(jar, tmp_path / "both") == ("eager batches", *DOORS)
    assert write_classes(jar, tmp_path / "none", eager_batches=False, door=False) == ()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            {
                MODEL_CLASS: b"of another release \x01\x00\x0cMILLISECONDS",
                INITIALIZER_CLASS: b"\x01\x00\x2bio/netty/handler/codec/http/HttpServerCodec",
                SERVER_CLASS: b"\x01\x00\x2aorg/pytorch/serve/grpcimpl/GRPCInterceptor",
                INFERENCE_CLASS: b"\x01\x00\x1dorg/pytorch/serve/job/GRPCJob",
                **dict.fromkeys(AGGREGATORS, b"\x01\x00\x25org/pytorch/serve/wlm/BatchAggregator"),
            },
            "is not TorchServe 0.12.0's",
        ),
        ({"other.class": b""}, "cannot be read"),
        (b"no jar", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_another_torchserve_is_left_alone_and_the_log_says_what_that_means(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    content: dict[str, bytes] | bytes | None,
    reason: str,
) -> None:
    path = tmp_path / "model-server.jar"
    if isinstance(content, dict):
        write_jar(path, content)
    elif content is not None:
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert write_classes(path, tmp_path / "classes") == ()
    assert not (tmp_path / "classes").exists()
    assert "requests will wait for maxBatchDelay" in caplog.text
    assert "slow clients, workflows and changes without a key are let in" in caplog.text
    assert "over gRPC the management token changes models without a key" in caplog.text
    assert "a call over gRPC that does not fit its handler costs the worker" in caplog.text
    assert "a worker took and had not begun when it died gets no answer" in caplog.text
    assert caplog.text.count(reason) == 5


def test_classes_that_have_to_agree_change_all_or_none(
    jar: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with zipfile.ZipFile(jar) as archive:
        members = {name: archive.read(name) for patch in PATCHES for name in patch.classes}
    members[AGGREGATORS[-1]] += b"\x00"
    folder = tmp_path / "classes"
    applied = write_classes(write_jar(tmp_path / "other.jar", members), folder)
    assert applied == ("eager batches", *DOORS[:-1])
    assert not list_written(folder) & set(AGGREGATORS)
    assert caplog.text.count("is not TorchServe 0.12.0's") == 1


def test_the_settings_are_javas_arguments() -> None:
    settings = FrontendSettings(
        key_file=Path("/run/a key"),
        deny=("/a", "/b"),
        request_seconds=2.5,
        max_connections=9,
        log_level="warning",
        log_files=1,
    )
    assert settings.to_arguments() == [
        "-Dmarwright.deny=/a,/b",
        "-Dmarwright.request.seconds=2.5",
        "-Dmarwright.retry.after=1",
        "-Dmarwright.log.requests=errors",
        "-Dmarwright.log.level=warn",
        "-Dmarwright.log.size=20971520B",
        "-Dmarwright.log.rotated=1",
        "-Dmarwright.key.file=/run/a key",
        "-Dmarwright.max.connections=9",
    ]


def test_what_is_not_said_sets_no_limit() -> None:
    arguments = FrontendSettings().to_arguments()
    assert "-Dmarwright.request.seconds=0" in arguments
    assert not [text for text in arguments if "key" in text or "connections" in text]


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(UsageError, match="expected none, errors or all, found 'some'"):
        FrontendSettings(log_requests="some").to_arguments()


@pytest.fixture(scope="module")
def ask(
    server: TorchServe, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], int]]:
    """Return a function that asks an eager server's worker for the size of the batch."""
    path = tmp_path_factory.mktemp("patient") / "patient.mar"
    model = {"modelName": "patient", "handler": "patient.py", "configFile": "model-config.yaml"}
    manifest = json.dumps({"runtime": "python", "model": model}).encode()
    config = f"batchSize: 8\nmaxBatchDelay: {DELAY}\n".encode()
    members = {"MAR-INF/MANIFEST.json": manifest, "model-config.yaml": config}
    write_jar(path, {**members, "patient.py": HANDLER.encode()})
    register(server.client, path)
    yield lambda: int(server.client.predict("patient", b"x").body)
    server.client.models.unregister("patient", "1.0")
    (server.store / "patient.mar").unlink()


@pytest.mark.server
def test_a_lone_request_does_not_wait_for_company(ask: Callable[[], int]) -> None:
    ask()
    started = time.monotonic()
    assert ask() == 1
    assert time.monotonic() - started < DELAY / 1000 / 2


@pytest.mark.server
def test_requests_that_come_while_a_worker_computes_share_the_next_batch(
    ask: Callable[[], int],
) -> None:
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(ask)
        time.sleep(0.05)
        rest = [pool.submit(ask) for _ in range(8)]
        assert first.result() == 1
        sizes = [future.result() for future in rest]
    assert max(sizes) > 4
