from __future__ import annotations

import builtins
import re

import pytest

from marwright import errors
from marwright.errors import AnswerError, MarwrightError, ReleaseError, StorageError, UsageError

CLASSES = {
    name: member
    for name, member in vars(errors).items()
    if isinstance(member, type) and issubclass(member, MarwrightError)
}

BUILTINS: dict[str, type[BaseException]] = {
    "MarwrightError": Exception,
    "ArchiveError": ValueError,
    "ConfigurationError": ValueError,
    "ConnectionFailedError": ConnectionError,
    "DataError": ValueError,
    "ExportError": ValueError,
    "InputRejectedError": ValueError,
    "ModelNotFoundError": LookupError,
    "NoServerError": LookupError,
    "NotReadyError": TimeoutError,
    "RequestTimeoutError": TimeoutError,
    "RunError": ValueError,
    "ServerError": RuntimeError,
    "StorageError": OSError,
    "TokenRejectedError": PermissionError,
    "UsageError": ValueError,
}


def make_error(kind: type[MarwrightError], message: str = "it failed") -> MarwrightError:
    if issubclass(kind, AnswerError):
        return kind(message, status=503)
    return kind(message)


def read_tree() -> dict[str, str]:
    """Return each class drawn in the docstring with the class that it hangs from."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"([│├└─ ]*)(\w+Error)\b", line):
            depth = len(match[1]) // 4
            parents[match[2]] = path[depth - 1] if depth else ""
            path[depth:] = [match[2]]
    return parents


def test_every_class_is_exported_and_nothing_else() -> None:
    assert set(errors.__all__) == set(CLASSES)


def test_exports_are_sorted_as_people_read() -> None:
    assert errors.__all__ == sorted(errors.__all__, key=str.casefold)


def test_the_tree_in_the_docstring_is_the_true_one() -> None:
    true = {
        name: next((base.__name__ for base in kind.__bases__ if base in CLASSES.values()), "")
        for name, kind in CLASSES.items()
    }
    assert read_tree() == true


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_says_when_it_is_raised(name: str) -> None:
    assert (CLASSES[name].__doc__ or "").strip()


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_also_the_builtin_that_it_specialises(name: str) -> None:
    bases = [base for base in CLASSES[name].__bases__ if base.__module__ == builtins.__name__]
    assert bases == ([BUILTINS[name]] if name in BUILTINS else [])


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_made_the_same_way_and_keeps_its_message(name: str) -> None:
    error = make_error(CLASSES[name], "it failed")
    assert str(error) == error.message == "it failed"
    assert error.args == ("it failed",)


@pytest.mark.parametrize("name", CLASSES)
def test_only_wrong_usage_exits_with_2(name: str) -> None:
    assert CLASSES[name].exit_status == (2 if name == "UsageError" else 1)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, "it failed"),
        ({"expected": "a"}, "it failed: expected a"),
        ({"found": "b"}, "it failed: found b"),
        ({"expected": "a", "found": "b"}, "it failed: expected a, found b"),
        ({"remedy": "do c"}, "it failed; do c"),
        ({"expected": "a", "found": "b", "remedy": "do c"}, "it failed: expected a, found b; do c"),
        ({"found": "b", "detail": "several\nlines"}, "it failed: found b"),
    ],
)
def test_an_error_is_one_line(fields: dict[str, str], line: str) -> None:
    assert str(MarwrightError("it failed", **fields)) == line
    assert str(StorageError("it failed", **fields)) == line  # OSError has a __str__ of its own


def test_json_holds_the_fields_that_were_given() -> None:
    error = UsageError("it failed", expected="a", remedy="do c", detail="several\nlines")
    assert error.to_json() == {
        "error": "UsageError",
        "message": "it failed",
        "expected": "a",
        "remedy": "do c",
        "detail": "several\nlines",
    }


def test_json_of_an_answer_holds_its_status() -> None:
    error = errors.OverloadedError("busy", status=503, body=b"{}", remedy="wait")
    assert error.to_json() == {
        "error": "OverloadedError",
        "message": "busy",
        "remedy": "wait",
        "status": 503,
    }
    assert error.body == b"{}"


def test_an_operating_system_error_of_ours_has_no_number() -> None:
    error = StorageError("cannot write x", found="No space left on device")
    assert (error.errno, error.filename) == (None, None)


def test_an_error_is_told_as_json_and_understood_again() -> None:
    error = ReleaseError("no", expected="a", found="b", remedy="c", detail="d\ne")
    again = ReleaseError.from_json(error.to_json())
    assert (str(again), again.detail) == (str(error), error.detail)
    assert ReleaseError.from_json({"message": "no"}).to_json() == {
        "error": "ReleaseError",
        "message": "no",
    }
