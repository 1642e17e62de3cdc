"""Live updates by server-sent events: each look is drawn once, and sent to all who watch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from marwright.errors import MarwrightError, OverloadedError

__all__ = ["Broadcast", "EventStream", "Frame", "Topic", "Viewer"]

_log = logging.getLogger(__name__)

BEHIND = 8
"""Messages that a viewer may be behind; who does not take them is dropped."""
LOOK_SECONDS = 0.5
RETRY_MILLISECONDS = 2000


class Topic(NamedTuple):
    """What a viewer watches."""

    name: str
    model: str = ""
    version: str = ""


@dataclass(frozen=True)
class Frame:
    """What changes in a page while somebody looks at it; all but `html` is plain text."""

    stamp: str
    """Where it is another one, the page is to be fetched anew."""
    rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Rows of tables by their keys: the mood, and the cells."""
    text: Mapping[str, str] = field(default_factory=dict)
    html: Mapping[str, str] = field(default_factory=dict)
    """Escaped already."""

    def encode(self, before: Frame | None, notes: list[str]) -> bytes:
        """Return the event of what is new since an earlier frame; of all where there is none."""
        body: dict[str, Any] = {"stamp": self.stamp, "notes": notes}
        for name in ("rows", "text", "html"):
            now, old = getattr(self, name), getattr(before, name, {})
            body[name] = {key: value for key, value in now.items() if old.get(key) != value}
        return b"event: look\ndata: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


class Viewer:
    """One who watches; what it is to be sent waits here."""

    def __init__(self, topic: Topic) -> None:
        self.topic = topic
        self.is_fresh = True
        """Whether it was sent nothing yet."""
        self.task: asyncio.Task[Any] | None = None
        self._waiting: asyncio.Queue[bytes | None] = asyncio.Queue(BEHIND)

    def put(self, message: bytes) -> bool:
        """Let a message wait to be sent; return False where too many do."""
        try:
            self._waiting.put_nowait(message)
        except asyncio.QueueFull:
            return False
        return True

    async def get(self) -> bytes | None:
        """Return the next message; None at the end."""
        return await self._waiting.get()

    def end(self) -> None:
        """Send nothing more."""
        while not self._waiting.empty():
            self._waiting.get_nowait()
        self._waiting.put_nowait(None)


class Broadcast:
    """Sends frames to viewers, from a thread of its own; the viewers live in the event loop.

    `wait` returns the moment of the next look after another one, or None where none came in time;
    `draw` a topic's frame, and `notice` what is worth a word since it was called last.
    """

    def __init__(
        self,
        wait: Callable[[float, float], float | None],
        draw: Callable[[Topic], Frame],
        notice: Callable[[], list[str]],
        *,
        most: int,
    ) -> None:
        self._wait = wait
        self._draw = draw
        self._notice = notice
        self._most = most
        self._viewers: dict[Topic, set[Viewer]] = {}
        self._frames: dict[Topic, Frame] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="page", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin; called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """End all viewers; any thread may call it."""
        self._ended.set()
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended already
                self._loop.call_soon_threadsafe(self._end_all)

    def _end_all(self) -> None:
        for viewers in self._viewers.values():
            for viewer in viewers:
                viewer.end()

    @property
    def count(self) -> int:
        """How many watch."""
        return sum(map(len, self._viewers.values()))

    def join(self, topic: Topic) -> Viewer:
        """Let one more watch.

        Raises:
            OverloadedError: as many watch as may.
        """
        if self.count >= self._most or self._ended.is_set():
            raise OverloadedError(
                f"{self._most} viewers watch already",
                status=503,
                remedy="close one, and reload; or reload from time to time",
            )
        viewer = Viewer(topic)
        self._viewers.setdefault(topic, set()).add(viewer)
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """Let one go."""
        watching = self._viewers.get(viewer.topic, set())
        watching.discard(viewer)
        if not watching:
            self._viewers.pop(viewer.topic, None)
            self._frames.pop(viewer.topic, None)

    def _run(self) -> None:
        """Draw each look's frames, and hand them to the event loop."""
        moment = 0.0
        while not self._ended.is_set():
            try:
                moment = self._draw_next(moment)
            except Exception:  # a mistake of ours must not end the updates of all viewers
                _log.exception("a look could not be drawn")
                self._ended.wait(LOOK_SECONDS)

    def _draw_next(self, moment: float) -> float:
        """Draw the next look, if there is one in time, and return its moment."""
        assert self._loop is not None
        found = self._wait(moment, LOOK_SECONDS)
        if found is None:
            return moment
        notes = self._notice()
        for topic in list(self._viewers):
            try:
                frame = self._draw(topic)
            except MarwrightError as exc:  # the page itself says so too
                _log.warning("%s cannot be drawn: %s", topic, exc)
                continue
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                self._loop.call_soon_threadsafe(self._send, topic, frame, notes)
        return found

    def _send(self, topic: Topic, frame: Frame, notes: list[str]) -> None:
        """Give a frame to all who watch a topic: all of it to fresh viewers, else what is new."""
        before = self._frames.get(topic)
        self._frames[topic] = frame
        messages: dict[bool, bytes] = {}
        for viewer in list(self._viewers.get(topic, ())):
            is_fresh = viewer.is_fresh or before is None
            if is_fresh not in messages:
                messages[is_fresh] = frame.encode(None if is_fresh else before, notes)
            viewer.is_fresh = False
            if not viewer.put(messages[is_fresh]):
                self.leave(viewer)
                if viewer.task is not None:
                    viewer.task.cancel()


class EventStream(Response):
    """The answer that a viewer reads until it leaves, or `may_see` says that it is no viewer."""

    def __init__(
        self, broadcast: Broadcast, viewer: Viewer, *, may_see: Callable[[], bool]
    ) -> None:
        super().__init__(media_type="text/event-stream")
        self._broadcast = broadcast
        self._viewer = viewer
        self._may_see = may_see

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what comes, until the viewer is gone, dropped or signed out, or the page ends."""
        viewer = self._viewer
        viewer.task = asyncio.current_task()
        watch = asyncio.create_task(_wait_until_gone(receive, viewer))
        headers = [(key, value) for key, value in self.raw_headers if key != b"content-length"]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            message: bytes | None = f"retry: {RETRY_MILLISECONDS}\n\n".encode()
            while message is not None and self._may_see():
                await send({"type": "http.response.body", "body": message, "more_body": True})
                message = await viewer.get()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watch.cancel()
            self._broadcast.leave(viewer)


async def _wait_until_gone(receive: Receive, viewer: Viewer) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    viewer.end()
