"""A fleet: three sites in network namespaces of their own, released to together."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml
from tests.conftest import end_serving, wait_until
from tests.loads import Load, Reports, find_unanswered

from marwright.server.certificate import make_certificate

pytestmark = pytest.mark.server

Pack = Callable[..., Path]
Fleet = Callable[..., Path]
Begin = Callable[[Any], Load]
Record = Callable[[str, Reports], None]

BRIDGE = "mwfleet"
NETWORK = "10.231.77"
NAMES = ("one", "two", "three")
LEASE = 8
PATIENCE = 120.0
OLD = {"1.0": True}
NEW = {"1.0": False, "2.0": True}
BACK = {"1.0": True, "2.0": False}
GATES = {
    "warm_up": 2,
    "drain_seconds": 2,
    "shadow": {"share": 50, "requests": 10},
    "canary": {"steps": [50], "requests": 20, "slower": 5},
}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Site:
    """A gateway and a server, in a network of its own that can be cut off."""

    def __init__(self, folder: Path, number: int, token: str) -> None:
        self.folder = folder
        self.name = NAMES[number]
        self.address = f"{NETWORK}.{11 + number}"
        self.namespace = f"{BRIDGE}-{self.name}"
        self.link = f"{BRIDGE}{number}"
        self.deploy = folder / "deploy.yaml"
        self.env = {**os.environ, "XDG_RUNTIME_DIR": str(folder / "runtime")}
        (folder / "runtime").mkdir(mode=0o700, parents=True)
        hosts = ("127.0.0.1", "localhost", self.address)
        self.certificate = make_certificate(folder / "tls", hosts)
        (folder / "control").write_text(token)
        self.text = yaml.safe_dump(
            {
                "name": self.name,
                "store": "store",
                "gateway": {"host": self.address, "port": 8443, "control": "control"},
                "tls": {"certificate": "tls/certificate.pem", "key": "tls/key.pem"},
                "access": {"tokens": False},
                "limits": {"queue": 1000},
                "models": [{"archive": "echo.mar", "workers": 1}],
                "releases": GATES,
            }
        )
        self.deploy.write_text(self.text)

    @property
    def endpoint_file(self) -> Path:
        return self.folder / f"runtime/marwright/{self.name}.json"

    @property
    def host(self) -> str:
        """What it is called in messages."""
        return f"{self.address}:8443"

    @property
    def entry(self) -> dict[str, str]:
        """What a fleet's deploy.yaml says of it."""
        return {
            "url": f"https://{self.address}:8443",
            "token": str(self.folder / "control"),
            "authority": str(self.certificate.certificate),
        }

    def join(self) -> None:
        ip("netns", "add", self.namespace)
        ip("link", "add", self.link, "type", "veth", "peer", "eth0", "netns", self.namespace)
        ip("link", "set", self.link, "master", BRIDGE, "up")
        ip("-n", self.namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.namespace, "link", "set", "eth0", "up")
        ip("-n", self.namespace, "link", "set", "lo", "up")

    def cut(self, *, off: bool) -> None:
        """Cut its network, or mend it; inside all goes on."""
        ip("link", "set", self.link, "down" if off else "up")

    def start(self) -> None:
        command = [sys.executable, "-m", "marwright", "serve", "--json", "--deploy", self.deploy]
        with (self.folder / "serve.err").open("ab") as errors:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *map(str, command)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=self.env,
            )
        assert self.process.stdout is not None
        assert self.process.stdout.readline(), (self.folder / "serve.err").read_text("utf-8")
        wait_until(lambda: self.run("status", self.name, "--ready").returncode == 0)

    def stop(self) -> None:
        end_serving(self.process)

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "marwright", *map(str, words)]
        return subprocess.run(
            ["ip", "netns", "exec", self.namespace, *map(str, command)],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def list_versions(self) -> dict[str, bool]:
        """Return its versions, and which one is the default."""
        asked = ("models", "show", "echo", "--server", self.name, "--json")
        shown = json.loads(self.run(*asked).stdout)
        return {item["version"]: item["default"] for item in shown}

    def ask(self) -> int:
        answer = requests.post(
            f"https://{self.address}:8443/predictions/echo",
            data=b"{}",
            verify=str(self.certificate.certificate),
            timeout=10,
        )
        return answer.status_code

    def reset(self) -> None:
        self.cut(off=False)
        self.run("rollback", "echo", "--to", self.name)
        self.deploy.write_text(self.text)
        applied = self.run("apply", self.deploy)
        assert applied.returncode == 0, applied.stderr
        for path in (self.folder / "store").glob("echo-*.mar"):
            path.unlink()
        self.deploy.with_name("releases.jsonl").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def sites(
    nginx: Path, pack: Pack, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Site]]:
    if shutil.which("ip") is None or os.geteuid():
        pytest.skip("network namespaces take iproute2 and root")
    with contextlib.ExitStack() as stack:
        try:
            ip("link", "add", BRIDGE, "type", "bridge")
        except subprocess.CalledProcessError as exc:
            pytest.skip(f"no network can be made here: {exc.stderr.decode().strip()}")
        stack.callback(ip, "link", "del", BRIDGE)
        ip("address", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        made = []
        for number, name in enumerate(NAMES):
            folder = tmp_path_factory.mktemp(name)
            site = Site(folder, number, secrets.token_hex(32))
            pack(folder / "store/echo.mar", "1.0", seconds=0.002)
            site.join()
            stack.callback(ip, "netns", "del", site.namespace)
            stack.callback(site.stop)
            made.append(site)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(Site.start, made))
        yield made


@pytest.fixture
def fleet(sites: list[Site], tmp_path: Path) -> Iterator[Fleet]:
    """Return a function that writes the fleet's deploy.yaml; the sites begin anew after a test."""

    def write(order: str = "one by one", **releases: Any) -> Path:
        content = {
            "servers": [site.entry for site in sites],
            "releases": {"order": order, "lease_seconds": LEASE, **releases},
        }
        path = tmp_path / "fleet.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    yield write
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(Site.reset, sites))


@contextlib.contextmanager
def begin(*words: str | Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Yield a command that runs, and what it has said so far."""
    said: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-m", "marwright", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        reader = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
        reader.start()
        try:
            yield process, said
        finally:
            process.kill()
            process.wait()
            reader.join()


def wait_for(said: list[str], text: str) -> None:
    wait_until(lambda: any(text in line for line in said))


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "marwright", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def list_all(sites: list[Site]) -> list[dict[str, bool]]:
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(Site.list_versions, sites))


def test_a_server_that_is_cut_off_returns_and_so_do_the_others(
    sites: list[Site], fleet: Fleet, load: Begin, record: Record, pack: Pack, tmp_path: Path
) -> None:
    deploy = fleet("one by one")
    traffic = load(sites[0])
    archive = pack(tmp_path / "echo-2.0.mar", "2.0", seconds=0.002)
    with begin("release", archive, "--to", deploy) as (process, said):
        wait_for(said, f"{sites[1].host}: warm-up")
        assert sites[0].list_versions() == NEW
        sites[1].cut(off=True)
        assert process.wait(PATIENCE) == 1
    assert f"{sites[1].host} cannot be reached" in said[-1]
    assert f"it goes back by itself within {LEASE} s; the others are" in said[-1]
    assert sites[0].list_versions() == OLD
    assert "2.0" not in sites[2].list_versions()
    wait_until(lambda: sites[1].list_versions() == OLD)  # it is cut off still
    sites[1].cut(off=False)
    assert sites[1].ask() == 200
    reports = traffic.finish()
    record("the network of one of three servers cut", reports)
    assert find_unanswered(reports) == {}


@pytest.mark.parametrize(
    "order", ["all at once", pytest.param("one by one", marks=pytest.mark.slow)]
)
def test_all_servers_move_and_return_together(
    sites: list[Site], fleet: Fleet, pack: Pack, tmp_path: Path, order: str
) -> None:
    deploy = fleet(order)
    made = run("release", pack(tmp_path / "echo-2.0.mar", "2.0", seconds=0.002), "--to", deploy)
    assert made.returncode == 0, made.stderr
    assert made.stdout == "echo 2.0 is released\n"
    assert list_all(sites) == [NEW] * 3
    back = run("rollback", "--to", deploy)
    assert back.returncode == 0, back.stderr
    assert list_all(sites) == [BACK] * 3


@pytest.mark.slow
def test_one_that_is_cut_off_while_all_wait_returns_too(
    sites: list[Site], fleet: Fleet, pack: Pack, tmp_path: Path
) -> None:
    """Two have moved, and the third is lost at the last moment."""
    archive = pack(tmp_path / "echo-2.0.mar", "2.0", seconds=0.002)
    with begin("release", archive, "--to", fleet("all at once")) as (process, said):
        wait_for(said, f"{sites[2].host}: wait to move: begun")
        sites[2].cut(off=True)
        assert process.wait(PATIENCE) == 1
    assert list_all(sites[:2]) == [OLD] * 2
    wait_until(lambda: sites[2].list_versions() == OLD)
    sites[2].cut(off=False)
    assert sites[2].ask() == 200


@pytest.mark.slow
@pytest.mark.parametrize("order", ["one by one", "all at once"])
def test_a_failed_gate_returns_those_that_have_moved(
    sites: list[Site], fleet: Fleet, pack: Pack, tmp_path: Path, order: str
) -> None:
    """The last server alone asks for more than the version can do."""
    sites[2].deploy.write_text(sites[2].text.replace("slower: 5", "slower: 0.01"))
    archive = pack(tmp_path / "echo-2.0.mar", "2.0", seconds=0.002)
    made = run("release", archive, "--to", fleet(order))
    assert made.returncode == 1
    assert f"{sites[2].host} has stopped the release" in made.stderr
    assert "times the stable version's" in made.stderr
    assert list_all(sites) == [OLD] * 3
    assert (f"{sites[0].host} moved" in made.stderr) == (order == "one by one")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_who_leads_may_be_interrupted_or_die(
    sites: list[Site], fleet: Fleet, pack: Pack, tmp_path: Path, number: signal.Signals
) -> None:
    deploy = fleet("one by one")
    archive = pack(tmp_path / "echo-2.0.mar", "2.0", seconds=0.002)
    with begin("release", archive, "--to", deploy) as (process, said):
        wait_for(said, f"{sites[1].host}: shadow")
        process.send_signal(number)
        process.wait(PATIENCE)
    if number == signal.SIGKILL:  # then each goes back once its lease ends
        wait_until(lambda: list_all(sites) == [OLD] * 3)
        shown = run("releases", "--to", deploy)
        assert "open: " in shown.stdout
        assert run("rollback", "--to", deploy).returncode == 0
    assert list_all(sites) == [OLD] * 3
    assert "returned" in run("releases", "--to", deploy).stdout


@pytest.mark.slow
def test_a_server_whose_release_is_killed_is_returned_by_who_leads(
    sites: list[Site], fleet: Fleet, pack: Pack, tmp_path: Path
) -> None:
    archive = pack(tmp_path / "echo-2.0.mar", "2.0", seconds=0.002)
    with begin("release", archive, "--to", fleet("one by one")) as (process, said):
        wait_for(said, f"{sites[1].host}: wait to keep: begun")
        children = psutil.Process(sites[1].process.pid).children()
        (made,) = (child for child in children if "release" in child.cmdline())
        made.kill()
        assert process.wait(PATIENCE) == 1
    assert list_all(sites) == [OLD] * 3


def test_all_that_speaks_against_it_is_said_of_all_servers(
    sites: list[Site], fleet: Fleet, pack: Pack, tmp_path: Path
) -> None:
    deploy = fleet()
    wanted = yaml.safe_load(deploy.read_text())
    (tmp_path / "other").write_text("x" * 64)
    wanted["servers"][0]["token"] = str(tmp_path / "other")
    wanted["servers"][1]["url"] = wanted["servers"][1]["url"].replace("8443", "8444")
    deploy.write_text(yaml.safe_dump(wanted))
    archive = pack(tmp_path / "echo-2.0.mar", "2.0", recorded=None)
    made = run("release", archive, "--to", deploy)
    assert made.returncode == 1
    assert "nothing was moved" in made.stderr
    for text in (
        f"{sites[0].host} does not take the token of {tmp_path / 'other'}",
        f"{sites[1].address}:8444 cannot be reached",
        f"{sites[2].host}: sample 0.json has no recorded answer",
    ):
        assert text in made.stderr
    assert list_all(sites) == [OLD] * 3


def test_a_fleet_is_released_to_and_not_served(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t" * 40)
    deploy = tmp_path / "fleet.yaml"
    deploy.write_text("servers: [{url: 'https://10.0.0.1', token: token}]\n")
    for words, status in (((), 2), (("--check",), 1)):
        served = run("serve", "--deploy", deploy, *words)
        assert served.returncode == status
        assert "marwright release ARCHIVE --to" in served.stderr
