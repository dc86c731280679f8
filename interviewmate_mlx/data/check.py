"""Checks whether a data set can be trained on: its rows, its ids, and leakage between splits."""

import sys
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import TypeAlias

from interviewmate_mlx.config import DataConfig
from interviewmate_mlx.data.faults import MAX_SHOWN, Fault, data_error
from interviewmate_mlx.data.leakage import (
    ANSWER_THRESHOLD,
    QUESTION_THRESHOLD,
    Seen,
    fold,
    similar_pairs,
)
from interviewmate_mlx.data.odd import odd_rows
from interviewmate_mlx.data.prompts import encode_record, row_fault
from interviewmate_mlx.data.records import (
    DIFFICULTIES,
    MAX_FAULTS,
    SPLIT_NAMES,
    TAKEN_ID,
    UNIQUE_ADVICE,
    Record,
    iterate_records,
    split_files,
)
from interviewmate_mlx.data.templates import (
    AUTO,
    Template,
    Tokenizer,
    choose_template,
)
from interviewmate_mlx.errors import DataError

_MAX_CLOSEST = 5  # pairs in a report
# Rows that are compared with each other. Of a split with more, only so many are in memory.
MAX_COMPARED_ROWS = 200_000
_MAX_COMPARED_CHARS = 128 << 20
_MAX_VALUES = 10_000  # of a label
_REST = "(others)"  # of a label's values
_ALL_OR_NONE = ("id", "category", "difficulty")  # labels
_COUNTED = ("rows", *_ALL_OR_NONE, "reading")
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
    readings: dict[str, list[str]]  # by split, how the keys of rows were understood
    answer_words: tuple[int, float, int]  # shortest, mean, longest
    closest: list[ClosePair]
    token_lengths: tuple[int, float, int] | None = None  # shortest, median, longest row
    warnings: list[Fault] = field(default_factory=list)  # rows that are odd, but no fault


@dataclass(frozen=True)
class Findings:
    """What `inspect_data` found.

    Attributes:
        path: the file or folder.
        faults: what would spoil training or mislead validation.
        warnings: what is odd, but can be trained on.
        report: counts and lengths; None if there are faults.
    """

    path: Path
    faults: list[Fault]
    warnings: list[Fault]
    report: DataReport | None

    def error(self, max_shown: int | None = MAX_SHOWN) -> DataError:
        """The faults in words; as many lines of them as `max_shown`, or all (None)."""
        return data_error(self.path, self.faults, max_shown)


def check_data(
    path: Path,
    tokenizer: "Tokenizer | None" = None,
    max_length: int = DataConfig.max_length,
    template: str = AUTO,
) -> DataReport:
    """Read a file or folder, and refuse what would spoil training or mislead validation.

    The arguments are those of `inspect_data`.

    Raises:
        DataError: there is nothing to read, or there are faults. The first are named.
    """
    found = inspect_data(path, tokenizer, max_length, template)
    if found.report is None:
        raise found.error()
    return found.report


def inspect_data(
    path: Path,
    tokenizer: "Tokenizer | None" = None,
    max_length: int = DataConfig.max_length,
    template: str = AUTO,
) -> Findings:
    """Read a file or folder, and find what would spoil training or mislead validation.

    Faults are files, rows or splits that cannot be read or are empty; ids that two
    splits share; labels that only some rows have; unknown difficulties; categories that
    are not in train; rows that are too long; near-duplicates within or between splits.
    Warnings are answers that end in the text of an end token, rows that already hold the
    template, and what looks like personal data or a secret.

    Args:
        path: a file, or a folder with the files of the splits.
        tokenizer: a Hugging Face tokenizer; without one, no tokens are counted.
        max_length: the most tokens in a row, with the template and the end token.
        template: as `data.template` of a run.

    Raises:
        DataError: there is nothing to read.
        ConfigError, ModelError: the template cannot be used.
    """
    chosen = choose_template(template, tokenizer) if tokenizer else None
    with _Tally(path, tokenizer, max_length, chosen) as tally:
        for new, beside in _portions(path, tally.faults):
            tally.add(new, beside)
        return tally.findings()


_Rows: TypeAlias = dict[str, list[Record]]  # by split
_Counts: TypeAlias = dict[str, dict[str, Counter[str]]]  # by split and label: of the values


def _portions(path: Path, faults: list[Fault]) -> Iterator[tuple[_Rows, _Rows]]:
    """The rows that can be read, in portions that fit into memory.

    Rows of valid and test stay there, to be compared with those of train: as many as are in
    one portion. The others of them are portions by themselves.

    Args:
        path: a file or folder.
        faults: those of other rows and of files are added to it.

    Yields:
        rows that are new, and those of other splits that are to be compared with them again.
    """
    files = split_files(path)
    kept: _Rows = {}
    for split in [split for split in files if split != "train"]:
        num_faults = len(faults)
        for number, portion in enumerate(_portions_of(files[split], faults)):
            if number:
                yield {split: portion}, {}
            else:
                kept[split] = portion
        if not kept[split] and len(faults) == num_faults:
            faults.append(_no_rows(files[split][0]))
    num_faults = len(faults)
    for number, portion in enumerate(_portions_of(files["train"], faults)):
        if number:
            yield {"train": portion}, kept
            continue
        yield {"train": portion} | kept, {}
        if not portion and len(faults) == num_faults:
            faults.append(_no_rows(files["train"][0]))


def _portions_of(files: list[Path], faults: list[Fault]) -> Iterator[list[Record]]:
    """The rows of a split in portions, of which the first may be empty."""
    portion: list[Record] = []
    num_chars, num_portions = 0, 0
    for found in iterate_records(*files):
        if isinstance(found, Fault):
            faults.append(found)
            continue
        portion.append(found)
        num_chars += sum(len(message.content) for message in found.messages)
        num_chars += len(found.prompt) + len(found.completion)
        if len(portion) == MAX_COMPARED_ROWS or num_chars >= _MAX_COMPARED_CHARS:
            yield portion
            portion, num_chars = [], 0
            num_portions += 1
    if portion or not num_portions:
        yield portion


def _no_rows(file: Path) -> Fault:
    advice = f"Add rows to {file.name}, or remove it."
    return Fault(file.name, "no rows, expected at least one, or no such file", advice)


class _Tally:
    """What is found in the rows of a data set, portion by portion."""

    def __init__(
        self,
        path: Path,
        tokenizer: "Tokenizer | None",
        max_length: int,
        template: Template | None,
    ) -> None:
        self.faults: list[Fault] = []
        self._path, self._tokenizer = path, tokenizer
        self._max_length, self._template = max_length, template
        self._own_end = (tokenizer.eos_token if tokenizer else None) or ""
        self._found: dict[Fault, None] = {}  # in rows; those of valid and test come again
        self._warnings: dict[Fault, None] = {}
        self._counts: _Counts = {}
        self._unlabelled: dict[str, list[str]] = {label: [] for label in _ALL_OR_NONE}  # places
        self._closest: list[ClosePair] = []
        self._words: Counter[int] = Counter()  # answers by their number of words
        self._tokens: Counter[int] = Counter()  # rows by their number of tokens
        self._seen = {what: Seen() for what in ("id", *_THRESHOLDS)}
        self._num_portions = 0

    def __enter__(self) -> "_Tally":
        return self

    def __exit__(self, *_: object) -> None:
        for seen in self._seen.values():
            seen.close()

    def add(self, new: _Rows, beside: _Rows) -> None:
        """Take new rows, and compare them with each other and with those beside."""
        self._num_portions += 1
        rows = [record for records in new.values() for record in records]
        every = rows + [record for records in beside.values() for record in records]
        lengths: list[int] = []
        if self._tokenizer and self._template:
            lengths, unfit = _count_tokens(self._tokenizer, rows, self._template)
            _keep(self._found, unfit)
        pairs = _close_pairs(every)
        _keep(self._found, _shared_ids(new | beside))
        here = {record.place for record in every}
        _keep(self._found, _unknown_difficulties(rows))
        _keep(self._found, _too_long(rows, lengths, self._max_length))
        _keep(self._found, (_fault(p) for p in pairs if p.similarity >= _THRESHOLDS[p.what]))
        _keep(self._found, self._equal_to_earlier(new, here))
        _keep(self._warnings, odd_rows(rows, self._own_end))
        for split, records in new.items():
            self._count(split, records)
        for label, missing in self._unlabelled.items():
            places = (record.source for record in rows if not getattr(record, label))
            missing += islice(places, MAX_FAULTS - len(missing))
        self._closest = sorted({*self._closest, *pairs}, key=_order)[:_MAX_CLOSEST]
        self._words.update(len(fold(record.answer)) for record in rows)
        self._tokens.update(lengths)

    def findings(self) -> Findings:
        """What was found in all."""
        counts = {split: self._counts[split] for split in SPLIT_NAMES if split in self._counts}
        labelled = [
            label for label in _ALL_OR_NONE if any(any(own[label]) for own in counts.values())
        ]
        self.faults += [
            *self._found,
            *(fault for label in labelled for fault in _missing(label, self._unlabelled[label])),
            *_unknown_categories({split: own["category"] for split, own in counts.items()}),
        ]
        warnings = list(self._warnings)
        if self._num_portions > 1:
            text = (
                f"more than {MAX_COMPARED_ROWS:,} rows: in parts of so many they were compared for "
                "near-duplicates, and between the parts for equal texts alone"
            )
            warnings.append(Fault(self._path.name, text, "Compare smaller files to find more."))
        if self.faults:
            return Findings(self._path, self.faults, warnings, None)
        report = DataReport(
            rows={split: own["rows"][""] for split, own in counts.items()},
            readings={split: _as_lines(own["reading"]) for split, own in counts.items()},
            categories=_by_value(counts, "category"),
            difficulties=_by_value(counts, "difficulty"),
            answer_words=(min(self._words), _mean(self._words), max(self._words)),
            closest=self._closest,
            token_lengths=_lengths(self._tokens) if self._tokens else None,
            warnings=warnings,
        )
        return Findings(self._path, [], warnings, report)

    def _count(self, split: str, records: list[Record]) -> None:
        counts = self._counts.setdefault(split, {label: Counter() for label in _COUNTED})
        counts["rows"][""] += len(records)
        counts["id"].update(bool(record.id) * "some" for record in records)
        for label in _COUNTED[2:]:
            values, count = Counter(getattr(record, label) for record in records), counts[label]
            for value, number in values.items():
                is_kept = value in count or len(count) < _MAX_VALUES
                count[value if is_kept else _REST] += number

    def _equal_to_earlier(self, new: _Rows, here: set[str]) -> Iterator[Fault]:
        """Ids and texts of an earlier portion: within one, pairs are found.

        Args:
            new: rows.
            here: the places of those that they were compared with.
        """
        for split, record in ((split, record) for split, rows in new.items() for record in rows):
            for what in _THRESHOLDS:
                words = " ".join(fold(getattr(record, what)))
                first = self._seen[what].first(words, record.place) if words else ""
                if first and first not in here:
                    yield _fault(ClosePair(what, 1.0, first, record.place, ("", "")))
            if record.id:
                taken = self._seen["id"].first(record.id, f"{split}/{record.place}")
                other, _, first = taken.partition("/")
                # Within a split, reading the rows finds them.
                if first and other != split and first not in here:
                    yield _taken_id(record, first.removesuffix(f" ({record.id})"))


def _keep(kept: dict[Fault, None], found: Iterable[Fault]) -> None:
    """Add faults that are not there yet, up to a limit; the others are not looked for."""
    if len(kept) >= MAX_FAULTS:
        return
    for fault in found:
        kept[fault] = None
        if len(kept) >= MAX_FAULTS:
            text = f"after {MAX_FAULTS:,} of its kind no more was looked for"
            kept[Fault(fault.place, text)] = None
            return


def _mean(counts: Counter[int]) -> float:
    return sum(value * number for value, number in counts.items()) / counts.total()


def _lengths(counts: Counter[int]) -> tuple[int, float, int]:
    """The shortest, the median and the longest."""
    ordered, sums = sorted(counts), list(accumulate(counts[value] for value in sorted(counts)))
    middle = [ordered[bisect(sums, (sums[-1] - 1 + odd) // 2)] for odd in (0, 1)]
    return ordered[0], sum(middle) / 2, ordered[-1]


def _by_value(counts: _Counts, label: str) -> dict[str, dict[str, int]]:
    names = sorted({name for own in counts.values() for name in own[label] if name})
    return {name: {split: own[label][name] for split, own in counts.items()} for name in names}


def _as_lines(counts: Counter[str]) -> list[str]:
    return [
        f"{number:,} row{'s' if number > 1 else ''}: {text}"
        for text, number in counts.most_common()
    ]


def _order(pair: ClosePair) -> tuple[float, str, str]:
    return -pair.similarity, pair.first, pair.second


def _close_pairs(records: list[Record]) -> list[ClosePair]:
    found = [
        ClosePair(
            what,
            pair.similarity,
            records[pair.first].place,
            records[pair.second].place,
            (getattr(records[pair.first], what), getattr(records[pair.second], what)),
        )
        for what, threshold in _THRESHOLDS.items()
        for pair in similar_pairs([getattr(record, what) for record in records], threshold)
    ]
    return sorted(found, key=lambda pair: -pair.similarity)


def _fault(pair: ClosePair) -> Fault:
    alike = "the same as" if pair.similarity == 1 else f"{pair.similarity:.0%} like"
    return Fault(
        pair.second,
        f"its {pair.what} is {alike} that of {pair.first}, "
        f"expected under {_THRESHOLDS[pair.what]:.0%}",
        "Remove or rewrite near-duplicates.",
        f"its {pair.what} is that of an earlier row, or nearly",
    )


def _shared_ids(splits: dict[str, list[Record]]) -> Iterator[Fault]:
    """Ids that two splits share. Within a file, reading the rows finds them."""
    first: dict[str, tuple[str, Record]] = {}
    for split, records in splits.items():
        for record in filter(lambda record: record.id, records):
            other_split, other = first.setdefault(record.id, (split, record))
            if other_split != split:
                yield _taken_id(record, other.source)


def _taken_id(record: Record, first: str) -> Fault:
    message = f"id {record.id!r} is taken by {first}"
    return Fault(record.source, message, UNIQUE_ADVICE, TAKEN_ID)


def _missing(label: str, places: list[str]) -> Iterator[Fault]:
    advice = f"Give all rows a value for {label}, or none of them."
    for place in places:
        yield Fault(place, f"no {label}, expected one as other rows have", advice)


def _unknown_categories(counts: dict[str, Counter[str]]) -> Iterator[Fault]:
    """Categories of other splits that train does not have."""
    trained = counts.get("train", Counter()).keys() - {""}
    are_known = trained and _REST not in trained
    for split, own in counts.items():
        for category in sorted(own.keys() - trained - {"", _REST} if are_known else ()):
            yield Fault(
                split,
                f"category {category!r} ({own[category]} rows) is not in train",
                "Rename such categories, or add rows of them to train.",
            )


def _count_tokens(
    tokenizer: "Tokenizer", records: list[Record], template: Template
) -> tuple[list[int], list[Fault]]:
    """The tokens of each record, 0 of one that the template cannot take; and these faults."""
    lengths, faults = [], []
    for record in records:
        try:
            examples = encode_record(tokenizer, record, sys.maxsize, "all", template)
            lengths.append(max(map(len, examples)))
        except DataError as error:
            lengths.append(0)
            faults.append(row_fault(record, error))
    return lengths, faults


def _too_long(records: list[Record], lengths: list[int], max_length: int) -> Iterator[Fault]:
    for record, length in zip(records, lengths, strict=False):  # no lengths without a tokenizer
        if length > max_length:
            fault = f"{length} tokens, expected at most {max_length}"
            yield Fault(
                record.place,
                fault,
                "Shorten such rows, or allow longer ones.",
                f"more than {max_length} tokens",
            )


def _unknown_difficulties(records: list[Record]) -> Iterator[Fault]:
    for record in records:
        if record.difficulty and record.difficulty not in DIFFICULTIES:
            expected = ", ".join(DIFFICULTIES)
            fault = f"difficulty: got {record.difficulty!r}, expected {expected}"
            advice = "Write one of these words, or name the key otherwise: it is not needed."
            yield Fault(record.source, fault, advice, f"difficulty: expected {expected}")
