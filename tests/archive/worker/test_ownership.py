from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import torch

from marwright.archive.worker.ownership import find_own


def test_a_file_below_a_root_is_named_relatively() -> None:
    assert find_own("/a/b/package/x.py", ["/c", "/a/b"]) == "package/x.py"
    assert find_own("/a/bc/x.py", ["/a/b"]) == ""
    assert find_own("<frozen os>", ["/a"]) == ""


def test_python_and_what_is_installed_is_nobodys_own() -> None:
    # As for a handler in a home folder that has all of Python below it.
    assert find_own(str(torch.__file__), [str(Path(torch.__file__).parents[4])]) == ""
    assert find_own(str(json.__file__), [str(Path(json.__file__).parents[2])]) == ""


def test_a_root_among_what_is_installed_owns_its_files() -> None:
    root = Path(sysconfig.get_path("purelib")) / "marwright" / "handlers"
    assert find_own(str(root / "x.py"), [str(root)]) == "x.py"
