from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marwright.archive import Manifest
from marwright.archive.checks import modules
from marwright.archive.checks.findings import Finding, Severity
from marwright.archive.checks.source import check_source
from marwright.errors import UsageError

HANDLER = """\
class Handler:
    def initialize(self, context): ...
    def handle(self, data, context): ...
"""

PIECES = [
    HANDLER,
    "import helper\n",
    "from . import helper\n",
    "from .. import x\n",
    "from helper import *\n",
    "import a.b.c\n",
    "try:\n    import absent_one\nfinally:\n    pass\n",
    "if __name__ == '__main__':\n    class B: ...\n",
    "class B: ...\n",
    "handle = lambda d, c: open('labels.json').read()\n",
    "x = y = (z, *w) = '/home/me/x', open(f'{x}/y')\n",
    "with open('a') as a, open(a) as (b, c): pass\n",
    "for n in open(n): n += n / n\n",
    "self.x = self.x.parent / __file__\n",
    "match x:\n    case {'a': [*b]} if (b := 1): pass\n",
    "async def handle(d, c): return [x async for x in d if open('x')]\n",
    "import torch, pickle\ntorch.load(pickle.load(x), **y)\n",
    "(", ")", "\\\n", "'", "\t", "# coding: utf-7\n",
]  # fmt: skip


def check(
    folder: Path, source: str = HANDLER, *, python: str | None = None, **others: str
) -> list[Finding]:
    """Check a folder with handler.py and others; `a__in__b="..."` is a/b.py."""
    named = {key: others.pop(key) for key in ("model_file", "serialized_file") if key in others}
    handler = others.pop("handler", "handler.py")
    for name, text in {"handler": source, **others}.items():
        path = folder / f"{name.replace('__in__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    requirements = "requirements.txt" if (folder / "requirements.txt").is_file() else None
    manifest = Manifest("m", "1.0", handler, requirements_file=requirements, **named)
    return check_source(folder, manifest, python=python)


def places(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [(str(item.severity), item.rule.id, item.place) for item in findings]


def test_a_handler_without_fault_has_no_findings(tmp_path: Path) -> None:
    assert check(tmp_path) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("class A: ...\n\nclass B: ...", ("error", "H303", "handler.py:3")),
        ("x = 1", ("error", "H303", "handler.py")),
        ("class A:\n    def handle(self): ...", ("error", "H304", "handler.py:1")),
        ("\ndef f(:", ("error", "H302", "handler.py:2")),
        ("from .helper import x\n" + HANDLER, ("error", "H307", "handler.py:1")),
        (HANDLER + "import no_such_module", ("error", "H308", "handler.py:4")),
        (HANDLER + "import helper.inner", ("error", "H308", "handler.py:4")),
        (HANDLER + "P = namedtuple('P', 'x')", ("error", "H303", "handler.py:4")),
    ],
    ids=["two", "none", "method", "syntax", "relative", "missing", "no package", "namedtuple"],
)
def test_a_fault_is_found_with_its_line(
    tmp_path: Path, source: str, expected: tuple[str, str, str]
) -> None:
    assert places(check(tmp_path, source, helper="x = 1")) == [expected]


def test_all_faults_are_found_at_once(tmp_path: Path) -> None:
    found = check(tmp_path, "import no_a\nimport helper", helper="import no_b")
    assert places(found) == [
        ("error", "H303", "handler.py"),
        ("error", "H308", "handler.py:1"),
        ("error", "H308", "helper.py:1"),
    ]


@pytest.mark.parametrize(
    "handler", ["absent.py", "absent", "absent.py:f", ":", ".py", "..", "../.."]
)
def test_a_handler_that_is_not_inside_is_an_error(tmp_path: Path, handler: str) -> None:
    assert places(check(tmp_path, handler=handler)) == [("error", "H301", "")]


@pytest.mark.parametrize("handler", ["handler.py", "handler", "src/handler.py", "handler.py:serve"])
def test_a_handler_is_found_as_torchserve_finds_it(tmp_path: Path, handler: str) -> None:
    assert check(tmp_path, "def serve(d, c): ...\ndef handle(d, c): ...", handler=handler) == []


def test_a_handler_may_be_a_package(tmp_path: Path) -> None:
    source = "from . import inner\nfrom .absent import x\n" + HANDLER
    found = check(tmp_path, handler="package", package__in____init__=source, package__in__inner="")
    assert places(found) == [("error", "H308", "package/__init__.py:2")]


@pytest.mark.parametrize(
    ("source", "severities"),
    [
        ("def handle(d, c): ...", ["error", "error"]),
        (HANDLER, ["warning"]),
        ("def serve(d, c): ...", []),
        ("from helper import *", []),
    ],
    ids=["neither", "a class instead", "there", "not known"],
)
def test_a_named_function_has_to_be_there(
    tmp_path: Path, source: str, severities: list[str]
) -> None:
    found = check(tmp_path, source, handler="handler.py:serve", helper="def serve(d, c): ...")
    assert [str(item.severity) for item in found] == severities


@pytest.mark.parametrize(
    ("source", "python", "ids"),
    [
        ("match 1:\n    case _: x = 1\n", "3.9", ["H302"]),
        ("match 1:\n    case _: x = 1\n", "3.10", []),
        ("if (x := 1): pass\n", "3.7", ["H302"]),
        ("if (x := 1): pass\n", "3.8", []),
    ],
)
def test_syntax_is_judged_by_the_declared_python(
    tmp_path: Path, source: str, python: str, ids: list[str]
) -> None:
    found = check(tmp_path, source + HANDLER, python=python)
    assert [item.rule.id for item in found] == ids
    assert all(f"in Python {python}" in item.found for item in found)


@pytest.mark.parametrize("python", ["three", "2.7", "3", "3.x"])
def test_a_python_that_is_no_version_is_refused(tmp_path: Path, python: str) -> None:
    with pytest.raises(UsageError, match="no version of Python"):
        check(tmp_path, python=python)


def test_a_module_that_only_may_be_needed_is_a_warning_where_it_is_broken(tmp_path: Path) -> None:
    source = "try:\n    import helper\nexcept Exception:\n    helper = None\n" + HANDLER
    assert places(check(tmp_path, source, helper="x = (")) == [("warning", "H302", "helper.py:1")]


@pytest.mark.parametrize(
    "imports",
    [
        "if x:\n    import no_such_module\n",
        "try:\n    import no_such_module\nexcept ImportError:\n    pass\n",
        "def later():\n    import no_such_module\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import no_such_module\n",
        "import typing\nif typing.TYPE_CHECKING:\n    import no_such_module\n",
        "try:\n    import optional\nexcept ImportError:\n    pass\n",
    ],
    ids=["if", "try", "function", "typing", "typing by its module", "optional"],
)
def test_an_import_that_a_worker_does_not_need_may_be_missing(tmp_path: Path, imports: str) -> None:
    assert check(tmp_path, imports + HANDLER, optional="import no_such_module") == []


def test_what_stands_only_in_the_working_folder_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "only_here.py").touch()
    monkeypatch.chdir(tmp_path / "beside")
    monkeypatch.syspath_prepend(tmp_path / "beside")
    assert places(check(tmp_path, "import only_here\n" + HANDLER))[0][1] == "H308"


def test_the_requirement_that_would_bring_a_module_is_named(tmp_path: Path) -> None:
    (found,) = check(tmp_path, "import cv2\n" + HANDLER)
    assert found.remedy == "pack cv2.py, or add opencv-python-headless to --requirements-file"


@pytest.mark.parametrize(
    ("requirements", "severity"),
    [
        ("opencv-python-headless==4.10", Severity.WARNING),
        ("OpenCV_Python.Headless", Severity.WARNING),
        ("some-company-package>=1", Severity.WARNING),
        ("-r others.txt", Severity.WARNING),
        ("pyyaml\n--index-url https://example.org\n# cv2", Severity.ERROR),
        ("", Severity.ERROR),
    ],
    ids=["named", "other spelling", "unknown here", "another file", "cannot bring it", "empty"],
)
def test_a_module_that_a_requirement_may_bring_is_a_warning(
    tmp_path: Path, requirements: str, severity: Severity
) -> None:
    (tmp_path / "requirements.txt").write_text(requirements)
    found = check(tmp_path, "import cv2\n" + HANDLER)
    assert [item.severity for item in found if item.rule.id == "H308"] == [severity]


def test_a_module_that_a_changed_path_may_find_is_a_warning(tmp_path: Path) -> None:
    source = "import sys\nsys.path.append('lib')\nimport inner\n" + HANDLER
    assert places(check(tmp_path, source)) == [("warning", "H308", "handler.py:3")]


@pytest.fixture
def without_captum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a machine with captum look like one without."""
    is_installed = modules.is_installed
    monkeypatch.setattr(
        modules, "is_installed", lambda name: name != "captum" and is_installed(name)
    )


@pytest.mark.parametrize("handler", ["image_classifier", "text_classifier"])
def test_what_torchserves_own_handlers_need_is_a_warning(
    tmp_path: Path, without_captum: None, handler: str
) -> None:
    found = check(tmp_path, handler=handler)
    assert {item.severity for item in found} == {Severity.WARNING}
    assert "pip install captum" in found[0].remedy
    assert "at ts.torch_handler." in found[0].found


def test_what_a_base_class_of_torchserve_needs_is_found_too(
    tmp_path: Path, without_captum: None
) -> None:
    source = "from ts.torch_handler.image_classifier import ImageClassifier as I\nclass H(I): ..."
    (found,) = check(tmp_path, source)
    assert places([found]) == [("warning", "H308", "")]
    assert "'captum' at ts.torch_handler.vision_handler:11" in found.found


@pytest.mark.parametrize(
    ("name", "severity"), [("queue", Severity.WARNING), ("torch", Severity.ERROR)]
)
def test_a_module_that_hides_an_installed_one_is_found(
    tmp_path: Path, name: str, severity: Severity
) -> None:
    (found,) = check(tmp_path, **{name: "x = 1"})
    assert (found.rule.id, found.member, found.severity) == ("H309", f"{name}.py", severity)


@pytest.mark.parametrize(
    ("source", "severities"),
    [
        ("import torch\nclass Net(torch.nn.Module): ...", []),
        ("class A: ...\nclass B: ...", ["error"]),
        ("x = 1", ["error"]),
        ("x = (", ["error"]),
    ],
)
def test_the_model_file_is_judged_as_torchserves_own_handlers_do(
    tmp_path: Path, source: str, severities: list[str]
) -> None:
    found = check(tmp_path, handler="base_handler", model=source, model_file="model.py")
    assert [str(item.severity) for item in found] == severities


def test_a_handler_in_cpp_is_not_looked_for_in_python(tmp_path: Path) -> None:
    manifest = Manifest("m", "1.0", "libhandler.so:Handler", runtime="LSP")
    assert check_source(tmp_path, manifest) == []


def test_a_handler_of_its_own_may_have_any_model_file(tmp_path: Path) -> None:
    assert check(tmp_path, model="class A: ...\nclass B: ...", model_file="model.py") == []


def test_weights_that_torchserves_own_handlers_cannot_load_are_found(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "model.pt")
    found = check(tmp_path, handler="base_handler", serialized_file="model.pt")
    assert places(found) == [("error", "H311", "model.pt")]
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "model.pt"))
    assert check(tmp_path, handler="base_handler", serialized_file="model.pt") == []


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "source",
    ["x" + "(" * 500, "x = " + "-" * 20_000 + "1", "x = 1" + "+1" * 20_000, "#" * (3 << 20)],
    ids=["brackets", "signs", "sum", "megabytes"],
)
def test_hostile_source_is_a_finding_and_no_crash(tmp_path: Path, source: str) -> None:
    assert check(tmp_path, source)[0].rule.id == "H302"


@pytest.mark.timeout(20)
def test_deep_but_valid_source_is_read(tmp_path: Path) -> None:
    assert check(tmp_path, HANDLER + "x = " + "+".join(["1"] * 700)) == []


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(PIECES), max_size=12), st.binary(max_size=4), st.integers(0, 400))
def test_no_source_escapes(tmp_path: Path, pieces: list[str], noise: bytes, at: int) -> None:
    text = "".join(pieces).encode()
    (tmp_path / "handler.py").write_bytes(text[:at] + noise + text[at:])
    (tmp_path / "helper.py").write_bytes(text[at:])
    for finding in check_source(tmp_path, Manifest("m", "1.0", "handler.py")):
        assert finding.to_json()["id"].startswith("H3")
