"""Alertmanager's file: who is told and who is not; what a real Alertmanager does with it."""

from __future__ import annotations

import json
import shutil
import stat
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tests.conftest import wait_until
from tests.monitor.receivers import Receiver

from marwright.errors import ConfigurationError, StorageError
from marwright.monitor.alertmanager import (
    CONFIGURATION,
    check_configuration,
    make_alertmanager,
    read_webhook,
    render,
)
from marwright.monitor.program import Program
from marwright.monitor.rules import Times, list_alerts
from marwright.server.deployment import Deployment
from marwright.server.ports import Ports
from marwright.server.sections import MailSettings, MonitoringSettings

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("prometheus-alertmanager", "amtool"))),
    reason="needs Debian's prometheus-alertmanager",
)
SCALE = 60.0
KEY = "a-key"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    one = Receiver()
    yield one
    one.close()


@pytest.fixture
def deployment(tmp_path: Path, receiver: Receiver) -> Deployment:
    (tmp_path / "webhook").write_text(f"{receiver.url}\n")
    settings = MonitoringSettings(
        alertmanager=Ports.find_free().inference, webhook=tmp_path / "webhook"
    )
    return Deployment(monitoring=settings)


@pytest.fixture
def alertmanager(deployment: Deployment, tmp_path: Path) -> Iterator[Program]:
    made = make_alertmanager(deployment, key=KEY, data=tmp_path / "data", scale=SCALE)
    try:
        made.begin()
        made.wait()
        yield made
    finally:
        made.end()


def send(alertmanager: Program, *alerts: dict[str, str]) -> None:
    body = json.dumps([{"labels": labels} for labels in alerts]).encode()
    request = urllib.request.Request(
        f"{alertmanager.url}/api/v2/alerts", body, {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=5).close()


def make_mail(**changes: Any) -> Deployment:
    values = {"to": "we@a.example", "sender": "it@b.example", "server": "mail.b.example:587"}
    return Deployment(monitoring=MonitoringSettings(mail=MailSettings(**{**values, **changes})))


def write(deployment: Deployment, folder: Path) -> dict[str, Any]:
    text = render(deployment)
    (folder / CONFIGURATION).write_text(text)
    check_configuration(folder)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def test_without_anybody_to_tell_amtool_takes_the_file(tmp_path: Path) -> None:
    assert write(Deployment(), tmp_path)["receivers"] == [{"name": "receiver"}]


def test_a_webhook_and_a_mail_are_both_told(deployment: Deployment, tmp_path: Path) -> None:
    both = make_mail().monitoring.model_copy(update={"webhook": deployment.monitoring.webhook})
    (receiver,) = write(Deployment(monitoring=both), tmp_path)["receivers"]
    assert {"webhook_configs", "email_configs"} < set(receiver)


def test_the_mails_password_stays_in_its_file(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("correct horse")
    deployment = make_mail(user="it", password=tmp_path / "password")
    (mail,) = write(deployment, tmp_path)["receivers"][0]["email_configs"]
    assert mail["auth_password_file"] == str(tmp_path / "password")
    assert mail["require_tls"] is True
    assert "correct horse" not in (tmp_path / CONFIGURATION).read_text()


@pytest.mark.parametrize(
    "text", ["", "not a url", "ftp://a/b", "http://", "http://a b/", "http://[::1/x", "http://a\nb"]
)
def test_a_file_without_a_url_is_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    path = tmp_path / "webhook"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        read_webhook(Deployment(monitoring=MonitoringSettings(webhook=path)))
    assert len(text) < 8 or text not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nothing"):
        read_webhook(Deployment(monitoring=MonitoringSettings(webhook=tmp_path / "nothing")))


def test_what_amtool_refuses_is_told_without_the_webhook(tmp_path: Path) -> None:
    (tmp_path / CONFIGURATION).write_text("route: {receiver: http://a/secret}\n")
    with pytest.raises(ConfigurationError) as caught:
        check_configuration(tmp_path, secret="http://a/secret")
    assert caught.value.detail
    assert "secret" not in str(caught.value) + caught.value.detail


def test_only_alerts_that_exist_silence_others(tmp_path: Path) -> None:
    names = {alert.name for alert in list_alerts(Deployment(), Times())}
    for rule in write(Deployment(), tmp_path)["inhibit_rules"]:
        for matcher in rule["source_matchers"] + rule["target_matchers"]:
            assert matcher.split('"')[1] in names


def test_its_folder_holds_the_webhook_for_its_owner_alone(
    alertmanager: Program, receiver: Receiver
) -> None:
    path = alertmanager.folder / CONFIGURATION
    assert receiver.url in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(alertmanager.folder.stat().st_mode) == 0o700


def test_a_page_is_told_and_told_again_when_it_is_over(
    alertmanager: Program, receiver: Receiver
) -> None:
    labels = {"alertname": "MarwrightDown", "server": "a", "severity": "page"}
    send(alertmanager, labels)
    wait_until(lambda: receiver.find("MarwrightDown", 0), timeout=20)


def test_while_a_server_is_down_its_other_alerts_are_not_told(
    alertmanager: Program, receiver: Receiver
) -> None:
    names = ("MarwrightDown", "MarwrightQueueGrowing")
    send(alertmanager, *({"alertname": n, "server": "a", "severity": "page"} for n in names))
    other = {"alertname": "MarwrightQueueGrowing", "server": "b", "severity": "page"}
    send(alertmanager, other)
    wait_until(lambda: len(receiver.alerts) >= 2, timeout=20)
    told = {(one["labels"]["alertname"], one["labels"]["server"]) for _, one in receiver.alerts}
    assert told == {("MarwrightDown", "a"), ("MarwrightQueueGrowing", "b")}


def test_a_web_page_that_does_not_know_the_key_is_told_no_webhook(
    alertmanager: Program, deployment: Deployment
) -> None:
    bare = f"http://127.0.0.1:{deployment.monitoring.alertmanager}"
    for path in ("/api/v2/status", "/api/v2/silences", "/metrics"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(bare + path, timeout=5)
    pid = int((alertmanager.folder / "server_pid").read_text().split()[0])
    process = psutil.Process(pid)
    assert KEY not in " ".join(process.cmdline())
    listening = {item.laddr.ip for item in process.net_connections() if item.laddr}
    assert listening == {"127.0.0.1"}


def test_a_broken_file_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_broken: Callable[[], None]
) -> None:
    make_broken()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ConfigurationError):
        make_alertmanager(Deployment(), key=KEY, data=tmp_path / "data")
    assert not list(tmp_path.glob("marwright-*"))


@pytest.fixture
def make_broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that has the file say what amtool refuses."""

    def change() -> None:
        monkeypatch.setattr("marwright.monitor.alertmanager.RECEIVER", 7)
        monkeypatch.setattr("marwright.monitor.alertmanager.SILENCED", (("a", "b", ["c"]),))

    return change
