from __future__ import annotations

import builtins
import http.client
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from marwright.client import Client, GrpcClient
from marwright.client.tokens import TokenFile
from marwright.errors import ClientError, StorageError, UsageError
from marwright.server import Ports, TorchServe
from marwright.server.certificate import (
    Certificate,
    check_certificate,
    make_certificate,
    warn_of_expiry,
)
from marwright.server.deployment import Deployment

NOW = datetime.now(timezone.utc)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """A certificate that no test changes."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def made(shared: Certificate, tmp_path: Path) -> Certificate:
    """A copy that a test may spoil."""
    copy = Certificate(tmp_path / "certificate.pem", tmp_path / "key.pem")
    shutil.copy2(shared.certificate, copy.certificate)
    shutil.copy2(shared.key, copy.key)
    return copy


def check(made: Certificate, **options: Any) -> list[str]:
    return check_certificate(made.certificate, made.key, **options)


def test_a_made_certificate_has_no_problem(shared: Certificate) -> None:
    assert check(shared) == []
    assert shared.key.stat().st_mode & 0o777 == 0o600
    assert warn_of_expiry(shared.certificate) == ""


def test_it_is_good_for_thirty_days(shared: Certificate) -> None:
    assert check(shared, now=NOW + timedelta(days=29)) == []
    (problem,) = check(shared, now=NOW + timedelta(days=31))
    assert f"expired on {NOW + timedelta(days=30):%Y-%m-}" in problem


def test_its_end_is_told_two_weeks_before(shared: Certificate) -> None:
    assert warn_of_expiry(shared.certificate, now=NOW + timedelta(days=15)) == ""
    text = warn_of_expiry(shared.certificate, now=NOW + timedelta(days=20))
    assert "expires on" in text
    assert text.endswith("in 10 days") or text.endswith("in 9 days")
    assert warn_of_expiry(shared.certificate, now=NOW + timedelta(days=40)) == ""  # a problem


def test_it_is_not_valid_before_it_was_made(shared: Certificate) -> None:
    (problem,) = check(shared, now=NOW - timedelta(days=1))
    assert "is not valid before" in problem


def test_a_host_that_it_does_not_name_is_a_problem(tmp_path: Path) -> None:
    made = make_certificate(tmp_path, ["models.example", "*.inner.example", "10.0.0.7"])
    good = ("models.example", "a.inner.example", "MODELS.example", "10.0.0.7")
    assert check(made, hosts=good) == []
    problems = check(made, hosts=("a.b.inner.example", "10.0.0.8", "inner.example"))
    assert len(problems) == 3
    assert "is not for a.b.inner.example; it is for 10.0.0.7, models.example" in problems[0]


def test_a_certificate_without_names_is_a_problem(made: Certificate) -> None:
    write_certificate(made, lambda builder: builder)
    (problem,) = check(made)
    assert "names no hosts" in problem


def test_another_key_is_a_problem(made: Certificate, tmp_path: Path) -> None:
    other = make_certificate(tmp_path / "other")
    (problem,) = check(Certificate(made.certificate, other.key))
    assert "is not the key of" in problem


def test_a_key_that_others_may_read_is_a_problem(made: Certificate) -> None:
    made.key.chmod(0o640)
    (problem,) = check(made)
    assert "mode 0640" in problem


def test_an_encrypted_key_is_a_problem(made: Certificate) -> None:
    key = serialization.load_pem_private_key(made.key.read_bytes(), password=None)
    made.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    (problem,) = check(made)
    assert "is encrypted" in problem


def test_an_elliptic_key_is_a_problem_since_torchserve_takes_rsa_alone(made: Certificate) -> None:
    made.key.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (problem,) = check(made)
    assert "is no RSA key" in problem


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"none")])
@pytest.mark.parametrize("name", ["certificate", "key"])
def test_a_file_that_is_none_is_a_problem(
    made: Certificate, spoil: Callable[[Path], object], name: str
) -> None:
    path: Path = getattr(made, name)
    spoil(path)
    (problem,) = check(made)
    assert problem.startswith(f"{path} cannot be read: ")
    assert "\n" not in problem


def test_a_second_one_replaces_the_first(made: Certificate) -> None:
    made.key.chmod(0o644)
    first = made.certificate.read_bytes()
    again = make_certificate(made.key.parent)
    assert again == made
    assert made.certificate.read_bytes() != first
    assert check(made) == []


def test_what_cannot_be_made_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="needs a host"):
        make_certificate(tmp_path, [])
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        make_certificate(tmp_path / "file")
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "cryptography":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match=r"pip install 'marwright\[tls\]'"):
        make_certificate(tmp_path)


def write_certificate(
    made: Certificate, extend: Callable[[x509.CertificateBuilder], x509.CertificateBuilder]
) -> None:
    key: Any = serialization.load_pem_private_key(made.key.read_bytes(), password=None)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=1))
    )
    signed = extend(builder).sign(key, hashes.SHA256())
    made.certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))


@pytest.fixture(scope="module")
def encrypted(shared: Certificate) -> Iterator[Mapping[str, str]]:
    """The addresses of a real TorchServe that has the certificate, and serves no model."""
    with tempfile.TemporaryDirectory(prefix="tls-", dir="/tmp") as name:
        folder = Path(name)
        addresses = {
            key: value.replace("http://", "https://")
            for key, value in Ports.find_free().to_properties().items()
        }
        properties = {
            **addresses,
            "certificate_file": str(shared.certificate),
            "private_key_file": str(shared.key),
            "enable_grpc_ssl": "true",
            "disable_token_authorization": "true",
            "disable_system_metrics": "true",
        }
        lines = [f"{key}={value}" for key, value in properties.items()]
        (folder / "config.properties").write_text("\n".join(lines))
        (folder / "store").mkdir()
        command = [str(Path(sys.executable).with_name("torchserve")), "--foreground", "--ncs"]
        with (folder / "output.log").open("wb") as output:
            process = subprocess.Popen(
                [*command, "--ts-config", "config.properties", "--model-store", "store"],
                cwd=folder,
                env={**os.environ, "TMPDIR": name, "TEMP": name},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + 60
            log = folder / "output.log"
            while b"Model server started" not in log.read_bytes():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield addresses
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


@pytest.mark.server
@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("inference_address", "/ping"),
        ("management_address", "/models"),
        ("metrics_address", "/metrics"),
    ],
)
def test_torchserve_speaks_https_with_it(
    encrypted: Mapping[str, str], shared: Certificate, key: str, path: str
) -> None:
    trusting = ssl.create_default_context(cafile=str(shared.certificate))
    trusting.verify_flags |= ssl.VERIFY_X509_STRICT  # as Python 3.13 has it
    for url in (encrypted[key], encrypted[key].replace("127.0.0.1", "localhost")):
        with urllib.request.urlopen(url + path, context=trusting, timeout=30) as answer:
            assert answer.status == 200
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(encrypted[key] + path, timeout=30)


@pytest.mark.server
@pytest.mark.parametrize(
    ("api", "method"),
    [
        ("inference", "org.pytorch.serve.grpc.inference.InferenceAPIsService/Ping"),
        ("management", "org.pytorch.serve.grpc.management.ManagementAPIsService/ListModels"),
    ],
)
def test_torchserve_speaks_grpc_with_it(
    encrypted: Mapping[str, str], shared: Certificate, api: str, method: str
) -> None:
    target = f"127.0.0.1:{encrypted[f'grpc_{api}_port']}"

    def call(credentials: grpc.ChannelCredentials) -> bytes:
        with grpc.secure_channel(target, credentials) as channel:
            send = channel.unary_unary(f"/{method}", bytes, bytes)
            return bytes(send(b"", timeout=30))

    assert call(grpc.ssl_channel_credentials(shared.certificate.read_bytes()))
    with pytest.raises(grpc.RpcError):
        call(grpc.ssl_channel_credentials())


@pytest.fixture(scope="module")
def developed(store: Path) -> Iterator[TorchServe]:
    """A server whose deployment has one word for TLS."""
    values = {"store": store, "models": ["cnn.mar"], "ports": "free", "tls": "development"}
    with TorchServe.deploy(Deployment.model_validate(values)) as server:
        yield server


def list_questions(server: TorchServe) -> Iterator[urllib.request.Request]:
    """Yield a question with its token for each of the three addresses."""
    endpoint = server.endpoint
    assert endpoint.key_file is not None
    tokens = TokenFile(endpoint.key_file)
    for url, purpose in (
        (f"{endpoint.inference_url}/ping", "inference"),
        (f"{endpoint.management_url}/models", "management"),
        (f"{endpoint.metrics_url}/metrics", "management"),
    ):
        token = tokens.read(cast(Any, purpose))
        yield urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})


@pytest.mark.server
def test_one_word_encrypts_all_three_addresses(developed: TorchServe, scan: bytes) -> None:
    assert developed.endpoint.certificate == developed.run_folder / "certificate.pem"
    trusting = ssl.create_default_context(cafile=str(developed.endpoint.certificate))
    questions = list(list_questions(developed))
    assert all(question.full_url.startswith("https://127.0.0.1:") for question in questions)
    for question in questions:
        with urllib.request.urlopen(question, context=trusting, timeout=30) as answer:
            assert answer.status == 200
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(question, timeout=30)
        plain = question.full_url.replace("https://", "http://")
        with pytest.raises((OSError, http.client.HTTPException)):
            urllib.request.urlopen(plain, timeout=30)
    assert developed.client.predict("cnn", scan).status == 200
    assert (developed.run_folder / "key.pem").stat().st_mode & 0o777 == 0o600


@pytest.mark.server
def test_one_word_encrypts_grpc_too(developed: TorchServe, scan: bytes) -> None:
    with GrpcClient(developed.endpoint) as client:
        assert client.predict("cnn", scan).json() == developed.client.predict("cnn", scan).json()
        assert [model.name for model in client.models.list()] == ["cnn"]


@pytest.mark.server
@pytest.mark.parametrize("kind", [Client, GrpcClient])
def test_clients_that_do_not_trust_the_certificate_send_nothing(
    developed: TorchServe, scan: bytes, tmp_path: Path, kind: Any
) -> None:
    other = make_certificate(tmp_path).certificate
    for certificate in (None, other):
        stranger = replace(developed.endpoint, certificate=certificate)
        with kind(stranger, timeout=10) as client, pytest.raises(ClientError):
            client.predict("cnn", scan)
