"""Reads, checks and encodes preferences: which of two answers is better, or whether one is good.

    {"prompt": ..., "chosen": ..., "rejected": ...}   two answers to one question
    {"prompt": ..., "completion": ..., "label": true}  one answer, and whether it is good

Each of the texts may also be a list of messages, as on the Hub: a prompt that ends with the
user, and an answer of one message of the assistant. An answer's list may repeat its prompt.
A text is put to the model as a question or an answer, by the same template as any other row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from interviewmate_mlx.data.faults import Fault, data_error
from interviewmate_mlx.data.prompts import Example, encode_record
from interviewmate_mlx.data.records import (
    TAKEN_ID,
    UNIQUE_ADVICE,
    Record,
    read_row,
    split_files,
)
from interviewmate_mlx.data.rows import read_rows
from interviewmate_mlx.data.templates import Template, Tokenizer
from interviewmate_mlx.errors import DataError, brief

PAIRED_KEYS = ("prompt", "chosen", "rejected")
JUDGED_KEYS = ("prompt", "completion", "label")


@dataclass(frozen=True)
class PairRecord:
    """A checked row: two conversations that differ in their last answer, the better one first."""

    chosen: Record
    rejected: Record

    @property
    def id(self) -> str:
        return self.chosen.id


@dataclass(frozen=True)
class JudgedRecord:
    """A checked row: a conversation, and whether its last answer is good."""

    record: Record
    is_good: bool

    @property
    def id(self) -> str:
        return self.record.id


Preference: TypeAlias = PairRecord | JudgedRecord


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, as the model sees them.

    Attributes:
        chosen: the better one. Its loss mask is true on the answer.
        rejected: the worse one, likewise.
        learned: (L,) bool, the tokens of `chosen` that are learned as such, where a method
            does that; by default those of the answer.
    """

    chosen: Example
    rejected: Example
    learned: np.ndarray

    def __len__(self) -> int:
        """Tokens of the longer side: both are padded to it."""
        return max(len(self.chosen), len(self.rejected))

    @property
    def sides(self) -> tuple[Example, ...]:
        return self.chosen, self.rejected

    @property
    def compared(self) -> tuple[Example, Example]:
        """The answers whose log-probabilities before training matter."""
        return self.chosen, self.rejected

    @property
    def record(self) -> Record:
        return self.chosen.record

    def content(self) -> bytes:
        return self.chosen.content() + self.rejected.content() + self.learned.tobytes()

    def with_references(self, references: Sequence[float]) -> "Pair":
        """The same, with the log-probabilities of its sides before training."""
        chosen, rejected = references
        return replace(
            self,
            chosen=replace(self.chosen, reference=chosen),
            rejected=replace(self.rejected, reference=rejected),
        )


@dataclass(frozen=True)
class Judged:
    """An answer that is good or not, as the model sees it.

    Attributes:
        example: the row. Its loss mask is true on the answer.
        is_good: whether the answer is.
        other: the same prompt with the answer of another row.
    """

    example: Example
    is_good: bool
    other: Example

    def __len__(self) -> int:
        return len(self.example)

    @property
    def sides(self) -> tuple[Example, ...]:
        return (self.example,)

    @property
    def compared(self) -> tuple[Example, Example]:
        """The answers whose log-probabilities before training matter."""
        return self.example, self.other

    @property
    def record(self) -> Record:
        return self.example.record

    def content(self) -> bytes:
        return self.example.content() + self.other.content() + bytes([self.is_good])

    def with_references(self, references: Sequence[float]) -> "Judged":
        """The same, with the log-probabilities of both answers before training."""
        example, other = references
        return replace(
            self,
            example=replace(self.example, reference=example),
            other=replace(self.other, reference=other),
        )


def load_preferences(path: Path, is_paired: bool) -> dict[str, list[Preference]]:
    """The preferences of a folder's train, valid and test files, or of one file as `train`.

    Args:
        path: a folder or a file.
        is_paired: whether rows hold two answers; else one and a label.

    Raises:
        DataError: there is nothing to read, or rows are faulty. All faulty rows are named.
    """
    splits, faults = {}, []
    for split, file in split_files(path).items():
        try:
            splits[split] = read_preferences(file, is_paired)
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("\n".join(faults))
    return splits


def read_preferences(path: Path, is_paired: bool) -> list[Preference]:
    """Read and check one file of preferences.

    Raises:
        DataError: the file or some of its rows cannot be read, its rows have several formats,
            or all have the same label. Every faulty row is named.
    """
    found: list[Preference] = []
    faults: list[Fault] = []
    formats: dict[tuple[str, ...], str] = {}  # the first row of each
    places: dict[str, str] = {}  # of each id
    for row in read_rows(path):
        source = f"{path.name} {row.place}".strip()
        if row.fault:
            faults.append(Fault(source, row.fault, row.advice))
            continue
        try:
            record, kinds = _read_row(row.value, source, is_paired)
        except ValueError as error:
            faults.append(Fault(source, str(error)))
            continue
        if record.id and record.id in places:
            taken = f"id {record.id!r} is taken by {places[record.id]}; expected each id once"
            faults.append(Fault(source, taken, UNIQUE_ADVICE, TAKEN_ID))
        places.setdefault(record.id, row.place)
        formats.setdefault(kinds, row.place)
        found.append(record)
    faults += [Fault(path.name, *fault) for fault in _file_faults(found, formats)]
    if faults:
        raise data_error(path, faults)
    if not found:
        raise DataError(f"{path}: no rows.\nAdd rows, one JSON object per line.")
    return found


def _file_faults(
    rows: Sequence[Preference], formats: dict[tuple[str, ...], str]
) -> list[tuple[str, str]]:
    """What is wrong with rows together, and what to do."""
    faults = []
    if len(formats) > 1:
        (one, first), (other, second) = list(formats.items())[:2]
        faults.append(
            (
                f"got {' and '.join(one)} in {first} and {' and '.join(other)} in {second}, "
                "expected one format in a file",
                "Write all rows in one format.",
            )
        )
    labels = {row.is_good for row in rows if isinstance(row, JudgedRecord)}
    if len(labels) == 1:
        faults.append(
            (
                f"got the label {str(labels.pop()).lower()} in all rows, expected both labels",
                "Add rows with the other label: nothing can be learned from one kind alone.",
            )
        )
    return faults


def _read_row(row: object, source: str, is_paired: bool) -> tuple[Preference, tuple[str, ...]]:
    """A row, and of what kind its prompt and its answers are.

    Raises:
        ValueError: what is wrong with it.
    """
    if not isinstance(row, dict):
        raise ValueError(f"got {brief(row)}, expected a JSON object")
    keys = PAIRED_KEYS if is_paired else JUDGED_KEYS
    if missing := [key for key in keys if row.get(key) is None]:
        got = ", ".join(brief(key) for key in list(row)[:10]) or "(none)"
        raise ValueError(
            f"{missing[0]}: got nothing (the keys are {got}), expected {', '.join(keys)}"
        )
    prompt, prompt_kind = _as_messages("prompt", row["prompt"], "user")
    answers = {key: _as_messages(key, row[key], "assistant") for key in keys[1:] if key != "label"}
    labels = {key: row[key] for key in ("id", "category") if key in row}
    last = prompt[-1] if prompt else None
    if isinstance(last, dict) and last.get("role") != "user":
        raise ValueError(f"prompt: got {brief(last.get('role'))} last, expected the user")
    _conversation("prompt", [*prompt, {"role": "assistant", "content": "."}], labels, source)
    records = []
    for key, (messages, _) in answers.items():
        own = messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages
        if len(own) != 1:
            raise ValueError(f"{key}: got {len(own)} messages after the prompt, expected one")
        records.append(_conversation(key, [*prompt, *own], labels, source))
    kinds = tuple(dict.fromkeys(kind for _, kind in answers.values()))
    if len(kinds) > 1:
        raise ValueError(
            f"got {kinds[0]} in chosen and {kinds[1]} in rejected, expected both alike"
        )
    formats = (f"a prompt of {prompt_kind}", f"answers of {kinds[0]}")
    if not is_paired:
        if not isinstance(row["label"], bool):
            raise ValueError(f"label: got {brief(row['label'])}, expected true or false")
        return JudgedRecord(records[0], row["label"]), formats
    if records[0].answer == records[1].answer:
        raise ValueError("chosen and rejected: got the same answer twice, expected two")
    return PairRecord(records[0], records[1]), formats


def _as_messages(key: str, value: object, role: str) -> tuple[list[object], str]:
    """The messages of a prompt or an answer; and whether they were a text or messages."""
    if isinstance(value, list):
        return value, "messages"
    if not isinstance(value, str):
        raise ValueError(f"{key}: got {brief(value)}, expected a text or a list of messages")
    return [{"role": role, "content": value}], "text"


def _conversation(key: str, messages: list[object], labels: dict[str, Any], source: str) -> Record:
    try:
        return read_row({"messages": messages, **labels}, source)
    except ValueError as error:
        fault = str(error).removeprefix("messages: ").removeprefix("content: ")
        raise ValueError(f"{key}: {fault}") from error


def encode_preferences(
    tokenizer: Tokenizer,
    rows: Sequence[Any],
    max_length: int,
    train_on: str,
    template: Template | None,
    group_rows: int,
) -> tuple[list[Any], int]:
    """Encode rows of either kind; see `encode_pairs` and `encode_judged`."""
    if rows and isinstance(rows[0], JudgedRecord):
        return encode_judged(tokenizer, rows, max_length, group_rows, template)
    return encode_pairs(tokenizer, rows, max_length, train_on, template)


def encode_pairs(
    tokenizer: Tokenizer,
    rows: Sequence[PairRecord],
    max_length: int,
    train_on: str,
    template: Template | None = None,
) -> tuple[list[Pair], int]:
    """Encode pairs.

    Args:
        tokenizer: a Hugging Face tokenizer.
        rows: checked ones.
        max_length: the most tokens of a side to keep.
        train_on: what a method that also learns the better answer learns of it: `answer`, or
            `all` for the prompt as well.
        template: by default the one that the tokenizer brings.

    Returns:
        The pairs; and how many rows are left out, because what was kept of an answer is nothing
        or is the same on both sides.
    """
    found = []
    for row in rows:
        sides = [
            _encode(tokenizer, record, max_length, template)
            for record in (row.chosen, row.rejected)
        ]
        chosen, rejected = sides
        is_alike = np.array_equal(chosen.tokens, rejected.tokens)
        if is_alike or not all(side.loss_mask.any() for side in sides):
            continue
        learned = chosen.loss_mask
        if train_on == "all":
            learned = np.arange(len(chosen)) > 0
        found.append(Pair(chosen, rejected, learned))
    return found, len(rows) - len(found)


def encode_judged(
    tokenizer: Tokenizer,
    rows: Sequence[JudgedRecord],
    max_length: int,
    group_rows: int,
    template: Template | None = None,
) -> tuple[list[Judged], int]:
    """Encode answers with labels, each with its prompt under another row's answer.

    The other answers are those of a group of rows that follow each other in the file: each row
    has the one before it, the first one the last. A row that is left over joins the last group.

    Args:
        tokenizer: a Hugging Face tokenizer.
        rows: checked ones.
        max_length: the most tokens of a row to keep.
        group_rows: rows in a group, at least 2.
        template: by default the one that the tokenizer brings.

    Returns:
        The rows; and how many are left out, because nothing of an answer was kept.
    """
    kept, examples = [], []
    for row in rows:
        example = _encode(tokenizer, row.record, max_length, template)
        if example.loss_mask.any():
            kept.append(row)
            examples.append(example)
    found = []
    for row, example, place in zip(kept, examples, rotated(len(kept), group_rows), strict=True):
        prompt, answer = row.record.messages[:-1], kept[place].record.messages[-1]
        other = replace(row.record, messages=(*prompt, answer))
        found.append(Judged(example, row.is_good, _encode(tokenizer, other, max_length, template)))
    return found, len(rows) - len(found)


def rotated(count: int, group_rows: int) -> list[int]:
    """For each of `count` rows, which row's answer it takes: see `encode_judged`."""
    starts = list(range(0, count, group_rows))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    places: list[int] = []
    for start, end in zip(starts, [*starts[1:], count], strict=True):
        places += [end - 1, *range(start, end - 1)]
    return places


def _encode(
    tokenizer: Tokenizer, record: Record, max_length: int, template: Template | None
) -> Example:
    """A conversation in tokens, with its last answer in the loss mask."""
    try:
        return encode_record(tokenizer, record, max_length, "last", template)[-1]
    except DataError as error:
        raise DataError(f"{record.source}: {error}") from error
