"""Texts that say the same: the near-duplicates of a data set.

Two texts are compared by the Jaccard similarity of their sets of word 5-grams,
after case, punctuation and white space are folded. A text of fewer words is one
gram. Equal texts are found first; of the others all grams are sorted together, so
that those which several texts share lie side by side.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GRAM_WORDS = 5
# Similarity from which two texts are near-duplicates. A question has few grams, and one
# changed word takes five of them; two answers that were written apart share hardly one.
QUESTION_THRESHOLD = 0.3
ANSWER_THRESHOLD = 0.2
# A gram that more texts than this hold makes no pairs of all of them (their number
# grows with the square); each is compared with the first one that holds it, and with its
# neighbours when texts are lined up by the least of their common grams, in several orders.
_COMMON = 64
_ORDERS, _NEIGHBOURS = 16, 2
# Pairs are compared exactly if they can be alike enough, and so are the closest few,
# which are shown.
_CLOSEST = 20


@dataclass(frozen=True)
class Pair:
    """Two texts, by their place in the list, and how alike they are."""

    first: int
    second: int
    similarity: float  # 1: equal after folding


def fold(text: str) -> list[str]:
    """The words of a text, without case, punctuation and compatibility forms (NFKC)."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def similar_pairs(texts: Sequence[str], threshold: float) -> list[Pair]:
    """The pairs of texts that are at least so alike and the closest below, the most alike first.

    A text that equals earlier ones makes one pair, with the first of them, and is
    compared with no other. A text without words is alike to none.
    """
    first_of: dict[str, int] = {}
    copies = []
    for index, text in enumerate(texts):
        folded = " ".join(fold(text))
        if folded and (first := first_of.setdefault(folded, index)) != index:
            copies.append(Pair(first, index, 1.0))
    places = list(first_of.values())
    alike = [
        Pair(places[pair.first], places[pair.second], pair.similarity)
        for pair in _compare(_hash_grams(list(first_of)), threshold)
    ]
    return sorted(copies + alike, key=lambda pair: (-pair.similarity, pair.first, pair.second))


def _compare(grams: list[np.ndarray], threshold: float) -> list[Pair]:
    """Exact similarities of the pairs that can reach the threshold, and of the closest few."""
    sizes = np.array([len(g) for g in grams], np.int64)
    first, second, shared, num_common = _sharing_pairs(grams)
    # At most: what they share of the rare grams, and all common grams of the one with fewer.
    shared = shared + np.minimum(num_common[first], num_common[second])
    bound = shared / np.maximum(1, sizes[first] + sizes[second] - shared)
    order = np.argsort(-bound, kind="stable")
    num_likely = int((bound >= threshold).sum())
    pairs = []
    for i in order[: max(num_likely, _CLOSEST)]:
        one, other = int(first[i]), int(second[i])
        both = len(np.intersect1d(grams[one], grams[other], assume_unique=True))
        pairs.append(Pair(one, other, both / (len(grams[one]) + len(grams[other]) - both)))
    return pairs


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


def _sharing_pairs(
    grams: list[np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pairs that may be alike: the first's index, the second's, how many rare grams they share.

    Last, for each text, how many of its grams are common.
    """
    num_texts = len(grams)
    owners = np.repeat(np.arange(num_texts), [len(g) for g in grams])
    values = np.concatenate([np.empty(0, np.uint64), *grams])
    order = np.argsort(values, kind="stable")  # stable: a gram's owners stay in order
    values, owners = values[order], owners[order]
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))[: len(values)]
    counts = np.diff(np.append(starts, len(values)))
    rare, heads = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start, count in zip(starts[counts > 1], counts[counts > 1], strict=True):
        group = owners[start : start + count]
        if count <= _COMMON:
            one, other = np.triu_indices(count, k=1)
            rare.append(group[one] * num_texts + group[other])
        else:
            heads.append(group[0] * num_texts + group[1:])
    common = np.repeat(counts > _COMMON, counts)
    neighbours = _neighbours(values[common], owners[common], num_texts)
    pairs, shared = np.unique(np.concatenate(rare), return_counts=True)
    others = np.setdiff1d(np.concatenate([*heads, neighbours]), pairs)
    pairs = np.concatenate([pairs, others])
    shared = np.concatenate([shared, np.zeros(len(others), np.int64)])
    num_common = np.bincount(owners[common], minlength=num_texts)
    return pairs // max(1, num_texts), pairs % max(1, num_texts), shared, num_common


def _neighbours(values: np.ndarray, owners: np.ndarray, num_texts: int) -> np.ndarray:
    """Codes of the texts that lie side by side when lined up by their least common grams.

    Two texts have the same least gram, under a random order of the grams, as often as
    they share grams; each line is by two such orders.
    """
    if not len(values):
        return np.empty(0, np.int64)
    order = np.argsort(owners, kind="stable")
    values, owners = values[order], owners[order]
    holders, starts = np.unique(owners, return_index=True)
    factors = np.random.default_rng(1).integers(0, 2**63, _ORDERS, np.uint64) * 2 + 1
    least = [np.minimum.reduceat(values * factor, starts) for factor in factors]
    codes = []
    for one, other in zip(least, least[1:] + least[:1], strict=True):
        line = holders[np.lexsort((other, one))]
        for distance in range(1, _NEIGHBOURS + 1):
            left, right = line[:-distance], line[distance:]
            codes.append(np.minimum(left, right) * num_texts + np.maximum(left, right))
    return np.unique(np.concatenate(codes))
