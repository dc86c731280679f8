"""Finds equal and near-duplicate texts in a data set.

Equal texts are found among any number of rows, because the disk holds what was seen. Nearly
equal ones are found among texts in memory.

The similarity of two texts is the Jaccard similarity of their sets of word 5-grams,
after case, punctuation and white space are folded. A text of fewer words is one
gram. Equal texts are found first. The grams of all other texts are then sorted
together, so that equal grams lie side by side.
"""

import hashlib
import re
import sqlite3
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from interviewmate_mlx.errors import StorageError

GRAM_WORDS = 5
# From this similarity on, two texts are near-duplicates. A question has few grams, and one
# changed word changes five of them. Two answers that were written independently share
# hardly any.
QUESTION_THRESHOLD = 0.3
ANSWER_THRESHOLD = 0.2
# A gram in more texts than this is common. To pair all of its texts would take too long
# (the pairs grow with the square). Instead, each text is paired with the first text that
# has the gram, and with its neighbours after a sort by the smallest hash of its common
# grams (MinHash). There are several such sorts, each with other hashes.
_MAX_RARE_TEXTS = 64
_NUM_SORTS, _NUM_NEIGHBOURS = 16, 2
# A gram may count as common from fewer texts on, so that this many pairs of texts with a
# gram that both have fit into some hundred MB.
_MAX_GRAM_PAIRS = 1 << 24
# Similarities are computed exactly for pairs that can reach the threshold, and for at
# least this many of the closest ones, because reports show some.
_MIN_COMPARED, _MAX_COMPARED = 20, 1 << 20
_CACHE_KB = 4 << 10  # of what was seen; the rest lies in a temporary file


@dataclass(frozen=True)
class Pair:
    """Two texts, by their index in the list, and their similarity."""

    first: int
    second: int
    similarity: float  # 1: equal after folding


class Seen:
    """Where each text or id was seen first. The memory that it takes does not grow with them."""

    def __init__(self) -> None:
        # Without a name: a temporary file of SQLite's, which ends with the connection.
        self._file = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for words in (
            "PRAGMA journal_mode = OFF",
            f"PRAGMA cache_size = -{_CACHE_KB}",
            "CREATE TABLE seen (text BLOB PRIMARY KEY, place TEXT) WITHOUT ROWID",
            "BEGIN",
        ):
            self._file.execute(words)

    def __enter__(self) -> "Seen":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back the disk's space."""
        self._file.close()

    def first(self, text: str, place: str) -> str:
        """The place where a text was seen before; "" if it was not, and from now on it is here.

        Raises:
            StorageError: the disk for temporary files is full.
        """
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        try:
            added = self._file.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, place))
            if added.rowcount:
                return ""
            found = self._file.execute("SELECT place FROM seen WHERE text = ?", (key,))
        except sqlite3.Error as error:
            raise StorageError(
                f"Rows cannot be compared, because a temporary file cannot be written: {error}.\n"
                "Make room where temporary files lie, or set TMPDIR to another folder."
            ) from error
        return str(found.fetchone()[0])


def fold(text: str) -> list[str]:
    """The words of a text, without case, punctuation and compatibility forms (NFKC)."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def similar_pairs(texts: Sequence[str], threshold: float) -> list[Pair]:
    """The pairs of texts that reach the threshold and the closest others, most similar first.

    A text that equals earlier ones makes one pair, with the first of them, and is not
    compared with any other. A text without words is similar to none.
    """
    first_of: dict[str, int] = {}
    copies = []
    for index, text in enumerate(texts):
        folded = " ".join(fold(text))
        if folded and (first := first_of.setdefault(folded, index)) != index:
            copies.append(Pair(first, index, 1.0))
    places = list(first_of.values())
    similar = [
        Pair(places[pair.first], places[pair.second], pair.similarity)
        for pair in _compare(_hash_grams(list(first_of)), threshold)
    ]
    return sorted(copies + similar, key=lambda pair: (-pair.similarity, pair.first, pair.second))


def _compare(grams: list[np.ndarray], threshold: float) -> list[Pair]:
    """The pairs that can reach the threshold and the closest others, compared exactly."""
    sizes = np.array([len(g) for g in grams], np.int64)
    first, second, shared, num_common = _sharing_pairs(grams)
    # An upper bound: the rare grams that they share, and all common grams of the one with fewer.
    shared = shared + np.minimum(num_common[first], num_common[second])
    bound = shared / np.maximum(1, sizes[first] + sizes[second] - shared)
    order = np.argsort(-bound, kind="stable")
    num_likely = min(int((bound >= threshold).sum()), _MAX_COMPARED)
    pairs = []
    for i in order[: max(num_likely, _MIN_COMPARED)]:
        one, other = int(first[i]), int(second[i])
        both = len(np.intersect1d(grams[one], grams[other], assume_unique=True))
        pairs.append(Pair(one, other, both / (len(grams[one]) + len(grams[other]) - both)))
    return pairs


def _hash_grams(texts: Sequence[str]) -> list[np.ndarray]:
    """The distinct 5-grams of each text, as sorted 64-bit hashes."""
    vocabulary: dict[str, int] = {}
    # The sum of a gram's words times random odd factors is its hash. The seed is fixed so
    # that the hashes are always the same.
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
    """Pairs of texts that may be similar.

    Returns:
        first: (P,) int, index of the first text of each pair.
        second: (P,) int, index of the second.
        shared: (P,) int, how many rare grams they share.
        num_common: (num_texts,) int, how many grams of each text are common.
    """
    num_texts = len(grams)
    owners = np.repeat(np.arange(num_texts), [len(g) for g in grams])
    values = np.concatenate([np.empty(0, np.uint64), *grams])
    order = np.argsort(values, kind="stable")  # stable: a gram's owners stay in order
    values, owners = values[order], owners[order]
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))[: len(values)]
    counts = np.diff(np.append(starts, len(values)))
    max_rare = _most_texts(counts)
    rare, with_first = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start, count in zip(starts[counts > 1], counts[counts > 1], strict=True):
        group = owners[start : start + count]
        if count <= max_rare:
            one, other = np.triu_indices(count, k=1)
            rare.append(group[one] * num_texts + group[other])
        else:
            with_first.append(group[0] * num_texts + group[1:])
    common = np.repeat(counts > max_rare, counts)
    neighbours = _neighbours(values[common], owners[common], num_texts)
    pairs, shared = np.unique(np.concatenate(rare), return_counts=True)
    others = np.setdiff1d(np.concatenate([*with_first, neighbours]), pairs)
    pairs = np.concatenate([pairs, others])
    shared = np.concatenate([shared, np.zeros(len(others), np.int64)])
    num_common = np.bincount(owners[common], minlength=num_texts)
    return pairs // max(1, num_texts), pairs % max(1, num_texts), shared, num_common


def _most_texts(counts: np.ndarray) -> int:
    """In how many texts a gram may be to be rare.

    Args:
        counts: (num_grams,) int, the texts of each gram.
    """
    sizes = np.arange(_MAX_RARE_TEXTS + 1)
    num_grams = np.bincount(counts[counts <= _MAX_RARE_TEXTS], minlength=len(sizes))
    num_pairs = np.cumsum(num_grams * (sizes * (sizes - 1) // 2))
    return int(sizes[num_pairs <= _MAX_GRAM_PAIRS][-1])


def _neighbours(values: np.ndarray, owners: np.ndarray, num_texts: int) -> np.ndarray:
    """Pairs of texts that are neighbours after a sort by the MinHash of their common grams.

    Under a random hash, the smallest hash of two texts is the same as often as they
    share grams. Each sort uses two such hashes.

    Args:
        values: the common grams, one for each text that has it.
        owners: the index of that text.
        num_texts: the number of texts.

    Returns:
        (P,) int: first * num_texts + second for each pair.
    """
    if not len(values):
        return np.empty(0, np.int64)
    order = np.argsort(owners, kind="stable")
    values, owners = values[order], owners[order]
    holders, starts = np.unique(owners, return_index=True)
    factors = np.random.default_rng(1).integers(0, 2**63, _NUM_SORTS, np.uint64) * 2 + 1
    min_hashes = [np.minimum.reduceat(values * factor, starts) for factor in factors]
    pairs = []
    for one, other in zip(min_hashes, min_hashes[1:] + min_hashes[:1], strict=True):
        in_order = holders[np.lexsort((other, one))]
        for distance in range(1, _NUM_NEIGHBOURS + 1):
            left, right = in_order[:-distance], in_order[distance:]
            pairs.append(np.minimum(left, right) * num_texts + np.maximum(left, right))
    return np.unique(np.concatenate(pairs))
