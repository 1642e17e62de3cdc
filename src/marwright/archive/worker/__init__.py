"""What a TorchServe worker does, in this process: load an archive, answer requests.

Loading, context, batching and encoding are TorchServe's own code (ts.model_loader, ts.service,
ts.protocol), so that they cannot differ. What its Java frontend does before and after (which
parameters a body becomes, which HTTP answer a worker's reply) is written again here, and held
against a booted TorchServe by tests/integration/test_in_process.py.
"""

from __future__ import annotations

from marwright.archive.worker.answer import Answer, Failure
from marwright.archive.worker.model import Model
from marwright.archive.worker.request import Part, Request

__all__ = ["Answer", "Failure", "Model", "Part", "Request"]
