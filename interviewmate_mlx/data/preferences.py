"""Reads and checks preferences: which of two answers is better, or whether one is good.

    {"prompt": ..., "chosen": ..., "rejected": ...}   two answers to one question
    {"prompt": ..., "completion": ..., "label": true}  one answer, and whether it is good

Each of the texts may also be a list of messages, as on the Hub: a prompt that ends with the
user, and an answer of one message of the assistant. An answer's list may repeat its prompt.
A text is put to the model as a question or an answer, by the same template as any other row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from interviewmate_mlx.data.faults import Fault, data_error
from interviewmate_mlx.data.records import (
    TAKEN_ID,
    UNIQUE_ADVICE,
    Record,
    read_row,
    split_files,
)
from interviewmate_mlx.data.rows import read_rows
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


def load_preferences(path: Path, is_paired: bool) -> dict[str, list[Preference]]:
    """The preferences of a folder's train, valid and test files, or of one file as `train`.

    Args:
        path: a folder or a file.
        is_paired: whether rows hold two answers; else one and a label.

    Raises:
        DataError: there is nothing to read, or rows are faulty. All faulty rows are named.
    """
    splits, faults = {}, []
    for split, files in split_files(path).items():
        try:
            splits[split] = read_preferences(files, is_paired)
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("\n".join(faults))
    return splits


def read_preferences(paths: Sequence[Path], is_paired: bool) -> list[Preference]:
    """Read and check the files of a split.

    Raises:
        DataError: the file or some of its rows cannot be read, its rows have several formats,
            or all have the same label. Every faulty row is named.
    """
    found: list[Preference] = []
    faults: list[Fault] = []
    formats: dict[tuple[str, ...], str] = {}  # the first row of each
    places: dict[str, str] = {}  # of each id
    for path, row in ((each, row) for each in paths for row in read_rows(each)):
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
    faults += [Fault(paths[0].name, *fault) for fault in _file_faults(found, formats)]
    if faults:
        raise data_error(paths[0], faults)
    if not found:
        raise DataError(f"{paths[0]}: no rows.\nAdd rows, one JSON object per line.")
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
