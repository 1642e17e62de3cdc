from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from marwright.archive import Manifest
from marwright.archive.checks.source import check_source

IMPORTS = """\
import json, os, pickle, pathlib, sys, torch
import numpy as np
from PIL import Image
from pathlib import Path
from torch import load
"""


def check(folder: Path, body: str, *, above: str = "") -> list[tuple[str, str, int | None]]:
    """Return what is found in a handler whose `initialize` is `body`; lines count from there."""
    head = f"{IMPORTS}{above}\nclass Handler:\n    def handle(self, data, context): ...\n"
    head += "    def initialize(self, context):\n"
    (folder / "handler.py").write_text(head + textwrap.indent(body, " " * 8), encoding="utf-8")
    start = head.count("\n")
    return [
        (str(item.severity), item.rule.id, item.line and item.line - start)
        for item in check_source(folder, Manifest("m", "1.0", "handler.py"))
    ]


@pytest.mark.parametrize(
    "body",
    [
        "open('labels.json')",
        "open('./labels.json', 'rb')",
        "json.load(open('labels.json', mode='r'))",
        "json.loads(Path('labels.json').read_text())",
        "d = context.system_properties.get('model_dir')\nopen(os.path.join(d, 'labels.json'))",
        "d = context.system_properties['model_dir']\nopen(d + '/labels.json')",
        "d = context.system_properties['model_dir']\nopen(f'{d}/labels.json')",
        "d = Path(context.system_properties['model_dir'])\n(d / 'labels.json').read_text()",
        "d = Path(context.system_properties['model_dir'])\nd.joinpath('labels.json').open()",
        "(Path(__file__).resolve().parent / 'labels.json').read_bytes()",
        "open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'labels.json'))",
        "name = 'labels.json'\nwith open(name) as stream:\n    stream.read()",
        "self.folder = Path(context.system_properties['model_dir'])\n"
        "(self.folder / 'labels.json').read_text()",
        "torch.jit.load('labels.json', 'cuda')",
        "np.load('labels.json')",
        "Image.open('labels.json')",
    ],
)
def test_a_file_that_is_opened_and_not_inside_is_an_error(tmp_path: Path, body: str) -> None:
    last = body.count("\n") + (not body.endswith("stream.read()"))
    assert check(tmp_path, body) == [("error", "H321", last)]
    (tmp_path / "labels.json").touch()
    assert check(tmp_path, body) == []


@pytest.mark.parametrize(
    "body",
    [
        "if context:\n    open('labels.json')",
        "try:\n    open('labels.json')\nexcept OSError:\n    pass",
        "if not context:\n    return\nopen('labels.json')",
        "for i in context:\n    open('labels.json')",
        "def later():\n    open('labels.json')",
        "x = context or open('labels.json')",
        "torch.hub.download(os.path.join(context.model_dir, 'labels.json'))",
        "import zipfile\nzipfile.ZipFile(context.x).extractall('.')\nopen('labels.json')",
    ],
    ids=["if", "try", "return", "loop", "function", "or", "only named", "unpacked"],
)
def test_a_file_that_may_not_be_opened_or_may_appear_is_a_warning(
    tmp_path: Path, body: str
) -> None:
    assert [item[:2] for item in check(tmp_path, body)] == [("warning", "H321")]


@pytest.mark.parametrize(
    "body",
    [
        "if os.path.isfile('labels.json'):\n    open('labels.json')",
        "path = Path('labels.json')\nif path.exists():\n    path.read_text()",
        "open('labels.json', 'w')",
        "Path('cache').mkdir()\nopen('cache/labels.json')",
        "Path('labels.json').write_text('x')\nopen('labels.json')",
        "open(context.manifest['model']['serializedFile'])",
        "open(os.path.join(context.folder, 'labels.json'))",
        "name = 'a'\nname = 'b'\nopen(name)",
        "for name in context.names:\n    open(name)",
        "open(name='labels.json') if 0 else print('labels.json')",
        "open('labels.json', context.mode)",
        "Image.open(context.body).tobytes()",
        "torch.hub.load('owner/repository', 'labels.json')",
    ],
)
def test_a_file_that_need_not_be_inside_is_left_alone(tmp_path: Path, body: str) -> None:
    assert check(tmp_path, body) == []


def test_one_functions_names_are_not_anothers(tmp_path: Path) -> None:
    above = (
        "def f(path):\n    return open(path)\ndef g():\n    path = 'labels.json'\n    return path\n"
    )
    assert check(tmp_path, "pass", above=above) == []


def test_a_constant_of_the_module_or_class_is_followed(tmp_path: Path) -> None:
    assert check(tmp_path, "open(NAME)", above="NAME = 'labels.json'\n") == [("error", "H321", 1)]
    assert [item[1] for item in check(tmp_path, "open(self.name)\nname = 1")] == []


@pytest.mark.parametrize(
    "body",
    [
        "torch.jit.load('/home/me/model.pt')",
        "open('/data/labels.json')",
        "Path('/opt/models') / 'labels.json'",
        "open(r'C:\\models\\labels.json')",
        "sys.path.append('/home/me/project')",
        "path = '~/labels.json'",
        "open(os.path.join('/data', 'labels.json'))",
        "x = f'/home/me/{context.name}'",
    ],
)
def test_an_absolute_path_is_a_warning(tmp_path: Path, body: str) -> None:
    assert check(tmp_path, body) == [("warning", "H320", 1)]


@pytest.mark.parametrize(
    "body",
    [
        "open('/dev/null')",
        "open('/tmp/x', 'w')",
        "x = '/predictions/cnn'",
        "x = 'https://example.org/home/me'",
        "'/home/me in a docstring'",
        "x = '/'",
        "os.path.exists('/data/labels.json')",
    ],
)
def test_a_text_that_is_no_path_of_another_machine_is_left_alone(tmp_path: Path, body: str) -> None:
    assert check(tmp_path, body) == []


@pytest.mark.parametrize(
    "body",
    [
        "torch.load(context.path)",
        "load(context.path)",
        "torch.load(context.path, weights_only=False)",
        "pickle.load(context.stream)",
        "pickle.loads(context.body)",
        "np.load(context.path, allow_pickle=True)",
    ],
)
def test_a_pickle_that_is_loaded_is_a_warning(tmp_path: Path, body: str) -> None:
    assert check(tmp_path, body) == [("warning", "H322", 1)]


@pytest.mark.parametrize(
    "body",
    [
        "torch.load(context.path, weights_only=True)",
        "torch.load(context.path, weights_only=context.only)",
        "torch.load(context.path, **context.options)",
        "np.load(context.path)",
        "json.load(context.stream)",
    ],
)
def test_what_loads_tensors_alone_is_left_alone(tmp_path: Path, body: str) -> None:
    assert check(tmp_path, body) == []


def test_the_modules_beside_the_handler_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("open('/home/me/x')\nopen('y.json')\n")
    (tmp_path / "unused.py").write_text("open('/home/me/x')\n")
    found = check(tmp_path, "pass", above="import helper\n")
    assert [item[:2] for item in found] == [("warning", "H320"), ("error", "H321")]
