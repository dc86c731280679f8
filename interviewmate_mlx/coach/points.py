"""Which points of a written answer another answer has: by the terms that they share.

This is overlap of words and not judgement: a right answer in other words counts as lacking,
and a wrong one in the same words as having.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import snowballstemmer

from interviewmate_mlx.data.leakage import fold

# From this share on, by weight, an answer has a point. Of the points of the shipped answers, a
# good other answer to the question has 66 %, a faulty one 34 %, and one to another question of
# the same category 4 % (`scripts/data/points.py`).
COVERED = 0.3
# A sentence ends before white space and what can begin another. Not in "e.g. this" or "0.5".
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9`\"'(*-])|\n+")
_MIN_TERMS = 3  # of a point; a shorter sentence belongs to the one before
_stem = cache(snowballstemmer.stemmer("english").stemWord)


@dataclass(frozen=True)
class Point:
    """A sentence of a written answer.

    Attributes:
        text: the sentence.
        share: of its terms, by weight, those that the other answer has; 0 to 1.
    """

    text: str
    share: float

    @property
    def is_covered(self) -> bool:
        return self.share >= COVERED


def term_weights(texts: Iterable[str]) -> dict[str, float]:
    """The inverse document frequency of each term, log((1 + N) / (1 + df)): rare terms weigh most.

    Args:
        texts: of a data set, one document each.
    """
    documents = [set(terms(text)) for text in texts]
    counts = Counter(term for document in documents for term in document)
    return {term: math.log((1 + len(documents)) / (1 + count)) for term, count in counts.items()}


def terms(text: str) -> list[str]:
    """The stems of a text's words."""
    return [_stem(word) for word in fold(text)]


def sentences(text: str) -> list[str]:
    """The sentences of a text; one that says hardly anything goes with the one before."""
    found: list[str] = []
    for part in _SENTENCE_END.split(text.strip()):
        if found and len(fold(part)) < _MIN_TERMS:
            found[-1] += f" {part.strip()}"
        elif part.strip():
            found.append(part.strip())
    return found


def points_of(reference: str, answer: str, weights: Mapping[str, float]) -> list[Point]:
    """The sentences of a reference answer, each with how much of it an answer has.

    Args:
        reference: the written answer.
        answer: of the user.
        weights: of terms, from `term_weights`. A term that is not among them is the rarest.
    """
    own = set(terms(answer))
    rarest = max(weights.values(), default=1.0)
    found = []
    for sentence in sentences(reference):
        weighed = {term: weights.get(term, rarest) for term in terms(sentence)}
        whole = sum(weighed.values())
        had = sum(weight for term, weight in weighed.items() if term in own)
        found.append(Point(sentence, had / whole if whole else 0.0))
    return found
