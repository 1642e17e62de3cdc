from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from marwright.archive.worker import Model
from marwright.errors import HandlerError

Unpacked = Callable[..., Path]

LAZY = """
import early
def handle(data, context):
    if data is None:
        return None
    import late
    import package.inner
    return [early.NAME + late.NAME + package.inner.NAME for row in data]
"""
GREEDY = """
import logging, os, sys, torch
def handle(data, context):
    seen = [torch.get_num_threads(), len(logging.root.handlers), "/nowhere" in sys.path]
    torch.set_num_threads(3)
    logging.basicConfig(level=logging.DEBUG, force=True)
    sys.path.append("/nowhere")
    os.chdir(os.path.dirname(__file__) + "/MAR-INF")
    if data and data[0]["body"] == b"fail":
        raise ValueError
    return [seen for row in data or ()]
"""


def named(name: str) -> dict[str, str]:
    text = f"NAME = '{name}'"
    return {"handler.py": LAZY, "early.py": text, "late.py": text, "package/inner.py": text}


def look() -> tuple[object, ...]:
    """Return what a model must leave as it was."""
    handlers = logging.root.handlers[:], logging.root.level, logging.root.filters[:]
    return sys.path[:], Path.cwd(), handlers, torch.get_num_threads(), sys.dont_write_bytecode


def test_modules_of_one_name_live_side_by_side(unpacked: Unpacked) -> None:
    one, two = (unpacked(named(name), folder=name) for name in ("one", "two"))
    with Model(one) as first, Model(two) as second:
        for _ in range(2):
            assert first.predict([b""])[0].body == b"oneoneone"
            assert second.predict([b""])[0].body == b"twotwotwo"


def test_nothing_is_left_behind(unpacked: Unpacked) -> None:
    before, modules = look(), set(sys.modules)
    folder = unpacked(named("one"))
    with Model(folder) as model:
        model.predict([b""])
        assert look() == before
        assert {path.name for path in model.sources} >= {"handler.py", "early.py", "late.py"}
    assert look() == before
    names = {"handler", "early", "late", "package"}
    assert not [name for name in set(sys.modules) - modules if name.split(".")[0] in names]
    assert not [entry for entry in sys.path_importer_cache if entry.startswith(str(folder))]


def test_what_a_handler_changes_is_its_own(unpacked: Unpacked) -> None:
    before = look()
    with Model(unpacked(GREEDY)) as model:
        assert look() == before
        assert model.predict([b""])[0].json() == [3, 1, True]
        assert look() == before
        assert model.predict([b"fail"])[0].status == 503
        assert look() == before


def test_torchserve_adds_no_log_handler_to_the_process(
    unpacked: Unpacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    with Model(unpacked("def handle(data, context): return ['x' for _ in data or ()]")) as model:
        model.predict([b""])
    assert logging.root.handlers == []


def test_nothing_is_left_where_loading_fails(unpacked: Unpacked, tmp_path: Path) -> None:
    before = look()
    with pytest.raises(HandlerError):
        Model(unpacked({"handler.py": "import early\n1 / 0", "early.py": ""}))
    assert look() == before
    assert not {"handler", "early"} & sys.modules.keys()
    assert not [entry for entry in sys.path_importer_cache if entry.startswith(str(tmp_path))]


def test_a_module_of_the_process_keeps_its_name(
    unpacked: Unpacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {name: ModuleType(name) for name in ("early", "late", "handler")}
    for name, module in ours.items():
        monkeypatch.setitem(sys.modules, name, module)
    with Model(unpacked(named("one"))) as model:
        assert model.predict([b""])[0].body == b"oneoneone"
        assert sys.modules["late"] is ours["late"]
    assert all(sys.modules[name] is module for name, module in ours.items())


def test_the_working_folder_is_not_searched(
    unpacked: Unpacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a worker it would not be found either.
    (tmp_path / "only_here.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(HandlerError, match="only_here"):
        Model(unpacked("import only_here"))


def test_a_handler_may_leave_a_folder_that_is_gone(unpacked: Unpacked) -> None:
    source = """
import os, tempfile
def handle(data, context):
    if data:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
        return ["x"]
"""
    before = look()
    with Model(unpacked(source)) as model:
        for _ in range(2):
            assert model.predict([b""])[0].status == 200
    assert look() == before


def test_what_a_handler_imports_from_elsewhere_stays(unpacked: Unpacked) -> None:
    source = "def handle(data, context):\n    import colorsys\n    return ['x' for _ in data or ()]"
    with Model(unpacked(source)) as model:
        model.predict([b""])
    assert "colorsys" in sys.modules
