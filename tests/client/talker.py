"""A handler that does what its input says; test_grpc.py packs it."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from ts.protocol.otf_message_handler import send_intermediate_predict_response


class Talker:
    def initialize(self, context: Any) -> None:
        self.initialized = True

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        return [self.obey(row, context) for row in data]

    def obey(self, row: dict[str, Any], context: Any) -> Any:
        if "body" not in row:
            return ",".join(f"{name}={bytes(row[name]).decode()}" for name in sorted(row))
        text = bytes(row["body"]).decode()
        word, _, value = text.partition(":")
        if word in {"tell", "slowly"}:
            *parts, last = value.split(",")
            for part in parts:
                send_intermediate_predict_response(
                    [part], context.request_ids, "Intermediate Prediction success", 200, context
                )
                time.sleep(0.3 if word == "slowly" else 0)
            return last
        if word == "sleep":
            time.sleep(float(value))
        if word == "exit":
            os._exit(3)
        if word == "raise":
            raise ValueError(value)
        if word == "problem":
            status = int(value)
            context.set_response_status(status, "as told")
            return json.dumps(
                {"title": "Told", "status": status, "detail": "so it was told"},
                separators=(",", ":"),
            )
        if word == "status":
            context.set_response_status(int(value), "as told")
        if word == "big":
            return b"x" * int(value)
        return f"{os.getpid()} {text}"
