"""Serve an archive for as long as a block runs, and ask it.

Needs a run (`marwright train`); run as `python examples/serve_and_predict.py`.
"""

from __future__ import annotations

from pathlib import Path

from marwright.archive import Run, pack_run
from marwright.server import TorchServe


def main() -> None:
    """Pack, serve, predict."""
    run = Run.open(Path("runs/digits"))
    packed = pack_run(run, out=Path("model_store"), name="digits", force=True)
    with TorchServe(packed.path.parent, models=[packed.path.name]) as server:
        for sample in run.samples:
            answer = server.client.predict("digits", sample.path)
            print(sample.label, answer.json())


if __name__ == "__main__":
    main()
