"""A deploy.yaml changed by its values: comments, and every line that says what it said, stay."""

from __future__ import annotations

import contextlib
import copy
import io
import re
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import SequenceMatcher
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from marwright.archive.document import Document
from marwright.errors import ConfigurationError
from marwright.server.deployment import REMEDY, Deployment
from marwright.server.examination import examine
from marwright.storage import translate_os_errors, write_file

if TYPE_CHECKING:
    from ruamel.yaml import YAML

__all__ = ["find_entry", "remove_entry", "revise", "set_default", "set_entry"]

MAX_LINES = 1000
"""Of a longer part lines are not compared, which takes more than the square of their number."""


def revise(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Let `change` alter a deploy.yaml, and write it once it is known that it can be used.

    `change` is called twice, with the file's values alone and with those that know their comments,
    and must do the same to both. In both `models` is a list: every archive of the store where the
    file does not say. A file that is not there begins empty. One that `change` leaves as it is is
    not written.

    Lines that the change does not touch stay as they are. In those that it does, spaces are made
    even, `null` and `~` become nothing, and brackets over several lines go into one, with their
    comments above the top key. A byte order mark is not kept.

    Raises:
        ConfigurationError: the file cannot be used as it is or as it would be, or the change would
            reach further through an anchor; it is as it was before.
    """
    text, wanted, names = _read(path)
    if names is not None and wanted.get("models") is None:
        wanted["models"] = list(names)
    before = copy.deepcopy(wanted)
    change(wanted)
    if wanted == before:
        return
    texts = _render(path, text, names, change)
    changed = next((item for item in texts if _means(item, wanted)), None)
    if changed is None:
        raise ConfigurationError(
            f"{path} allows no change of these values alone",
            remedy="write out what its anchors and merges stand for, and repeat",
        )
    _check(path, changed)
    if "\r\n" in text:
        changed = changed.replace("\r\n", "\n").replace("\n", "\r\n")
    with write_file(path.resolve()) as stream:  # a link stays one
        stream.write(changed.encode())


def find_entry(document: Mapping[str, Any], archive: str) -> int | None:
    """Return the place of an archive's entry among `models`, or None."""
    for place, entry in enumerate(document.get("models", [])):
        if (entry["archive"] if isinstance(entry, dict) else entry) == archive:
            return place
    return None


def set_entry(document: dict[str, Any], archive: str, values: Mapping[str, Any]) -> None:
    """Set keys of an archive's entry, of those that are None take them away; add it if need be.

    An entry that is only a name becomes a mapping once it has keys. Where the entry sets the
    handler's `threads` too, which would win, these follow.
    """
    models = document.setdefault("models", [])
    place = find_entry(document, archive)
    if place is None:
        with _before_tail(models):
            models.append(archive)
        place = len(models) - 1
    if not isinstance(models[place], dict):
        if all(value is None for value in values.values()):
            return
        _expand(models, place)
    entry = models[place]
    _set_keys(entry, values)
    handler = entry.get("handler")
    if "threads" in values and isinstance(handler, dict) and "threads" in handler:
        _set_keys(_unbind(entry, "handler"), {"threads": values["threads"]})


def set_default(document: dict[str, Any], archive: str, versions: Collection[str]) -> None:
    """Let one archive answer where a request names no version of its model.

    `versions`: the archives of all versions of that model; `default` is taken from the others.
    """
    for name in versions:
        if name != archive and find_entry(document, name) is not None:
            set_entry(document, name, {"default": None})
    set_entry(document, archive, {"default": True})


def remove_entry(document: dict[str, Any], archive: str) -> None:
    """Take away an archive's entry, where there is one; comments in lines below it stay."""
    place = find_entry(document, archive)
    if place is None:
        return
    models = document["models"]
    if len(models) > 1:
        _remove(models, place)
    else:
        tail = _cut_tail(models, place)
        document["models"] = []
        _hang_tail(document, "models", tail)


def _read(path: Path) -> tuple[str, dict[str, Any], list[str] | None]:
    """Return the file's text, its values, and what it serves; None where there is no file."""
    if not path.exists():
        return "", {}, None
    deployment, document = Deployment.parse(path)
    with translate_os_errors(f"read {path}"):
        text = path.read_bytes().decode("utf-8-sig")
    try:
        values = _unshare(document.values)
    except RecursionError as exc:
        raise ConfigurationError(f"{path} holds a value that holds itself", remedy=REMEDY) from exc
    return text, values, [entry.archive for entry in deployment.list_entries()]


def _unshare(value: Any) -> Any:
    """Return values of which none is another one's by an alias."""
    if isinstance(value, dict):
        return {key: _unshare(item) for key, item in value.items()}
    return [_unshare(item) for item in value] if isinstance(value, list) else value


def _means(text: str, wanted: Any) -> bool:
    try:
        return bool(_unshare(yaml.safe_load(text)) == wanted)
    except yaml.YAMLError:
        return False


def _check(path: Path, text: str) -> None:
    """Raise ConfigurationError where a server could not be started with this text."""
    document = Document(path, text, error=ConfigurationError)
    deployment, problems = document.validate(Deployment)
    document.refuse(problems, remedy=REMEDY)
    assert deployment is not None  # else there were problems
    document.refuse(examine(deployment, document), remedy=REMEDY)


def _render(
    path: Path, text: str, names: list[str] | None, change: Callable[[dict[str, Any]], None]
) -> list[str]:
    """Return the changed text: with the user's lines, and as ruamel.yaml writes all of it."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq
    from ruamel.yaml.error import YAMLError

    head, body, foot = _split(text.replace("\r\n", "\n"))
    form = _make_form(body)
    try:
        # Loaded twice, as what has been written once knows its comments no longer whole.
        unchanged, document = (_load(form, body) for _ in range(2))
        if document is None:
            head, body, document, before = head + body, "", CommentedMap(), ""
        else:
            before = _dump(form, unchanged)
        if names is not None and document.get("models") is None:
            document["models"] = models = CommentedSeq(names)
            if "models" in document.ca.items:
                models.ca.comment = [document.ca.items["models"][2], []]
        change(document)
        after = _dump(form, document)
        return [head + _carry_over(body, before, after) + foot, head + after + foot]
    except (YAMLError, yaml.YAMLError, ValueError, RecursionError) as exc:
        reason = " ".join(str(exc).split()) or type(exc).__name__
        raise ConfigurationError(f"cannot change {path}", found=reason) from exc


def _split(text: str) -> tuple[str, str, str]:
    """Return what stands before the document and its `---`, the document, and from `...` on."""
    start, end = 0, len(text)
    for event in yaml.parse(text):
        if isinstance(event, yaml.DocumentStartEvent) and event.explicit and event.end_mark:
            start = event.end_mark.index
        elif isinstance(event, yaml.DocumentEndEvent) and event.explicit and event.start_mark:
            end = event.start_mark.index
    blank = re.compile(r"[ \t]*\n?").match(text, start)
    start = blank.end() if blank and start else start
    head, body = text[:start], text[start:end]
    return head, body if body.endswith("\n") or not body else f"{body}\n", text[end:]


def _make_form(text: str) -> YAML:
    """Return what reads and writes a document, indented as this one mostly is."""
    from ruamel.yaml import YAML
    from ruamel.yaml.emitter import RoundTripEmitter
    from ruamel.yaml.events import CollectionEndEvent

    class Emitter(RoundTripEmitter):
        def write_post_comment(self, event: Any) -> bool:
            """Write a comment; ruamel.yaml 0.19 joins two lines some way behind one of brackets."""
            is_written = bool(super().write_post_comment(event))
            if isinstance(event, CollectionEndEvent):
                self.no_newline = False
            return is_written

    form = YAML()
    form.Emitter = Emitter
    form.preserve_quotes = True
    form.width = 1 << 20  # no line is broken
    form.brace_single_entry_mapping_in_flow_sequence = True
    mapping, offset, dash = _measure_indents(text)
    form.indent(mapping, offset + dash, offset)
    return form


def _measure_indents(text: str) -> tuple[int, int, int]:
    """Return the first indents found: of a mapping, of dashes, and of what stands behind these."""
    found: dict[str, int] = {}
    pending: deque[Any] = deque([yaml.compose(text, Loader=yaml.SafeLoader)])
    seen = set()
    while pending:
        node = pending.popleft()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode) or node.flow_style:
            continue
        seen.add(id(node))
        is_mapping = isinstance(node, yaml.MappingNode)
        for value in [pair[1] for pair in node.value] if is_mapping else node.value:
            indent = value.start_mark.column - node.start_mark.column
            if not is_mapping:
                found.setdefault("dash", indent)
            elif isinstance(value, yaml.CollectionNode) and not value.flow_style:
                kind = "mapping" if isinstance(value, yaml.MappingNode) else "offset"
                found.setdefault(kind, indent)
            pending.append(value)
    return found.get("mapping", 2), found.get("offset", 0), found.get("dash", 2)


def _load(form: YAML, text: str) -> Any:
    """Return a document, without comments inside the brackets of its models.

    These would break its lines anywhere.
    """
    document = form.load(text)
    if document is not None and _is_flow(models := document.get("models")):
        models.ca.items.clear()
    return document


def _dump(form: YAML, document: Any) -> str:
    stream = io.StringIO()
    form.dump(document, stream)
    text = stream.getvalue()
    return text if text.endswith("\n") else f"{text}\n"


def _carry_over(text: str, before: str, after: str) -> str:
    """Return `text` with the change from `before` to `after`.

    `before` is the text as ruamel.yaml writes it, unchanged.
    """
    mine, old, new = map(_cut_sections, (text, before, after))
    lines: list[str] = []
    for key, part in new.items():
        given, known = mine.get(key, []), old.get(key, [])
        merged = _merge(given, known, part)
        if merged != given:  # what ruamel.yaml drops, mostly of brackets, goes above them
            lost = _count_comments(given) - _count_comments(known) - _count_comments(merged)
            lines += [f"{comment}\n" for comment in lost.elements()]
        lines += merged
    return "".join(lines)


def _count_comments(lines: list[str]) -> Counter[str]:
    """Return how often each comment stands in a document, or in some top keys of it."""
    text = "".join(lines)
    tokens: list[Any] = list(yaml.scan(text))
    gaps = [
        text[token.end_mark.index : following.start_mark.index]
        for token, following in pairwise(tokens)
    ]
    return Counter(comment.rstrip() for gap in gaps for comment in re.findall("#.*", gap))


def _cut_sections(text: str) -> dict[str, list[str]]:
    """Return the lines that each top key begins, and under "" those before the first."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    starts = {"": 0}
    if isinstance(root, yaml.MappingNode) and not root.flow_style:
        starts |= {str(key.value): key.start_mark.line for key, _ in root.value}
    lines = text.splitlines(keepends=True)
    ends = [*list(starts.values())[1:], len(lines)]
    return {key: lines[start:end] for (key, start), end in zip(starts.items(), ends, strict=True)}


def _merge(mine: list[str], old: list[str], new: list[str]) -> list[str]:
    """Return the lines of `new` where these differ from `old`, else of `mine`: a merge of three."""
    if new == old:
        return mine
    if max(len(old), len(mine), len(new)) > MAX_LINES:
        return new
    in_mine, in_new = _align(old, mine), _align(old, new)
    lines: list[str] = []
    places = sorted(in_mine.keys() & in_new.keys())
    for place, following in zip(places, [*places[1:], len(old)], strict=True):
        (mine_at, mine_from), (new_at, new_from) = in_mine[place], in_new[place]
        lines += mine[mine_at:mine_from] + new[new_at:new_from]
        part = new[new_from : in_new[following][0]]
        is_same = part == old[place:following]
        lines += mine[mine_from : in_mine[following][0]] if is_same else part
    return lines


def _align(old: list[str], other: list[str]) -> dict[int, tuple[int, int]]:
    """Return for places between lines the place in another text, and behind what it adds there."""
    places = {0: (0, 0)}
    matcher = SequenceMatcher(None, old, other, autojunk=False)
    for start, begin, size in matcher.get_matching_blocks():
        for step in range(size + 1):
            first = places.get(start + step, (begin + step,))[0]
            places[start + step] = first, begin + step
    return places


def _is_flow(collection: Any) -> bool:
    return _knows_comments(collection) and bool(collection.fa.flow_style())


def _knows_comments(value: Any) -> bool:
    from ruamel.yaml.comments import CommentedBase

    return isinstance(value, CommentedBase)


def _unbind(collection: Any, key: Any) -> Any:
    """Return a member that no alias stands for, so that a change of it is one in this place."""
    member = collection[key]
    if _knows_comments(member) and member.anchor.value:
        member = member.copy()
        delattr(member, member.anchor.attrib)
        collection[key] = member
    return member


def _expand(models: Any, place: int) -> None:
    """Turn an entry that is only a name into a mapping; a comment behind the name stays there."""
    from ruamel.yaml.comments import CommentedMap

    entry = CommentedMap(archive=models[place])
    if _knows_comments(models):
        slots = models.ca.items.get(place)
        if _is_flow(models):
            entry.fa.set_flow_style()
        elif slots and slots[0]:
            slots[0].start_mark.column += len("archive: ")
            entry.ca.items["archive"] = [None, None, slots[0], None]
            slots[0] = None
    models[place] = entry


def _set_keys(mapping: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if value is None:
            if key in mapping:
                _remove(mapping, key)
        elif key in mapping:
            if mapping[key] != value:
                mapping[key] = value
        else:
            with _before_tail(mapping):
                mapping[key] = value


@contextlib.contextmanager
def _before_tail(collection: Any) -> Iterator[None]:
    """Let what is added at the end stand before the lines of comment that follow the end now."""
    tail = _cut_tail(collection, _last(collection)) if collection else ""
    yield
    _hang_tail(collection, _last(collection), tail)


def _remove(collection: Any, key: Any) -> None:
    """Take away a member; the lines of comment below it go to the one above, or stand first."""
    keys = list(_list_keys(collection))
    at = keys.index(key)
    tail = _cut_tail(collection, key)
    del collection[key]
    if at and tail:
        _hang_tail(collection, keys[at - 1], tail)
    elif tail and collection:
        first = next(iter(_list_keys(collection)))
        slots = collection.ca.items.setdefault(first, [None] * 4)
        slots[1] = [_make_token(tail), *(slots[1] or [])]


def _list_keys(collection: Any) -> Collection[Any]:
    return collection.keys() if isinstance(collection, dict) else range(len(collection))


def _last(collection: Any) -> Any:
    return list(_list_keys(collection))[-1]


def _find_slots(collection: Any, key: Any) -> tuple[list[Any], int] | None:
    """Return where ruamel.yaml keeps the comment behind a member's last line: slots, and which.

    It also holds the lines below, up to the next member. None where nothing is kept: plain values,
    and what stands in brackets.
    """
    if not _knows_comments(collection) or _is_flow(collection):
        return None
    member = collection[key]
    if _knows_comments(member) and member and not _is_flow(member):
        return _find_slots(member, _last(member))
    slots = collection.ca.items.setdefault(key, [None] * 4)
    return slots, 2 if isinstance(collection, dict) else 0


def _cut_tail(collection: Any, key: Any) -> str:
    """Take the lines of comment below a member off it, and return them."""
    found = _find_slots(collection, key)
    if found is None or found[0][found[1]] is None:
        return ""
    slots, which = found
    end, _, tail = slots[which].value.partition("\n")
    if end:
        slots[which].value = f"{end}\n"
    else:
        slots[which] = None
    return str(tail)


def _hang_tail(collection: Any, key: Any, tail: str) -> None:
    """Put lines of comment below a member."""
    found = _find_slots(collection, key) if tail else None
    if found is None:
        return
    slots, which = found
    if slots[which] is None:
        slots[which] = _make_token(f"\n{tail}")
    else:
        slots[which].value += tail


def _make_token(text: str) -> Any:
    from ruamel.yaml.error import CommentMark
    from ruamel.yaml.tokens import CommentToken

    return CommentToken(text, CommentMark(0), None)
