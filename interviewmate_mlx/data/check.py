"""Checks whether a data set can be trained on: its rows, its ids, and leakage between splits."""

import statistics
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from interviewmate_mlx.config import DataConfig
from interviewmate_mlx.data.faults import MAX_SHOWN, Fault, data_error
from interviewmate_mlx.data.leakage import (
    ANSWER_THRESHOLD,
    QUESTION_THRESHOLD,
    fold,
    similar_pairs,
)
from interviewmate_mlx.data.personal import find_personal
from interviewmate_mlx.data.prompts import encode_record, row_fault
from interviewmate_mlx.data.records import (
    DIFFICULTIES,
    TAKEN_ID,
    UNIQUE_ADVICE,
    Record,
    iterate_records,
    scan_records,
    split_files,
)
from interviewmate_mlx.data.templates import (
    AUTO,
    QUESTION,
    Template,
    Tokenizer,
    choose_template,
)
from interviewmate_mlx.errors import DataError

_MAX_CLOSEST = 5  # pairs in a report
# Rows that are compared with each other; of more, only so many are in memory.
MAX_COMPARED_ROWS = 200_000
_MAX_COMPARED_CHARS = 256 << 20
_MAX_UNLABELLED = 100_000  # rows without a label that others have, to be named
_ALL_OR_NONE = ("id", "category", "difficulty")  # labels
# End tokens of well-known models. A base's own comes from its tokenizer.
_END_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<|return|>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
)
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
    tally = _Tally(path, tokenizer, max_length, chosen)
    for splits in _portions(path, tally.faults):
        tally.add(splits)
    return tally.findings()


def _portions(path: Path, faults: list[Fault]) -> Iterator[dict[str, list[Record]]]:
    """The rows of each split that can be read; of many training rows a part at a time.

    Args:
        path: a file or folder.
        faults: those of other rows and of files are added to it.
    """
    files = split_files(path)
    others: dict[str, list[Record]] = {}
    for split in [split for split in files if split != "train"]:
        others[split], found = scan_records(*files[split])
        faults += found
    portion: list[Record] = []
    num_chars, num_portions, num_faults = 0, 0, len(faults)
    for found_row in iterate_records(*files["train"]):
        if isinstance(found_row, Fault):
            faults.append(found_row)
            continue
        portion.append(found_row)
        num_chars += len(found_row.question) + len(found_row.answer)
        if len(portion) == MAX_COMPARED_ROWS or num_chars >= _MAX_COMPARED_CHARS:
            num_portions += 1
            yield {"train": portion} | others
            portion, num_chars = [], 0
    splits = {"train": portion} | others
    if portion or not num_portions:
        yield splits
    for split in [split for split in files if not splits[split]]:
        is_faulty = len(faults) > num_faults if split == "train" else bool(faults)
        if not is_faulty and not (split == "train" and num_portions):
            name = files[split][0].name
            fault = "no rows, expected at least one, or no such file"
            faults.append(Fault(name, fault, f"Add rows to {name}, or remove it."))


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
        self._end_tokens = list(
            dict.fromkeys([*([tokenizer.eos_token] if tokenizer else []), *_END_TOKENS])
        )
        self._found: dict[Fault, None] = {}  # in rows; those of valid and test come again
        self._warnings: dict[Fault, None] = {}
        self._counts: dict[str, Counter[tuple[str, str]]] = {}  # by split: of (label, value)
        self._unlabelled: dict[str, list[Fault]] = {label: [] for label in _ALL_OR_NONE}
        self._closest: list[ClosePair] = []
        self._words, self._tokens = array("q"), array("q")
        self._seen: dict[str, set[int]] = {what: set() for what in _THRESHOLDS}
        self._num_portions = 0

    def add(self, splits: dict[str, list[Record]]) -> None:
        """Take the next training rows, and the rows of the other splits, the same each time."""
        self._num_portions += 1
        new = splits if self._num_portions == 1 else {"train": splits["train"]}
        rows = [record for records in new.values() for record in records]
        every = [record for records in splits.values() for record in records]
        lengths: list[int] = []
        found: list[Fault] = []
        if self._tokenizer and self._template:
            lengths, found = _count_tokens(self._tokenizer, rows, self._template)
        pairs = _close_pairs(every)
        found += [
            *_shared_ids(splits),
            *_unknown_difficulties(rows),
            *_too_long(rows, lengths, self._max_length),
            *(_fault(pair) for pair in pairs if pair.similarity >= _THRESHOLDS[pair.what]),
            *self._equal_to_earlier(new.get("train", [])),
        ]
        self._found |= dict.fromkeys(found)
        warnings = (
            _ends_of_text(rows, self._end_tokens),
            _templates_in_text(rows),
            _personal(rows),
        )
        self._warnings |= dict.fromkeys(fault for each in warnings for fault in each)
        for split, records in new.items():
            self._count(split, records)
        for label, missing in self._unlabelled.items():
            if len(missing) < _MAX_UNLABELLED:
                missing += _missing_label(rows, label)
        self._closest = sorted({*self._closest, *pairs}, key=_order)[:_MAX_CLOSEST]
        self._words.extend(len(fold(record.answer)) for record in rows)
        self._tokens.extend(lengths)

    def findings(self) -> Findings:
        """What was found in all."""
        counts = self._counts
        labelled = {label for count in counts.values() for label, value in count if value}
        missing = (self._unlabelled[label] for label in _ALL_OR_NONE if label in labelled)
        self.faults += [
            *self._found,
            *(fault for faults in missing for fault in faults),
            *_unknown_categories({split: _values(counts[split], "category") for split in counts}),
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
        tokens = self._tokens
        report = DataReport(
            rows={split: _values(count, "rows")[""] for split, count in counts.items()},
            readings={split: _as_lines(_values(counts[split], "reading")) for split in counts},
            categories=_by_value(counts, "category"),
            difficulties=_by_value(counts, "difficulty"),
            answer_words=(min(self._words), statistics.mean(self._words), max(self._words)),
            closest=self._closest,
            token_lengths=(min(tokens), statistics.median(tokens), max(tokens)) if tokens else None,
            warnings=warnings,
        )
        return Findings(self._path, [], warnings, report)

    def _count(self, split: str, records: list[Record]) -> None:
        counts = self._counts.setdefault(split, Counter())
        counts["rows", ""] += len(records)
        for label in (*_ALL_OR_NONE[1:], "reading"):
            for value, number in Counter(getattr(record, label) for record in records).items():
                counts[label, value] += number
        if any(record.id for record in records):
            counts["id", "some"] += 1

    def _equal_to_earlier(self, records: list[Record]) -> Iterator[Fault]:
        """Texts that equal one of an earlier portion: within one, pairs are found."""
        for what, seen in self._seen.items():
            hashes = {}
            for record in records:
                words = " ".join(fold(getattr(record, what)))
                if words:
                    hashes[hash(words)] = record
            for number in hashes.keys() & seen:
                yield Fault(
                    _place(hashes[number]),
                    f"its {what} is the same as that of an earlier row, "
                    f"expected under {_THRESHOLDS[what]:.0%}",
                    "Remove or rewrite near-duplicates.",
                    f"its {what} is that of an earlier row, or nearly",
                )
            seen.update(hashes)


def _values(counts: Counter[tuple[str, str]], label: str) -> Counter[str]:
    return Counter({value: number for (name, value), number in counts.items() if name == label})


def _by_value(counts: dict[str, Counter[tuple[str, str]]], label: str) -> dict[str, dict[str, int]]:
    own = {split: _values(count, label) for split, count in counts.items()}
    names = sorted({name for counter in own.values() for name in counter if name})
    return {name: {split: own[split][name] for split in counts} for name in names}


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
            _place(records[pair.first]),
            _place(records[pair.second]),
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
                fault = f"id {record.id!r} is taken by {other.source}"
                yield Fault(record.source, fault, UNIQUE_ADVICE, TAKEN_ID)


def _missing_label(records: list[Record], label: str) -> Iterator[Fault]:
    for record in records:
        if not getattr(record, label):
            fault = f"no {label}, expected one as other rows have"
            advice = f"Give all rows a value for {label}, or none of them."
            yield Fault(record.source, fault, advice)


def _unknown_categories(counts: dict[str, Counter[str]]) -> Iterator[Fault]:
    """Categories of other splits that train does not have."""
    trained = counts.get("train", Counter()).keys() - {""}
    for split, own in counts.items():
        for category in sorted(own.keys() - trained - {""} if trained else ()):
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
                _place(record),
                fault,
                "Shorten such rows, or allow longer ones.",
                f"more than {max_length} tokens",
            )


def _unknown_difficulties(records: list[Record]) -> Iterator[Fault]:
    for record in records:
        if record.difficulty and record.difficulty not in DIFFICULTIES:
            expected = ", ".join(DIFFICULTIES)
            fault = f"difficulty: got {record.difficulty!r}, expected {expected}"
            yield Fault(record.source, fault, kind=f"difficulty: expected {expected}")


def _answers(record: Record) -> list[str]:
    """The texts that are learned."""
    said = [message.content for message in record.messages if message.role == "assistant"]
    return said if record.messages else [record.completion]


def _ends_of_text(records: list[Record], end_tokens: list[str]) -> Iterator[Fault]:
    """Answers that end in the text of an end token. Training adds the token itself."""
    for record in records:
        endings = [answer.rstrip() for answer in _answers(record)]
        for token in end_tokens:
            if any(ending.endswith(token) for ending in endings):
                yield Fault(
                    record.source,
                    f"an answer ends in the text {token!r}, which the model would learn to write "
                    "out; training adds an end token by itself",
                    "Remove this text from the answers.",
                )


def _templates_in_text(records: list[Record]) -> Iterator[Fault]:
    """Conversations that hold the words of the template, which would then stand there twice."""
    asks, answers = (word.strip() for word in QUESTION.split("{}"))
    for record in records:
        roles = {"user": asks, "assistant": answers}
        for role, word in roles.items():
            said = [m.content.strip() for m in record.messages if m.role == role]
            if any(text.startswith(word) for text in said):
                yield Fault(
                    record.source,
                    f"a text of the {role} begins with {word!r}, which the template adds",
                    "Remove these words from the texts.",
                )


def _personal(records: list[Record]) -> Iterator[Fault]:
    """Rows with addresses, numbers or keys, which an adapter would remember."""
    for record in records:
        texts = [message.content for message in record.messages]
        whole = "\n".join([*texts, record.prompt, record.completion, record.follow_up])
        for kind, start in find_personal(whole):
            yield Fault(
                _place(record),
                f"holds what looks like {kind} ({start}), which an adapter would remember",
                "Remove personal data, or write an invented one, such as name@example.com.",
                f"holds what looks like {kind}, which an adapter would remember",
            )


def _place(record: Record) -> str:
    return f"{record.source} ({record.id})" if record.id else record.source
