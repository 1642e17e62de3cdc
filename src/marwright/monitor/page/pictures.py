"""Pictures that others have sent, as small PNG files of our own making.

What a client sent never reaches a browser: it is decoded here, within limits, and drawn anew.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict

from PIL import Image

__all__ = ["draw_anew", "Pictures"]

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
MOST_PIXELS = 16_000_000
"""Of the picture as it was sent; it is decoded into three bytes each."""
KEPT = 128


def draw_anew(content: bytes, *, side: int) -> bytes | None:
    """Return a picture as PNG, at most `side` pixels wide and high; None where it is none.

    A small one is enlarged by whole steps, so that its pixels are seen.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if not 0 < image.width * image.height <= MOST_PIXELS:
                return None
            image.draft("RGB", (side, side))  # a JPEG need not be decoded at its full size
            drawn = image.convert("RGB")
    except Exception:  # decoders of hostile bytes raise whatever there is
        return None
    drawn.thumbnail((side, side))
    steps = side // max(drawn.size)
    if steps > 1:
        size = (drawn.width * steps, drawn.height * steps)
        drawn = drawn.resize(size, Image.Resampling.NEAREST)
    stream = io.BytesIO()
    drawn.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


class Pictures:
    """The last thumbnails, under names that nobody guesses; threads may share it."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, bytes | None] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, content: bytes, *, side: int = 96) -> str:
        """Keep a thumbnail, and return its name; "" where the content is no picture."""
        name = hashlib.sha256(content).hexdigest()[:32]
        with self._lock:
            known = name in self._kept
        drawn = self._kept.get(name) if known else draw_anew(content, side=side)
        with self._lock:
            self._kept[name] = drawn
            self._kept.move_to_end(name)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return name if drawn else ""

    def find(self, name: str) -> bytes | None:
        """Return a thumbnail; None where it is not kept any more."""
        with self._lock:
            return self._kept.get(name)
