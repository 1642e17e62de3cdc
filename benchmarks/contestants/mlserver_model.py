"""MLServer: two parallel workers, adaptive batching up to 32 (both in its settings files).

It speaks the V2 protocol, where an image is base64 inside JSON: the one contestant that gets the
request's bytes in an envelope. A custom handler would take them raw, but neither batch them nor
pass them to its parallel workers.
"""

from __future__ import annotations

from mlserver import MLModel
from mlserver.codecs import Base64Codec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse
from pipeline import Classifier


class Model(MLModel):
    """What MLServer's workers load."""

    async def load(self) -> bool:
        """Load the model, once a worker."""
        self.classifier = Classifier.from_environment()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answer one request, or several that MLServer has merged along the first axis."""
        answers = self.classifier.classify(Base64Codec.decode_input(payload.inputs[0]))
        return InferenceResponse(
            model_name=self.name, outputs=[StringCodec.encode_output("answer", answers)]
        )
