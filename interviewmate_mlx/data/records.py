"""Reads and checks rows, in every accepted format.

A row is a JSON object in one of these formats. The first whose keys are all there
is used:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}
    {"question": ..., "answer": ...}
    {"prompt": ..., "completion": ...}               verbatim, no template
    {"instruction": ..., "input": ..., "output": ...}  Alpaca; input may be absent
    {"text": ...}                                    verbatim, all of it learned

A column of nulls counts as absent: data sets that were joined have such columns.

A row may also have the labels `id`, `category`, `difficulty` and `follow_up`. Other keys
are ignored. But in a row with `question` and `answer`, a key that looks like a misspelt
label is an error.
"""

from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from interviewmate_mlx.data.faults import Fault, data_error
from interviewmate_mlx.data.rows import ENDINGS, read_rows
from interviewmate_mlx.errors import DataError, brief
from interviewmate_mlx.files import is_utf8

LABELS = ("id", "category", "difficulty", "follow_up")
DIFFICULTIES = ("beginner", "intermediate", "advanced")
_MAX_FAULTS = 100_000  # more than anybody reads; a file of 256 MB could have millions
TAKEN_ID = "an id that an earlier row has"
UNIQUE_ADVICE = "Give each row an id of its own."
# The keys that make a row's format.
_FORMATS = (
    ("messages",),
    ("question", "answer"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("text",),
)
_MISSPELT_RATIO = 0.85  # from this difflib ratio on, an unknown key is a misspelt label
ROLES = ("system", "user", "assistant")
SPLIT_NAMES = {
    "train": ("train",),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test",),
}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: `system`, `user` or `assistant`.
        content: its text.
        input: the end of `content` that an Alpaca row has apart, as `input`; "" if none.
    """

    role: str
    content: str
    input: str = ""


@dataclass(frozen=True)
class Record:
    """A checked row: a conversation, or a verbatim prompt and its completion."""

    source: str  # file and line, for messages
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""
    id: str = ""
    category: str = ""
    difficulty: str = ""
    follow_up: str = ""  # what an interviewer would ask next

    @property
    def question(self) -> str:
        """The prompt, or the last message of the user."""
        asked = [message.content for message in self.messages if message.role == "user"]
        return asked[-1] if asked else self.prompt

    @property
    def answer(self) -> str:
        """The completion, or the last message of the assistant."""
        return self.messages[-1].content if self.messages else self.completion


def load_splits(path: Path) -> dict[str, list[Record]]:
    """The rows of a folder's train, valid and test files, or of one file as `train`.

    Raises:
        DataError: there is nothing to read, or rows are faulty. All faulty rows are
            named, with file and line.
    """
    splits, faults = {}, []
    for split, file in split_files(path).items():
        try:
            splits[split] = read_records(file)
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("\n".join(faults))
    return splits


def split_files(path: Path) -> dict[str, Path]:
    """The train, valid and test files of a folder that exist, or one file as `train`.

    Raises:
        DataError: there is no such path, or the folder has no train file.
    """
    if not path.exists():
        where = "" if path.is_absolute() else f"The current folder is {Path.cwd()}. "
        raise DataError(
            f"No data at {path}.\n"
            f"{where}Give a .jsonl or .json file, a folder with train.jsonl (and valid.jsonl, "
            "test.jsonl), or `interview` for the shipped questions."
        )
    if path.is_file():
        return {"train": path}
    found = {split: _split_file(path, split) for split in SPLIT_NAMES}
    if found["train"] is None:
        raise DataError(f"{path} holds no train.jsonl and no train.json.\nAdd one.")
    return {split: file for split, file in found.items() if file}


def read_records(path: Path) -> list[Record]:
    """Read and check one file of rows.

    Raises:
        DataError: the file or some of its rows cannot be read. Every faulty row is
            named, with its line.
    """
    records, faults = scan_records(path)
    if faults:
        raise data_error(path, faults)
    if not records:
        raise DataError(f"{path}: no rows.\nAdd rows, one JSON object per line.")
    return records


def scan_records(path: Path) -> tuple[list[Record], list[Fault]]:
    """Read a file of rows; return the valid ones, and the faults of the others or of the file."""
    records: list[Record] = []
    faults: list[Fault] = []
    first_place: dict[str, str] = {}  # of each id
    for row in read_rows(path):
        source = f"{path.name} {row.place}".strip()
        if len(faults) == _MAX_FAULTS:
            faults.append(Fault(source, f"after {_MAX_FAULTS} faults nothing more was read"))
            break
        if row.fault:
            faults.append(Fault(source, row.fault, row.advice))
            continue
        try:
            record = read_row(row.value, source)
        except ValueError as error:
            faults.append(Fault(source, str(error)))
            continue
        if record.id and record.id in first_place:
            first = first_place[record.id]
            taken = f"id {record.id!r} is taken by {first}; expected each id once"
            faults.append(Fault(source, taken, UNIQUE_ADVICE, TAKEN_ID))
        first_place.setdefault(record.id, row.place)
        records.append(record)
    return records, faults


def split_file_names(split: str) -> list[str]:
    """The names that a split's file may have, the first that exists is taken."""
    return [f"{name}{ending}" for name in SPLIT_NAMES[split] for ending in ENDINGS]


def _split_file(folder: Path, split: str) -> Path | None:
    names = split_file_names(split)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_row(row: object, source: str) -> Record:
    """Check a row.

    Raises:
        ValueError: what is wrong with it.
    """
    if not isinstance(row, dict):
        raise ValueError(f"got {brief(row)}, expected a JSON object")
    labels: dict[str, Any] = {key: _label(row, key) for key in LABELS}
    match _format_of(row):
        case ("messages",):
            return Record(source, messages=_read_messages(row["messages"]), **labels)
        case ("question", "answer"):
            _refuse_misspelt(row)
            pair = _string(row, "question").strip(), _string(row, "answer").strip()
            return Record(source, messages=_dialogue(*pair), **labels)
        case ("prompt", "completion"):
            prompt, completion = _string(row, "prompt"), _string(row, "completion")
            return Record(source, prompt=prompt, completion=completion, **labels)
        case ("instruction", "output"):
            extra = _string(row, "input").strip() if row.get("input") else ""
            question = "\n\n".join(filter(None, [_string(row, "instruction").strip(), extra]))
            answer = Message("assistant", _string(row, "output").strip())
            return Record(source, messages=(Message("user", question, extra), answer), **labels)
        case ("text",):
            return Record(source, completion=_string(row, "text"), **labels)
    if row.keys() >= {"prompt"} and row.keys() & {"chosen", "rejected", "label"}:
        raise ValueError("got a preference, expected one answer (or set train.method, as to dpo)")
    keys = ", ".join(brief(key) for key in list(row)[:10]) or "(none)"
    more = f" and {len(row) - 10} more" if len(row) > 10 else ""
    raise ValueError(
        f"got the keys {keys}{more}, expected 'question' and 'answer' "
        "(or messages, prompt and completion, instruction and output, text)"
    )


def _format_of(row: dict[str, Any]) -> tuple[str, ...]:
    """The first format whose keys are all there, not all of them null; () if there is none."""
    complete = [keys for keys in _FORMATS if row.keys() >= set(keys)]
    filled = [keys for keys in complete if any(row[key] is not None for key in keys)]
    return next(iter(filled or complete), ())


def _refuse_misspelt(row: dict[str, Any]) -> None:
    given = {key for key, value in row.items() if value is not None}
    for key in sorted(given - {"question", "answer", *LABELS}):
        ratios = {label: SequenceMatcher(None, key.casefold(), label).ratio() for label in LABELS}
        nearest = max(LABELS, key=ratios.__getitem__)
        if ratios[nearest] >= _MISSPELT_RATIO:
            raise ValueError(f"got the key {brief(key)}, expected {nearest!r} (or another name)")


def _dialogue(question: str, answer: str) -> tuple[Message, ...]:
    return Message("user", question), Message("assistant", answer)


def _read_messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise ValueError("messages: expected a list of objects with role and content")
    messages = tuple(Message(_string(m, "role"), _string(m, "content").strip()) for m in value)
    roles = [message.role for message in messages]
    if unknown := set(roles) - set(ROLES):
        got = brief(min(unknown))
        raise ValueError(f"messages: got the role {got}, expected {', '.join(ROLES)}")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or turns != expected:
        raise ValueError(
            f"messages: got the roles {', '.join(roles[:10]) or '(none)'}, "
            "expected user and assistant in turn, ending with assistant"
        )
    return messages


def _string(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        got = "nothing" if value is None else brief(value)
        raise ValueError(f"{key}: got {got}, expected a string")
    if not value.strip():
        raise ValueError(f"{key}: got an empty string")
    if not is_utf8(value):
        raise ValueError(f"{key}: got half a surrogate pair, expected valid Unicode")
    return value


def _label(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = _string(row, key)
    if key != "follow_up" and not text.isprintable():
        raise ValueError(f"{key}: got {brief(text)}, expected no line breaks or control characters")
    return text
