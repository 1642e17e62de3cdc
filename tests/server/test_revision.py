from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marwright.errors import ConfigurationError
from marwright.server.deployment import Deployment
from marwright.server.revision import find_entry, remove_entry, revise, set_default, set_entry

Change = Callable[[dict[str, Any]], None]
BOTH = ["cnn.mar", "cnn-2.0.mar"]


@pytest.fixture
def path(tmp_path: Path, store: Path) -> Path:
    """A deploy.yaml yet to be written, beside a store with two versions of cnn."""
    (tmp_path / "store").mkdir()
    for name in BOTH:
        shutil.copy(store / name, tmp_path / "store")
    return tmp_path / "deploy.yaml"


def alter(path: Path, text: str, change: Change) -> str:
    """Return a file, less its store, as it is after a change; ONE and TWO stand for archives."""
    text = text.replace("ONE", BOTH[0]).replace("TWO", BOTH[1])
    path.write_text(f"store: store\n{text}")
    revise(path, change)
    changed = path.read_text().removeprefix("store: store\n")
    return changed.replace(BOTH[0], "ONE").replace(BOTH[1], "TWO")


def set_workers(document: dict[str, Any]) -> None:
    set_entry(document, BOTH[0], {"workers": 3, "queue": 9})


def list_comments(text: str) -> list[str]:
    return sorted(re.findall(r"#.*", text))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "models:\n- archive: ONE  # a\n\n# next\n- TWO\n",
            "models:\n- archive: ONE  # a\n  workers: 3\n  queue: 9\n\n# next\n- TWO\n",
        ),
        (
            "models:\n- ONE  # a\n# b\n",
            "models:\n- archive: ONE  # a\n  workers: 3\n  queue: 9\n# b\n",
        ),
        (
            "models:\n    -   'ONE'\n    -   TWO\nlimits:\n      queue:   5   # few\n",
            "models:\n    -   archive: 'ONE'\n        workers: 3\n        queue: 9\n    -   TWO\n"
            "limits:\n      queue:   5   # few\n",
        ),
        ("models: [TWO]\n", "models: [TWO, {archive: ONE, workers: 3, queue: 9}]\n"),
        (
            "models: [TWO,  # two\n  {archive: ONE,\n  # one\n  workers: 1}]\nname:    a\n",
            "# two\n# one\nmodels: [TWO, {archive: ONE, workers: 3, queue: 9}]\nname:    a\n",
        ),
        (
            "models:  # all of them\nname: a\n",
            "models:  # all of them\n- TWO\n- archive: ONE\n  workers: 3\n  queue: 9\nname: a\n",
        ),
        (
            "name: a\n# end\n",
            "name: a\n# end\nmodels:\n- TWO\n- archive: ONE\n  workers: 3\n  queue: 9\n",
        ),
        (
            "models:\n- TWO # a\n\n# b\nname: a\n",
            "models:\n- TWO # a\n- archive: ONE\n  workers: 3\n  queue: 9\n\n# b\nname: a\n",
        ),
        (  # ruamel.yaml 0.19 would join the lines of the new entry
            "models:\n\n- {archive: TWO}  # a\nname: a\n",
            "models:\n\n- {archive: TWO}  # a\n- archive: ONE\n  workers: 3\n  queue: 9\nname: a\n",
        ),
        (
            "models:\n- archive: ONE\n  devices:\n  - 0  # a\n  # b\n",
            "models:\n- archive: ONE\n  devices:\n  - 0  # a\n  workers: 3\n  queue: 9\n  # b\n",
        ),
        (
            "models:\n- &it ONE\nname: *it  # the same\n",
            "models:\n- archive: &it ONE\n  workers: 3\n  queue: 9\nname: *it  # the same\n",
        ),
        (
            "models:\n- {archive: TWO, workers: &n 4}\n- {archive: ONE, workers: *n, queue: 1}\n",
            "models:\n- {archive: TWO, workers: &n 4}\n- {archive: ONE, workers: 3, queue: 9}\n",
        ),
    ],
)
def test_an_entry_is_set_in_the_form_that_it_has(path: Path, before: str, after: str) -> None:
    assert alter(path, before, set_workers) == after


def test_what_stands_around_the_document_stays(path: Path) -> None:
    text = "%YAML 1.1\n# first\n---  # here\nstore: store\nmodels: [cnn.mar]\n...\n# last\n"
    path.write_text(text)
    revise(path, set_workers)
    entry = "{archive: cnn.mar, workers: 3, queue: 9}"
    assert path.read_text() == text.replace("cnn.mar", entry)


def test_lines_that_only_yaml_tells_apart_stay(path: Path) -> None:
    rest = (
        "access: { tokens:   off }\nlimits: {queue: 0x10,\n  connections: 1_000} # a\n"
        'logging:\n    folder: "a\\\n      b"\nname:\n  ~\n'
        "properties: {\n  prefer_direct_buffer: yes, # b\n  }\n"
    )
    assert alter(path, f"models: [ONE]\n{rest}", set_workers).endswith(f"\n{rest}")


def test_line_ends_of_another_system_stay(path: Path) -> None:
    path.write_bytes(b"store: store\r\nmodels:\r\n- cnn.mar  # a\r\n")
    revise(path, set_workers)
    assert path.read_bytes() == (
        b"store: store\r\nmodels:\r\n- archive: cnn.mar  # a\r\n  workers: 3\r\n  queue: 9\r\n"
    )


def test_a_change_of_nothing_does_not_write(path: Path) -> None:
    path.write_text("store: store\n")
    stamp = path.stat()
    revise(path, lambda document: set_entry(document, BOTH[0], {"workers": None}))
    assert path.stat() == stamp


def test_a_file_is_made_where_there_is_none(path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["store"] = "store"
        set_workers(document)

    revise(path, change)
    assert path.read_text() == (
        "store: store\nmodels:\n- archive: cnn.mar\n  workers: 3\n  queue: 9\n"
    )


def test_a_link_stays_a_link(path: Path) -> None:
    path.write_text("store: store\n")
    link = path.with_name("link.yaml")
    link.symlink_to(path.name)
    revise(link, set_workers)
    assert link.is_symlink()
    assert "workers: 3" in path.read_text()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "models:\n- archive: ONE\n  default: true  # the old one\n  # a\n- TWO\n# b\n",
            "models:\n- archive: ONE\n  # a\n- archive: TWO\n  default: true\n# b\n",
        ),
        (
            "models: [{archive: ONE, default: true}, TWO]\n",
            "models: [{archive: ONE}, {archive: TWO, default: true}]\n",
        ),
        ("models:\n- ONE\n", "models:\n- ONE\n- archive: TWO\n  default: true\n"),
        (
            "models:\n- default: true\n  # a\n  archive: ONE\n- {archive: TWO, default: off}\n",
            "models:\n-\n  # a\n  archive: ONE\n- {archive: TWO, default: true}\n",
        ),
    ],
)
def test_one_version_of_a_model_is_the_default(path: Path, before: str, after: str) -> None:
    assert alter(path, before, lambda it: set_default(it, BOTH[1], BOTH)) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("models:\n# a\n- ONE  # b\n# c\n- TWO\n", "models:\n# a\n# c\n- TWO\n"),
        (
            "models:\n- TWO  # a\n# b\n- archive: ONE  # c\n  workers: 1  # d\n\n# e\nname: a\n",
            "models:\n- TWO  # a\n# b\n\n# e\nname: a\n",
        ),
        ("models:\n- ONE\n# a\nname: a\n", "models: []\n# a\nname: a\n"),
        ("models: [ONE, TWO]\n", "models: [TWO]\n"),
        ("name: a\n", "name: a\nmodels:\n- TWO\n"),
        ("models: [TWO]\n", "models: [TWO]\n"),
    ],
)
def test_an_entry_is_removed_and_comments_below_it_stay(
    path: Path, before: str, after: str
) -> None:
    assert alter(path, before, lambda document: remove_entry(document, BOTH[0])) == after


@pytest.mark.parametrize("threads", [4, None])
def test_threads_of_a_shared_handler_change_for_one_entry(path: Path, threads: int | None) -> None:
    text = (
        "models:\n- archive: TWO\n  handler: &fast\n    threads: 2  # a\n    max_batch: 8\n"
        "- archive: ONE\n  handler: *fast  # b\n"
    )
    changed = alter(path, text, lambda document: set_entry(document, BOTH[0], {"threads": threads}))
    assert list_comments(changed)[-1] == "# b"
    two, one = yaml.safe_load(changed)["models"]
    assert two["handler"] == {"threads": 2, "max_batch": 8}
    assert one.get("threads") == one["handler"].get("threads") == threads


def test_a_change_that_would_reach_another_entry_is_refused(path: Path) -> None:
    text = "models:\n- &one\n  archive: ONE\n  workers: 1\n- {<<: *one, archive: TWO}\n"
    with pytest.raises(ConfigurationError, match="its anchors and merges"):
        alter(path, text, set_workers)
    assert path.read_text().count("workers: 1") == 1


def test_a_result_that_cannot_be_used_is_not_written_and_named_by_its_file(path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"deploy\.yaml.*absent\.mar") as caught:
        alter(path, "models: [ONE]\n", lambda document: set_entry(document, "absent.mar", {}))
    assert "/." not in str(caught.value)
    assert path.read_text() == "store: store\nmodels: [cnn.mar]\n"
    assert [item.name for item in path.parent.iterdir() if item.name.startswith(".")] == []


def test_an_entry_that_cannot_be_used_may_be_removed(path: Path) -> None:
    text = "models: [ONE, absent.mar]\n"
    changed = alter(path, text, lambda document: remove_entry(document, "absent.mar"))
    assert changed == "models: [ONE]\n"


@pytest.mark.parametrize(
    "value", ["&a [*a]", "[" * 80 + "]" * 80, "[*b" + ", *b" * 200 + "]", "'x'\n# y"]
)
def test_a_strange_file_is_changed_or_refused_as_a_whole(path: Path, value: str) -> None:
    text = f"name: &b b\nproperties:\n  prefer_direct_buffer: {value}\nmodels: [cnn.mar]\n"
    text = f"store: store\n{text}"
    path.write_text(text)
    try:
        revise(path, set_workers)
    except ConfigurationError:
        assert path.read_text() == text
    else:
        assert "workers: 3" in path.read_text()


def test_find_entry_knows_both_forms() -> None:
    document = {"models": ["a.mar", {"archive": "b.mar"}]}
    assert [find_entry(document, name) for name in ("a.mar", "b.mar", "c.mar")] == [0, 1, None]


@st.composite
def deployments(draw: st.DrawFn) -> str:
    """Return a deploy.yaml in some of the forms that people write."""
    notes = iter(range(1000))

    def note() -> str:
        return draw(st.sampled_from(["", f"  # {next(notes)}"]))

    def lines(indent: str = "") -> str:
        return "".join(
            draw(st.sampled_from(["\n", f"{indent}# {next(notes)}\n"]))
            for _ in range(draw(st.integers(0, 2)))
        )

    def entry(name: str, indent: str) -> str:
        quote = draw(st.sampled_from(["", "'", '"']))
        name = f"{quote}{name}{quote}"
        keys = draw(st.permutations(["workers", "queue", "handler"]))[: draw(st.integers(0, 3))]
        values = {"workers": "2", "queue": f"&q{next(notes)} 7", "handler": "{max_batch: 0x4}"}
        pairs = [f"{key}: {values[key]}" for key in keys]
        if not keys and draw(st.booleans()):
            return f"{name}{note()}\n"
        if draw(st.booleans()):
            space = draw(st.sampled_from(["", " "]))
            inner = draw(st.sampled_from([", ", f",{note()}\n{indent}   "]))
            text = inner.join([f"archive: {name}", *pairs])
            return f"{{{space}{text}{space}}}{note()}\n"
        if "handler" in keys and draw(st.booleans()):
            text = f"handler:{note()}\n{lines(indent)}{indent}    max_batch: 4"
            pairs[keys.index("handler")] = text
        return f"archive: {name}{note()}\n" + "".join(
            f"{lines(indent)}{indent}{pair}{note()}\n" for pair in pairs
        )

    offset = draw(st.sampled_from(["", "  ", "    "]))
    dash = draw(st.sampled_from(["- ", "-   "]))
    names = draw(st.permutations(BOTH))[: draw(st.integers(1, 2))]
    models = "".join(
        f"{lines(offset)}{offset}{dash}{entry(name, offset + ' ' * len(dash))}" for name in names
    )
    parts = [
        f"store: store{note()}\n",
        f"models:{note()}\n{models}",
        f"limits:\n{lines('   ')}   connections:  10{note()}\n",
        f"access: {{ tokens: off,{note()}\n  token_minutes: 5 }}{note()}\n",
    ]
    start = draw(st.sampled_from(["", f"---{note()}\n", f"{lines()}---\n"]))
    return start + "".join(lines() + part for part in draw(st.permutations(parts))) + lines()


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(text=deployments(), name=st.sampled_from(BOTH), workers=st.integers(0, 9))
def test_of_any_file_only_the_keys_change_and_every_comment_stays(
    path: Path, text: str, name: str, workers: int
) -> None:
    path.write_text(text)
    values = {"workers": workers, "batch_size": 4}
    wanted = yaml.safe_load(text)
    entries = [{"archive": it} if isinstance(it, str) else it for it in wanted["models"]]
    ours = [entry for entry in entries if entry["archive"] == name]
    revise(path, lambda document: set_entry(document, name, values))
    changed = path.read_text()
    found = yaml.safe_load(changed)
    others = [it for it in found["models"] if not isinstance(it, dict) or it["archive"] != name]
    assert others == [it for it in wanted["models"] if it not in ours and it != name]
    place = find_entry(found, name)
    assert place is not None
    assert found["models"][place] == {"archive": name, **(ours[0] if ours else {}), **values}
    assert found | {"models": None} == wanted | {"models": None}
    assert list_comments(changed) == list_comments(text)
    assert Deployment.read(path).access.tokens is False
