"""Signatures: made and verified here, and by model-signing's own command line."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from marwright.archive.keys import make_key_pair
from marwright.archive.signature import (
    Signature,
    Trust,
    signature_path,
    verify_signature,
)
from marwright.archive.signing import sign_with_certificate, sign_with_key, sign_with_sigstore
from marwright.errors import ArchiveError, MarwrightError, UsageError


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "cnn.mar"
    path.write_bytes(b"PK" + bytes(range(256)) * 64)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make_key_pair(tmp_path / "keys")


@pytest.fixture
def issue(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Return a function that writes a key and a certificate, issued by another or by itself."""

    def write(
        name: str, issuer: str = "", *, age: int = 1, days: int = 30, signs: bool = True
    ) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        above = x509.load_pem_x509_certificate(path(issuer).read_bytes()) if issuer else None
        own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        start = datetime.now(timezone.utc) - timedelta(days=age)
        usage = [signs, *[False] * 3, not signs, not issuer, *[False] * 3]
        purpose = ExtendedKeyUsageOID.CODE_SIGNING if signs else ExtendedKeyUsageOID.SERVER_AUTH
        certificate = (
            x509.CertificateBuilder(own if above is None else above.subject, own)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + timedelta(days=days))
            .add_extension(x509.BasicConstraints(not issuer, None), critical=True)
            .add_extension(x509.KeyUsage(*usage), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .sign(keys[issuer] if issuer else key, hashes.SHA256())
        )
        keys[name] = key
        path(name).write_bytes(certificate.public_bytes(Encoding.PEM))
        private = tmp_path / f"{name}.key"
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return private, path(name)

    def path(name: str) -> Path:
        return tmp_path / f"{name}.pem"

    keys: dict[str, ec.EllipticCurvePrivateKey] = {}
    return write


def model_signing(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line that model-signing itself brings."""
    command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the statement inside a signature file, and leave the signature as it was."""
    bundle = json.loads(path.read_bytes())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    edit(statement)
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    path.write_text(json.dumps(bundle), encoding="utf-8")


def test_what_was_signed_with_a_key_verifies(archive: Path, pair: tuple[Path, Path]) -> None:
    signed = sign_with_key(archive, key=pair[0])
    assert signed.path == signature_path(archive) == archive.with_name("cnn.mar.sig")
    verified = verify_signature(archive, Trust(keys=(pair[1],)))
    assert verified == signed
    assert (verified.kind, verified.model) == ("key", "cnn.mar")


def test_model_signing_verifies_what_is_signed_here(archive: Path, pair: tuple[Path, Path]) -> None:
    path = sign_with_key(archive, key=pair[0]).path
    answer = model_signing("verify", "key", archive, "--signature", path, "--public_key", pair[1])
    assert (answer.returncode, answer.stdout) == (0, "Verification succeeded\n")


def test_what_model_signing_signed_verifies_here(archive: Path, pair: tuple[Path, Path]) -> None:
    path = signature_path(archive)
    answer = model_signing("sign", "key", archive, "--signature", path, "--private_key", pair[0])
    assert answer.returncode == 0
    assert verify_signature(archive, Trust(keys=(pair[1],))).kind == "key"


def test_certificates_verify_in_both_directions(
    archive: Path, issue: Callable[..., tuple[Path, Path]]
) -> None:
    _, root = issue("root")
    key, certificate = issue("signer", "root")
    path = sign_with_certificate(archive, key=key, certificate=certificate, chain=[root]).path
    verified = verify_signature(archive, Trust(certificates=(root,)))
    assert verified.signer == "the certificate of CN=signer"
    answer = model_signing(
        "verify", "certificate", archive, "--signature", path, "--certificate_chain", root
    )
    assert answer.returncode == 0, answer.stderr
    path.unlink()
    answer = model_signing(
        *("sign", "certificate", archive, "--signature", path, "--private_key", key),
        *("--signing_certificate", certificate, "--certificate_chain", root),
    )
    assert answer.returncode == 0, answer.stderr
    assert verify_signature(archive, Trust(certificates=(root,))).kind == "certificate"


def test_a_certificate_that_the_root_issued_needs_no_chain(
    archive: Path, issue: Callable[..., tuple[Path, Path]]
) -> None:
    _, root = issue("root")
    key, certificate = issue("signer", "root")
    sign_with_certificate(archive, key=key, certificate=certificate)
    verify_signature(archive, Trust(certificates=(root,)))


def test_a_key_with_a_password_signs_with_and_without_a_certificate(
    tmp_path: Path, archive: Path, issue: Callable[..., tuple[Path, Path]]
) -> None:
    private, public = make_key_pair(tmp_path / "locked", password="secret")
    sign_with_key(archive, key=private, password="secret")
    verify_signature(archive, Trust(keys=(public,)))
    _, root = issue("root")
    key, certificate = issue("signer", "root")
    command = ["openssl", "pkcs8", "-topk8", "-in", str(key), "-out", str(tmp_path / "locked.key")]
    subprocess.run([*command, "-passout", "pass:secret"], check=True, capture_output=True)
    sign_with_certificate(
        archive, key=tmp_path / "locked.key", certificate=certificate, password="secret"
    )
    verify_signature(archive, Trust(certificates=(root,)))


def test_a_signature_holds_under_another_name_and_in_another_folder(
    tmp_path: Path, archive: Path, pair: tuple[Path, Path]
) -> None:
    sign_with_key(archive, key=pair[0])
    moved = tmp_path / "store" / "other.mar"
    moved.parent.mkdir()
    shutil.copy(archive, moved)
    shutil.copy(signature_path(archive), signature_path(moved))
    verify_signature(moved, Trust(keys=(pair[1],)))


def test_a_folder_is_signed_with_all_its_files(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    folder = tmp_path / "cnn"
    (folder / "MAR-INF").mkdir(parents=True)
    (folder / "MAR-INF/MANIFEST.json").write_text("{}", encoding="utf-8")
    (folder / "handler.py").write_text("code", encoding="utf-8")
    sign_with_key(folder, key=pair[0])
    verify_signature(folder, Trust(keys=(pair[1],)))
    (folder / "handler.py").write_text("mode", encoding="utf-8")
    with pytest.raises(ArchiveError, match=r"does not hold.*handler\.py"):
        verify_signature(folder, Trust(keys=(pair[1],)))


def test_one_of_several_trusted_signers_is_enough(
    tmp_path: Path, archive: Path, pair: tuple[Path, Path]
) -> None:
    _, other = make_key_pair(tmp_path / "other")
    sign_with_key(archive, key=pair[0])
    verify_signature(archive, Trust(keys=(other, pair[1])))


def test_another_key_is_refused(tmp_path: Path, archive: Path, pair: tuple[Path, Path]) -> None:
    _, other = make_key_pair(tmp_path / "other")
    sign_with_key(archive, key=pair[0])
    with pytest.raises(ArchiveError, match="not signed by anybody who is trusted") as caught:
        verify_signature(archive, Trust(keys=(other,)))
    assert str(other) in caught.value.expected
    assert caught.value.found.startswith("one by the key ")


def test_an_altered_byte_is_refused(archive: Path, pair: tuple[Path, Path]) -> None:
    sign_with_key(archive, key=pair[0])
    archive.write_bytes(archive.read_bytes()[:-1] + b"?")
    with pytest.raises(ArchiveError, match=r"is not what was signed: expected sha256:.* of cnn"):
        verify_signature(archive, Trust(keys=(pair[1],)))


def test_another_archives_signature_is_refused(archive: Path, pair: tuple[Path, Path]) -> None:
    other = archive.with_name("other.mar")
    other.write_bytes(b"PK other")
    sign_with_key(other, key=pair[0])
    signature_path(other).rename(signature_path(archive))
    with pytest.raises(ArchiveError, match=r"is not what was signed: .* of other\.mar"):
        verify_signature(archive, Trust(keys=(pair[1],)))


def test_a_removed_signature_is_refused(archive: Path, pair: tuple[Path, Path]) -> None:
    with pytest.raises(ArchiveError, match=r"is not signed: .*; sign it: marwright sign"):
        verify_signature(archive, Trust(keys=(pair[1],)))


def test_a_statement_that_was_changed_is_refused(archive: Path, pair: tuple[Path, Path]) -> None:
    path = sign_with_key(archive, key=pair[0]).path
    change(path, lambda statement: statement["subject"][0].update(name="other.mar"))
    with pytest.raises(ArchiveError, match=r"does not hold: .* found one that was altered"):
        verify_signature(archive, Trust(keys=(pair[1],)))


def test_a_signature_over_nothing_is_refused(
    tmp_path: Path, archive: Path, pair: tuple[Path, Path]
) -> None:
    (tmp_path / "empty").mkdir()
    sign_with_key(tmp_path / "empty", key=pair[0]).path.rename(signature_path(archive))
    with pytest.raises(ArchiveError, match="found one over nothing"):
        verify_signature(archive, Trust(keys=(pair[1],)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no json",
        b"[]",
        b"7",
        b"{}",
        b"[" * 100_000,
        b"\xff\xfe",
        b"-----BEGIN PGP SIGNATURE-----\n",
        b'{"verificationMaterial": {}, "dsseEnvelope": {"payload": "e30="}}',
        b'{"verificationMaterial": {}, "messageSignature": {"signature": ""}}',
        b" " * (5 << 20),
    ],
)
def test_a_file_that_is_no_signature_is_refused(
    archive: Path, pair: tuple[Path, Path], content: bytes
) -> None:
    signature_path(archive).write_bytes(content)
    with pytest.raises(ArchiveError, match=r"is no signature of a model: expected .*, found ."):
        verify_signature(archive, Trust(keys=(pair[1],)))


def test_every_cut_of_a_signature_ends_in_an_error_of_ours(
    archive: Path, pair: tuple[Path, Path]
) -> None:
    path = sign_with_key(archive, key=pair[0]).path
    content = path.read_bytes()
    for end in range(0, len(content) - 1, 97):
        path.write_bytes(content[:end])
        with pytest.raises(MarwrightError):
            verify_signature(archive, Trust(keys=(pair[1],)))


def test_an_expired_certificate_is_refused_when_verifying_and_when_signing(
    archive: Path, issue: Callable[..., tuple[Path, Path]]
) -> None:
    _, root = issue("root", age=40, days=90)
    key, certificate = issue("signer", "root", age=30, days=10)
    answer = model_signing(
        *("sign", "certificate", archive, "--signature", signature_path(archive)),
        *("--private_key", key, "--signing_certificate", certificate, "--certificate_chain", root),
    )
    assert answer.returncode == 0, answer.stderr
    with pytest.raises(ArchiveError, match=r"CN=signer in .* is not valid now"):
        verify_signature(archive, Trust(certificates=(root,)))
    with pytest.raises(ArchiveError, match=r"CN=signer in .* is not valid now"):
        sign_with_certificate(archive, key=key, certificate=certificate)


def test_a_certificate_of_another_root_is_refused(
    archive: Path, issue: Callable[..., tuple[Path, Path]]
) -> None:
    issue("root")
    _, other = issue("other")
    key, certificate = issue("signer", "root")
    sign_with_certificate(archive, key=key, certificate=certificate)
    with pytest.raises(ArchiveError, match=r"does not hold: .*unable to get local issuer"):
        verify_signature(archive, Trust(certificates=(other,)))


def test_a_certificate_that_is_not_for_signing_is_refused(
    archive: Path, issue: Callable[..., tuple[Path, Path]]
) -> None:
    _, root = issue("root")
    key, certificate = issue("web", "root", signs=False)
    sign_with_certificate(archive, key=key, certificate=certificate)
    with pytest.raises(ArchiveError, match="cannot be used for signing"):
        verify_signature(archive, Trust(certificates=(root,)))


def test_a_certificate_and_anothers_key_are_refused(
    archive: Path, issue: Callable[..., tuple[Path, Path]], pair: tuple[Path, Path]
) -> None:
    _, certificate = issue("root")
    with pytest.raises(UsageError, match="is not the certificate of"):
        sign_with_certificate(archive, key=pair[0], certificate=certificate)


def test_trust_in_keys_is_no_trust_in_certificates(
    archive: Path, issue: Callable[..., tuple[Path, Path]], pair: tuple[Path, Path]
) -> None:
    key, certificate = issue("root")
    sign_with_certificate(archive, key=key, certificate=certificate)
    with pytest.raises(ArchiveError, match="not signed by anybody who is trusted"):
        verify_signature(archive, Trust(keys=(pair[1],)))


def test_a_private_key_where_a_public_one_belongs_is_refused(
    archive: Path, pair: tuple[Path, Path]
) -> None:
    sign_with_key(archive, key=pair[0])
    with pytest.raises(UsageError, match="expected a public key, found a private key"):
        verify_signature(archive, Trust(keys=(pair[0],)))


def test_a_failure_leaves_the_old_signature(archive: Path, pair: tuple[Path, Path]) -> None:
    before = sign_with_key(archive, key=pair[0]).path.read_bytes()
    with pytest.raises(UsageError):
        sign_with_key(archive, key=pair[1])
    assert signature_path(archive).read_bytes() == before
    archive.unlink()
    with pytest.raises(MarwrightError):
        sign_with_key(archive, key=pair[0])
    assert signature_path(archive).read_bytes() == before


def test_sigstore_without_a_network_is_one_clear_error(
    archive: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(ArchiveError, match=r"Sigstore cannot be used: .* use a key or a cert"):
        sign_with_sigstore(archive, identity_token="token")
    assert not signature_path(archive).exists()


def test_a_sigstore_bundle_is_told_from_a_certificates(
    archive: Path, issue: Callable[..., tuple[Path, Path]]
) -> None:
    key, certificate = issue("root")
    path = sign_with_certificate(archive, key=key, certificate=certificate).path
    bundle = json.loads(path.read_bytes())
    material = bundle["verificationMaterial"]
    material["certificate"] = material.pop("x509CertificateChain")["certificates"][0]
    path.write_text(json.dumps(bundle), encoding="utf-8")
    assert Signature.read(path).kind == "sigstore"
    with pytest.raises(ArchiveError, match="one by the Sigstore certificate of CN=root"):
        verify_signature(archive, Trust(certificates=(certificate,)))


def test_without_the_extra_the_error_says_what_to_install(
    archive: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_with_key(archive, key=pair[0])
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    monkeypatch.setitem(sys.modules, "model_signing.verifying", None)
    with pytest.raises(UsageError, match=r"pip install 'marwright\[sign\]'"):
        sign_with_key(archive, key=pair[0])
    with pytest.raises(UsageError, match=r"pip install 'marwright\[sign\]'"):
        verify_signature(archive, Trust(keys=(pair[1],)))
