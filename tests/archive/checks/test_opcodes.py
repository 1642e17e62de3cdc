from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from datetime import date
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marwright.archive.checks import opcodes
from marwright.archive.checks.opcodes import UNKNOWN, follow, follow_all

VALUE = OrderedDict(
    a=[Fraction(1, 2), date(2026, 1, 1)] * 2, b={"text": b"bytes" * 99, "n": -(2**70)}
)
PICKLES = [pickle.dumps(VALUE, protocol) for protocol in range(6)]
MANY = 1_000_000


class Recorder(pickle._Unpickler):  # the one in Python, whose memory is bounded
    """Runs a pickle as pickle does, but imports nothing: a name stands for what it would be."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), fix_imports=False)
        self.imports: list[tuple[str, str]] = []

    def find_class(self, module: str, name: str) -> Any:
        """Note what would be imported."""
        self.imports.append((module, name))
        return _Dummy

    def persistent_load(self, key: object) -> Any:
        """Return what torch would look up."""
        return key

    def get_extension(self, code: int) -> None:
        """Note that a table of copyreg would be asked."""
        self.find_class(*UNKNOWN)
        self.append(_Dummy)  # type: ignore[attr-defined]  # set by load()


class _Dummy:
    def __new__(cls, *arguments: Any, **options: Any) -> _Dummy:
        return super().__new__(cls)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass


def imports_of(content: bytes) -> list[tuple[str, str]]:
    return list(follow(io.BytesIO(content), max_opcodes=MANY).imports)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_is_followed_to_its_end(protocol: int) -> None:
    stream = io.BytesIO(PICKLES[protocol] + b"more")
    found = follow(stream, max_opcodes=MANY)
    assert found.problem == ""
    assert found.end == stream.tell() == len(PICKLES[protocol])
    assert {name for _, name in found.imports} >= {"OrderedDict", "Fraction", "date"}


@given(
    base=st.sampled_from(PICKLES),
    changes=st.lists(
        st.tuples(
            st.floats(0, 1, exclude_max=True),
            st.sampled_from([bytes((code,)) for code in range(256)])
            | st.sampled_from(
                [b"\x8c\x02os", b"\x93", b"h\x00", b"q\x01", b"\x94", b"0", b"2", b"R"]
            ),
            st.booleans(),
        ),
        min_size=1,
        max_size=6,
    ),
)
@settings(max_examples=400, deadline=None)
def test_whatever_pickle_would_import_is_found(
    base: bytes, changes: list[tuple[float, bytes, bool]]
) -> None:
    content = bytearray(base)
    for where, code, replace in changes:
        at = int(where * len(content))
        content[at : at + (len(code) if replace else 0)] = code
    if b"\x96" in content:  # BYTEARRAY8: pickle itself makes one of any length it is told
        return
    recorder = Recorder(bytes(content))
    with pytest.raises(BaseException):  # noqa: B017,PT011,PT012  almost anything, or the end
        recorder.load()
        raise EOFError
    found = imports_of(bytes(content))
    if UNKNOWN not in found:
        assert set(recorder.imports) <= set(found)


def test_the_memos_key_is_read_in_every_spelling() -> None:
    for put, get in ((b"p7\n", b"g7\n"), (b"q\x07", b"h\x07"), (b"r\7\0\0\0", b"j\7\0\0\0")):
        content = b"\x80\x04\x8c\x02os" + put + b"0" + get + b"\x8c\x06system\x93."
        assert imports_of(content) == [("os", "system")]


@pytest.mark.parametrize("content", [b"g1x\n.", b"p-1\nN.", b"g" + b"1" * 20 + b"\n."])
def test_a_memo_key_that_is_no_number_breaks_the_pickle(content: bytes) -> None:
    assert "no number" in follow(io.BytesIO(content), max_opcodes=MANY).problem


@pytest.mark.parametrize("content", [b"\x93.", b"N\x93.", b"(N\x93.", b"\x8c\x02os\x93."])
def test_an_import_of_what_is_no_text_is_unknown(content: bytes) -> None:
    assert imports_of(b"\x80\x04" + content) == [UNKNOWN]


def test_a_name_too_long_to_be_one_is_unknown() -> None:
    text = b"X" + struct.pack("<I", 5000) + b"a" * 5000
    assert imports_of(b"\x80\x04" + text + text + b"\x93.") == [UNKNOWN]


def test_calls_are_counted() -> None:
    for content in (
        b"cm\nn\n)R.",
        b"(im\nn\n.",
        b"(cm\nn\no.",
        b"cm\nn\n)\x81.",
        b"cm\nn\n)}\x92.",
    ):
        assert follow(io.BytesIO(content), max_opcodes=MANY).calls == 1
    for content in (b"cm\nn\n.", b"im\nn\n.", b"o."):
        assert follow(io.BytesIO(content), max_opcodes=MANY).calls == 0


def test_bytes_that_are_a_pickle_themselves_are_noted() -> None:
    inner = pickle.dumps([1])
    outer = pickle.dumps([inner, b"other", bytearray(inner)], 5)
    nested = follow(io.BytesIO(outer), max_opcodes=MANY).nested
    assert [outer[start : start + length] for start, length in nested] == [inner, inner]


def test_a_long_argument_is_stepped_over() -> None:
    class Counting(io.BytesIO):
        read_bytes = 0

        def read(self, size: int | None = -1) -> bytes:
            content = super().read(size)
            self.read_bytes += len(content)
            return content

    stream = Counting(pickle.dumps([b"x" * 10_000_000, "y" * 10_000_000]))
    assert follow(stream, max_opcodes=MANY).problem == ""
    assert stream.read_bytes < 10_000


def test_pickles_one_after_the_other_are_followed() -> None:
    content = b"".join(PICKLES) + b"\xff rest"
    found = list(follow_all(io.BytesIO(content), max_opcodes=MANY))
    assert [pickle.problem for pickle in found] == [""] * 6 + ["no opcode is b'\\xff'"]


@pytest.mark.parametrize(
    ("limit", "content"),
    [
        ("MAX_STACK", b"N" * 20 + b"."),
        ("MAX_IMPORTS", b"".join(b"cm\nn%d\n" % index for index in range(20)) + b"."),
        ("MAX_NESTED", b"C\x0a\x80\x02aaaaaaaa" * 20 + b"."),
        ("MAX_PICKLES", b"N." * 20),
    ],
)
def test_a_pickle_that_takes_too_much_breaks(
    monkeypatch: pytest.MonkeyPatch, limit: str, content: bytes
) -> None:
    monkeypatch.setattr(opcodes, limit, 10)
    found = list(follow_all(io.BytesIO(content), max_opcodes=MANY))
    assert found[-1].problem.startswith("more than 10 ")


def test_more_opcodes_than_wanted_break_the_pickle() -> None:
    assert follow(io.BytesIO(b"N" * 20), max_opcodes=10).problem == "more than 10 opcodes"


def test_a_memo_beyond_its_limit_makes_names_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opcodes, "MAX_MEMO", 1)
    content = b"\x80\x04\x8c\x01a\x94\x8c\x02os\x940h\x01\x8c\x01x\x93."
    assert imports_of(content) == [UNKNOWN]
