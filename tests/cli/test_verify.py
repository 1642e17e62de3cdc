"""`marwright sign` and `marwright verify`, as a user runs them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from marwright.archive.admission import POLICY_NAME
from marwright.archive.keys import make_key_pair
from marwright.archive.member import Member
from marwright.archive.signature import signature_path
from marwright.archive.writer import write_archive
from marwright.cli.main import main

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def marwright(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command line here: a process takes a second."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["marwright", *map(str, arguments)])
        status = 0
        before = signal.getsignal(signal.SIGTERM)
        try:
            main()
        except SystemExit as exc:
            status = exc.code if isinstance(exc.code, int) else 1
        finally:
            signal.signal(signal.SIGTERM, before)
        return subprocess.CompletedProcess(sys.argv, status, *capsys.readouterr())

    return run


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    model = {"modelName": "m", "handler": "h.py", "modelVersion": "1.0"}
    manifest = {"createdOn": "01/01/1980 00:00:00", "runtime": "python", "model": model}
    members = [
        Member("MAR-INF/MANIFEST.json", json.dumps(manifest).encode()),
        Member("h.py", b"class Handler: ...\n"),
    ]
    return write_archive(tmp_path / "m.mar", members).path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make_key_pair(tmp_path / "keys")


def read_rows(answer: subprocess.CompletedProcess[str]) -> dict[str, str]:
    return {row["check"]: row["result"] for row in json.loads(answer.stdout)["checks"]}


def test_a_new_key_signs_and_its_public_half_verifies(
    tmp_path: Path, archive: Path, marwright: Run
) -> None:
    made = marwright("sign", "--new-key", tmp_path / "k")
    assert made.returncode == 0, made.stderr
    signed = marwright("sign", archive, "--key", tmp_path / "k/private.pem", "--json")
    assert json.loads(signed.stdout)["signature"] == str(signature_path(archive))
    assert signed.stderr == ""
    verified = marwright("verify", archive, "--key", tmp_path / "k/public.pem")
    assert verified.returncode == 0, verified.stderr
    lines = [line.split()[:2] for line in verified.stdout.splitlines()[2:]]
    assert lines == [["digests", "ok"], ["signature", "ok"]]


def test_an_unsigned_archive_verifies_by_its_digests_alone(archive: Path, marwright: Run) -> None:
    answer = marwright("verify", archive, "--json")
    assert answer.returncode == 0, answer.stderr
    assert read_rows(answer) == {"digests": "ok", "signature": "-"}


def test_a_key_demands_a_signature(archive: Path, pair: tuple[Path, Path], marwright: Run) -> None:
    answer = marwright("verify", archive, "--key", pair[1], "--json")
    assert answer.returncode == 1
    assert read_rows(answer) == {"digests": "ok", "signature": "FAILED"}
    assert json.loads(answer.stderr)["found"].startswith("I605")


def test_a_signature_nobody_asked_about_is_still_compared_with_the_bytes(
    archive: Path, pair: tuple[Path, Path], marwright: Run
) -> None:
    assert marwright("sign", archive, "--key", pair[0]).returncode == 0
    answer = marwright("verify", archive, "--json")
    assert (answer.returncode, read_rows(answer)["signature"]) == (0, "-")
    archive.write_bytes(archive.read_bytes() + b"\n")
    answer = marwright("verify", archive, "--json")
    assert (answer.returncode, read_rows(answer)["signature"]) == (1, "FAILED")


def test_an_altered_member_is_one_line_and_exit_1(archive: Path, marwright: Run) -> None:
    archive.write_bytes(archive.read_bytes().replace(b"Handler", b"Hendler", 1))
    answer = marwright("verify", archive)
    assert answer.returncode == 1
    assert answer.stdout.splitlines()[2].split()[:2] == ["digests", "FAILED"]
    assert len(answer.stderr.splitlines()) == 1
    assert "I601 h.py" in answer.stderr


def test_an_altered_archive_is_not_signed(
    archive: Path, pair: tuple[Path, Path], marwright: Run
) -> None:
    archive.write_bytes(archive.read_bytes().replace(b"Handler", b"Hendler", 1))
    answer = marwright("sign", archive, "--key", pair[0])
    assert answer.returncode == 1
    assert "I601 h.py" in answer.stderr
    assert not signature_path(archive).exists()


def test_a_key_that_others_may_read_is_warned_of(
    archive: Path, pair: tuple[Path, Path], marwright: Run
) -> None:
    pair[0].chmod(0o640)
    answer = marwright("sign", archive, "--key", pair[0])
    assert answer.returncode == 0
    assert answer.stderr == f"warning: others than you may read {pair[0]}: chmod 600 {pair[0]}\n"


def test_the_policy_beside_an_archive_is_obeyed(
    archive: Path, pair: tuple[Path, Path], marwright: Run
) -> None:
    (archive.parent / POLICY_NAME).write_text("keys: [keys/public.pem]\n", encoding="utf-8")
    answer = marwright("verify", archive, "--json")
    assert (answer.returncode, read_rows(answer)["policy"]) == (1, "FAILED")
    assert marwright("sign", archive, "--key", pair[0]).returncode == 0
    answer = marwright("verify", archive, "--json")
    assert answer.returncode == 0, answer.stderr
    assert read_rows(answer) == {"digests": "ok", "signature": "ok", "policy": "ok"}


def test_a_password_comes_from_the_environment(
    tmp_path: Path, archive: Path, marwright: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARWRIGHT_KEY_PASSWORD", "secret")
    assert marwright("sign", "--new-key", tmp_path / "k").returncode == 0
    assert "ENCRYPTED" in (tmp_path / "k/private.pem").read_text("ascii")
    answer = marwright("sign", archive, "--key", tmp_path / "k/private.pem")
    assert answer.returncode == 0, answer.stderr
    monkeypatch.delenv("MARWRIGHT_KEY_PASSWORD")
    answer = marwright("sign", archive, "--key", tmp_path / "k/private.pem")
    assert answer.returncode == 2
    assert "MARWRIGHT_KEY_PASSWORD" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sign"], "needs an archive, or --new-key"),
        (["sign", "m.mar"], "needs --key or --sigstore: found neither"),
        (["sign", "m.mar", "--key", "k", "--sigstore"], "found both"),
        (["sign", "m.mar", "--key", "k", "--chain", "c"], "--chain goes with --certificate"),
        (["sign", "m.mar", "--sigstore", "--certificate", "c"], "goes with --key"),
        (["sign", "m.mar", "--new-key", "k"], "--new-key goes alone"),
        (["verify", "m.mar", "--identity", "me"], "go together"),
        (["verify", "m.mar", "--identity", "", "--identity-provider", "p"], "neither is empty"),
        (["verify", "m.mar", "--key", "keys/private.pem"], "found a private key"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    archive: Path,
    pair: tuple[Path, Path],
    marwright: Run,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signature_path(archive).write_bytes(
        b"" if "--key" not in arguments else _sign(archive, pair[0])
    )
    monkeypatch.chdir(archive.parent)
    answer = marwright(*arguments)
    assert answer.returncode == 2, answer.stderr
    assert message in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


def _sign(archive: Path, key: Path) -> bytes:
    from marwright.archive.signing import sign_with_key

    return sign_with_key(archive, key=key).path.read_bytes()


@pytest.mark.parametrize("option", ["--key", "--certificate-chain", "--policy", "--signature"])
def test_a_file_that_is_missing_is_one_line_and_exit_1(
    archive: Path, pair: tuple[Path, Path], marwright: Run, option: str
) -> None:
    _sign(archive, pair[0])
    answer = marwright("verify", archive, option, "absent")
    assert answer.returncode == 1, answer.stdout
    assert len(answer.stderr.splitlines()) == 1


def test_a_command_starts_without_model_signing(archive: Path) -> None:
    program = (
        "import sys; from marwright.cli.main import app\n"
        f"try: app(['verify', {str(archive)!r}])\n"
        "except SystemExit as exc: assert exc.code == 0\n"
        "assert not {'model_signing', 'cryptography', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
