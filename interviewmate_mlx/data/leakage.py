"""Texts that say the same: the near-duplicates of a data set.

Two texts are compared by the Jaccard similarity of their sets of word 5-grams,
after case, punctuation and white space are folded. A text of fewer words is one
gram. Grams are sorted together, so that those which several texts share lie side
by side: no sketch, no library, and 100,000 answers take well under a minute.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GRAM_WORDS = 5
# Similarity from which two texts are near-duplicates. A question has few grams, and one
# changed word takes five of them; two answers that were written apart share hardly one.
QUESTION_THRESHOLD = 0.3
ANSWER_THRESHOLD = 0.2
# A gram that more texts than this hold makes no pairs of all of them (their number
# grows with the square); each is compared with the first one that holds it.
_COMMON = 64
# Pairs are compared exactly if the grams that are not common make up half of what it takes,
# and so are the closest few, which are shown.
_SHARE_TO_COMPARE, _CLOSEST = 0.5, 20


@dataclass(frozen=True)
class Pair:
    """Two texts, by their place in the list, and how alike they are."""

    first: int
    second: int
    similarity: float  # 1: equal after folding


def fold(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    return re.findall(r"\w+", text.casefold())


def similar_pairs(texts: Sequence[str], threshold: float) -> list[Pair]:
    """The pairs of texts that are at least so alike and the closest below, the most alike first."""
    grams = _hash_grams(texts)
    sizes = np.array([len(g) for g in grams])
    first, second, shared = _sharing_pairs(grams)
    estimate = shared / (sizes[first] + sizes[second] - shared) if len(first) else np.empty(0)
    order = np.argsort(-estimate, kind="stable")
    num_likely = int((estimate >= _SHARE_TO_COMPARE * threshold).sum())
    pairs = []
    for i in order[: max(num_likely, _CLOSEST)]:
        one, other = int(first[i]), int(second[i])
        both = len(np.intersect1d(grams[one], grams[other], assume_unique=True))
        pairs.append(Pair(one, other, both / (len(grams[one]) + len(grams[other]) - both)))
    return sorted(pairs, key=lambda pair: (-pair.similarity, pair.first, pair.second))


def _hash_grams(texts: Sequence[str]) -> list[np.ndarray]:
    """The distinct 5-grams of each text, as sorted 64-bit hashes."""
    vocabulary: dict[str, int] = {}
    # Random odd factors make the sum over a gram's words a hash; the seed only keeps it fixed.
    factors = np.random.default_rng(0).integers(0, 2**63, GRAM_WORDS, np.uint64) * 2 + 1
    grams = []
    for text in texts:
        ids = [vocabulary.setdefault(word, len(vocabulary) + 1) for word in fold(text)]
        ids += [0] * (GRAM_WORDS - len(ids))
        words = np.array(ids, np.uint64)
        words ^= words << np.uint64(32)
        windows = np.lib.stride_tricks.sliding_window_view(words, GRAM_WORDS)
        grams.append(np.unique((windows * factors).sum(axis=1)))
    return grams


def _sharing_pairs(grams: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs that share a gram: the first's index, the second's, and how many they share.

    Of a common gram only the pairs with its first holder count.
    """
    num_texts = len(grams)
    owners = np.repeat(np.arange(num_texts), [len(g) for g in grams])
    values = np.concatenate([np.empty(0, np.uint64), *grams])
    order = np.argsort(values, kind="stable")  # stable: a gram's owners stay in order
    values, owners = values[order], owners[order]
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))[: len(values)]
    counts = np.diff(np.append(starts, len(values)))
    codes = [np.empty(0, np.int64)]
    for start, count in zip(starts[counts > 1], counts[counts > 1], strict=True):
        group = owners[start : start + count]
        if count <= _COMMON:
            one, other = np.triu_indices(count, k=1)
            codes.append(group[one] * num_texts + group[other])
        else:
            codes.append(group[0] * num_texts + group[1:])
    pairs, shared = np.unique(np.concatenate(codes), return_counts=True)
    return pairs // max(1, num_texts), pairs % max(1, num_texts), shared
