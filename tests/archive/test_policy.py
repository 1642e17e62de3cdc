"""Policies: what they admit, what they refuse, and every mistake in one."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from marwright.archive.admission import POLICY_NAME, admit, find_policy
from marwright.archive.keys import make_key_pair
from marwright.archive.member import Member
from marwright.archive.policy import FindingRules, Policy
from marwright.archive.signature import signature_path
from marwright.archive.signing import sign_with_key
from marwright.archive.writer import write_archive
from marwright.errors import ArchiveError, StorageError, UsageError


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write(tmp_path / "store" / "cnn.mar")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make_key_pair(tmp_path / "keys")


def write(path: Path, *, name: str = "cnn", **more: bytes) -> Path:
    """Write an archive that is whole, and has digests."""
    model = {"modelName": name, "handler": "h.py", "modelVersion": "1.0"}
    manifest = {"createdOn": "01/01/1980 00:00:00", "runtime": "python", "model": model}
    manifest["archiverVersion"] = "0.12.0"
    content = {"MAR-INF/MANIFEST.json": json.dumps(manifest).encode(), **more}
    content["h.py"] = b"class H: ...\n"
    path.parent.mkdir(exist_ok=True)
    return write_archive(path, [Member(*pair) for pair in sorted(content.items())]).path


def alter(path: Path) -> None:
    """Change one member, with its checksum, and keep all digests as they were."""
    with zipfile.ZipFile(path) as source:
        comment = source.comment
        members = [(info, source.read(info)) for info in source.infolist()]
    with zipfile.ZipFile(path, "w") as target:
        target.comment = comment
        for info, content in members:
            target.writestr(info, content.replace(b"class H", b"class G"))


def write_policy(folder: Path, text: str) -> Path:
    path = folder / POLICY_NAME
    path.write_text(text, encoding="utf-8")
    return path


def test_without_a_policy_an_unsigned_archive_is_admitted(archive: Path) -> None:
    admit(archive, None)


def test_a_signed_archive_is_admitted_and_an_unsigned_one_refused(
    archive: Path, pair: tuple[Path, Path]
) -> None:
    policy = Policy(keys=(pair[1],))
    with pytest.raises(ArchiveError, match=r"is refused: the archive is not signed.*I605"):
        admit(archive, policy)
    sign_with_key(archive, key=pair[0])
    admit(archive, policy)


def test_a_signature_by_somebody_else_is_refused(
    tmp_path: Path, archive: Path, pair: tuple[Path, Path]
) -> None:
    other, _ = make_key_pair(tmp_path / "other")
    sign_with_key(archive, key=other)
    with pytest.raises(ArchiveError, match=r"I606 .*not signed by anybody who is trusted"):
        admit(archive, Policy(keys=(pair[1],)))


def test_an_archive_that_was_altered_after_signing_is_refused(
    archive: Path, pair: tuple[Path, Path]
) -> None:
    sign_with_key(archive, key=pair[0])
    alter(archive)
    with pytest.raises(ArchiveError, match=r"I606 .*is not what was signed"):
        admit(archive, Policy(keys=(pair[1],)))


def test_digests_are_enough_where_no_signature_is_required(archive: Path) -> None:
    policy = Policy(require="digests")
    admit(archive, policy)
    alter(archive)
    with pytest.raises(ArchiveError, match=r"I601 h\.py"):
        admit(archive, policy)


def test_an_archive_without_digests_is_refused_where_they_are_required(archive: Path) -> None:
    with zipfile.ZipFile(archive) as source:
        members = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(archive, "w") as target:
        for name, content in members.items():
            target.writestr(name, content)
    with pytest.raises(ArchiveError, match="I604"):
        admit(archive, Policy(require="digests"))


def test_only_models_of_allowed_names_are_admitted(tmp_path: Path) -> None:
    policy = Policy(require="nothing", models=("cnn*", "digits"))
    admit(write(tmp_path / "store" / "a.mar", name="cnn-large"), policy)
    with pytest.raises(ArchiveError, match=r"I608 .*rnn, allowed cnn"):
        admit(write(tmp_path / "store" / "b.mar", name="rnn"), policy)


def test_a_finding_is_borne_or_not_as_the_policy_says(tmp_path: Path) -> None:
    path = write(tmp_path / "store" / "a.mar", labels=b"a", Labels=b"b")  # S106, a warning
    admit(path, Policy(require="nothing"))
    for rules in (FindingRules(deny=("S106",)), FindingRules(worst="note")):
        with pytest.raises(ArchiveError, match="S106"):
            admit(path, Policy(require="nothing", findings=rules))
    rules = FindingRules(worst="note", allow=("S106",))
    admit(path, Policy(require="nothing", findings=rules))


def test_a_dangerous_archive_is_admitted_only_where_that_finding_is_allowed(archive: Path) -> None:
    link = zipfile.ZipInfo("weights.pt")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(archive, "a") as target:
        target.writestr(link, "/etc/passwd")
    for policy in (None, Policy(require="nothing")):
        with pytest.raises(ArchiveError, match="S103 weights"):
            admit(archive, policy)
    admit(archive, Policy(require="nothing", findings=FindingRules(allow=("S103",))))


def test_a_policy_file_names_keys_beside_itself(archive: Path, pair: tuple[Path, Path]) -> None:
    policy = Policy.read(write_policy(pair[1].parent, "keys: [public.pem]\n"))
    assert policy.require == "signature"
    assert policy.keys == (pair[1],)


def test_every_problem_of_a_policy_file_is_listed_with_its_line(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    path = write_policy(
        tmp_path,
        "requires: signature\n"
        "keys:\n"
        "  - keys/private.pem\n"
        "  - absent.pem\n"
        "identities: [{identity: me}]\n"
        "models: []\n"
        "findings:\n"
        "  worst: terrible\n"
        "  allow: [X999]\n",
    )
    with pytest.raises(ArchiveError, match="found 7 problems") as caught:
        Policy.read(path)
    detail = caught.value.detail
    assert [line.split(":")[1] for line in detail.splitlines()] == list("1345689")
    assert "did you mean require?" in detail
    assert "expected a public key, found a private key" in detail
    assert "absent.pem" in detail


def test_a_signature_without_anybody_to_trust_is_a_problem(tmp_path: Path) -> None:
    for text in ("", "require: signature\n", "models: [cnn]\n"):
        with pytest.raises(ArchiveError, match="needs keys, certificates or identities"):
            Policy.read(write_policy(tmp_path, text))


@pytest.mark.parametrize("text", ["[", "- a\n", "7\n", "keys: {\n", "a: b: c\n", "\x00"])
def test_a_file_that_is_no_policy_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ArchiveError, match="cannot read"):
        Policy.read(write_policy(tmp_path, text))


def test_a_missing_policy_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read"):
        Policy.read(tmp_path / "absent.yaml")


def test_a_policy_that_was_written_reads_as_the_same(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pair[1].parent)
    policy = Policy(keys=(Path("public.pem"),), models=("cnn",))
    (tmp_path / "elsewhere").mkdir()
    policy.write(tmp_path / "elsewhere" / "policy.yaml")
    assert Policy.read(tmp_path / "elsewhere" / "policy.yaml") == policy


def test_the_policy_in_a_store_is_found_and_another_beside_it_refused(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    given = Policy(require="nothing")
    assert find_policy(tmp_path) is None
    assert find_policy(tmp_path, given) == given
    write_policy(tmp_path, "keys: [keys/public.pem]\n")
    own = find_policy(tmp_path)
    assert own == Policy(keys=(pair[1],))
    assert find_policy(tmp_path, own) == own
    with pytest.raises(UsageError, match="two policies"):
        find_policy(tmp_path, given)


def test_a_link_that_leads_nowhere_is_not_taken_for_no_policy(tmp_path: Path) -> None:
    (tmp_path / POLICY_NAME).symlink_to("absent.yaml")
    with pytest.raises(StorageError, match="cannot read"):
        find_policy(tmp_path)


def test_a_signature_is_looked_for_beside_the_archive(
    archive: Path, pair: tuple[Path, Path]
) -> None:
    sign_with_key(archive, key=pair[0])
    signature_path(archive).rename(archive.with_suffix(".sig"))
    with pytest.raises(ArchiveError, match="I605"):
        admit(archive, Policy(keys=(pair[1],)))
