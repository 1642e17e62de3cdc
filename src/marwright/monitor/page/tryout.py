"""The form to try a model with: its answer, and why it answers so."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from marwright.client import Answer, Client
from marwright.errors import InputRejectedError, MarwrightError
from marwright.monitor.page.pictures import draw_anew

__all__ = ["METHODS", "Tryout", "try_model"]

METHODS = ("integrated_gradients", "saliency", "occlusion", "grad_cam")
SIDE = 288
"""Pixels of the pictures that are shown."""
LABELS = 10
LONGEST_TEXT = 20_000
SECONDS = 60.0


@dataclass(frozen=True)
class Tryout:
    """One answer, ready to be shown."""

    model: str
    version: str
    file: str
    milliseconds: int
    labels: tuple[tuple[str, float], ...]
    """The likeliest first; empty where the answer is none of a classifier."""
    text: str
    """The answer's JSON, indented."""
    picture: str
    """The input as a data: address; empty where it is no picture."""
    heat: str
    """What speaks for the answer, likewise."""
    explanation: str
    """Why there is no heat map; empty where there is one, or none was asked for."""


def try_model(
    client: Client, model: str, version: str, file: str, content: bytes, *, method: str
) -> Tryout:
    """Ask a version for its answer to a file, and for an explanation by a method.

    `method`: one of METHODS, "default" for the model's own, "" for no explanation.

    Raises:
        MarwrightError: there is no answer; without an explanation it is shown all the same.
    """
    data = read_input(file, content)
    answer = client.predict(model, data, version=version, timeout=SECONDS)
    heat, problem = b"", ""
    if method:
        try:
            heat = explain(client, model, version, data, method)
        except MarwrightError as exc:
            problem = str(exc)
    return Tryout(
        model=model,
        version=version,
        file=file,
        milliseconds=round(answer.seconds * 1000),
        labels=_list_labels(answer),
        text=_show_answer(answer),
        picture=_make_address(content),
        heat=_make_address(heat),
        explanation=problem,
    )


def read_input(file: str, content: bytes) -> Any:
    """Return a file as the client sends it: one of JSON is read, others are sent as they are.

    Raises:
        InputRejectedError: it is no JSON although its name says so.
    """
    if not file.lower().endswith(".json"):
        return content
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise InputRejectedError(f"the file is no JSON: {exc}", status=400) from exc
    return value if isinstance(value, (dict, list)) else content


def explain(client: Client, model: str, version: str, data: Any, method: str) -> bytes:
    """Return the picture of an explanation."""
    asked = data
    if method != "default" and isinstance(data, bytes):
        asked = {"data": base64.b64encode(data).decode(), "method": method}
    elif method != "default" and isinstance(data, dict):
        asked = {**data, "method": method}
    answer = client.explain(model, asked, version=version, accept="image/png", timeout=SECONDS)
    return answer.body


def _list_labels(answer: Answer) -> tuple[tuple[str, float], ...]:
    try:
        value = answer.json()
    except MarwrightError:
        return ()
    if not isinstance(value, Mapping) or not value:
        return ()
    if not all(isinstance(item, (int, float)) and 0 <= item <= 1 for item in value.values()):
        return ()
    pairs = sorted(value.items(), key=lambda pair: pair[1], reverse=True)
    return tuple((str(label), float(share)) for label, share in pairs[:LABELS])


def _show_answer(answer: Answer) -> str:
    try:
        text = json.dumps(answer.json(), indent=2, ensure_ascii=False)
    except MarwrightError:
        text = f"{len(answer.body):,} bytes of {answer.content_type or 'an unknown type'}"
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}\n..."


def _make_address(content: bytes) -> str:
    drawn = draw_anew(content, side=SIDE) if content else None
    return f"data:image/png;base64,{base64.b64encode(drawn).decode()}" if drawn else ""
