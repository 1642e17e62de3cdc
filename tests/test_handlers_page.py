"""What docs/handlers.md shows is what the handlers do."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

from marwright.archive import Archive, HandlerSettings, Spec, pack_spec
from marwright.archive.spec import Backend


@pytest.fixture
def text(root: Path) -> str:
    return (root / "docs/handlers.md").read_text("utf-8")


def list_rows(text: str, heading: str) -> list[str]:
    """Return the first column's code words of the table below a heading."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = section.partition("|---|")[2].splitlines()
    firsts = [line.split("|")[1] for line in rows if line.startswith("| `")]
    return [word for first in firsts for word in re.findall(r"`([^`]+)`", first)]


def find_example(text: str) -> str:
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return str(example)


def test_the_handler_shown_has_at_most_20_lines(text: str) -> None:
    assert len([line for line in find_example(text).splitlines() if line.strip()]) <= 20


def write_folder(root: Path, text: str, folder: Path) -> None:
    """Lay out what the page says: the handler shown among marwright's own, model, vocabulary."""
    for path in (root / "handlers").glob("[!_]*.py"):
        shutil.copy(path, folder)
    (folder / "sentiment.py").write_text(find_example(text))
    (folder / "vocabulary.txt").write_text("good bad")
    model = torch.nn.Linear(2, 1)
    model.weight.data, model.bias.data = torch.tensor([[4.0, -4.0]]), torch.zeros(1)
    torch.jit.script(model).save(folder / "model.pt")


def test_the_handler_shown_answers(root: Path, text: str, tmp_path: Path) -> None:
    write_folder(root, text, tmp_path)
    spec = Spec.create(
        name="sentiment", handler="sentiment.py", model="model.pt", files=["vocabulary.txt"]
    )
    packed = pack_spec(spec, folder=tmp_path, out=tmp_path / "sentiment.mar")
    with Archive.open(packed.path) as archive, archive.load() as loaded:
        good, bad, odd = loaded.predict([b"a good day", b"bad bad", b"odd"])
    assert (good.json(), bad.json()) == ({"positive": 0.982}, {"positive": 0.0})
    assert (odd.status, odd.json()["status"]) == (422, 422)


def test_every_setting_is_shown(text: str) -> None:
    assert {*list_rows(text, "Settings"), "pad_value"} == set(HandlerSettings.model_fields)


def test_every_backend_is_shown(text: str) -> None:
    assert list_rows(text, "Backends") == list(get_args(Backend))


def test_every_metric_is_shown(root: Path, text: str) -> None:
    declared = yaml.safe_load((root / "src/marwright/server/metrics.yaml").read_text("utf-8"))
    ours = {item["name"] for item in declared["model_metrics"]["counter"]}
    shown, last = set(), ""
    for word in list_rows(text, "Metrics"):
        last = word if not word.startswith("_") else last
        shown.add(word if not word.startswith("_") else last.replace("_bucket", word))
    assert shown == ours


def test_the_spec_shown_packs_the_handler_shown(root: Path, text: str, tmp_path: Path) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    spec = Spec.create(**yaml.safe_load(shown))
    write_folder(root, text, tmp_path)
    assert pack_spec(spec, folder=tmp_path, out=tmp_path / "sentiment.mar").name == "sentiment"
