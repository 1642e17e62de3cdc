"""A site: real servers behind a real nginx, each with a supervisor, and a load while parts die."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tests.conftest import BOOT_SECONDS, Served, wait_until
from tests.loads import RATE, find_unanswered

from marwright.archive import Run, pack_run
from marwright.client import Client, Endpoint
from marwright.gateway.traffic import Split
from marwright.server.ports import Ports
from marwright.server.process import read_server_pid
from marwright.server.registry import Record, find_record, list_records, list_replicas
from marwright.server.supervision.inspection import (
    ask_supervisor,
    fetch_metrics,
    restart_server,
    stop_server,
)

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("scratch")]

TOKENS = ("first-token", "second-token")
SPLIT = Split("cnn", stable="1.0", candidate="2.0", share=20.0)
BOTH = ["cnn.mar", "cnn-2.0.mar"]
BROKEN = """
class Handler:
    def initialize(self, context):
        raise KeyError("labels")
    def handle(self, data, context):
        return ["ok"] * len(data)
"""
Marwright = Callable[..., subprocess.CompletedProcess[str]]
Load = Callable[..., Any]
Keep = Callable[..., None]


def make_site(folder: Path, store: Path, name: str, **values: Any) -> Served:
    """Return a site that is not started yet."""
    shutil.copytree(store, folder / "store", dirs_exist_ok=True)
    served = Served(folder, name)
    gateway = {"port": Ports.find_free().inference, **values.pop("gateway", {})}
    served.write(models=["cnn.mar"], gateway=gateway, **values)
    return served


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, store: Path, scratch: Path) -> Iterator[Served]:
    """A gateway and two replicas of two versions; the last tests here kill and stop it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "tokens").write_text("\n".join(TOKENS), encoding="ascii")
    it = make_site(folder, store, "site", replicas=2, gateway={"tokens": str(folder / "tokens")})
    rewrite(it, models=BOTH)
    try:
        it.start()
        wait_until(lambda: all(row["ready"] for row in it.wait()["replicas"]))
        yield it
    finally:
        it.end()


def rewrite(site: Served, **values: Any) -> None:
    """Change some values of its deploy.yaml."""
    site.config.write_text(
        yaml.safe_dump({**yaml.safe_load(site.config.read_text("utf-8")), **values}), "utf-8"
    )


def find_folder(site: Served) -> Path:
    return Path(find_record(site.name).run_folder)


def find_endpoint(site: Served) -> Path:
    return find_folder(site) / "endpoint.json"


def list_parts(site: Served) -> list[Record]:
    return sorted(list_replicas(find_record(site.name)), key=lambda record: record.name)


def find_pid(folder: str | Path) -> int:
    """Return what a guard has started in a folder; 0 before it has."""
    found = read_server_pid(Path(folder))
    return found[0] if found else 0


def list_pids(site: Served) -> list[int]:
    """Return nginx and the replicas' Javas."""
    folders = [str(find_folder(site)), *(part.run_folder for part in list_parts(site))]
    return [find_pid(folder) for folder in folders]


def list_processes(folder: Path) -> list[psutil.Process]:
    """Return the processes that have to do with a folder."""
    found = psutil.process_iter(["cmdline"])
    return [one for one in found if str(folder) in " ".join(one.info["cmdline"] or ())]


def is_all_ready(site: Served) -> bool:
    status = site.status()
    return bool(status.get("ready")) and all(row["ready"] for row in status["replicas"])


def ask(url: str, body: bytes | None = None, token: str = "") -> int:
    """Return the status of an answer."""
    headers = {"Content-Type": "application/octet-stream"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as exc:
        exc.close()
        return exc.code


def test_a_client_finds_the_gateway_and_its_token(site: Served, scan: bytes) -> None:
    endpoint = Endpoint.read(find_endpoint(site))
    with Client(endpoint) as client:
        assert client.predict("cnn", scan).status == 200
        assert client.predict("cnn", scan, version="2.0").status == 200
    url = endpoint.inference_url
    for token in TOKENS:
        assert ask(f"{url}/predictions/cnn", scan, token) == 200
    for token in ("", "third-token", TOKENS[0].upper()):
        assert ask(f"{url}/predictions/cnn", scan, token) == 401
    assert ask(f"{url}/models", token=TOKENS[0]) == 404
    assert ask(f"{url}/ping", token=TOKENS[0]) == 200


def test_its_status_is_one_with_a_row_for_each_replica(site: Served, marwright: Marwright) -> None:
    wait_until(lambda: is_all_ready(site))
    (status,) = json.loads(marwright("status", "--json").stdout)
    assert [(row["name"], row["ready"]) for row in status["replicas"]] == [
        ("site.1", True),
        ("site.2", True),
    ]
    assert [(m["version"], m["ready_workers"], m["workers"]) for m in status["models"]] == [
        ("1.0", 2, 2),
        ("2.0", 2, 2),
    ]
    table = marwright("status", "--ready").stdout
    assert table.count(" server ") == 1
    assert "site.1" in table
    assert marwright("status", "site.2").stdout.count(" server ") == 1


def test_commands_mean_the_site_where_no_server_is_named(
    site: Served, marwright: Marwright
) -> None:
    assert marwright("models", "list").returncode == 0
    refused = marwright("models", "scale", "cnn", "2")
    assert refused.returncode == 2
    assert "--server site.1" in refused.stderr
    assert marwright("models", "scale", "cnn", "1", "--server", "site.2").returncode == 0
    assert marwright("logs", "--server", "site.1").returncode == 0


def test_apply_changes_each_replica_and_says_it_once(site: Served, marwright: Marwright) -> None:
    rewrite(site, models=["cnn.mar"])
    planned = marwright("apply", site.config, "--dry-run", "--json")
    plan = json.loads(planned.stdout)
    assert [(step["server"], step["kind"], step["version"]) for step in plan["plan"]] == [
        ("site.1", "unregister", "2.0"),
        ("site.2", "unregister", "2.0"),
    ]
    assert (plan["restart"], plan["gateway"]) == ([], [])
    assert len(site.status()["models"]) == 2
    made = marwright("apply", site.config)
    assert made.returncode == 0
    assert made.stdout.count("unregister") == 1
    assert "each of site.1, site.2:" in made.stdout
    assert len(site.status()["models"]) == 1
    rewrite(site, models=BOTH)
    assert marwright("apply", site.config).returncode == 0
    assert marwright("apply", site.config).stdout == "nothing to do\n"


def test_apply_names_replicas_that_differ_and_what_takes_a_restart(
    site: Served, marwright: Marwright
) -> None:
    unregistered = marwright("models", "unregister", "cnn", "2.0", "--server", "site.2")
    assert unregistered.returncode == 0
    plan = marwright("apply", site.config, "--dry-run").stdout
    assert plan.splitlines()[:3] == ["site.1:", "nothing to do", "site.2:"]
    assert marwright("apply", site.config).returncode == 0
    rewrite(site, limits={"queue": 7})
    refused = marwright("apply", site.config)
    assert refused.returncode == 1
    assert "limits.queue: 100 -> 7" in refused.stdout
    assert "needs: marwright restart" in refused.stderr
    rewrite(site, limits={})
    wait_until(lambda: is_all_ready(site))


def test_apply_moves_the_gateway(site: Served, marwright: Marwright, scan: bytes) -> None:
    before = list_pids(site)
    old = Endpoint.read(find_endpoint(site)).inference_url
    port, tokens = Ports.find_free().inference, site.folder / "tokens"
    rewrite(site, gateway={"port": port, "tokens": str(tokens)})
    moved = marwright("apply", site.config)
    assert f"the gateway takes gateway.port: {old.rpartition(':')[2]} -> {port}" in moved.stdout
    with Client(Endpoint.read(find_endpoint(site))) as client:
        assert client.endpoint.inference_url.endswith(f":{port}")
        assert client.predict("cnn", scan).status == 200
    with pytest.raises(urllib.error.URLError):
        ask(f"{old}/ping")
    assert list_pids(site) == before


def test_nothing_is_reloaded_while_nothing_changes(site: Served) -> None:
    configuration = find_folder(site) / "nginx.conf"
    before = configuration.read_bytes(), configuration.stat().st_mtime_ns
    (nginx,) = (psutil.Process(find_pid(find_folder(site))),)
    workers = {child.pid for child in nginx.children()}
    time.sleep(2)  # some ten looks
    assert (configuration.read_bytes(), configuration.stat().st_mtime_ns) == before
    assert {child.pid for child in nginx.children()} == workers


def kill_supervisor(site: Served) -> None:
    before = list_parts(site)[1].pid
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: list_parts(site)[1].pid != before)


def restart(site: Served) -> None:
    before = list_pids(site)
    assert restart_server(find_record(site.name), timeout=BOOT_SECONDS) > 0
    assert list_pids(site)[0] == before[0]
    assert not set(list_pids(site)[1:]) & set(before[1:])


@pytest.mark.parametrize("fault", [kill_supervisor, pytest.param(restart, marks=pytest.mark.slow)])
def test_no_request_is_lost_while_one_replica_is_away(
    site: Served, load: Load, fault: Callable[[Served], None]
) -> None:
    traffic = load(site)
    fault(site)
    wait_until(lambda: is_all_ready(site))
    assert find_unanswered(traffic.finish()) == {}


@pytest.mark.slow
def test_no_request_is_lost_where_one_server_is_killed(
    site: Served, load: Load, record: Keep
) -> None:
    traffic = load(site)
    os.kill(find_pid(list_parts(site)[0].run_folder), signal.SIGKILL)
    wait_until(lambda: not is_all_ready(site))
    wait_until(lambda: is_all_ready(site))
    reports = traffic.finish()
    record("one of two servers killed with -9, behind the gateway", reports)
    assert find_unanswered(reports) == {}


def test_what_a_killed_worker_was_answering_is_answered_by_another(
    site: Served, load: Load, record: Keep
) -> None:
    traffic = load(site)
    java = psutil.Process(find_pid(list_parts(site)[0].run_folder))
    java.children()[0].kill()
    wait_until(lambda: not is_all_ready(site))
    wait_until(lambda: is_all_ready(site))
    reports = traffic.finish()
    record("a worker killed with -9, behind the gateway", reports)
    assert find_unanswered(reports) == {}


def test_metrics_are_those_of_all_replicas_told_apart(site: Served) -> None:
    ask_supervisor(find_record(site.name), "/traffic", asdict(SPLIT), timeout=30)
    text = fetch_metrics(find_record(site.name).health_url)
    assert text is not None
    lines = text.splitlines()
    for replica in ("1", "2"):
        label = f'replica="{replica}"'
        assert f'marwright_workers_ready{{model="cnn",version="1.0",{label}}} 1' in lines
        assert f"marwright_replica_ready{{{label}}} 1" in lines
    assert "marwright_gateway_up 1" in lines
    share = f'model="{SPLIT.model}",version="{SPLIT.candidate}",arm="candidate"'
    assert f"marwright_split_share_ratio{{{share}}} {SPLIT.share / 100:g}" in lines
    assert len([line for line in lines if line.startswith("# TYPE marwright_server_up ")]) == 1
    if promtool := shutil.which("promtool"):
        command = [promtool, "check", "metrics"]
        subprocess.run(command, input=text, text=True, check=True, capture_output=True)


def test_a_reload_of_nginx_costs_no_request(site: Served, load: Load, record: Keep) -> None:
    master = psutil.Process(find_pid(find_folder(site)))
    traffic = load(site)
    seen = {child.pid for child in master.children()}
    for number in range(10):
        split = replace(SPLIT, share=10.0 * number)
        ask_supervisor(find_record(site.name), "/traffic", asdict(split), timeout=30)
        found = {child.pid for child in master.children()}
        assert found - seen
        seen |= found
    reports = traffic.finish()
    record("nginx reloaded ten times", reports)
    assert find_unanswered(reports) == {}


def test_a_killed_nginx_is_there_again_within_two_seconds(site: Served, load: Load) -> None:
    master = psutil.Process(find_pid(find_folder(site)))
    traffic = load(site)
    for process in (master, *master.children()):
        process.kill()
    wait_until(lambda: find_pid(find_folder(site)) not in {0, master.pid})
    wait_until(lambda: site.status()["live"])
    reports = traffic.finish()
    assert reports["plain"]["longest_silence"] < 2
    assert reports["plain"]["lost"] < 2 * RATE  # those that were sent meanwhile: nobody was there
    assert reports["client"]["lost"] == 0
    assert site.status()["restarts"] == 1


def test_a_killed_site_goes_on_and_is_adopted_with_its_splits(site: Served, load: Load) -> None:
    assert site.process is not None
    ask_supervisor(find_record(site.name), "/traffic", asdict(SPLIT), timeout=30)
    before, pids = site.status(), list_pids(site)
    traffic = load(site)
    site.process.kill()
    site.process.wait()
    time.sleep(1)
    facts = site.start()
    wait_until(lambda: is_all_ready(site))
    reports = traffic.finish()
    assert facts["adopted"]
    assert list_pids(site) == pids
    assert site.status()["health_url"] == before["health_url"]
    assert find_unanswered(reports) == {}
    (kept,) = ask_supervisor(find_record(site.name), "/traffic")["splits"]
    assert kept["share"] == SPLIT.share
    seen = ask_supervisor(find_record(site.name), "/observed", {"model": "cnn"})
    assert seen["stable"]


def find_guard(folder: str | Path) -> psutil.Process:
    """Return the guard of what was started in a folder."""
    guard = psutil.Process(find_pid(folder)).parent()
    assert guard is not None
    assert "guard.py" in " ".join(guard.cmdline())
    return guard


def test_what_lost_its_guards_and_supervisors_too_is_adopted(site: Served, scan: bytes) -> None:
    assert site.process is not None
    javas, parts = list_pids(site)[1:], list_parts(site)
    guards = [find_guard(find_folder(site)), find_guard(Path(parts[0].config).parent)]
    site.process.kill()
    site.process.wait()
    for guard in guards:
        guard.kill()
    os.kill(parts[1].pid, signal.SIGKILL)
    site.start()
    wait_until(lambda: is_all_ready(site))
    assert list_pids(site)[1:] == javas
    with Client(Endpoint.read(find_endpoint(site))) as client:
        assert client.predict("cnn", scan).status == 200


def test_what_no_split_can_be_is_refused_in_words(site: Served) -> None:
    wrong: list[Any] = [{"model": "cnn", "share": 200}, {"share": 1}, [], {"model": "cnn", "a": 1}]
    for asked in wrong:
        with pytest.raises(Exception, match=r"no such split|no model is named"):
            ask_supervisor(find_record(site.name), "/traffic", asked)


def test_stop_ends_what_a_killed_site_left(site: Served, scratch: Path) -> None:
    assert site.process is not None
    site.process.kill()
    site.process.wait()
    stop_server(find_record(site.name), timeout=60)
    assert_nothing_is_left(site, scratch)


def assert_nothing_is_left(site: Served, scratch: Path) -> None:
    assert [path.name for path in scratch.iterdir()] == ["runtime"]
    assert list_records() == {}
    assert list_processes(scratch) == []
    assert list_processes(site.folder) == []


def test_sigterm_ends_an_encrypted_site_in_order(
    tmp_path: Path, store: Path, scratch: Path, scan: bytes
) -> None:
    site = make_site(tmp_path, store, "tls", tls="development")
    try:
        site.start()
        endpoint = Endpoint.read(find_endpoint(site))
        assert endpoint.inference_url.startswith("https://")
        with Client(endpoint) as client:
            assert client.predict("cnn", scan).status == 200
            assert client.models.describe("cnn").ready_workers == 1
        assert site.process is not None
        site.process.terminate()
        assert site.process.wait(60) == 0
        assert_nothing_is_left(site, scratch)
        assert list((scratch / "runtime/marwright").glob("tls*")) == []
    finally:
        site.end()


def test_a_site_that_nobody_adopts_ends_by_itself(
    tmp_path: Path, store: Path, scratch: Path
) -> None:
    site = make_site(tmp_path, store, "alone", supervision={"linger_seconds": 1})
    try:
        site.start()
        assert site.process is not None
        site.process.kill()
        site.process.wait()
        wait_until(lambda: [path.name for path in scratch.iterdir()] == ["runtime"])
        wait_until(lambda: not list_processes(scratch))
        assert_nothing_is_left(site, scratch)
    finally:
        site.end()


def test_a_site_of_broken_replicas_says_what_the_first_one_says(
    tmp_path: Path, run: Run, scratch: Path, store: Path
) -> None:
    site = make_site(tmp_path, store, "broken", replicas=2)
    (tmp_path / "broken_handler.py").write_text(BROKEN, encoding="utf-8")
    handler = str(tmp_path / "broken_handler.py")
    pack_run(run, out=tmp_path / "store/bad.mar", name="bad", handler=handler, preflight=None)
    rewrite(site, models=["bad.mar"])
    with pytest.raises(AssertionError) as raised:
        site.start()
    site.end()
    assert "no replica could be started" in str(raised.value)
    assert "KeyError" in str(raised.value)
    assert_nothing_is_left(site, scratch)


def test_a_site_whose_port_is_taken_starts_nothing(
    tmp_path: Path, store: Path, scratch: Path, taken_port: int
) -> None:
    site = make_site(tmp_path, store, "taken", gateway={"port": taken_port})
    with pytest.raises(AssertionError, match=f"the gateway's port {taken_port} is taken"):
        site.start()
    site.end()
    assert_nothing_is_left(site, scratch)
