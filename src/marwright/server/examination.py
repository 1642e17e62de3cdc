"""What is wrong with a deployment beyond types: everything, before anything is started."""

from __future__ import annotations

import copy
import difflib
import importlib.util
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from marwright.archive.admission import admit, find_policy
from marwright.archive.document import Document, Problem
from marwright.errors import MarwrightError
from marwright.server.deployment import Deployment
from marwright.server.memory import read_memory
from marwright.server.nginx import find_nginx
from marwright.server.ports import is_free
from marwright.server.sections import ServerSettings, TlsFiles
from marwright.server.wanted import Wanted, read_wanted

__all__ = ["BEARER_TOKEN", "examine", "examine_rest", "judge_control"]

Keys = list[str | int]
FLEET_KEYS = {"servers", "releases", "store"}
"""What a deploy.yaml says that names servers."""
SHORTEST_CONTROL_TOKEN = 20
LOOPBACK = ("127.0.0.1", "::1", "localhost")
SHOWN = 5
"""Archives of the store that are named in place of a missing one."""

BEARER_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""RFC 6750, section 2.1."""


def examine(
    deployment: Deployment,
    document: Document | None = None,
    *,
    starting: bool = False,
    trusted: Collection[str] = (),
    places: Sequence[int] | None = None,
) -> list[Problem]:
    """Return every problem, with its line where there is a document.

    `starting`: ports must be free too. `trusted` are file names of archives that were judged
    before and have not changed since. `places` are those of the models in the document, where
    some of its entries were left out.
    """
    if deployment.servers is not None:
        found = [*_check_fleet(deployment.servers, deployment.model_fields_set, starting=starting)]
    else:
        found = [
            *_check_store(deployment, trusted),
            *_check_access(deployment),
            *_check_gateway(deployment),
            *_check_tls(deployment),
            *_check_memory(deployment),
            *_check_properties(deployment),
            *(_check_ports(deployment) if starting else ()),
        ]
    if places is not None:
        found = [(_move(keys, places), text) for keys, text in found]
    return [
        document.problem(keys, text) if document else Problem(None, ".".join(map(str, keys)), text)
        for keys, text in found
    ]


def examine_rest(document: Document, known: Sequence[Problem], *, starting: bool) -> list[Problem]:
    """Return what is wrong beyond types in a file that has wrong values.

    Pydantic stops at types; the user shall not have to mend these before hearing of the rest.
    """
    values = copy.deepcopy(document.values)
    entries = values.get("models")
    while (keys := _find_wrong(values, document)) is not None:
        _remove(values, keys)
    places = None
    if isinstance(entries, list) and "models" in values:
        places = [number for number, entry in enumerate(entries) if entry is not _REMOVED]
        values["models"] = [entries[number] for number in places]
    deployment = Deployment.model_validate(values, context={"folder": document.path.parent})
    # A value that was left out has its default here, of which the user wants to hear nothing.
    wrong = [f"{problem.where}." for problem in known]
    return [
        problem
        for problem in examine(deployment, document, starting=starting, places=places)
        if not any(f"{problem.where}.".startswith(start) for start in wrong)
    ]


_REMOVED: Any = object()
"""Stands where a model's entry was, so that the others keep their places."""


def _find_wrong(values: dict[str, Any], document: Document) -> list[Any] | None:
    """Return the keys down to a value that is wrong, or None where there is none left."""
    models = values.get("models")
    if isinstance(models, list):
        values = {**values, "models": [{"archive": "-"} if m is _REMOVED else m for m in models]}
    try:
        Deployment.model_validate(values, context={"folder": document.path.parent})
    except ValidationError as exc:
        node: Any = values
        keys = []
        for key in exc.errors()[0]["loc"]:  # it names also the form that pydantic tried
            is_there = key in node if isinstance(node, dict) else _is_place(key, node)
            if is_there:
                node = node[key]
                keys.append(key)
        return keys
    return None


def _remove(values: Any, keys: list[Any]) -> None:
    if not keys:  # what is wrong is nowhere in particular
        values.clear()
        return
    *outer, last = keys
    for key in outer:
        values = values[key]
    if isinstance(values, list):
        values[last] = _REMOVED
    else:
        del values[last]


def _is_place(key: object, node: object) -> bool:
    return isinstance(node, list) and isinstance(key, int) and key < len(node)


def _move(keys: Keys, places: Sequence[int]) -> Keys:
    """Return keys with a model's number as it stands in the document."""
    group, *rest = keys
    return [group, places[int(rest[0])], *rest[1:]] if group == "models" and rest else keys


def _check_fleet(
    servers: Sequence[ServerSettings], keys: Collection[str], *, starting: bool
) -> Iterator[tuple[Keys, str]]:
    """Check the servers that are released to; `keys` are all that the file says."""
    if starting:
        yield ["servers"], "run elsewhere: marwright release ARCHIVE --to this file"
    if not servers:
        yield ["servers"], "names none"
    seen: dict[str, int] = {}
    for number, server in enumerate(servers):
        url = urlsplit(server.url)
        try:
            local = url.hostname == "localhost" or ip_address(url.hostname or "").is_loopback
        except ValueError:
            local = False
        if url.scheme == "http" and not local:
            text = "would be told its token where others can read it: https, or loopback"
            yield ["servers", number, "url"], text
        if seen.setdefault(url.netloc, number) != number:
            yield ["servers", number, "url"], f"is the server {seen[url.netloc]} too"
        yield from _check_tokens(server.token, ["servers", number, "token"])
        if server.authority is not None and not server.authority.is_file():
            yield ["servers", number, "authority"], f"there is no file {server.authority}"
    for key in sorted(set(keys) - FLEET_KEYS):
        yield [key], "is said by each server's own deploy.yaml, not beside servers"


def _check_store(deployment: Deployment, trusted: Collection[str]) -> Iterator[tuple[Keys, str]]:
    if not deployment.store.is_dir():
        yield ["store"], f"there is no folder {deployment.store}"
        return
    policy = None
    try:
        policy = find_policy(deployment.store, deployment.read_policy())
    except MarwrightError as exc:
        yield ["policy"], str(exc)
    wanted: dict[int, Wanted] = {}
    for number, entry in enumerate(deployment.list_entries()):
        path = deployment.store / entry.archive
        if not path.exists():
            text = f"there is no archive {path}; {_suggest(deployment, entry.archive)}"
            yield ["models", number, "archive"], text
            continue
        try:
            wanted[number] = item = read_wanted(deployment, entry)
            if not item.workers and deployment.access.models == "off":
                # TorchServe itself starts one for each version that it loads.
                yield ["models", number, "workers"], "0 goes with another access.models than off"
            if entry.archive not in trusted:
                admit(path, policy)
        except MarwrightError as exc:
            yield ["models", number, "archive"], _join(exc)
    yield from _check_versions(wanted)
    yield from _check_workers(deployment, wanted)


def _suggest(deployment: Deployment, archive: str) -> str:
    """Return what a missing archive was meant to be, or what the store holds."""
    names = sorted(path.name for path in deployment.store.glob("*.mar"))
    if near := difflib.get_close_matches(archive, names, n=1):
        return f"did you mean {near[0]}?"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"the store holds {', '.join(names[:SHOWN]) or 'none'}{more}"


def _check_versions(wanted: dict[int, Wanted]) -> Iterator[tuple[Keys, str]]:
    defaults = defaultdict(list)
    seen: dict[tuple[str, str], str] = {}
    for number, item in wanted.items():
        if item.key in seen:
            text = f"is {' '.join(item.key)} as {seen[item.key]} is"
            yield ["models", number, "archive"], text
        seen.setdefault(item.key, item.path.name)
        if item.entry.default:
            defaults[item.name].append((number, item.version))
    for name, found in defaults.items():
        for number, version in found[1:]:
            text = f"{name} has two defaults, {found[0][1]} and {version}"
            yield ["models", number, "default"], text


def _check_workers(
    deployment: Deployment, wanted: Mapping[int, Wanted]
) -> Iterator[tuple[Keys, str]]:
    """Check the memory that workers may take before they are renewed, where that is limited."""
    default = deployment.supervision.memory_limit
    shares: dict[tuple[str | int, ...], int] = defaultdict(int)
    for number, item in wanted.items():
        own = item.entry.memory_limit
        keys = ("models", number, "memory_limit") if own else ("supervision", "memory_limit")
        shares[keys] += item.workers * (own or default or 0) * deployment.replicas
    total, memory = sum(shares.values()), read_memory()
    if total > memory:
        text = f"lets all workers together take {total:,} bytes, more than this machine has"
        largest = max(shares, key=lambda keys: shares[keys])
        yield list(largest), f"{text}: {memory:,} bytes"


def _check_access(deployment: Deployment) -> Iterator[tuple[Keys, str]]:
    path = deployment.access.gateway_key
    if path is None:
        return
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is no text"
        yield ["access", "gateway_key"], f"{path} cannot be read: {reason}"
        return
    if not BEARER_TOKEN.fullmatch(text):
        expected = "one token of letters, digits and -._~+/="
        yield ["access", "gateway_key"], f"{path} does not hold {expected}"


def _check_gateway(deployment: Deployment) -> Iterator[tuple[Keys, str]]:
    gateway = deployment.gateway
    if gateway is None:
        if deployment.replicas > 1:
            yield ["replicas"], "more than one take a gateway in front: gateway: true"
        return
    try:
        find_nginx()
    except MarwrightError as exc:
        yield ["gateway"], str(exc)
    unusable = [
        item
        for key in ("tokens", "control")
        if (path := getattr(gateway, key)) is not None
        for item in _check_tokens(path, ["gateway", key])
    ]
    yield from unusable
    if gateway.control is not None:
        keys: Keys = ["gateway", "control"]
        if not unusable:
            yield from ((keys, text) for text in judge_control(gateway.control, gateway.tokens))
        if deployment.tls is None and gateway.host not in LOOPBACK:
            yield keys, "would let others read the tokens at this host: it takes tls"


def judge_control(control: Path, clients: Path | None) -> Iterator[str]:
    """Yield why the tokens of a file protect no releases; of `clients`, none may be among them.

    Both files can be read.
    """
    tokens = control.read_text("utf-8").split()
    if clients is not None and set(tokens) & set(clients.read_text("utf-8").split()):
        yield f"{control} has a token of the clients: give those who may release their own"
    if min(map(len, tokens)) < SHORTEST_CONTROL_TOKEN:
        least = f"it takes {SHORTEST_CONTROL_TOKEN} characters"
        yield f"{control} has a token that could be guessed: {least}, as of openssl rand -hex 32"


def _check_tokens(path: Path, keys: Keys) -> Iterator[tuple[Keys, str]]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is no text"
        yield keys, f"{path} cannot be read: {reason}"
        return
    tokens = [line.strip() for line in lines if line.strip()]
    if not tokens or not all(map(BEARER_TOKEN.fullmatch, tokens)):
        yield keys, f"{path} does not hold tokens of letters, digits and -._~+/=, one a line"


def _check_tls(deployment: Deployment) -> Iterator[tuple[Keys, str]]:
    if deployment.tls is None:
        return
    if importlib.util.find_spec("cryptography") is None:
        yield ["tls"], "needs a package: pip install 'marwright[tls]'"
        return
    from marwright.server.certificate import check_certificate

    if isinstance(deployment.tls, TlsFiles):
        files = deployment.tls
        for text in check_certificate(
            files.certificate, files.key, now=datetime.now(timezone.utc), hosts=("127.0.0.1",)
        ):
            yield ["tls"], text


def _check_memory(deployment: Deployment) -> Iterator[tuple[Keys, str]]:
    memory = read_memory()
    for key in ("heap", "direct_memory"):
        value = getattr(deployment.jvm, key)
        if value == "auto":
            continue
        if value > memory:
            yield ["jvm", key], f"is more than this machine has: {memory:,} bytes"
        elif value < 64 << 20:
            yield ["jvm", key], "is too little for TorchServe; at least 64 MiB"


def _check_properties(deployment: Deployment) -> Iterator[tuple[Keys, str]]:
    from marwright.server.keys import FIXED_KEYS, KEYS, suggest_key

    for key in deployment.properties:
        if key in FIXED_KEYS:
            yield ["properties", key], f"is said by {FIXED_KEYS[key]}"
        elif key not in KEYS:
            yield ["properties", key], f"TorchServe reads no such key{suggest_key(key)}"


def _check_ports(deployment: Deployment) -> Iterator[tuple[Keys, str]]:
    if deployment.gateway and not is_free(deployment.gateway.port):
        yield ["gateway", "port"], f"port {deployment.gateway.port} is taken"
    if deployment.ports == "free":
        return
    names = set(type(deployment.ports).model_fields)
    if deployment.gateway:  # behind it the servers listen anywhere
        names = {"health"}
    if "health" not in deployment.ports.model_fields_set:  # which gives way: health.open_health
        names.discard("health")
    for name in sorted(names):
        port = getattr(deployment.ports, name)
        if not is_free(port):
            yield ["ports", name], f"port {port} is taken"


def _join(error: MarwrightError) -> str:
    """Return an error in one line."""
    return " ".join([str(error), *error.detail.split()]) if error.detail else str(error)
