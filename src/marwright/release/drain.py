"""Waiting until a version has answered what the gateway sent it before its traffic ended.

TorchServe 0.12 leaves requests without an answer that wait for a version which is unregistered.
"""

from __future__ import annotations

import time

from marwright.release.gates import ARMS
from marwright.release.target import Target

__all__ = ["drain"]

LOOK_SECONDS = 0.1
QUIET_SECONDS = 0.5
"""It has answered all once nothing of it was logged for so long, or for as long as it takes."""


def drain(target: Target, model: str, arm: str, *, most: float) -> float:
    """Wait until nothing of one arm was answered for as long as its slowest answer took.

    Returns the seconds, which are `most` at most; 0 without a gateway, where nobody knows.
    """
    began = last = time.monotonic()
    seen, quiet = dict.fromkeys(ARMS, 0), QUIET_SECONDS
    while target.gateway is not None and (now := time.monotonic()) < began + most:
        observed = target.observe(model, since=seen)
        seen = {each: count + len(observed[each]) for each, count in seen.items()}
        quiet = max([quiet, *(seconds for _, seconds in observed[arm])])
        if observed[arm]:
            last = now
        elif now - last >= quiet:
            break
        time.sleep(LOOK_SECONDS)
    return time.monotonic() - began
