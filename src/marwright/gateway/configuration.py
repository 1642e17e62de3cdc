"""The gateway's nginx.conf; nginx.org/en/docs describes each directive.

All paths of the run folder are relative to it. What comes from archives and files is matched
against a narrow alphabet, or quoted, before it becomes a part of the text.
"""

from __future__ import annotations

import ipaddress
import json
import os
import pwd
import re
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from marwright.errors import ConfigurationError
from marwright.gateway.control_routes import (
    ControlSettings,
    render_control,
    render_control_tokens,
)
from marwright.gateway.directives import (
    quote_path,
    quote_text,
    stamp,
    write_block,
    write_host,
)
from marwright.gateway.tokens import check_token, read_tokens, render_tokens
from marwright.gateway.traffic import NAME, Split, Traffic, quote_version
from marwright.server.launch import count_cores

__all__ = ["count_workers", "read_generation", "render", "Settings"]

ACCESS_LOG = "access.log"
ERROR_LOG = "error.log"
CAPTURE_SOCKET = "capture.sock"
CORES = 4
"""Of the machine's, for each worker of nginx: TorchServe takes ten times what nginx does."""
FALLBACK_STATUSES = (404, 500, 502, 503, 504, 507)
"""What a candidate answers where the stable version is to answer instead: TorchServe's 404 is a
version that is not registered (any more), its 507 a worker that was killed."""
TRIES = 3
"""How many replicas a request is sent to at most, where there are no more of them."""
CONNECT_SECONDS = 2
MEMORY_BYTES = 1 << 20
"""Up to this size a request's body waits in memory, beyond it in a file of the run folder."""
CLIENT_IDLE_SECONDS = 75
PROBLEMS = (400, 401, 403, 404, 405, 408, 411, 413, 414, 429, 500, 501, 502, 503, 504, 505)
"""The errors that nginx itself answers; its own 494 to 497 are 400 to clients."""
TURNED_AWAY = 599
"""In place of 503 where that would mean that a candidate failed; clients get 503."""
PART = r"[^/\x00-\x1f\x7f]+"
"""Any name in a path; TorchServe decodes once, as nginx does."""


@dataclass(frozen=True)
class Settings:
    """What a gateway is to be; a change of any value is a new Settings."""

    port: int
    replicas: tuple[str, ...]
    """Inference URLs on loopback, all http or all https: "http://127.0.0.1:8080"."""
    host: str = "127.0.0.1"
    """Where it listens: a name or an address."""
    certificate: Path | None = None
    """PEM, with those that it is signed by; None for plain http."""
    key: Path | None = None
    authority: Path | None = None
    """PEM that https replicas are checked by; their certificate has to name localhost."""
    replica_token: str | None = None
    """Sent to the replicas as their bearer token; the clients' own are never sent on."""
    client_tokens: Path | None = None
    """A file of accepted bearer tokens, one a line; None where no token is asked."""
    request_bytes: int = 6_553_500
    """Largest request; larger ones are answered 413."""
    request_seconds: int = 60
    """Seconds that a client may pause while it sends a request."""
    answer_seconds: int = 130
    """Seconds that one version may take to answer; TorchServe itself gives up after 120."""
    connections: int = 2000
    """Most requests at once; further ones are answered 503."""
    retry_after: int = 1
    """Seconds: Retry-After of each 429 and 503."""
    control: ControlSettings | None = None
    """None where nobody releases from elsewhere."""
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        """Refuse what no gateway can be, with a ConfigurationError."""
        if not 0 < self.port < 1 << 16:
            raise ConfigurationError("no such port", expected="1 to 65535", found=str(self.port))
        if (self.certificate is None) != (self.key is None):
            raise ConfigurationError("https needs a certificate and its key")
        if self.replica_token is not None:
            check_token(self.replica_token, "replica_token")
        write_host(self.host)
        _read_replicas(self)
        least = {
            "request_bytes": 1,
            "request_seconds": 1,
            "answer_seconds": 1,
            "connections": 1,
            "retry_after": 0,
        }
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ConfigurationError(
                    f"no such {name} is possible",
                    expected=f"{lowest} or more",
                    found=str(getattr(self, name)),
                )


def render(settings: Settings, generation: int = 0) -> str:
    """Return the whole nginx.conf; `generation` tells it from the one that it replaces.

    Raises:
        ConfigurationError: a file's name or a token cannot be written there.
        StorageError: the tokens or a certificate cannot be read.
    """
    lines = [
        f"# generation {generation}",
        *_render_process(settings),
        write_block("http", *_render_http(settings), _render_server(settings, generation)),
    ]
    return "\n".join(lines) + "\n"


def read_generation(text: str) -> int:
    """Return the generation of a rendered configuration; 0 for another text."""
    found = re.match(r"# generation (\d+)\n", text)
    return int(found[1]) if found else 0


def count_workers() -> int:
    """Return how many processes of nginx answer."""
    return max(1, count_cores() // CORES)


def draining_name(generation: int | str) -> str:
    """Return the file of the run folder that lets clients' connections end after each answer.

    "*" is that of any generation.
    """
    return f"draining-{generation}"


def _render_process(settings: Settings) -> Iterator[str]:
    if os.geteuid() == 0:  # else workers run as whoever starts them, and nginx warns of `user`
        yield f"user {pwd.getpwuid(0).pw_name};"
    # A client, a replica, and for a copied request the same again.
    connections = 4 * settings.connections + 64
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = connections + 64 if most == resource.RLIM_INFINITY else min(connections + 64, most)
    yield "daemon off;"
    yield "master_process on;"
    yield "pcre_jit on;"
    yield f"worker_processes {count_workers()};"
    yield f"worker_rlimit_nofile {files};"
    yield f"worker_shutdown_timeout {2 * settings.answer_seconds + 5}s;"
    yield "pid nginx.pid;"
    yield f"error_log {ERROR_LOG} error;"
    yield write_block("events", f"worker_connections {min(connections, files)};")


def _render_http(settings: Settings) -> Iterator[str]:
    yield "server_tokens off;"
    yield "default_type application/octet-stream;"
    yield "uninitialized_variable_warn off;"  # requests that are refused early have set none
    for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
        yield f"{name}_temp_path temp/{name};"
    yield _render_log()
    yield f"access_log {ACCESS_LOG} accesses buffer=32k flush=100ms;"
    yield "map_hash_bucket_size 1024;"
    yield "variables_hash_bucket_size 128;"
    yield "limit_conn_zone $server_name zone=requests:64k;"
    yield write_block(
        "map $http_x_request_id $id",
        r'"~^[A-Za-z0-9._-]{1,128}\z" $http_x_request_id;',
        "default $request_id;",
    )
    yield write_block(
        "map $status $wait", *(f"{code} {settings.retry_after};" for code in (429, 503))
    )
    yield write_block("map $upstream_http_retry_after $retry_after", '"" $wait;')
    yield write_block("map $status $challenge", "401 Bearer;")
    if settings.client_tokens is not None:
        yield from render_tokens(read_tokens(settings.client_tokens), "authorized")
    if settings.control is not None:
        yield from render_control_tokens(settings.control, settings.client_tokens)
    yield from _render_splits(settings.traffic.splits)
    yield _render_replicas(settings)


def _render_log() -> str:
    """Return the form of the access log's lines; queries are left out, tokens may stand there."""
    numbers = {"time": "$msec", "status": "$status", "seconds": "$request_time"}
    texts = {
        "request": "$id",
        "method": "$request_method",
        "model": "$model",
        "asked": "$asked",
        "arm": "$went",
        "version": "$answered",
        "upstream_status": "$upstream_status",
        "upstream_seconds": "$upstream_response_time",
        "upstream": "$upstream_addr",
    }
    pairs = [f'"{name}":{value}' for name, value in numbers.items()]
    pairs += [f'"{name}":"{value}"' for name, value in texts.items()]
    return "log_format accesses escape=json '{" + ",".join(pairs) + "}';"


def _render_splits(splits: Sequence[Split]) -> Iterator[str]:
    for number, split in enumerate(splits):
        yield _render_share("arm", number, split.model, split.share, "candidate", "stable")
        yield _render_share("shadow", number, split.model, split.shadow, "1", '""')
    numbered = list(enumerate(splits))
    yield _render_choice("arm", "unsplit", {s.model: f"$arm_{n}" for n, s in numbered})
    yield _render_choice("shadow", '""', {s.model: f"$shadow_{n}" for n, s in numbered})
    for name in ("stable", "candidate"):
        versions = {split.model: quote_version(getattr(split, name)) for split in splits}
        yield _render_choice(name, '""', {key: f'"{value}"' for key, value in versions.items()})


def _render_choice(name: str, default: str, values: Mapping[str, str]) -> str:
    """Return what sets a variable by a request's model, whose name counts in each letter's case."""
    rows = (rf'"~^{re.escape(model)}\z" {value};' for model, value in values.items())
    return write_block(f"map $model ${name}", f"default {default};", *rows)


def _render_share(
    name: str, number: int, model: str, percent: float, chosen: str, rest: str
) -> str:
    """Return what chooses a share of a model's requests by their ids, each always alike."""
    share = [f"{percent:.2f}% {chosen};"] if percent else []
    return write_block(f'split_clients "{name} {model} $id" ${name}_{number}', *share, f"* {rest};")


def _render_replicas(settings: Settings) -> str:
    """Return the group of replicas.

    None is ever taken for down (max_fails=0): one that is gone refuses within microseconds on
    loopback, and the 503s of one busy model must not take a replica away from all the others. A
    replica that is alone stands there twice, so that a request is tried once more.
    """
    addresses = [url.netloc for url in _read_replicas(settings)]
    addresses = addresses * 2 if len(addresses) == 1 else addresses
    return write_block(
        "upstream replicas",
        "zone replicas 256k;",
        "least_conn;",
        *(f"server {address} max_fails=0;" for address in addresses),
        "keepalive 64;",
    )


def _render_server(settings: Settings, generation: int) -> str:
    tls = " ssl" if settings.certificate is not None else ""
    return write_block(
        "server",
        f"listen {write_host(settings.host)}:{settings.port}{tls};",
        "server_name marwright;",
        *_render_tls(settings),
        *_render_limits(settings),
        *_render_proxy(settings),
        "add_header X-Request-ID $id always;",
        "add_header X-Marwright-Version $answered always;",
        "add_header Retry-After $retry_after always;",
        "add_header WWW-Authenticate $challenge always;",
        *_render_draining(generation),
        *_render_routes(settings),
        *_render_arms(settings),
        *_list_error_pages(PROBLEMS),
        *_render_problems(),
    )


def _render_tls(settings: Settings) -> Iterator[str]:
    if settings.certificate is None or settings.key is None:
        return
    yield stamp(settings.certificate)
    yield f"ssl_certificate {quote_path(settings.certificate)};"
    yield f"ssl_certificate_key {quote_path(settings.key)};"
    yield "ssl_protocols TLSv1.2 TLSv1.3;"
    yield "ssl_session_cache shared:tls:1m;"


def _render_limits(settings: Settings) -> Iterator[str]:
    yield f"client_max_body_size {settings.request_bytes};"
    yield f"client_body_buffer_size {min(settings.request_bytes, MEMORY_BYTES)};"
    yield f"client_header_timeout {settings.request_seconds}s;"
    yield f"client_body_timeout {settings.request_seconds}s;"
    yield f"send_timeout {settings.request_seconds}s;"
    yield f"keepalive_timeout {CLIENT_IDLE_SECONDS}s;"
    yield "keepalive_requests 100000;"
    yield f"limit_conn requests {settings.connections};"
    yield "limit_conn_status 503;"


def _render_proxy(settings: Settings) -> Iterator[str]:
    replicas = _read_replicas(settings)
    # Another replica may know a model that one does not know yet, after its restart.
    unknown = " http_404" if len(replicas) > 1 else ""
    yield "proxy_http_version 1.1;"
    yield 'proxy_set_header Connection "";'
    yield "proxy_set_header Host localhost;"
    yield "proxy_set_header X-Request-ID $id;"
    yield "proxy_set_header X-Marwright-Gateway 1;"
    token = f"Bearer {settings.replica_token}" if settings.replica_token else ""
    yield f'proxy_set_header Authorization "{token}";'
    yield "proxy_hide_header X-Request-ID;"
    yield "proxy_hide_header X-Marwright-Version;"
    yield "proxy_buffering off;"  # a model's answer may come in pieces, each when it is there
    yield "proxy_buffer_size 32k;"  # an answer's headers have to fit
    yield "proxy_buffers 4 32k;"
    yield "proxy_busy_buffers_size 64k;"
    yield f"proxy_connect_timeout {CONNECT_SECONDS}s;"
    yield f"proxy_send_timeout {settings.answer_seconds}s;"
    yield f"proxy_read_timeout {settings.answer_seconds}s;"
    yield (
        "proxy_next_upstream error timeout http_502 http_503 http_504 non_idempotent" + unknown
    ) + ";"
    yield f"proxy_next_upstream_tries {max(TRIES, len(replicas))};"
    yield f"proxy_next_upstream_timeout {settings.answer_seconds}s;"
    if settings.authority is not None:
        yield stamp(settings.authority)
        yield f"proxy_ssl_trusted_certificate {quote_path(settings.authority)};"
        yield "proxy_ssl_verify on;"
        yield "proxy_ssl_name localhost;"  # nginx looks at names alone, not at IP addresses
        yield "proxy_ssl_server_name on;"
        yield "proxy_ssl_protocols TLSv1.2 TLSv1.3;"


def _render_draining(generation: int) -> Iterator[str]:
    """Return what ends connections while a file is there, each after its answer.

    Workers that are replaced close idle connections at once, whatever their clients are just
    sending. Only a location can have another keepalive_timeout, so that requests pass through one.
    """
    yield write_block(
        f"if (-f {draining_name(generation)})", 'rewrite "(?s)^(.*)$" "/.draining$1" last;'
    )
    known = "/(?:ping$|predictions/|explanations/|v1/|v2/|control/|[.]problem/)"
    yield write_block(
        'location ^~ "/.draining/"',
        "internal;",
        "keepalive_timeout 0;",
        f'rewrite "^/\\.draining({known}.*)$" "$1" last;',
        "return 404;",
    )


def _render_routes(settings: Settings) -> Iterator[str]:
    """Return what clients may ask for; see TorchServe's InferenceRequestHandler."""
    verb = "(?<verb>predictions|explanations)"
    versioned = f"^/{verb}/(?<model>{PART})/(?<asked>{PART})/?$"
    # The path is sent as it was understood here, not as it was written.
    passed = ('rewrite "^(.*)$" "$1" break;', f"proxy_pass {_scheme(settings)}://replicas;")
    yield _guard(settings, "= /ping", f"proxy_pass {_scheme(settings)}://replicas/ping;")
    if settings.traffic.splits:  # the first location that fits is taken
        yield _guard(settings, f'~ "^/{verb}/(?<model>{NAME})/?$"', "rewrite ^ /.arm/$arm last;")
    yield _guard(settings, f'~ "^/{verb}/(?<model>{PART})/?$"', *passed)
    yield _guard(settings, f'~ "{versioned}"', *passed)
    yield _guard(settings, f'~ "^/v1/models/(?<model>{PART}):(predict|explain)$"', *passed)
    yield _guard(settings, f'~ "^/v2/models/(?<model>{PART})/(infer|explain)$"', *passed)
    if settings.control is not None:
        yield from render_control(settings.control)
    yield write_block("location /", "return 404;")


def _guard(settings: Settings, pattern: str, *lines: str) -> str:
    """Return a location that asks for a token, where one is to be asked for."""
    asks = settings.client_tokens is not None
    token = [write_block("if ($authorized = '')", "return 401;")] if asks else []
    return write_block(f"location {pattern}", *token, *lines)


def _render_arms(settings: Settings) -> Iterator[str]:
    """Return where a request goes that names no version, by $arm."""
    mirrors = any(split.shadow for split in settings.traffic.splits)
    mirror = ["mirror /.mirror;"] if mirrors else []
    base = f"proxy_pass {_scheme(settings)}://replicas/$verb/$model"
    stable = ("set $answered $stable;", f"{base}/$stable$is_args$args;")
    yield write_block("location = /.arm/unsplit", "internal;", f"{base}$is_args$args;")
    yield write_block("location = /.arm/stable", "internal;", "set $went stable;", *mirror, *stable)
    yield write_block(
        "location = /.arm/candidate",
        "internal;",
        "set $went candidate;",
        "set $answered $candidate;",
        *mirror,
        "proxy_intercept_errors on;",
        "recursive_error_pages on;",
        f"error_page {' '.join(map(str, FALLBACK_STATUSES))} = @stable;",
        # No way round the limit: the stable version is not for requests that were turned away.
        f"limit_conn_status {TURNED_AWAY};",
        f"error_page {TURNED_AWAY} =503 /.problem/503;",
        *_list_error_pages(set(PROBLEMS) - set(FALLBACK_STATUSES)),
        # One that fails is not asked again; only a replica that is gone is no failure of its own.
        "proxy_next_upstream error non_idempotent;",
        f"{base}/$candidate$is_args$args;",
    )
    yield write_block("location @stable", "recursive_error_pages on;", *stable)
    if mirrors:
        yield _render_mirror()


def _render_mirror() -> str:
    """Return where copies go; nothing that happens there reaches a client."""
    return write_block(
        "location = /.mirror",
        "internal;",
        write_block("if ($shadow = '')", "return 204;"),
        "error_log /dev/null crit;",
        f"proxy_pass http://unix:{CAPTURE_SOCKET}:/;",
        "proxy_set_header Host localhost;",
        "proxy_set_header Connection close;",
        'proxy_set_header Authorization "";',
        "proxy_set_header X-Request-ID $id;",
        "proxy_set_header X-Original-URI $request_uri;",
        "proxy_next_upstream off;",
        "proxy_connect_timeout 100ms;",
        "proxy_send_timeout 1s;",
        "proxy_read_timeout 1s;",
    )


def _render_problems() -> Iterator[str]:
    """Return nginx's own errors in the form of RFC 9457."""
    for code in PROBLEMS:
        status = HTTPStatus(code)
        problem = {
            "type": "about:blank",
            "title": status.phrase,
            "status": code,
            "detail": f"the gateway: {_DETAILS.get(code, status.phrase.lower())}",
        }
        yield write_block(
            f"location = /.problem/{code}",
            "internal;",
            "default_type application/problem+json;",
            f"return {code} {quote_text(json.dumps(problem))};",
        )


def _list_error_pages(codes: Iterable[int]) -> list[str]:
    """Return what names the problem of each status; a location with one of its own needs all."""
    pages = [f"error_page {code} /.problem/{code};" for code in sorted(codes)]
    return [*pages, "error_page 494 495 496 497 =400 /.problem/400;"]


_DETAILS = {
    401: "a bearer token is needed",
    404: "it lets through predictions, explanations and /ping alone",
    413: "the request is larger than it takes",
    502: "no replica could be reached",
    503: "it holds as many requests as it may",
    504: "no replica answered in time",
}


def _scheme(settings: Settings) -> str:
    return _read_replicas(settings)[0].scheme


def _read_replicas(settings: Settings) -> list[SplitResult]:
    """Return the replicas' URLs, or refuse them."""
    expected = "one or more such as http://127.0.0.1:8080, all http or all https"
    urls = [_read_url(text, expected) for text in settings.replicas]
    if len({url.scheme for url in urls}) != 1 or len(set(urls)) < len(urls):
        raise ConfigurationError(
            "the gateway has no usable replicas", expected=expected, found=repr(settings.replicas)
        )
    if urls[0].scheme == "https" and settings.authority is None:
        raise ConfigurationError("https replicas need the file that they are checked by: authority")
    return urls


def _read_url(text: str, expected: str) -> SplitResult:
    """Return a replica's URL; its address is digits, dots and colons, or localhost."""
    try:
        url = urlsplit(text.rstrip("/"))
        fits = url.scheme in {"http", "https"} and not (url.path or url.query or url.fragment)
        host = url.hostname or ""
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
        if fits and local and url.port and "%" not in host:
            shown = f"[{host}]" if ":" in host else host
            return SplitResult(url.scheme, f"{shown}:{url.port}", "", "", "")
    except ValueError:
        pass
    raise ConfigurationError("no such replica is possible", expected=expected, found=repr(text))
