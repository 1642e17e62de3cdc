"""Answers of models as rows of JSON and as cells of a table."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["decode_body", "render_answer"]

SHOWN_LETTERS = 60
"""Of a binary answer in a table: enough to tell a picture from a sound."""


def decode_body(body: bytes, content_type: str | None) -> dict[str, Any]:
    """Return JSON and text as `answer`, any other body as `body_base64`."""
    try:
        text = body.decode()
    except ValueError:
        return {"body_base64": base64.b64encode(body).decode()}
    # A dict without a content type is JSON as well: TorchServe encodes it and says nothing.
    with contextlib.suppress(ValueError, RecursionError):
        if not content_type or "json" in content_type:
            return {"answer": json.loads(text)}
    return {"answer": text}


def render_answer(row: Mapping[str, Any]) -> str:
    """Return labels with their probabilities in a line; anything else as it came."""
    if "body_base64" in row:
        return f"{row['body_base64'][:SHOWN_LETTERS]} (base64)"
    answer = row["answer"]
    if isinstance(answer, dict) and all(isinstance(value, float) for value in answer.values()):
        return "  ".join(f"{label} {value:.4f}" for label, value in answer.items())
    return str(answer)
