"""TorchServe's tokens: read from its key file, renewed when they expire, never shown.

The file is written by org.pytorch.serve.util.TokenAuthorization; docs/token_authorization_api.md
describes `GET /token`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from marwright.errors import TokenRejectedError

__all__ = ["Purpose", "TokenFile"]

Purpose = Literal["inference", "management", "API"]


class TokenFile:
    """A key_file.json, read anew whenever a token is wanted: TorchServe rewrites it on renewal."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __repr__(self) -> str:
        return f"TokenFile({str(self._path)!r})"

    def read(self, purpose: Purpose) -> str:
        """Return the current token for the inference, management or token API.

        Raises:
            TokenRejectedError: the file is missing or broken; a status of 0, since none was sent.
        """
        try:
            token = json.loads(self._path.read_text(encoding="utf-8"))[purpose]["key"]
            # What no header can carry, requests would quote in its exception.
            if not re.fullmatch(r"[!-~]+", token):
                raise ValueError("not a token")
            return str(token)
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise TokenRejectedError(
                f"cannot read the {purpose} token from {self._path}",
                status=0,
                detail="",
                remedy="check that the server runs, and that you may read its key file",
            ) from exc
