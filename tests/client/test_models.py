from __future__ import annotations

from typing import Any

import pytest

from marwright.client import Client
from marwright.client.models import model_path
from marwright.errors import ClientError, ConflictError, OverloadedError, UsageError


@pytest.mark.parametrize(
    ("name", "version", "path"),
    [
        ("cnn", None, "/models/cnn"),
        ("cnn", "1.0", "/models/cnn/1.0"),
        ("my net", "1 0", "/models/my%20net/1%200"),
        ("ä?x#y%", "..1", "/models/%C3%A4%3Fx%23y%25/..1"),
    ],
)
def test_names_and_versions_are_quoted(
    service: Any, client: Client, described: Any, name: str, version: str | None, path: str
) -> None:
    service.answer([described()])
    client.models.describe(name, version)
    assert service.lines == [f"GET {path}"]


PARTS = [("", None), ("cnn", ""), (".", "1"), ("cnn", ".."), ("a/b", None), ("cnn", "1/0")]


@pytest.mark.parametrize(("name", "version"), PARTS)
def test_a_part_that_means_another_resource_is_refused(name: str, version: str | None) -> None:
    with pytest.raises(UsageError):
        model_path(name, version)


def test_an_empty_version_never_unregisters_the_whole_model(service: Any, client: Client) -> None:
    with pytest.raises(UsageError):
        client.models.unregister("cnn", "")
    assert service.asked == []


def test_the_list_follows_every_page(service: Any, client: Client) -> None:
    first = {"nextPageToken": "2", "models": [{"modelName": "a", "modelUrl": "a.mar"}]}
    second = {"models": [{"modelName": "b", "modelUrl": "b.mar"}]}
    service.answer(first, second)
    assert [model.name for model in client.models.list()] == ["a", "b"]
    assert service.lines == ["GET /models?limit=100", "GET /models?limit=100&next_page_token=2"]


@pytest.mark.parametrize("token", ["", None, "2"])
def test_a_list_without_an_end_ends(service: Any, client: Client, token: str | None) -> None:
    service.answer({"nextPageToken": token, "models": []})
    assert client.models.list() == ()
    assert len(service.asked) <= 2


def test_describing_reads_workers_and_settings(
    service: Any, client: Client, described: Any
) -> None:
    service.answer([described("2.0", ready=1, workers=2)])
    version = client.models.describe("cnn", "2.0")
    assert (version.name, version.version, version.archive) == ("cnn", "2.0", "cnn.mar")
    assert (version.ready_workers, version.ready) == (1, False)
    assert [worker.pid for worker in version.workers] == [100, 101]


def test_versions_are_all_of_them(service: Any, client: Client, described: Any) -> None:
    service.answer([described("1.0"), described("2.0")])
    assert [version.version for version in client.models.versions("cnn")] == ["1.0", "2.0"]
    assert service.lines == ["GET /models/cnn/all"]


@pytest.mark.parametrize(
    "status",
    [
        'Model "cnn" Version: 1.0 registered with 1 initial workers',
        'Model "cnn" Version: 1.0 registered with 0 initial workers. Use scale workers API to add.',
    ],
)
def test_registering_returns_the_version_that_was_registered(
    service: Any, client: Client, described: Any, status: str
) -> None:
    service.answer({"status": status}, [described()])
    registered = client.models.register("my cnn.mar", workers=1)
    assert registered is not None
    assert registered.version == "1.0"
    query = "url=my+cnn.mar&initial_workers=1&synchronous=true"
    assert service.lines == [f"POST /models?{query}", "GET /models/cnn/1.0"]


def test_an_answer_that_names_no_version_returns_none(service: Any, client: Client) -> None:
    service.answer({"status": "Worker updated"})
    assert client.models.register("cnn.mar") is None


def test_scaling_waits_and_describes(service: Any, client: Client, described: Any) -> None:
    service.answer([described(ready=2, workers=2)])
    assert client.models.scale("cnn", 2, version="1.0").ready_workers == 2
    query = "min_worker=2&max_worker=2&synchronous=true"
    assert service.lines == [f"PUT /models/cnn/1.0?{query}", "GET /models/cnn/1.0"]


def test_scaling_waits_for_workers_that_are_not_called_ready_yet(
    service: Any, client: Client, described: Any
) -> None:
    done = {"status": "Workers scaled to 2 for model: cnn"}
    service.answer(done, [described(ready=1, workers=2)], [described(ready=2, workers=2)])
    assert client.models.scale("cnn", 2).ready_workers == 2
    service.answer(done, [described(ready=1, workers=2)])
    assert client.models.scale("cnn", 2, synchronous=False).ready_workers == 1


def test_the_default_goes_to_a_version_with_a_ready_worker(
    service: Any, client: Client, described: Any
) -> None:
    service.answer([described("2.0")])
    assert client.models.set_default("cnn", "2.0").version == "2.0"
    assert service.lines == ["GET /models/cnn/2.0", "PUT /models/cnn/2.0/set-default"]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_default_never_goes_to_a_version_without_a_ready_worker(
    service: Any, client: Client, described: Any, workers: int
) -> None:
    service.answer([described("2.0", ready=0, workers=workers)])
    with pytest.raises(OverloadedError, match=r"models scale cnn 1 --version 2\.0"):
        client.models.set_default("cnn", "2.0")
    assert service.lines == ["GET /models/cnn/2.0"]


def test_unregistering_a_default_version_is_a_conflict(
    service: Any, client: Client, problem: Any
) -> None:
    service.answer(problem(403, "InvalidModelVersionException", "Cannot remove default version"))
    with pytest.raises(ConflictError, match="Cannot remove default version"):
        client.models.unregister("cnn", "1.0")
    assert service.lines == ["DELETE /models/cnn/1.0"]


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[", b"[]", b"7", b'"x"', b"null", b'[{"a": 1}]']
)
@pytest.mark.parametrize("call", ["list", "describe", "versions", "register"])
def test_an_answer_of_another_shape_is_a_client_error(
    service: Any, client: Client, reply: Any, call: str, body: bytes
) -> None:
    service.answer(reply(body=body))
    arguments = () if call == "list" else ("cnn",)
    with pytest.raises(ClientError, match="expected") as caught:
        getattr(client.models, call)(*arguments)
    assert type(caught.value) is ClientError
