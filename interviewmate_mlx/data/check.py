"""Checks whether a data set can be trained on: its rows, its ids, and leakage between splits."""

import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from interviewmate_mlx.config import DataConfig
from interviewmate_mlx.data.leakage import (
    ANSWER_THRESHOLD,
    QUESTION_THRESHOLD,
    fold,
    similar_pairs,
)
from interviewmate_mlx.data.prompts import Tokenizer, encode_record
from interviewmate_mlx.data.records import DIFFICULTIES, Record, scan_records, split_files
from interviewmate_mlx.errors import DataError, list_faults

_MAX_CLOSEST = 5  # pairs in a report
_THRESHOLDS = {"question": QUESTION_THRESHOLD, "answer": ANSWER_THRESHOLD}


@dataclass(frozen=True)
class ClosePair:
    """Two rows with similar questions or similar answers."""

    what: str  # question or answer
    similarity: float
    first: str  # file and line, or id
    second: str
    texts: tuple[str, str]


@dataclass(frozen=True)
class DataReport:
    """The counts and lengths of a data set, and its most similar rows."""

    rows: dict[str, int]  # by split
    categories: dict[str, dict[str, int]]  # by category, then split
    difficulties: dict[str, dict[str, int]]
    answer_words: tuple[int, float, int]  # shortest, mean, longest
    closest: list[ClosePair]
    token_lengths: tuple[int, float, int] | None = None  # shortest, median, longest row


def check_data(
    path: Path, tokenizer: "Tokenizer | None" = None, max_length: int = DataConfig.max_length
) -> DataReport:
    """Read a file or folder, and find what would spoil training or mislead validation.

    Args:
        path: a file, or a folder with the files of the splits.
        tokenizer: a Hugging Face tokenizer; without one, no tokens are counted.
        max_length: the most tokens in a row, with the template and the end token.

    Raises:
        DataError: files, rows or splits that cannot be read or are empty; ids that two
            splits share; labels that only some rows have; unknown difficulties;
            categories that are not in train; rows that are too long; near-duplicates
            within or between splits. All are reported together, with file and line.
    """
    splits, faults = _scan(path)
    records = [record for rows in splits.values() for record in rows]
    lengths = [_count_tokens(tokenizer, record) for record in records] if tokenizer else []
    pairs = _close_pairs(records)
    faults += [
        *_shared_ids(splits),
        *_missing_labels(records),
        *_unknown_difficulties(records),
        *_unknown_categories(splits),
        *_too_long(records, lengths, max_length),
        *(_fault(pair) for pair in pairs if pair.similarity >= _THRESHOLDS[pair.what]),
    ]
    if faults:
        raise DataError(
            f"{path}: {len(faults)} fault{'s' if len(faults) > 1 else ''}:\n"
            f"{list_faults(faults, max_shown=20)}\nCorrect or remove these rows and check again."
        )
    words = [len(fold(record.answer)) for record in records]
    return DataReport(
        rows={split: len(rows) for split, rows in splits.items()},
        categories=_count_by(splits, "category"),
        difficulties=_count_by(splits, "difficulty"),
        answer_words=(min(words), statistics.mean(words), max(words)),
        closest=pairs[:_MAX_CLOSEST],
        token_lengths=(min(lengths), statistics.median(lengths), max(lengths)) if lengths else None,
    )


def _scan(path: Path) -> tuple[dict[str, list[Record]], list[str]]:
    """The rows of each split that can be read, and the faults of other rows and of files."""
    splits: dict[str, list[Record]] = {}
    faults: list[str] = []
    for split, file in split_files(path).items():
        try:
            splits[split], found = scan_records(file)
        except DataError as error:
            faults.append(str(error).splitlines()[0])
            continue
        faults += [f"{file.name} {fault}" for fault in found]
        if not splits[split] and not found:
            faults.append(f"{file.name}: no rows, expected at least one, or no such file")
    return splits, faults


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
    ]
    return sorted(found, key=lambda pair: -pair.similarity)


def _fault(pair: ClosePair) -> str:
    same = "the same" if pair.similarity == 1 else f"{pair.similarity:.0%} alike"
    return (
        f"{pair.first} and {pair.second}: {pair.what}s are {same}, "
        f"expected under {_THRESHOLDS[pair.what]:.0%}"
    )


def _shared_ids(splits: dict[str, list[Record]]) -> Iterator[str]:
    """Ids that two splits share. Within a file, reading the rows finds them."""
    first: dict[str, tuple[str, Record]] = {}
    for split, records in splits.items():
        for record in filter(lambda record: record.id, records):
            other_split, other = first.setdefault(record.id, (split, record))
            if other_split != split:
                yield f"{record.source}: id {record.id!r} is taken by {other.source}"


def _missing_labels(records: list[Record]) -> Iterator[str]:
    for label in ("id", "category", "difficulty"):
        missing = [record for record in records if not getattr(record, label)]
        if len(missing) < len(records):
            yield from (f"{r.source}: no {label}, expected one as in other rows" for r in missing)


def _unknown_categories(splits: dict[str, list[Record]]) -> Iterator[str]:
    """Categories of other splits that train does not have."""
    trained = {record.category for record in splits.get("train", []) if record.category}
    for split, records in splits.items():
        counts = Counter(record.category for record in records if record.category)
        for category in sorted(counts.keys() - trained if trained else ()):
            yield f"{split}: category {category!r} ({counts[category]} rows) is not in train"


def _count_tokens(tokenizer: "Tokenizer", record: Record) -> int:
    return len(encode_record(tokenizer, record, sys.maxsize, "all"))


def _too_long(records: list[Record], lengths: list[int], max_length: int) -> Iterator[str]:
    for record, length in zip(records, lengths, strict=False):  # no lengths without a tokenizer
        if length > max_length:
            yield f"{_place(record)}: {length} tokens, expected at most {max_length}"


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
