"""The words of who leads a release, and what happens where none comes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import IO

import pytest

from marwright.errors import ReleaseError
from marwright.release.lead import Lead


@pytest.fixture
def words() -> Iterator[tuple[IO[str], IO[str]]]:
    """A pipe: where words are heard, and where they are said."""
    heard, said = os.pipe()
    with os.fdopen(heard) as source, os.fdopen(said, "w", buffering=1) as target:
        yield source, target


Words = tuple[IO[str], IO[str]]


def test_a_word_holds_from_when_it_was_said(words: Words) -> None:
    lead = Lead(words[0], lease=30)
    words[1].write("stay \nmove \n")
    lead.wait_for("move")
    lead.wait_for("move")


def test_without_a_word_it_ends_with_its_lease(words: Words) -> None:
    lead = Lead(words[0], lease=0.3)
    with pytest.raises(ReleaseError, match="not heard of for 0 s"):
        lead.wait_for("move")


def test_each_word_renews_the_lease(words: Words) -> None:
    lead = Lead(words[0], lease=1.0)
    for _ in range(8):
        words[1].write("stay \n")
        time.sleep(0.2)
        lead.check()


def test_the_way_back_gives_the_reason(words: Words) -> None:
    lead = Lead(words[0], lease=30)
    words[1].write("move \nback another server has failed\n")
    with pytest.raises(ReleaseError, match="another server has failed"):
        lead.wait_for("keep")


def test_where_the_site_ends_it_goes_back(words: Words) -> None:
    lead = Lead(words[0], lease=30)
    words[1].close()
    with pytest.raises(ReleaseError, match="the site that it is made at has ended"):
        lead.wait_for("move")
