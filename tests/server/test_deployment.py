from __future__ import annotations

import dataclasses
import json
import os
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from pydantic import ValidationError

from marwright.archive.admission import POLICY_NAME
from marwright.errors import ConfigurationError, StorageError
from marwright.server.deployment import Deployment
from marwright.server.ports import Ports
from marwright.server.sections import parse_size


def write(folder: Path, text: str) -> Path:
    path = folder / "deploy.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def write_expired(folder: Path) -> None:
    """Write a certificate for loopback that was good until yesterday, and its key."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.x509.oid import NameOID

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=9))
        .not_valid_after(now - timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    (folder / "old.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "old.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (folder / "old.key").chmod(0o600)


def test_all_that_is_wrong_is_said_at_once_and_nothing_is_changed(
    tmp_path: Path, store: Path, taken_port: int
) -> None:
    own = tmp_path / "store"
    own.mkdir()
    for path in store.glob("*.mar"):
        (own / path.name).hardlink_to(path)
    write_expired(tmp_path)
    (tmp_path / "policy.yaml").write_text("require: nothing\nmodels: [other]\n")
    path = write(
        tmp_path,
        f"""\
store: store
modles: []
policy: policy.yaml
models:
  - 7
  - {{archive: cnn.mar, workers: -1, default: true}}
  - {{archive: cnn-2.0.mar, default: true}}
  - gone.mar
ports: {{inference: 70000, management: {taken_port}}}
limits: {{queue: 0, request_bytes: 1 furlong}}
tls: {{certificate: old.pem, key: old.key}}
properties: {{io_ration: 3, job_queue_size: 4}}
""",
    )
    before = sorted(os.walk(tmp_path))
    with pytest.raises(ConfigurationError) as caught:
        Deployment.read(path, starting=True)
    found = caught.value.detail
    for line in (
        ":2: modles: no such key; did you mean models?",
        ":5: models.0: ",
        ":6: models.1.workers: ",
        ":6: models.1.archive: ",  # the policy forbids it
        ":7: models.2.archive: ",
        ":7: models.2.default: cnn has two defaults, 1.0 and 2.0",
        ":8: models.3.archive: there is no archive ",
        ":9: ports.inference: ",
        f":9: ports.management: port {taken_port} is taken",
        ":10: limits.queue: ",
        ":10: limits.request_bytes: is no size",
        ":11: tls: ",
        ":12: properties.io_ration: TorchServe reads no such key; did you mean io_ratio?",
        ":12: properties.job_queue_size: is said by limits.queue",
    ):
        assert line in found
    assert "expired" in found
    assert "allowed other" in found
    assert sorted(os.walk(tmp_path)) == before


def test_each_thing_is_said_once(tmp_path: Path) -> None:
    ports = {**dataclasses.asdict(Ports.find_free()), "inference": 0}
    path = write(tmp_path, f"store: 5\nports: {json.dumps(ports)}\n")
    with pytest.raises(ConfigurationError) as caught:
        Deployment.read(path, starting=True)
    assert [line.split(": ")[1] for line in caught.value.detail.splitlines()] == [
        "store",
        "ports.inference",
    ]


def test_a_word_that_stands_for_a_group_may_be_misspelt(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"ports: .*'free'"):
        Deployment.read(write(tmp_path, "ports: freee\nstore: .\n"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[]", "a mapping"),
        ("store: [", "YAML"),
        ("store: .\nstore: .\n", "stands twice"),
        ("store: .\nports: {inference: 9, metrics: 9}\n", "both 9"),
        ("store: .\njvm: {heap: 1 MiB}\n", "too little"),
        ("store: .\njvm: {heap: 900000 GiB}\n", "more than this machine has"),
        ("store: gone\n", "there is no folder"),
        ("store: .\npolicy: gone.yaml\n", "gone.yaml"),
    ],
)
def test_a_broken_file_says_what_is_wrong(tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Deployment.read(write(tmp_path, text))
    assert found in f"{caught.value}\n{caught.value.detail}"


def test_a_missing_file_is_ours_to_say(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        Deployment.read(tmp_path / "deploy.yaml")


def test_paths_start_in_the_file_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path, "store: inner\nlogging: {folder: logs}\n")
    monkeypatch.chdir(tmp_path)
    deployment = Deployment.read(Path("deploy.yaml"))
    assert deployment.store == tmp_path / "inner"
    assert deployment.logging.folder == tmp_path / "logs"


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    first = Deployment.model_validate(
        {
            "store": str(tmp_path),
            "models": [],
            "limits": {"request_bytes": "2 MiB"},
            "properties": {"io_ratio": 60, "async_logging": True},
        }
    )
    assert first.properties == {"io_ratio": "60", "async_logging": "true"}
    first.write(tmp_path / "deploy.yaml")
    assert Deployment.read(tmp_path / "deploy.yaml") == first


@pytest.mark.parametrize(
    ("text", "size"), [("7", 7), ("2 MiB", 2 << 20), ("1.5kb", 1500), ("1 GiB", 1 << 30)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_size_in_no_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size("2 PB")
    with pytest.raises(ValidationError):
        Deployment.model_validate({"limits": {"request_bytes": "1 KB"}})  # below the least


def test_a_store_s_own_policy_counts(tmp_path: Path, store: Path) -> None:
    (tmp_path / "cnn.mar").hardlink_to(store / "cnn.mar")
    (tmp_path / POLICY_NAME).write_text("require: nothing\nmodels: [other]\n")
    with pytest.raises(ConfigurationError, match="cnn"):
        Deployment.read(write(tmp_path, "store: .\n"))


def test_a_deployment_is_not_changed_in_place() -> None:
    with pytest.raises((ValidationError, dataclasses.FrozenInstanceError)):
        Deployment().store = Path("x")
