"""What a pickle would import, read off its opcodes; nothing is unpickled.

A pickle is a program for a small stack machine (pickletools describes its opcodes). Here that
machine runs with text as its only kind of value, which is all that an import needs. Long arguments
are stepped over, so that memory does not grow with the file.
"""

from __future__ import annotations

import os
import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, NamedTuple

__all__ = ["follow", "follow_all", "Followed", "JOBLIB_ARRAY", "PICKLE_STARTS", "UNKNOWN"]

UNKNOWN = ("?", "?")
"""An import whose name the pickle computes, or leaves to a table of its reader (EXT1)."""

JOBLIB_ARRAY = ("joblib.numpy_pickle", "NumpyArrayWrapper")
"""Behind it an array's bytes stand in the midst of the pickle."""

MAX_TEXT_BYTES = 1024
"""Of a name; longer text is no module and no attribute."""
MAX_STACK = 1_000_000
MAX_MEMO = 500_000
MAX_IMPORTS = 10_000
MAX_NESTED = 1_000
MAX_PICKLES = 1_000

PICKLE_STARTS = tuple(bytes((0x80, protocol)) for protocol in range(6))
NESTED_STARTS = (*PICKLE_STARTS, b"PK\x03\x04")
"""How bytes begin that may be a pickle, or a file of torch.save, inside a pickle."""

_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_TEXT = {
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_CALLS = {"REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"}
_MARK = object()


@dataclass
class Followed:
    """One pickle, followed to its end or to where it breaks."""

    imports: dict[tuple[str, str], None] = field(default_factory=dict)
    """(module, name), in their order."""
    nested: list[tuple[int, int]] = field(default_factory=list)
    """(offset, length) of bytes that are pickles themselves by their look."""
    problem: str = ""
    """Why it could not be followed to its end."""
    protocol: int = 0
    is_marked: bool = False
    """It begins with its protocol, as all but the oldest do; text and other data do not."""
    calls: int = 0
    """How often it calls what it imports, or makes an object of it."""
    opcodes: int = 0
    end: int = 0
    """Where the pickle ends in the stream, or breaks."""


def follow(stream: IO[bytes], *, max_opcodes: int) -> Followed:
    """Follow the pickle that begins at a seekable stream's position."""
    machine = _Machine(stream)
    try:
        machine.run(max_opcodes)
    except _Broken as exc:
        machine.found.problem = str(exc)
    machine.found.end = stream.tell()
    return machine.found


def follow_all(stream: IO[bytes], *, max_opcodes: int) -> Iterator[Followed]:
    """Follow pickle after pickle: torch.save wrote five to a file once, and a loader may go on."""
    for _ in range(MAX_PICKLES):
        found = follow(stream, max_opcodes=max_opcodes)
        yield found
        max_opcodes -= found.opcodes
        if found.problem:
            return
    yield Followed(problem=f"more than {MAX_PICKLES:,} pickles, one after the other")


class _Broken(Exception):
    """The pickle cannot be followed further."""


class _Opcode(NamedTuple):
    name: str
    argument: int
    """Bytes; negative: pickletools' ways to say a length."""
    to_mark: bool
    pops: int
    pushes: int


def _read_table() -> dict[bytes, _Opcode]:
    table = {}
    for opcode in pickletools.opcodes:
        before = opcode.stack_before
        to_mark = pickletools.markobject in before
        table[opcode.code.encode("latin-1")] = _Opcode(
            opcode.name,
            opcode.arg.n if opcode.arg else 0,
            to_mark,
            before.index(pickletools.markobject) if to_mark else len(before),
            len(opcode.stack_after),
        )
    return table


_TABLE = _read_table()


class _Machine:
    """The stack and the memo, with text where it is known and None for all else."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.found = Followed()
        self._stream = stream
        start = stream.tell()
        self._size = stream.seek(0, os.SEEK_END)
        stream.seek(start)
        self._stack: list[object] = []
        self._memo: dict[int, str] = {}
        self._counts_memo = self._names_memo = False
        self._memoized = self._marks = 0
        self._steps: dict[str, Callable[[_Opcode, bytes], None]] = {
            **dict.fromkeys(_TEXT, self._push_text),
            **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), self._push_memo),
            **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), self._memoize),
            **dict.fromkeys(("GLOBAL", "INST"), self._import_stated),
            **dict.fromkeys(("EXT1", "EXT2", "EXT4"), self._import_unknown),
            "STACK_GLOBAL": self._import_stacked,
            "PROTO": self._note_protocol,
            "MARK": self._mark,
            "DUP": lambda opcode, argument: self._push(self._stack[-1] if self._stack else None),
        }

    def run(self, max_opcodes: int) -> None:
        """Follow opcodes up to STOP; raises _Broken where that cannot be."""
        found, read, steps = self.found, self._stream.read, self._steps
        while True:
            code = read(1)
            opcode = _TABLE.get(code)
            if opcode is None:
                raise _Broken(f"no opcode is {code!r}" if code else "cut off")
            if found.opcodes >= max_opcodes:
                raise _Broken(f"more than {max_opcodes:,} opcodes")
            found.opcodes += 1
            argument = self._read_argument(opcode) if opcode.argument else b""
            if opcode.name == "STOP":
                return
            steps.get(opcode.name, self._replace)(opcode, argument)

    def _read_argument(self, opcode: _Opcode) -> bytes:
        """Return an argument, or the first bytes of a long one; the stream stands behind it."""
        length = opcode.argument
        if length == pickletools.UP_TO_NEWLINE:
            lines = 2 if opcode.name in ("GLOBAL", "INST") else 1
            return b"\n".join([self._read_line() for _ in range(lines)])
        if length < 0:
            length = int.from_bytes(self._stream.read(_LENGTHS[length]), "little")
        if opcode.name in _BYTES or length > MAX_TEXT_BYTES:
            return self._step_over(length, look_inside=opcode.name in _BYTES)
        argument = self._stream.read(length)
        if len(argument) < length:
            raise _Broken("cut off")
        return argument

    def _read_line(self) -> bytes:
        line = part = self._stream.readline(MAX_TEXT_BYTES + 1)
        while part and not part.endswith(b"\n"):
            part = self._stream.readline(1 << 16)
        if not part:
            raise _Broken("cut off")
        return line.removesuffix(b"\n")

    def _step_over(self, length: int, *, look_inside: bool) -> bytes:
        start = self._stream.tell()
        if start + length > self._size:
            raise _Broken("cut off")
        head = self._stream.read(min(length, MAX_TEXT_BYTES + 1))
        if look_inside and length > 4 and head.startswith(NESTED_STARTS):
            if len(self.found.nested) >= MAX_NESTED:
                raise _Broken(f"more than {MAX_NESTED:,} pickles inside it")
            self.found.nested.append((start, length))
        self._stream.seek(start + length)
        return head

    def _push(self, value: object) -> None:
        if len(self._stack) >= MAX_STACK:
            raise _Broken(f"more than {MAX_STACK:,} values on its stack")
        self._stack.append(value)

    def _mark(self, opcode: _Opcode, argument: bytes) -> None:
        self._marks += 1
        self._push(_MARK)

    def _replace(self, opcode: _Opcode, argument: bytes) -> None:
        """Do what most opcodes do: take values from the stack, and put one there."""
        if opcode.name in _CALLS and (self._marks or not opcode.to_mark):
            self.found.calls += 1
        if opcode.to_mark:
            self._marks = max(0, self._marks - 1)
            while self._stack and self._stack.pop() is not _MARK:
                pass
        if opcode.pops:
            del self._stack[-opcode.pops :]
        for _ in range(opcode.pushes):
            self._push(None)

    def _push_text(self, opcode: _Opcode, argument: bytes) -> None:
        if opcode.name == "STRING":
            argument = argument.strip()[1:-1]  # it is in quotes
        # An escape may spell a name; no pickler writes one so.
        hidden = opcode.name in ("STRING", "UNICODE") and b"\\" in argument
        self._push(None if hidden or len(argument) > MAX_TEXT_BYTES else _text(argument))

    def _push_memo(self, opcode: _Opcode, argument: bytes) -> None:
        self._push(self._memo.get(_key(opcode, argument)))

    def _memoize(self, opcode: _Opcode, argument: bytes) -> None:
        if opcode.name == "MEMOIZE":
            key, self._counts_memo = self._memoized, True
            self._memoized += 1
        else:
            key, self._names_memo = _key(opcode, argument), True
        if self._counts_memo and self._names_memo:
            self._import(None, None)  # no pickler does both, and readers differ in the count
        value = self._stack[-1] if self._stack else None
        if isinstance(value, str) and len(self._memo) < MAX_MEMO:
            self._memo[key] = value
        else:
            self._memo.pop(key, None)

    def _import_stated(self, opcode: _Opcode, argument: bytes) -> None:
        module, _, name = argument.partition(b"\n")
        self._import(_text(module), _text(name))
        self._replace(opcode, argument)

    def _import_stacked(self, opcode: _Opcode, argument: bytes) -> None:
        module, name = self._stack[-2:] if len(self._stack) > 1 else (None, None)
        self._import(module, name)
        self._replace(opcode, argument)

    def _import_unknown(self, opcode: _Opcode, argument: bytes) -> None:
        self._import(None, None)
        self._replace(opcode, argument)

    def _import(self, module: object, name: object) -> None:
        if len(self.found.imports) >= MAX_IMPORTS:
            raise _Broken(f"more than {MAX_IMPORTS:,} imports")
        known = isinstance(module, str) and isinstance(name, str)
        self.found.imports[(str(module), str(name)) if known else UNKNOWN] = None

    def _note_protocol(self, opcode: _Opcode, argument: bytes) -> None:
        self.found.protocol = argument[0]
        if self.found.opcodes == 1:
            self.found.is_marked = True
        elif JOBLIB_ARRAY in self.found.imports:
            raise _Broken("an array of objects")
        else:
            self._import(None, None)  # names before it are read by another protocol


def _text(argument: bytes) -> str:
    return argument.decode("utf-8", "backslashreplace")


def _key(opcode: _Opcode, argument: bytes) -> int:
    """Return a memo's key, which the oldest opcodes write out in digits."""
    if opcode.name not in ("GET", "PUT"):
        return int.from_bytes(argument, "little")
    if not argument.isdigit() or len(argument) > 10:
        raise _Broken("a key of its memo is no number")
    return int(argument)
