"""FastAPI: one prediction a request; `uvicorn --workers 2`, uvloop and httptools.

The work is done on the event loop: with one thread of computing, a pool of threads only adds
switches. FastAPI batches nothing by itself.
"""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from pipeline import Classifier

app = FastAPI()
classifier = Classifier.from_environment()


@app.post("/classify")
async def classify(request: Request) -> Response:
    """Answer one image."""
    [answer] = classifier.classify([await request.body()])
    return Response(answer, media_type="application/json")
