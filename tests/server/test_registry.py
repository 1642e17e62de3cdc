from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from marwright.client import Endpoint
from marwright.errors import NoServerError, ServerError, StorageError, UsageError
from marwright.server.process import read_start_time
from marwright.server.registry import (
    Record,
    announce,
    announce_folder,
    claim,
    find_endpoint,
    find_record,
    list_records,
    list_servers,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of links, empty."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    return tmp_path / "runtime/marwright"


def make_run_folder(parent: Path, name: str = "run") -> Path:
    Endpoint(f"http://{name}:1", f"http://{name}:2").write(parent / name / "endpoint.json")
    return parent / name


def test_links_lie_in_the_runtime_folder(tmp_path: Path, folder: Path) -> None:
    with announce("8080", make_run_folder(tmp_path)):
        assert announce_folder() == folder
        assert (folder / "8080.json").is_symlink()
        assert folder.stat().st_mode & 0o077 == 0
        assert list(folder.iterdir()) == [folder / "8080.json"]


@pytest.mark.parametrize("state", ["state", ""])
def test_links_lie_in_the_state_folder_where_there_is_no_runtime_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / state) if state else "")
    expected = tmp_path / (state or "home/.local/state") / "marwright/servers"
    with announce("8080", make_run_folder(tmp_path)):
        assert (expected / "8080.json").is_symlink()
        assert list(list_servers()) == ["8080"]


def test_a_server_is_known_while_the_block_runs(tmp_path: Path) -> None:
    with announce("8080", make_run_folder(tmp_path)):
        assert find_endpoint().inference_url == "http://run:1"
        assert find_endpoint("8080") == find_endpoint()
    assert list_servers() == {}


def test_a_block_that_fails_leaves_no_link(tmp_path: Path, folder: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), announce("8080", make_run_folder(tmp_path)):
        raise ZeroDivisionError
    assert list(folder.iterdir()) == []


def test_a_dead_link_is_pruned(tmp_path: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "dead.json").symlink_to(tmp_path / "gone/endpoint.json")
    assert list_servers() == {}
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"inference_url": null}'])
def test_a_file_that_is_no_endpoint_hides_no_server(
    tmp_path: Path, folder: Path, content: str
) -> None:
    with announce("8080", make_run_folder(tmp_path)):
        (folder / "a.json").write_text(content)
        (folder / "z.json").mkdir()
        assert list(list_servers()) == ["8080"]
        assert (folder / "a.json").exists()


@pytest.mark.parametrize("name", [None, "8080"])
def test_no_server_is_said_with_what_to_do(name: str | None) -> None:
    with pytest.raises(NoServerError, match="marwright serve"):
        find_endpoint(name)


def test_a_wrong_name_names_the_right_ones(tmp_path: Path) -> None:
    refused = pytest.raises(NoServerError, match=r"no server two .*servers: one")
    with announce("one", make_run_folder(tmp_path, "one")), refused:
        find_endpoint("two")


def test_of_several_servers_one_must_be_named(tmp_path: Path) -> None:
    one, two = make_run_folder(tmp_path, "one"), make_run_folder(tmp_path, "two")
    with announce("one", one), announce("t.w.o", two):
        with pytest.raises(UsageError, match=r"found one, t\.w\.o; choose one with --server"):
            find_endpoint()
        assert find_endpoint("t.w.o").inference_url == "http://two:1"
    assert list_servers() == {}


@pytest.mark.parametrize("name", ["", "../up", "a/b", "/etc/x", "nul\0"])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="server name"), announce(name, tmp_path):
        pass
    assert list(tmp_path.rglob("*.json")) == []


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "runtime").touch()
    with pytest.raises(StorageError), announce("8080", tmp_path):
        pass


def make_record(pid: int | None = None, **values: str) -> Record:
    pid = pid or os.getpid()
    values = {"name": "one", "since": "today", "start": read_start_time(pid) or "", **values}
    return Record(pid=pid, **values)


def test_a_claim_keeps_others_away_until_it_is_released(tmp_path: Path, folder: Path) -> None:
    first = claim("one")
    first.write(make_record(key="secret"))
    assert (folder / "one.lock").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ServerError, match=rf"a server one .* process {os.getpid()} has it"):
        claim("one")
    config = claim(config=tmp_path / "deploy.yaml")
    config.write(make_record())
    with pytest.raises(ServerError, match=r"deploy.yaml is served already.* the server one"):
        claim(config=tmp_path / "deploy.yaml")
    first.release()
    config.release()
    claim("one").release()
    assert list(folder.iterdir()) == []


def test_a_claim_tells_who_had_it_and_was_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from marwright.server.registry import *;"
        "one = claim('one'); one.write(Record('one', 7, '0', 'then', run_folder=sys.argv[1]));"
        "print('claimed', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "claimed\n"
        with pytest.raises(ServerError):
            claim("one")
        holder.kill()
    assert find_record().run_folder == str(tmp_path)  # its server may still be there
    fresh = claim("one")
    assert fresh.previous == Record("one", 7, "0", "then", run_folder=str(tmp_path))
    fresh.release()


def test_records_of_what_is_gone_are_passed_over(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        for name, record in {
            "one": make_record(),
            "dead": make_record(name="dead", start="1", run_folder=str(tmp_path / "gone")),
        }.items():
            held = claim(name)
            stack.callback(held.release)
            held.write(record)
        stack.callback(claim("empty").release)
        assert list(list_records()) == ["one"]
        with pytest.raises(NoServerError, match="no server dead runs here"):
            find_record("dead")


def test_a_signal_reaches_only_the_process_that_is_meant() -> None:
    command = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command) as stranger:
        with pytest.raises(NoServerError):
            make_record(stranger.pid, start="1").send(signal.SIGTERM)
        assert stranger.poll() is None
        make_record(stranger.pid).send(signal.SIGTERM)
        assert stranger.wait(10) == -signal.SIGTERM
    with pytest.raises(NoServerError):
        make_record(stranger.pid, start="1").send(signal.SIGTERM)
