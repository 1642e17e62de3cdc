"""The set of files that docs/decisions/0006-pickle-scanner.md compares scanners on, and more."""

from __future__ import annotations

import bz2
import collections
import datetime
import decimal
import gzip
import io
import lzma
import os
import pickle
import struct
import sys
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest

from marwright.archive import Packed
from marwright.archive.checks import pickles
from marwright.archive.checks.findings import Finding, Severity
from marwright.archive.checks.pickles import scan_pickles
from marwright.errors import StorageError

COMMAND = "echo harmless"
MAGIC = 0x1950A86A20F9469CFC6C
"""How files of the older torch.save begin."""


def text(value: str) -> bytes:
    """Return the opcode that pushes a short text, and its bytes."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def call(module: str, name: str, *arguments: str | bytes, protocol: int = 2) -> bytes:
    """Return a pickle of protocol 2 or 3 that calls module.name."""
    pushed = b""
    for argument in arguments:
        content = argument if isinstance(argument, bytes) else argument.encode()
        pushed += (b"B" if isinstance(argument, bytes) else b"X") + struct.pack("<I", len(content))
        pushed += content
    return b"\x80%cc%b\n%b\n(%btR." % (protocol, module.encode(), name.encode(), pushed)


def call_stacked(module: str, name: str, *arguments: str) -> bytes:
    """Return a pickle of protocol 4 that calls module.name."""
    pushed = b"".join(map(text, arguments))
    return b"\x80\x04" + text(module) + text(name) + b"\x93(" + pushed + b"tR."


EVIL = call("os", "system", COMMAND)

MALICIOUS: dict[str, bytes] = {
    "os.system": call("posix", "system", COMMAND),
    "os.system by its own module": EVIL,
    "builtins.eval": call("builtins", "eval", "1", protocol=3),
    "builtins.exec, protocol 4": call_stacked("builtins", "exec", "1"),
    "__builtin__.eval, protocol 0": b"c__builtin__\neval\n(S'1'\ntR.",
    "INST opcode": b"(S'echo'\nios\nsystem\n.",
    "OBJ opcode": b"(cos\nsystem\nS'echo'\no.",
    "builtins.__import__": call("builtins", "__import__", "os"),
    "getattr chain": (
        b"\x80\x04" + text("builtins") + text("getattr") + b"\x93("
        + text("builtins") + text("__import__") + b"\x93(" + text("os") + b"tR"
        + text("system") + b"tR(" + text(COMMAND) + b"tR."
    ),
    "subprocess.Popen": call("subprocess", "Popen", COMMAND),
    "runpy.run_path": call("runpy", "run_path", "x.py"),
    "pty.spawn": call("pty", "spawn", "sh"),
    "importlib.import_module": call("importlib", "import_module", "os"),
    "operator.attrgetter": call("operator", "attrgetter", "system"),
    "functools.partial of os.system": (
        b"\x80\x02cfunctools\npartial\n(cos\nsystem\n" + b"tR(X\x04\0\0\0echotR."
    ),
    "functools.reduce": call("functools", "reduce", "x", "y"),
    "torch.hub.load": call("torch.hub", "load", "a/b", "c"),
    "torch.load": call("torch", "load", "x.pt"),
    "torch.utils.cpp_extension": call("torch.utils.cpp_extension", "load_inline", "x", "y"),
    "numpy.load": call("numpy", "load", "x.npy"),
    "numpy.f2py": call("numpy.f2py.crackfortran", "getlincoef", "1"),
    "ctypes.CDLL": call("ctypes", "CDLL", "x.so"),
    "marshal.loads": call("marshal", "loads", b"x"),
    "types.FunctionType": call("types", "FunctionType", "x"),
    "io.open": call("io", "open", "/etc/passwd"),
    "a method by a dotted name": call_stacked("pathlib", "Path.write_text", "a", "b"),
    "os.system by a dotted name": call_stacked("torch.serialization", "os.system", COMMAND),
    "a module of another module": call("sklearn.utils", "os", COMMAND),
    "pip.main": call("pip", "main", "install"),
    "pip._internal": call("pip._internal.cli.main", "main", "install"),
    "asyncio": call("asyncio", "create_subprocess_shell", COMMAND),
    "multiprocessing": call("multiprocessing.util", "spawnv_passfds", "sh"),
    "code.interact": call("code", "interact", "x"),
    "webbrowser.open": call("webbrowser", "open", "http://localhost"),
    "copyreg.add_extension": call("copyreg", "add_extension", "x"),
    "pickle in a pickle": call("pickle", "loads", EVIL),
    "joblib.load": call("joblib", "load", "x"),
    "broken after the payload": EVIL[:-1] + b"\xff\xff\xff",
    "cut after the payload": EVIL[:-1],
    "name from the memo": (
        b"\x80\x04" + text("os") + b"\x94" + text("system") + b"\x940" + b"0h\x00h\x01\x93("
        + text(COMMAND) + b"tR."
    ),
    "name from a memo behind POP": (
        b"\x80\x04" + text("os") + text("x") + b"0q\x000" + text("system") + text("x") + b"0q\x010"
        + b"h\x00h\x01\x93(" + text(COMMAND) + b"tR."
    ),
    "name behind DUP": (
        b"\x80\x04" + text("os") + b"20" + text("system") + b"20\x93(" + text(COMMAND) + b"tR."
    ),
    "name that is computed": (
        b"\x80\x04" + text("_codecs") + text("encode") + b"\x93(" + text("bf") + text("rot13")
        + b"tR" + text("system") + b"\x93(" + text(COMMAND) + b"tR."
    ),
    "name with escapes": b"\x80\x04V\\u006fs\nVsystem\n\x93(" + text(COMMAND) + b"tR.",
    "memo numbered in two ways": b"\x80\x04" + text("a") + b"\x94q\x07.",
    "protocol changed on the way": b"\x80\x02ccommands\ngetoutput\n\x80\x04.",
    "extension code": b"\x80\x02\x82\x01(tR.",
    "second pickle in the file": pickle.dumps({"a": 1}, 2) + EVIL,
}  # fmt: skip


class Net:
    """Stands for a class of the model's own."""


BENIGN: dict[str, Any] = {
    "text and numbers": {"a": ["b", 1.5, None, True], "c": (1, 10**30)},
    "dates and sets": [datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc), {1}, 1j],
    "containers": [
        collections.OrderedDict(a=1),
        collections.Counter("ab"),
        collections.deque([1]),
        collections.defaultdict(int),
        frozenset({1}),
        bytearray(b"x"),
        range(3),
        decimal.Decimal("1.5"),
        Path("x"),
    ],
    "NumPy": [np.arange(9.0), np.float32(1), np.dtype("int8"), np.array(["a"], dtype=object)],
    "long bytes": b"\xff" * 100_000,
}


def scan(tmp_path: Path, name: str, content: bytes, *, method: int = 0) -> list[Finding]:
    with zipfile.ZipFile(tmp_path / "m.mar", "w", method) as archive:
        archive.writestr(name, content)
    return scan_pickles(tmp_path / "m.mar")


def ids(findings: list[Finding]) -> set[str]:
    return {finding.rule.id for finding in findings}


def zip_up(members: dict[str, bytes], *, method: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def change(torch_file: bytes, members: dict[str, bytes], *, method: int = 0) -> bytes:
    """Return a torch file with other or further members, which lie below `archive/`."""
    with zipfile.ZipFile(io.BytesIO(torch_file)) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    top = next(iter(found)).split("/")[0]
    return zip_up(found | {f"{top}/{name}": text for name, text in members.items()}, method=method)


def save(value: Any, **options: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def script(module: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def state() -> bytes:
    """A state dict as torch.save writes it."""
    import torch

    return save(torch.nn.Linear(3, 2).state_dict())


@pytest.fixture(scope="module")
def scripted() -> bytes:
    """A TorchScript file."""
    import torch

    return script(torch.nn.Linear(3, 2))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("name", ["model.pkl", "vocabulary.bin", "notes.txt", "x"])
@pytest.mark.parametrize("attack", MALICIOUS)
def test_an_attack_is_found_whatever_the_file_is_called(
    tmp_path: Path, attack: str, name: str, method: int
) -> None:
    findings = scan(tmp_path, name, MALICIOUS[attack], method=method)
    assert {f.severity for f in findings if f.rule.id == "P201"} == {Severity.DANGER}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("what", BENIGN)
def test_plain_values_have_no_finding(tmp_path: Path, what: str, protocol: int) -> None:
    assert scan(tmp_path, "x.pkl", pickle.dumps(BENIGN[what], protocol)) == []


def test_a_class_of_the_models_own_is_a_warning(tmp_path: Path) -> None:
    findings = scan(tmp_path, "x.pkl", pickle.dumps(Net()))
    assert [(f.rule.id, f.severity) for f in findings] == [("P202", Severity.WARNING)]
    assert findings[0].found.endswith("test_pickles.Net")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_dict_has_no_finding(tmp_path: Path, legacy: bool, method: int) -> None:
    import torch

    state = {"epoch": 3, "lr": 0.1, "model": torch.nn.Linear(3, 2).state_dict()}
    state |= {"size": torch.Size([1]), "dtype": torch.bfloat16, "device": torch.device("cpu")}
    content = save(state, _use_new_zipfile_serialization=not legacy)
    assert scan(tmp_path, "model.pt", content, method=method) == []


def test_what_torch_writes_of_tensors_is_known_without_picklescan(
    tmp_path: Path, state: bytes, scripted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "picklescan.scanner", None)  # as if absent
    for torch_file in (state, scripted):
        assert scan(tmp_path, "model.pt", torch_file) == []


def test_all_that_weights_only_admits_is_admitted() -> None:
    from torch import _weights_only_unpickler

    from marwright.archive.checks.imports import Verdict, judge

    for path in _weights_only_unpickler._get_allowed_globals():
        assert judge(*path.rsplit(".", 1)) is Verdict.TENSORS, path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_torchscript_has_no_finding(tmp_path: Path, scripted: bytes, method: int) -> None:
    assert scan(tmp_path, "model.pt", scripted, method=method) == []


def test_what_marwright_packs_has_no_finding(packed: Packed) -> None:
    assert scan_pickles(packed.path) == []


def test_a_whole_module_needs_weights_only_false(tmp_path: Path) -> None:
    import torch

    findings = scan(tmp_path, "model.pt", save(torch.nn.Sequential(torch.nn.Linear(3, 2))))
    assert [(f.rule.id, f.severity) for f in findings] == [("P202", Severity.WARNING)]
    assert "torch.nn.modules.linear.Linear" in findings[0].found
    assert "weights_only=False" in findings[0].remedy


def test_numpy_values_in_a_torch_file_need_weights_only_false(tmp_path: Path) -> None:
    assert ids(scan(tmp_path, "model.pt", save({"accuracy": np.float64(0.9)}))) == {"P202"}


def test_a_tensor_pickled_by_pickle_is_looked_into(tmp_path: Path) -> None:
    import torch

    content = pickle.dumps(torch.zeros(3))
    findings = scan(tmp_path, "x.pkl", content)
    assert [(f.rule.id, f.severity) for f in findings] == [("P202", Severity.WARNING)]
    bytes_elsewhere = call("torch.storage", "_load_from_bytes", "x")
    assert ids(scan(tmp_path, "x.pkl", bytes_elsewhere)) == {"P201"}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("member", ["data.pkl", "constants.pkl", "code/x.py.debug_pkl", "odd"])
def test_pickles_inside_torch_files_are_found(
    tmp_path: Path, state: bytes, scripted: bytes, member: str, method: int
) -> None:
    for torch_file in (state, scripted):
        content = change(torch_file, {member: EVIL}, method=method)
        findings = scan(tmp_path, "model.pt", content)
        assert ids(findings) == {"P201"}
        assert findings[0].member == "model.pt"
        assert findings[0].found.endswith(f"{member}: os.system")


# Local header, list: where a field stands in each, and what is written there.
@pytest.mark.parametrize(
    ("local", "listed", "value"),
    [(14, 16, b"\0\0\0\0"), (6, 8, b"\x01"), (30, None, b"X")],
    ids=["checksum", "encrypted", "name"],
)
def test_what_torch_ignores_in_a_zip_file_hides_nothing(
    tmp_path: Path, state: bytes, local: int, listed: int | None, value: bytes
) -> None:
    content = bytearray(change(state, {"data.pkl": EVIL}))
    for signature, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", listed)):
        if offset is not None:
            start = content.index(signature) + offset
            content[start : start + len(value)] = value
    assert "P201" in ids(scan(tmp_path, "model.pt", bytes(content)))


def test_a_zip_file_with_two_lists_of_members_is_not_believed(tmp_path: Path, state: bytes) -> None:
    findings = scan(tmp_path, "model.pt", b"PK\x03\x04" + state)
    assert [(f.rule.id, f.severity) for f in findings] == [("P204", Severity.ERROR)]


def test_every_pickle_of_a_legacy_torch_file_is_followed(tmp_path: Path) -> None:
    first = [pickle.dumps(MAGIC, 2), pickle.dumps(1001, 2)]
    assert ids(scan(tmp_path, "model.pt", b"".join([*first, EVIL]))) == {"P201"}
    computed = call("builtins", "eval", hex(MAGIC))
    assert ids(scan(tmp_path, "model.pt", computed + first[1])) == {"P201"}


@pytest.mark.parametrize("function", ["torch.save(x, 'f')", "torch.ops.aten.save(x, 'f')"])
def test_torchscript_that_writes_files_is_found(tmp_path: Path, function: str) -> None:
    # TorchScript is compiled from source, which has to stand in a file.
    source = f"import torch\ndef f(x):\n    {function}\n    return x\n"
    namespace: dict[str, Any] = {"__name__": "s"}
    (tmp_path / "s.py").write_text(source)
    exec(compile(source, tmp_path / "s.py", "exec"), namespace)
    findings = scan(tmp_path, "model.pt", script(namespace["f"]))
    assert [(f.rule.id, f.severity) for f in findings] == [("P205", Severity.DANGER)]
    assert "torch.save" in findings[0].found


@pytest.mark.parametrize(
    ("code", "found"),
    [
        (b"torch.from_file(p, True, 10)", True),
        (b"torch . from_file (p)", True),
        (b"_0 = ops.debugprims.load_tensor(p)", True),
        (b"_0 = (head).save(x)", True),  # who knows what that is
        (b"_0 = self.save(x)", False),
        (b"_0 = __torch__.net.save(x)", False),
        (b"_0 = torch.savings(x)", False),
    ],
)
def test_torchscript_is_searched_for_what_reaches_files(
    tmp_path: Path, scripted: bytes, code: bytes, found: bool
) -> None:
    content = change(scripted, {"code/__torch__/net.py": code}, method=zipfile.ZIP_DEFLATED)
    assert ids(scan(tmp_path, "model.pt", content)) == ({"P205"} if found else set())


def write_npy(payload: bytes) -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + payload


def test_arrays_of_objects_are_looked_into(tmp_path: Path) -> None:
    assert ids(scan(tmp_path, "x.npy", write_npy(EVIL))) == {"P201"}
    assert ids(scan(tmp_path, "x.npz", zip_up({"x.npy": write_npy(EVIL)}))) == {"P201"}
    numbers, objects = io.BytesIO(), io.BytesIO()
    np.savez(numbers, a=np.arange(1000.0))
    np.save(objects, np.array(["a", 1], dtype=object))
    assert scan(tmp_path, "x.npz", numbers.getvalue()) == []
    assert scan(tmp_path, "x.npy", objects.getvalue()) == []


@pytest.mark.parametrize("name", ["x.joblib", "x.dat"])
@pytest.mark.parametrize(
    "pack",
    [
        *(zlib.compress, gzip.compress, bz2.compress, lzma.compress),
        lambda content: lzma.compress(content, lzma.FORMAT_ALONE),
        lambda content: zip_up({"a.zip": zip_up({"b.pkl": content}, method=8)}),
    ],
)
def test_compressed_pickles_are_looked_into(tmp_path: Path, pack: Any, name: str) -> None:
    assert ids(scan(tmp_path, name, pack(EVIL))) == {"P201"}
    assert ids(scan(tmp_path, name, pack(pickle.dumps(b"x" * 99) + EVIL), method=8)) == {"P201"}
    assert scan(tmp_path, name, pack(b"some text")) == []


def test_a_pickle_behind_the_first_of_two_gzip_files_is_found(tmp_path: Path) -> None:
    content = gzip.compress(EVIL[:9]) + gzip.compress(EVIL[9:])
    assert ids(scan(tmp_path, "x.pkl", content)) == {"P201"}


def test_compressed_bytes_that_break_off_are_looked_into_as_far_as_they_go(tmp_path: Path) -> None:
    content = gzip.compress(EVIL + os.urandom(1000))[:200]
    assert "P201" in ids(scan(tmp_path, "x.pkl", content))


def test_compressed_bytes_that_cannot_be_unpacked_are_told(tmp_path: Path) -> None:
    greedy = lzma.compress(EVIL, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}])
    assert ids(scan(tmp_path, "x.joblib", greedy)) == {"P201"}
    broken = b"\xfd7zXZ\0" + bytes(50)
    assert [(f.rule.id, f.severity) for f in scan(tmp_path, "x.joblib", broken)] == [
        ("P204", Severity.ERROR)
    ]


def test_a_torch_file_at_the_end_of_a_pickle_is_looked_into(tmp_path: Path, state: bytes) -> None:
    # torch.jit.load finds a zip file from its end.
    prefix = pickle.dumps({})
    findings = scan(tmp_path, "model.pt", prefix + change(state, {"data.pkl": EVIL}))
    assert {finding.severity for finding in findings} & {Severity.DANGER, Severity.ERROR}


def test_the_oldest_torch_files_are_looked_into(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("pickle")
        info.size = len(EVIL)
        tar.addfile(info, io.BytesIO(EVIL))
    assert ids(scan(tmp_path, "model.pt", buffer.getvalue())) == {"P201"}
    assert ids(scan(tmp_path, "code.tar.gz", gzip.compress(buffer.getvalue()))) == {"P201"}


def test_what_joblib_writes_is_a_warning(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression().fit(np.random.rand(20, 3), ["a", "b"] * 10)
    for options in ({}, {"compress": 3}):
        joblib.dump(model, tmp_path / "x.joblib", **options)
        findings = scan(tmp_path, "x.joblib", (tmp_path / "x.joblib").read_bytes())
        assert {(f.rule.id, f.severity) for f in findings} == {("P202", Severity.WARNING)}


@pytest.mark.parametrize("attack", ["os.system", "builtins.exec, protocol 4", "subprocess.Popen"])
def test_what_stands_behind_an_array_of_joblib_is_searched(tmp_path: Path, attack: str) -> None:
    joblib.dump([np.arange(1000.0)], tmp_path / "x.joblib")
    content = (tmp_path / "x.joblib").read_bytes()[:-1] + MALICIOUS[attack][2:]
    assert "P201" in ids(scan(tmp_path, "x.joblib", content))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".",
        b"import os\nos.system('x')\n",
        b"class Net:\n    pass\n",
        b"cat\ndog\ncode\nos\n",
        b"cast\ndog\nelephant\n",
        b'{"a": 1}',
        b"P5\n24 24\n255\n" + bytes(576),
        b"x^2 + y^2",
        b"\x80\x02 by chance \xff\xfe",
        bytes(range(256)) * 50,
        b"(" * 1000,
    ],
)
def test_other_files_have_no_finding(tmp_path: Path, content: bytes) -> None:
    assert scan(tmp_path, "x", content) == []


def test_a_pickle_that_breaks_off_is_an_error(tmp_path: Path) -> None:
    findings = scan(tmp_path, "x.pkl", pickle.dumps(Net())[:-3])
    assert [(f.rule.id, f.severity) for f in findings] == [
        ("P203", Severity.ERROR),
        ("P202", Severity.WARNING),
    ]
    assert ids(scan(tmp_path, "x.pt", b"\x80\x02\xff")) == {"P203"}


def test_a_torch_file_that_breaks_off_is_an_error(tmp_path: Path, state: bytes) -> None:
    for name, severity in (("x.pt", Severity.ERROR), ("x.zip", Severity.WARNING)):
        findings = scan(tmp_path, name, state[:-30])
        assert [(f.rule.id, f.severity) for f in findings] == [("P204", severity)]


@pytest.mark.parametrize("length", [b"\xff" * 8, b"\0\0\0\0\1\0\0\0", b"\xff" * 7 + b"\x7f"])
def test_a_length_beyond_the_file_asks_for_no_memory(tmp_path: Path, length: bytes) -> None:
    for opcode in (b"\x8e", b"\x8d", b"\x96"):  # bytes, text, bytearray of eight bytes' length
        findings = scan(tmp_path, "x.pkl", b"\x80\x04" + opcode + length)
        assert ids(findings) == {"P203"}


@pytest.mark.parametrize(
    ("limit", "value", "content"),
    [
        ("MAX_OPCODES", 100, pickle.dumps(list(range(1000)))),
        ("MAX_DEPTH", 1, zip_up({"a.pt": zip_up({"b.pt": zip_up({"c": b"x"})})})),
        ("limits.FREE_BYTES", -9_000, zip_up({"a.pkl": bytes(100_000)}, method=8)),
        ("MAX_MEMBERS", 3, zip_up({str(index): b"x" for index in range(5)})),
    ],
)
def test_a_file_that_takes_too_long_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, content: bytes
) -> None:
    monkeypatch.setattr(f"marwright.archive.checks.pickles.{limit}", value)
    findings = scan(tmp_path, "x.pt", content)
    assert [(f.rule.id, f.severity) for f in findings] == [("P204", Severity.ERROR)]
    assert "more than" in findings[0].found or "over" in findings[0].found


def test_members_of_a_tar_file_and_of_a_folder_are_looked_into(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/model.pkl").write_bytes(EVIL)
    with tarfile.open(tmp_path / "m.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "m", "m")
    for path in (tmp_path / "m", tmp_path / "m.tar.gz"):
        assert [f.member for f in scan_pickles(path)] == ["model.pkl"]


def test_names_inside_are_shown_harmless(tmp_path: Path) -> None:
    findings = scan(tmp_path, "x.zip", zip_up({"\x1b[2J.pkl": call("os", "\x1b[2J")}))
    assert findings
    assert all(finding.found.isprintable() for finding in findings)


def test_many_imports_are_told_in_short(tmp_path: Path) -> None:
    content = b"\x80\x02" + b"".join(b"cos\nf%d\n" % index for index in range(100)) + b"."
    assert scan(tmp_path, "x.pkl", content)[0].found == "os.f0, os.f1, os.f2, os.f3 and 96 more"


def test_a_gigabyte_that_is_stored_is_not_read(tmp_path: Path, state: bytes) -> None:
    size, path = 1 << 30, tmp_path / "m.mar"
    content = zip_up({"model.pt": state, "weights.bin": b"\xff"})
    start = content.rindex(b"\xffPK\x01\x02")
    listing = bytearray(content[start + 1 :])
    entry, end = listing.rindex(b"PK\x01\x02"), listing.rindex(b"PK\x05\x06")
    listing[entry + 20 : entry + 28] = struct.pack("<II", size, size)
    listing[end + 16 : end + 20] = struct.pack("<I", start + size)
    with path.open("wb") as stream:  # with a hole in the file, which is quickly written
        stream.write(content[:start])
        stream.truncate(start + size)
        stream.seek(start + size)
        stream.write(listing)
    before = read_count()
    assert [str(finding) for finding in scan_pickles(path)] == []
    assert read_count() - before < 1 << 20


def read_count() -> int:
    """Return how many bytes this process has read, from disk or not."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def test_a_full_disk_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_full() -> Any:
        return Path("/dev/full").open("r+b", 0)

    monkeypatch.setattr(pickles.tempfile, "TemporaryFile", open_full)
    with pytest.raises(StorageError, match="cannot write a temporary file"):
        scan(tmp_path, "x.pkl", pickle.dumps([1] * 1000), method=8)
