"""BentoML: two workers; the image is the body as it is.

Its adaptive batching takes a list of inputs from one request, so base64 inside JSON here; with
that it answered two thirds of the requests that it answers this way, and some with 503: what a
request costs it lies before the model. uvloop and httptools (bentoml.txt) gave it a third more.
"""

from __future__ import annotations

from typing import Annotated

import bentoml
from bentoml.validators import ContentType
from pipeline import Classifier


@bentoml.service(workers=2, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Server:
    """What each worker loads."""

    def __init__(self) -> None:
        self.classifier = Classifier.from_environment()

    @bentoml.api(route="/classify")
    async def classify(self, image: Annotated[bytes, ContentType("image/jpeg")], /) -> str:
        """Answer one image, on the event loop: BentoML's threads gave it no more."""
        return self.classifier.classify([image])[0]
