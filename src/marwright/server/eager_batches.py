"""TorchServe's frontend with one constant changed: a request does not wait for company.

TorchServe takes the first request of a batch from its queue and then waits up to maxBatchDelay,
1 ms at least, for each further one (org.pytorch.serve.wlm.Model, pollBatch), also when nobody else
is there. Batches need no waiting: while a worker computes, requests queue up, and the next batch
takes them all. So the waits' unit becomes microseconds: maxBatchDelay 1 takes what is in the queue
and goes. The class is changed on its way into a server's run folder, nothing installed is touched;
what was tried instead is in docs/decisions/0010-eager-batches.md.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
from pathlib import Path

__all__ = ["write_eager_model"]

_log = logging.getLogger(__name__)

MODEL_CLASS = "org/pytorch/serve/wlm/Model.class"
KNOWN_SHA256 = "7c5523f1fe77fe79aa32665469e17725e70518692abcf4987989ef72f10d4cff"
"""Of the class in TorchServe 0.12.0."""

# A constant of a class file: tag 1 (UTF-8), length, text (JVM specification, section 4.4.7). The
# class has one of each kind, and uses it for TimeUnit alone.
_BEFORE = b"\x01\x00\x0cMILLISECONDS"
_AFTER = b"\x01\x00\x0cMICROSECONDS"


def write_eager_model(jar: Path, folder: Path) -> bool:
    """Write the changed class below a folder that is to stand first on Java's class path.

    Returns whether it was written: with another TorchServe than 0.12.0 it is not, and a line in the
    log says so.
    """
    try:
        with zipfile.ZipFile(jar) as archive:
            code = archive.read(MODEL_CLASS)
    except (OSError, KeyError, zipfile.BadZipFile) as exc:
        _log.warning("requests will wait for maxBatchDelay: %s cannot be read: %s", jar, exc)
        return False
    if hashlib.sha256(code).hexdigest() != KNOWN_SHA256 or code.count(_BEFORE) != 1:
        _log.warning("requests will wait for maxBatchDelay: %s is not TorchServe 0.12.0's", jar)
        return False
    target = folder / MODEL_CLASS
    target.parent.mkdir(parents=True)
    target.write_bytes(code.replace(_BEFORE, _AFTER))
    return True
