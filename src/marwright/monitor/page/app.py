"""The routes of the page.

What a browser asks for is answered with HTML, errors too; what lies below /api/ with JSON, and
errors as problems (RFC 9457).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Scope

from marwright.errors import InputRejectedError, MarwrightError, OverloadedError
from marwright.monitor.page.access import Access
from marwright.monitor.page.barrier import Barrier, TooLargeError
from marwright.monitor.page.rollbacks import Rollbacks
from marwright.monitor.page.scene import show_time
from marwright.monitor.page.sources import Sources
from marwright.monitor.page.stream import Broadcast, EventStream, Topic
from marwright.monitor.page.tryout import METHODS, try_model
from marwright.monitor.page.views import View, Views

__all__ = ["build_app"]

_log = logging.getLogger(__name__)

STATIC = Path(__file__).with_name("static")
KINDS = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
TRIES = 8
"""Of models at a time: a slow one must not keep all other pages waiting."""
TOPICS = {"overview", "version", "releases", "failures"}
TITLES = {
    401: "Sign in",
    403: "Refused",
    404: "Not found",
    405: "Not allowed",
    413: "Too large",
    421: "Wrong host",
    429: "Too many tries",
    503: "Too many viewers",
}

router = APIRouter(default_response_class=HTMLResponse)


def build_app(
    sources: Sources,
    access: Access,
    broadcast: Broadcast,
    views: Views,
    *,
    served: str,
    cookie: str,
) -> ASGIApp:
    """Return the application: what it shows, whom it lets in, and the address it is served at."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=_live)
    app.state.views = views
    app.state.access = access
    app.state.cookie = cookie
    app.state.rollbacks = Rollbacks(sources)
    app.state.tries = asyncio.Semaphore(TRIES)
    app.state.broadcast = broadcast
    app.state.templates = _open_templates()
    app.include_router(router)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(MarwrightError, _answer_error)
    app.add_exception_handler(TooLargeError, _answer_large)
    app.add_exception_handler(Exception, _answer_mistake)
    return Barrier(  # around all of it, what answers our own mistakes included
        app,
        access=access,
        served=served,
        cookie=cookie,
        file_bytes=lambda: sources.read_deployment().limits.request_bytes,
        refuse=lambda scope, status, why: _refuse(app, scope, status, why),
    )


@contextlib.asynccontextmanager
async def _live(app: FastAPI) -> AsyncIterator[None]:
    app.state.broadcast.start()
    yield
    app.state.broadcast.close()


def _open_templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("marwright.monitor.page"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    files = {path.name: path.read_bytes() for path in sorted(STATIC.iterdir())}
    environment.globals["marks"] = {
        name: hashlib.sha256(content).hexdigest()[:12] for name, content in files.items()
    }
    environment.globals["files"] = files
    environment.globals["methods"] = METHODS
    environment.filters["moment"] = show_time
    return environment


# Pages.


@router.get("/")
def show_overview(request: Request, q: str = "") -> Response:
    """Show all versions, traffic, and the server."""
    return _draw(request, request.app.state.views.show_overview(q[:200]))


@router.get("/version")
def show_version(request: Request, model: str = "", version: str = "") -> Response:
    """Show one version."""
    return _draw(request, request.app.state.views.show_version(model, version))


@router.get("/releases")
def show_releases(request: Request, said: str = "") -> Response:
    """Show the releases, and the gates of the one in progress."""
    return _draw(request, request.app.state.views.show_releases(), done=said == "back")


@router.get("/failures")
def show_failures(request: Request) -> Response:
    """Show the latest requests that failed."""
    return _draw(request, request.app.state.views.show_failures())


@router.get("/pictures/{name}")
def show_picture(request: Request, name: str) -> Response:
    """Show the thumbnail of an input."""
    found = request.app.state.views.pictures.find(name)
    if found is None:
        raise HTTPException(404)
    return Response(found, media_type="image/png")


@router.get("/rollback")
def ask_rollback(request: Request, model: str = "") -> Response:
    """Ask whether a release is to be taken back."""
    return _draw(request, request.app.state.views.show_rollback(model), problem="")


@router.post("/rollback")
async def roll_back(request: Request) -> Response:
    """Take a release back, and show the history."""
    model = (await _read_form(request))["model"]
    try:
        done = await run_in_threadpool(request.app.state.rollbacks.roll_back, model)
    except MarwrightError as exc:
        view = await run_in_threadpool(request.app.state.views.show_rollback, model)
        return _draw(request, view, status=409, problem=str(exc))
    _log.info("%s", done)
    return RedirectResponse("/releases?said=back", 303)


@router.get("/try")
def show_form(request: Request, model: str = "", version: str = "") -> Response:
    """Show the form to try a model with."""
    view = request.app.state.views.show_form(chosen=(model, version))
    return _draw(request, view, tried=None, problem="", method="default")


@router.post("/try")
async def answer_form(request: Request) -> Response:
    """Ask a model, and show its answer."""
    form = await _read_form(request)
    async with request.app.state.tries:
        return await run_in_threadpool(_try, request, form)


def _try(request: Request, form: _Form) -> Response:
    views: Views = request.app.state.views
    method, chosen = form["method"], _read_choice(form["choice"])
    tried, problem, status = None, "", 200
    try:
        if not form.content:
            raise InputRejectedError("choose a file first", status=400)
        if method not in {"", "default", *METHODS}:
            raise InputRejectedError("there is no such explanation", status=400)
        with views.sources.open_client() as client:
            tried = try_model(client, *chosen, form.file, form.content, method=method)
    except MarwrightError as exc:
        problem, status = str(exc), 422 if isinstance(exc, InputRejectedError) else 502
    view = views.show_form(chosen=chosen)
    return _draw(request, view, status=status, tried=tried, problem=problem, method=method)


# Signing in and out.


@router.get("/login")
def show_login(request: Request, next: str = "/") -> Response:
    """Show where the token is asked for."""
    return _draw_login(request, next, status=200)


@router.post("/login")
async def sign_in(request: Request) -> Response:
    """Give a browser a session for the token, or for the ticket of the printed address."""
    access: Access = request.app.state.access
    form = await _read_form(request)
    target = _check_target(form["next"])
    session = access.sign_in(form["token"].strip())
    if session is None:
        if not await access.pause():
            return _draw_login(request, target, status=429, problem="Too many wrong tokens.")
        problem = "That is not the token; or its address was used already, or is too old."
        return _draw_login(request, target, status=401, problem=problem)
    answer = RedirectResponse(target, 303)
    cookie = request.app.state.cookie
    answer.set_cookie(cookie, session, httponly=True, samesite="strict", path="/")
    return answer


@router.post("/logout")
async def sign_out(request: Request) -> Response:
    """End a session."""
    await _read_form(request)
    request.app.state.access.sign_out(request.state.session)
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(request.app.state.cookie, httponly=True, samesite="strict", path="/")
    return answer


# Without HTML.


@router.get("/static/{name}")
def send_static(request: Request, name: str) -> Response:
    """Send the style or the script."""
    content = request.app.state.templates.globals["files"].get(name)
    kind = KINDS.get(Path(name).suffix)
    if content is None or kind is None:
        raise HTTPException(404)
    # Its address has a part of its digest: another content has another address.
    return Response(content, headers={"Cache-Control": "max-age=86400", "Content-Type": kind})


@router.get("/api/look")
def send_look(request: Request) -> Response:
    """Send the latest look at the server."""
    return JSONResponse(request.app.state.views.make_report())


@router.get("/api/events")
async def send_events(
    request: Request, topic: str = "overview", model: str = "", version: str = ""
) -> Response:
    """Send each look's changes until the viewer leaves."""
    if topic not in TOPICS:
        raise HTTPException(404)
    key = (model, version) if topic == "version" else ("", "")
    broadcast: Broadcast = request.app.state.broadcast
    if topic == "version" and request.app.state.views.read_scene().find(*key) is None:
        raise HTTPException(404)
    access: Access = request.app.state.access
    session = request.state.session
    return EventStream(
        broadcast,
        broadcast.join(Topic(topic, *key)),
        may_see=lambda: not session or access.is_session(session),  # a token does not end
    )


# What answers are made of.


def _draw(request: Request, view: View | None, *, status: int = 200, **values: Any) -> HTMLResponse:
    """Draw a view."""
    if view is None:
        raise HTTPException(404)
    session = request.state.session
    code = request.app.state.access.make_code(session) if session else ""
    template = request.app.state.templates.get_template(view.template)
    text = template.render(topic=view.topic, stamp=view.stamp, code=code, **view.values, **values)
    return HTMLResponse(text, status)


def _draw_login(request: Request, target: str, *, status: int, problem: str = "") -> HTMLResponse:
    app = request.app
    text = app.state.templates.get_template("login.html").render(
        next=_check_target(target),
        problem=problem,
        name=app.state.views.sources.record.name,
    )
    return HTMLResponse(text, status)


def _check_target(target: str) -> str:
    """Return where to go on to: a path of ours, whatever was asked for."""
    try:
        parts = urlsplit(target)
    except ValueError:
        return "/"
    is_ours = not parts.scheme and not parts.netloc and target.startswith("/")
    return target if is_ours and "\\" not in target and not target.startswith("//") else "/"


@dataclass(frozen=True)
class _Form:
    """What was filled in."""

    texts: Mapping[str, str]
    file: str = ""
    """The name of the file that was chosen."""
    content: bytes = b""

    def __getitem__(self, name: str) -> str:
        """Return a text; "" where there is none."""
        return self.texts.get(name, "")


async def _read_form(request: Request) -> _Form:
    """Return a form that was made for this session; another one is refused."""
    session = request.state.session
    async with request.form(max_files=1, max_fields=16) as form:
        texts = {key: value for key, value in form.items() if isinstance(value, str)}
        if session and not request.app.state.access.is_code(session, texts.get("code")):
            raise HTTPException(403, "This form is too old, or not of this page; nothing was done.")
        upload = form.get("file")
        if not isinstance(upload, UploadFile):
            return _Form(texts)
        return _Form(texts, Path(upload.filename or "").name[:200], await upload.read())


def _read_choice(text: str) -> tuple[str, str]:
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, list) and [type(item) for item in value] == [str, str]:
            return value[0], value[1]
    return "", ""


# Errors.


def _refuse(app: FastAPI, scope: Scope, status: int, why: str) -> ASGIApp:
    """Return the answer to a request that the barrier refuses."""
    request = Request({**scope, "app": app})
    if status == 401 and not _wants_json(request):
        query = f"?{request.url.query}" if request.url.query else ""
        target = f"{request.url.path}{query}" if request.method == "GET" else "/"
        return _draw_login(request, target, status=401, problem=why)
    return _make_error(request, status, why or "A token is needed.")


def _wants_json(request: Request) -> bool:
    return request.url.path.startswith("/api/")


def _make_error(
    request: Request, status: int, why: str, headers: Mapping[str, str] | None = None
) -> Response:
    title = TITLES.get(status, "It did not work")
    more = dict(headers or {})
    if _wants_json(request):
        if status == 401:
            more["WWW-Authenticate"] = "Bearer"
        problem = {"type": "about:blank", "title": title, "status": status, "detail": why}
        return JSONResponse(problem, status, more, media_type="application/problem+json")
    text = request.app.state.templates.get_template("error.html").render(
        title=title, why=why, name=request.app.state.views.sources.record.name
    )
    return HTMLResponse(text, status, more)


def _answer_http(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    why = "" if exc.detail == HTTPStatus(exc.status_code).phrase else str(exc.detail)
    return _make_error(request, exc.status_code, why, exc.headers)


def _answer_error(request: Request, exc: Exception) -> Response:
    if isinstance(exc, OverloadedError):
        return _make_error(request, 503, str(exc), {"Retry-After": "30"})
    return _make_error(request, 502, str(exc))


def _answer_large(request: Request, exc: Exception) -> Response:
    return _make_error(request, 413, "This is too large; see limits.request_bytes.")


def _answer_mistake(request: Request, exc: Exception) -> Response:
    _log.error("%s could not be answered", request.url.path, exc_info=exc)
    return _make_error(request, 500, "marwright itself failed; the terminal says more.")
