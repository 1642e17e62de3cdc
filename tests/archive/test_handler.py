from __future__ import annotations

import importlib.machinery
import sys
import textwrap
from pathlib import Path

import pytest

from marwright.archive import HandlerSource
from marwright.archive.handler import list_ours
from marwright.errors import HandlerError, StorageError

HANDLER = """\
class Handler:
    def initialize(self, context): ...
    def handle(self, data, context): ...
"""
INDENTED = textwrap.indent(HANDLER, "    ")


def write_files(folder: Path, **sources: str) -> str:
    """Write `a__in__b="..."` as a/b.py and return the path of handler.py."""
    for name, source in sources.items():
        path = folder / f"{name.replace('__in__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return str(folder / "handler.py")


def find_names(handler: str) -> list[str]:
    return [name for name, _ in HandlerSource.find(handler).files()]


def test_our_handlers_are_found_by_name() -> None:
    assert {"image_classifier", "tensor"} <= set(list_ours())
    assert not {"batch_handler", "backend"} & set(list_ours())
    assert {"image_classifier.py", "image_input.py", "fast_worker.py"} <= set(
        find_names("image_classifier")
    )


def test_an_unknown_handler_is_refused_with_the_names_of_ours(tmp_path: Path) -> None:
    with pytest.raises(HandlerError, match=r"no handler file nonsense.*image_classifier"):
        HandlerSource.find("nonsense")
    with pytest.raises(HandlerError, match=r"no handler file .*absent\.py"):
        HandlerSource.find(str(tmp_path / "absent.py"))


def test_a_name_too_long_for_the_file_system_is_an_error_of_ours() -> None:
    with pytest.raises(StorageError, match="too long"):
        HandlerSource.find("a" * 300 + ".py")


@pytest.mark.parametrize(
    "source",
    [
        HANDLER,
        "def handle(data, context): ...",
        "class A: ...\nclass B: ...\ndef handle(data, context): ...",
        "class A: ...\nclass B: ...\nhandle = A()",
        "from json import dumps as handle",
        "from json import JSONEncoder\n" + HANDLER,
        "from json import JSONEncoder\nclass H(JSONEncoder): ...",
        f"if True:\n{INDENTED}else:\n{INDENTED}",
        HANDLER + "\nif __name__ == '__main__':\n    class Other: ...\n    import no_such_module",
        "class H:\n    def handle(self, d, c): ...\n    initialize = handle",
        "from json import *",
        "handle: object = print",
    ],
    ids=[
        "one class",
        "a function",
        "a function beside classes",
        "an assigned function",
        "an imported function",
        "imported classes do not count",
        "a subclass",
        "one class in two branches",
        "a program at the end",
        "a method by assignment",
        "an import of everything",
        "an annotated assignment",
    ],
)
def test_a_handler_that_torchserve_takes_is_taken(tmp_path: Path, source: str) -> None:
    handler = write_files(tmp_path, handler=source)
    assert find_names(handler) == ["handler.py"]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("x = 1", "H303 handler.py: none where TorchServe expects exactly one class"),
        ("class A: ...\nclass B: ...", r"A \(line 1\), B \(line 2\) where TorchServe expects"),
        ("if True:\n    class A: ...\nclass B: ...", r"A \(line 2\), B \(line 3\)"),
        ("try:\n    class A: ...\nfinally:\n    class B: ...", r"A \(line 2\), B \(line 4\)"),
        ("try:\n    x\nexcept A:\n    class A: ...\nclass B: ...", r"A \(line 4\), B \(line 5\)"),
        (
            "\nclass A:\n    def handle(self, d, c): ...",
            r"handler\.py:2: class A without a method ini",
        ),
        (
            "class A:\n    def initialize(self, c): ...",
            r"handler\.py:1: class A without a method han",
        ),
        ("class A: ...", "without a method initialize; .* class A without a method handle"),
        ("x = 1\ndef f(:\n", r"H302 handler\.py:2: invalid syntax"),
        ("x = '\0'", r"H302 handler\.py.*null bytes"),
        ("# coding: nonsense\n", r"H302 handler\.py: .*encoding.*nonsense"),
        ("from .helper import x\n" + HANDLER, r"H307 handler\.py:1: the worker knows no package"),
    ],
)
def test_what_would_kill_a_worker_is_refused_with_its_line(
    tmp_path: Path, source: str, problem: str
) -> None:
    handler = write_files(tmp_path, handler=source, helper="x = 1")
    with pytest.raises(HandlerError, match=problem):
        HandlerSource.find(handler)


def test_all_problems_of_a_handler_are_named_at_once(tmp_path: Path) -> None:
    handler = write_files(tmp_path, handler="from . import a\nimport helper", helper="x = (")
    with pytest.raises(HandlerError) as caught:
        HandlerSource.find(handler)
    found = caught.value.found
    assert "exactly one class" in found
    assert "H307 handler.py:1" in found
    assert "H302 helper.py:1" in found


def test_a_module_that_is_missing_is_left_to_the_checks_that_know_the_requirements(
    tmp_path: Path,
) -> None:
    assert find_names(write_files(tmp_path, handler="import no_such_module\n" + HANDLER))


def test_source_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "handler.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HandlerError, match=r"handler\.py"):
        HandlerSource.find(str(tmp_path / "handler.py"))


def test_a_dot_in_the_file_name_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, **{"my.handler": HANDLER})
    with pytest.raises(HandlerError, match="a dot in the name"):
        HandlerSource.find(str(tmp_path / "my.handler.py"))


def test_a_warning_of_the_compiler_is_no_error(tmp_path: Path) -> None:
    assert find_names(write_files(tmp_path, handler=HANDLER + 'x = "\\d"\n')) == ["handler.py"]


@pytest.mark.parametrize(
    "imports",
    [
        "import helper\n",
        "from helper import x\n",
        "try:\n    from .helper import x\nexcept ImportError:\n    from helper import x\n",
        "try:\n    import helper\nexcept ImportError:\n    pass\n",
        "def later():\n    import helper\n",
        "if True:\n    import helper\n",
    ],
    ids=["import", "from", "try or else", "optional", "in a function", "in if"],
)
def test_a_local_module_travels_however_it_is_imported(tmp_path: Path, imports: str) -> None:
    handler = write_files(tmp_path, handler=imports + HANDLER, helper="x = 1", other="y = 2")
    assert find_names(handler) == ["handler.py", "helper.py"]


def test_local_modules_are_followed_to_the_end(tmp_path: Path) -> None:
    handler = write_files(
        tmp_path,
        handler="import a\n" + HANDLER,
        a="import b",
        b="from package.inner import x",
        package__in____init__="",
        package__in__inner="from . import sibling\nimport c\nx = 1",
        package__in__sibling="",
        package__in__sub__in__deep="import d",
        c="",
        d="",
        unrelated="",
    )
    assert sorted(find_names(handler)) == [
        "a.py",
        "b.py",
        "c.py",
        "d.py",
        "handler.py",
        "package/__init__.py",
        "package/inner.py",
        "package/sibling.py",
        "package/sub/deep.py",
    ]


def test_a_package_travels_whole_with_what_it_reads(tmp_path: Path) -> None:
    handler = write_files(
        tmp_path, handler="import package\n" + HANDLER, package__in____init__="", package__in__x=""
    )
    for name in ("words.txt", "deep/more.bin", "__pycache__/x.pyc", ".hidden"):
        (tmp_path / "package" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "package" / name).touch()
    assert find_names(handler) == [
        "handler.py",
        "package/__init__.py",
        "package/deep/more.bin",
        "package/words.txt",
        "package/x.py",
    ]


def test_an_extension_module_beside_the_handler_travels(tmp_path: Path) -> None:
    handler = write_files(tmp_path, handler="import fast\n" + HANDLER)
    name = f"fast{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    (tmp_path / name).write_bytes(b"\x7fELF\0")
    assert find_names(handler) == ["handler.py", name]


def test_a_folder_of_an_installed_packages_name_is_no_package(tmp_path: Path) -> None:
    handler = write_files(tmp_path, handler="import yaml\n" + HANDLER, yaml__in__unrelated="")
    assert find_names(handler) == ["handler.py"]


@pytest.mark.timeout(10)
def test_an_import_cycle_ends(tmp_path: Path) -> None:
    handler = write_files(
        tmp_path, handler="import a\n" + HANDLER, a="import b", b="import a, handler"
    )
    assert find_names(handler) == ["handler.py", "a.py", "b.py"]


def test_a_syntax_error_in_a_local_module_names_that_module(tmp_path: Path) -> None:
    handler = write_files(tmp_path, handler="import helper\n" + HANDLER, helper="\n\nx = (")
    with pytest.raises(HandlerError, match=r"H302 helper\.py:3"):
        HandlerSource.find(handler)


def test_nothing_of_the_handler_is_run(tmp_path: Path) -> None:
    handler = write_files(tmp_path, handler="raise SystemExit('it ran')\n" + HANDLER)
    assert find_names(handler) == ["handler.py"]


def test_the_handler_of_the_working_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, handler="import helper\n" + HANDLER, helper="")
    monkeypatch.chdir(tmp_path)
    assert find_names("handler.py") == ["handler.py", "helper.py"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # ts leaves its version file open
@pytest.mark.parametrize(
    "source",
    [
        HANDLER,
        "handle = print",
        "class A: ...\nclass B: ...",
        HANDLER + "from collections import namedtuple\nPair = namedtuple('Pair', 'a b')",
        HANDLER + "from enum import Enum\nColour = Enum('Colour', 'red blue')",
        HANDLER + "from typing import NewType\nIndex = NewType('Index', int)",
    ],
)
def test_torchserve_itself_judges_as_we_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    from ts.model_loader import TsModelLoader

    name = f"handler_{abs(hash(source))}"
    path = write_files(tmp_path, **{name: source}).replace("handler.py", f"{name}.py")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    try:
        HandlerSource.find(path)
        ours = True
    except HandlerError:
        ours = False
    try:
        TsModelLoader().load("m", str(tmp_path), f"{name}.py")
        theirs = True
    except ValueError:
        theirs = False
    finally:
        sys.modules.pop(name, None)
    assert ours == theirs
