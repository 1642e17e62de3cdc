from __future__ import annotations

import pytest

from marwright.archive.worker.form import FormError, read_form


# All of it as TorchServe 0.12 was seen to answer.
@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (b"", []),
        (b"d", []),
        (b"d&", [("d", b"")]),
        (b"a&b=1", [("a", b""), ("b", b"1")]),
        (b"a=1&b", [("a", b"1")]),
        (b"a=1&a=2&c=", [("a", b"1"), ("a", b"2"), ("c", b"")]),
        (b"a=b=c", [("a", b"b=c")]),
        (b"a+b=x%20y+z", [("a b", b"x y z")]),
        (b" a =1", [("a", b"1")]),
        (b"%C3%A9=%ff&\xff=\xff", [("é", b"\xff"), ("\ufffd", b"\xff")]),
        (b"%e9=1", [("\ufffd", b"1")]),
        (b"a=1\r\nb=2&c=3", [("a", b"1")]),
        (b"a=1\n", [("a", b"1")]),
        (b"a=1\r", [("a", b"1")]),
        (b"a\n=1", [("a", b"1")]),
        (b"\n", []),
        (b'{"data": "abc"}', []),
    ],
)
def test_fields_are_read(body: bytes, fields: list[tuple[str, bytes]]) -> None:
    assert list(read_form(body)) == fields


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"x%zz=1", "Bad string: 'x%zz'"),
        (b"a=%zz", "Invalid hex byte at index '0' in string: '%zz'"),
        (b"a=12%4", "Invalid hex byte at index '2' in string: '12%4'"),
        (b"a=%", "Invalid hex byte at index '0' in string: '%'"),
        (b"a=b%zz=\xff", "Invalid hex byte at index '1' in string: 'b%zz=\ufffd'"),
        (b"&a=1", "java.lang.IllegalArgumentException: empty name"),
        (b"=1", "java.lang.IllegalArgumentException: empty name"),
        (b"a=1\rb", "Bad end of line"),
    ],
)
def test_what_netty_refuses_is_refused_in_its_words(body: bytes, message: str) -> None:
    with pytest.raises(FormError) as caught:
        list(read_form(body))
    assert str(caught.value) == message
