"""Sentences with the mean of what some twenty people rated them: the data of Hutto and Gilbert (2014)."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packages import Package, read_member

VADER = Package(
    "vaderSentiment",
    "2.5",
    "vaderSentiment-2.5.tar.gz",
    "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
)
INNER = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"


@dataclass(frozen=True)
class Rated:
    """A sentence: the document that it is from, its mean rating from -4 (most negative) to 4, and its words."""

    document: str
    rating: float
    text: str


def rated(package: Path, name: str) -> Iterator[Rated]:
    """The sentences of one of the four sets, such as ``tweets``.

    Sentences of editorials and product reviews are numbered DOCUMENT_SENTENCE; a tweet is a document of its own, and
    so is a sentence about a film.
    """
    with tarfile.open(package) as outer:
        packed = io.BytesIO(read_member(outer, INNER))
    with tarfile.open(fileobj=packed) as archive:
        text = read_member(archive, f"hutto_ICWSM_2014/{name}_GroundTruth.txt").decode(errors="replace")
    for line in text.splitlines():
        if line.count("\t") == 2:
            number, rating, words = line.split("\t")
            yield Rated(number.partition("_")[0], float(rating), words)
