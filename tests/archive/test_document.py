from __future__ import annotations

import time
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field

from marwright.archive.document import Document, validate
from marwright.errors import ArchiveError, ConfigurationError


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    count: int = Field(default=1, ge=1, le=9)
    share: float = Field(default=0.5, gt=0)
    tested: bool = True
    names: list[str] = []


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    title: str = Field(default="a", pattern="^[a-z]+$")
    inner: Inner | str = Inner()
    words: dict[str, int] = {}
    folder: Path = Path()
    needed: int


def read(text: str) -> Document:
    return Document(Path("file.yaml"), text)


@pytest.mark.parametrize(
    ("whole", "part"), [("{%s}", "k%d: *%s"), ("[%s]", "*%.0s%s"), ("{<<: [%s]}", "*%.0s%s")]
)
def test_a_few_lines_that_come_to_a_billion_values_are_refused_at_once(
    whole: str, part: str
) -> None:
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, 12):  # each names the one above it nine times
        parts = ", ".join(part % (number, f"a{level - 1}") for number in range(9))
        lines.append(f"a{level}: &a{level} {whole % parts}")
    began = time.process_time()
    with pytest.raises(ArchiveError, match="too many aliases: expected at most 100,000 values"):
        read("\n".join(lines))
    assert time.process_time() - began < 1


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "a: &a\n  b: [c, {d: *a}]"])
def test_a_value_that_holds_itself_is_refused(text: str) -> None:
    with pytest.raises(ArchiveError, match="found line 1: a value holds itself"):
        read(text)


def test_aliases_that_people_write_are_taken() -> None:
    text = "a: &a {x: [1, 2]}\nb: [" + ", ".join(["*a"] * 200) + "]\nc: {<<: *a, y: 3}\n"
    values = read(text).values
    assert values["b"] == [{"x": [1, 2]}] * 200
    assert values["c"] == {"x": [1, 2], "y": 3}


def test_keys_that_stand_twice_are_found_in_lists_too_and_named_once() -> None:
    document = read("a:\n  - &one\n    b: 1\n    b: 2\n  - *one\nc: *one\n")
    (problem,) = document.list_doubles()
    assert problem.line == 4
    assert problem.found == "stands twice, first in line 3"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a:\n\tb: 1\n", "line 2: a tab stands here: write blanks"),
        ("a:\n  b: 1\n c: 1\n", "line 3: the line is indented unlike the lines that it belongs to"),
        ("a:\n  - b\n - c\n", "line 3: the line is indented unlike"),
        ("  a: 1\nb: 1\n", "line 2: the line is indented unlike"),
        ("a:\n  b: 1\n   c: 1\n", "line 3: a second ':' stands here: indent the line like"),
        ("a: b: c\n", "line 1: a second ':' stands here"),
        ('a: "b" c\n', "line 1: text follows a value that has ended"),
        ("a: @b\n", "line 1: found character '@'"),
        ("[" * 5000, "too many levels"),
    ],
)
def test_what_is_no_yaml_is_said_in_words_with_its_line(text: str, found: str) -> None:
    with pytest.raises(ArchiveError) as caught:
        read(text)
    assert caught.value.found.startswith(found)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "needed: is missing"),
        ("inner: {count: many}", "inner.count: expected a whole number, such as 4, found 'many'"),
        ("inner: {count: 1.5}", "inner.count: expected a whole number, such as 4, found 1.5"),
        ("inner: {count: }", "inner.count: expected a whole number, such as 4, found nothing"),
        ("inner: {count: 0}", "inner.count: expected at least 1, found 0"),
        ("inner: {count: 10}", "inner.count: expected at most 9, found 10"),
        ("inner: {share: x}", "inner.share: expected a number, such as 0.5, found 'x'"),
        ("inner: {share: 0}", "inner.share: expected more than 0.0, found 0"),
        ("inner: {tested: perhaps}", "inner.tested: expected true or false, found 'perhaps'"),
        ("inner: {names: x}", "inner.names: expected a list, such as [a, b], found 'x'"),
        ("inner: {name: x}", "inner.name: no such key; did you mean names?"),
        (
            "inner: [x]",
            "inner: expected a mapping, such as {key: value}, or a text, such as cnn,"
            " or '8080' in quotes, found a list",
        ),
        ("words: 7", "words: expected a mapping, such as {key: value}, found 7"),
        ("title: 8080", "title: expected a text, such as cnn, or '8080' in quotes, found 8080"),
        ("title: A", "title: expected a text of the form ^[a-z]+$, found 'A'"),
        ("folder: {a: b}", "folder: expected a path, such as folder/file, found a mapping"),
        (f"words: {'x' * 99}", f"found '{'x' * 39}..."),
    ],
)
def test_a_wrong_value_says_what_is_taken_and_what_was_found(text: str, found: str) -> None:
    document = read(text)
    checked, problems = document.validate(Outer)
    assert checked is None
    assert any(str(problem).endswith(found) for problem in problems)
    assert all(problem.found == "is missing" or problem.line for problem in problems)


def test_what_one_problem_says_to_do_takes_the_place_of_the_general_remedy() -> None:
    document = read("needed: 1\nneded: 2\n")
    _, problems = document.validate(Outer)
    with pytest.raises(ArchiveError) as caught:
        document.refuse(problems, remedy="read the manual")
    assert str(caught.value) == (
        "file.yaml cannot be used: found line 2: neded: no such key; did you mean needed?"
    )
    with pytest.raises(ArchiveError, match="found 2 problems; read the manual"):
        document.refuse(problems * 2, remedy="read the manual")


def test_values_of_no_document_are_worded_alike() -> None:
    with pytest.raises(ConfigurationError) as caught:
        validate(Outer, {"inner": {"count": "x"}}, source="it", error=ConfigurationError)
    assert str(caught.value) == (
        "it cannot be used: found inner.count: expected a whole number, such as 4, found 'x';"
        " needed: is missing"
    )
