from __future__ import annotations

import time

import pytest

from marwright.archive import Packed
from marwright.server import TorchServe

pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_an_expired_token_is_renewed_by_itself(packed: Packed, scan: bytes) -> None:
    properties = {"token_expiration_min": "1"}
    with TorchServe(packed.path.parent, models=["cnn.mar"], properties=properties) as server:
        assert server.endpoint.key_file is not None
        before = server.endpoint.key_file.read_text("utf-8")
        time.sleep(62)
        assert server.client.predict("cnn", scan).status == 200
        assert server.client.models.describe("cnn").ready
        assert server.endpoint.key_file.read_text("utf-8") != before
