"""Test an archive as it will be served: its samples must be answered as they were recorded.

Needs model_store/cnn.mar (`marwright demo`, or `marwright pack`); run as
`pytest examples/test_archive.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from marwright.errors import InputRejectedError


def test_samples_are_answered_as_recorded(served_archive):
    """A function that serves archives: one test may compare several."""
    cnn = served_archive("model_store/cnn.mar")
    assert cnn.samples
    for sample in cnn.samples:
        cnn.check(sample)


@pytest.mark.archive("model_store/cnn.mar", workers=2)
def test_what_is_no_image_is_refused(served_archive):
    """With the marker, the fixture is the archive itself."""
    with pytest.raises(InputRejectedError):
        served_archive.predict(Path(__file__))
