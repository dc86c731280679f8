"""Is a data set fit to train on? Its rows, its ids, and that no split knows another's rows."""

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from interviewmate_mlx.data.leakage import (
    ANSWER_THRESHOLD,
    QUESTION_THRESHOLD,
    fold,
    similar_pairs,
)
from interviewmate_mlx.data.records import DIFFICULTIES, Record, load_splits
from interviewmate_mlx.errors import DataError, list_faults

_CLOSEST_SHOWN = 5
_THRESHOLDS = {"question": QUESTION_THRESHOLD, "answer": ANSWER_THRESHOLD}


@dataclass(frozen=True)
class ClosePair:
    """Two rows whose questions or answers are alike."""

    what: str  # question or answer
    similarity: float
    first: str  # file and line, or id
    second: str
    texts: tuple[str, str]


@dataclass(frozen=True)
class DataReport:
    """What a data set holds."""

    rows: dict[str, int]  # by split
    categories: dict[str, dict[str, int]]  # by category, then split
    difficulties: dict[str, dict[str, int]]
    answer_words: tuple[int, float, int]  # shortest, mean, longest
    closest: list[ClosePair]


def check_data(path: Path) -> DataReport:
    """Read a file or folder and look for everything that would make training or validation lie.

    Raises:
        DataError: rows that cannot be read; else ids that two splits share,
            unknown difficulties, and near-duplicates within or between splits.
            All at once, each with file and line.
    """
    splits = load_splits(path)
    records = [record for rows in splits.values() for record in rows]
    pairs = _close_pairs(records)
    faults = [
        *_shared_ids(records),
        *_unknown_difficulties(records),
        *(_fault(pair) for pair in pairs if pair.similarity >= _THRESHOLDS[pair.what]),
    ]
    if faults:
        raise DataError(
            f"{path}: {len(faults)} fault{'s' if len(faults) > 1 else ''}:\n"
            f"{list_faults(faults, most=20)}\nMend or remove those rows and check again."
        )
    words = [len(fold(record.answer)) for record in records]
    return DataReport(
        rows={split: len(rows) for split, rows in splits.items()},
        categories=_count_by(splits, "category"),
        difficulties=_count_by(splits, "difficulty"),
        answer_words=(min(words), statistics.mean(words), max(words)),
        closest=pairs[:_CLOSEST_SHOWN],
    )


def _close_pairs(records: list[Record]) -> list[ClosePair]:
    found = [
        ClosePair(
            what,
            pair.similarity,
            _place(records[pair.first]),
            _place(records[pair.second]),
            (getattr(records[pair.first], what), getattr(records[pair.second], what)),
        )
        for what, threshold in _THRESHOLDS.items()
        for pair in similar_pairs([getattr(record, what) for record in records], threshold)
        if getattr(records[pair.first], what)  # verbatim texts have no question
    ]
    return sorted(found, key=lambda pair: -pair.similarity)


def _fault(pair: ClosePair) -> str:
    same = "the same" if pair.similarity == 1 else f"{pair.similarity:.0%} alike"
    return (
        f"{pair.first} and {pair.second}: {pair.what}s are {same}, "
        f"expected under {_THRESHOLDS[pair.what]:.0%}"
    )


def _shared_ids(records: list[Record]) -> Iterator[str]:
    first: dict[str, Record] = {}
    for record in records:
        if record.id and (other := first.setdefault(record.id, record)) is not record:
            yield f"{record.source}: id {record.id!r} is taken by {other.source}"


def _unknown_difficulties(records: list[Record]) -> Iterator[str]:
    for record in records:
        if record.difficulty and record.difficulty not in DIFFICULTIES:
            expected = ", ".join(DIFFICULTIES)
            yield f"{record.source}: difficulty: got {record.difficulty!r}, expected {expected}"


def _place(record: Record) -> str:
    return f"{record.source} ({record.id})" if record.id else record.source


def _count_by(splits: dict[str, list[Record]], label: str) -> dict[str, dict[str, int]]:
    counts = {s: Counter(getattr(record, label) for record in rows) for s, rows in splits.items()}
    names = sorted({name for counter in counts.values() for name in counter if name})
    return {name: {split: counts[split][name] for split in splits} for name in names}
