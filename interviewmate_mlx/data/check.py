"""Checks whether a data set can be trained on: its rows, its ids, and leakage between splits."""

import statistics
import sys
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
    readings,
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
    splits, faults = _scan(path)
    records = [record for rows in splits.values() for record in rows]
    lengths: list[int] = []
    if tokenizer:
        lengths, misfits = _count_tokens(tokenizer, records, choose_template(template, tokenizer))
        faults += misfits
    pairs = _close_pairs(records)
    faults += [
        *_shared_ids(splits),
        *_missing_labels(records),
        *_unknown_difficulties(records),
        *_unknown_categories(splits),
        *_too_long(records, lengths, max_length),
        *(_fault(pair) for pair in pairs if pair.similarity >= _THRESHOLDS[pair.what]),
    ]
    end_tokens = dict.fromkeys([*([tokenizer.eos_token] if tokenizer else []), *_END_TOKENS])
    warnings = [
        *_ends_of_text(records, list(end_tokens)),
        *_templates_in_text(records),
        *_personal(records),
    ]
    if faults:
        return Findings(path, faults, warnings, None)
    words = [len(fold(record.answer)) for record in records]
    report = DataReport(
        rows={split: len(rows) for split, rows in splits.items()},
        readings={split: readings(rows) for split, rows in splits.items()},
        categories=_count_by(splits, "category"),
        difficulties=_count_by(splits, "difficulty"),
        answer_words=(min(words), statistics.mean(words), max(words)),
        closest=pairs[:_MAX_CLOSEST],
        token_lengths=(min(lengths), statistics.median(lengths), max(lengths)) if lengths else None,
        warnings=warnings,
    )
    return Findings(path, [], warnings, report)


def _scan(path: Path) -> tuple[dict[str, list[Record]], list[Fault]]:
    """The rows of each split that can be read, and the faults of other rows and of files."""
    splits: dict[str, list[Record]] = {}
    faults: list[Fault] = []
    for split, files in split_files(path).items():
        splits[split], found = scan_records(*files)
        faults += found
        if not splits[split] and not found:
            name = files[0].name
            fault = "no rows, expected at least one, or no such file"
            faults.append(Fault(name, fault, f"Add rows to {name}, or remove it."))
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


def _missing_labels(records: list[Record]) -> Iterator[Fault]:
    for label in ("id", "category", "difficulty"):
        missing = [record for record in records if not getattr(record, label)]
        if len(missing) < len(records):
            fault = f"no {label}, expected one as other rows have"
            advice = f"Give all rows a value for {label}, or none of them."
            yield from (Fault(record.source, fault, advice) for record in missing)


def _unknown_categories(splits: dict[str, list[Record]]) -> Iterator[Fault]:
    """Categories of other splits that train does not have."""
    trained = {record.category for record in splits.get("train", []) if record.category}
    for split, records in splits.items():
        counts = Counter(record.category for record in records if record.category)
        for category in sorted(counts.keys() - trained if trained else ()):
            yield Fault(
                split,
                f"category {category!r} ({counts[category]} rows) is not in train",
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


def _count_by(splits: dict[str, list[Record]], label: str) -> dict[str, dict[str, int]]:
    counts = {s: Counter(getattr(record, label) for record in rows) for s, rows in splits.items()}
    names = sorted({name for counter in counts.values() for name in counter if name})
    return {name: {split: counts[split][name] for split in splits} for name in names}
