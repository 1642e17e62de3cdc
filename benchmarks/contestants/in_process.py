"""The limit: decode, infer and encode in one single-threaded process at batch 32, without a server.

in_process.py IMAGE SECONDS: says "ready" when warm, waits for a line, and prints images a second.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pipeline import Classifier

BATCH = 32


def main() -> None:
    """Work for the given time."""
    image, seconds = Path(sys.argv[1]).read_bytes(), float(sys.argv[2])
    classifier = Classifier.from_environment()
    work(classifier, image, 1.0)
    print("ready", flush=True)
    sys.stdin.readline()
    print(work(classifier, image, seconds), flush=True)


def work(classifier: Classifier, image: bytes, seconds: float) -> float:
    """Answer batches of one image for some time; return images a second."""
    started = now = time.perf_counter()
    done = 0
    while now < started + seconds:
        classifier.classify([image] * BATCH)
        done += BATCH
        now = time.perf_counter()
    return done / (now - started)


if __name__ == "__main__":
    main()
