"""Reads and checks rows, in every accepted form.

`data/forms.py` says what the keys of a row mean. A column of nulls counts as absent: data sets
that were joined have such columns.

A row may also have the labels `id`, `category`, `difficulty` and `follow_up`. Other keys
are ignored. But in a row with `question` and `answer`, a key that looks like a misspelt
label is an error.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import islice
from pathlib import Path
from typing import Any

from interviewmate_mlx.data.faults import Fault, data_error
from interviewmate_mlx.data.forms import LABELS as LABELS
from interviewmate_mlx.data.forms import Message as Message
from interviewmate_mlx.data.forms import (
    Reading,
    UnknownKeysError,
    as_text,
    check_turns,
    read_keys,
    read_messages,
    refuse_untrained,
)
from interviewmate_mlx.data.leakage import Seen
from interviewmate_mlx.data.rows import ENDINGS, Row, read_rows
from interviewmate_mlx.errors import DataError, brief

DIFFICULTIES = ("beginner", "intermediate", "advanced")
MAX_FAULTS = 100_000  # more than anybody reads; a file of 256 MB could have millions
TAKEN_ID = "an id that an earlier row has"
UNIQUE_ADVICE = "Give each row an id of its own."
_MISSPELT_RATIO = 0.85  # from this difflib ratio on, an unknown key is a misspelt label
_MAX_FILES = 10_000  # of a folder and those in it, looked through for splits
_MAX_NAMED = 5  # of their folders
SPLIT_NAMES = {
    "train": ("train",),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test",),
}
# How the Hub names the files of its branch refs/convert/parquet, within a set's folder.
_ANY_SPLIT = "|".join(name for names in SPLIT_NAMES.values() for name in names)
_BRANCH_PART = re.compile(rf"(?<![^/])({_ANY_SPLIT})/\d{{4}}\.parquet$")


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
    num_given: int = 0  # of the messages, the first ones, that carry no loss
    reading: str = ""  # how its keys were understood

    @property
    def place(self) -> str:
        """Its file and line, with its id."""
        return f"{self.source} ({self.id})" if self.id else self.source

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
    for split, files in split_files(path).items():
        try:
            splits[split] = read_records(*files)
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("\n".join(faults))
    return splits


def split_files(path: Path) -> dict[str, list[Path]]:
    """The train, valid and test files of a folder that exist, or one file as `train`.

    Raises:
        DataError: there is no such path, or the folder has no train file, or not all parts of one.
    """
    if not path.exists():
        where = "" if path.is_absolute() else f"The current folder is {Path.cwd()}. "
        raise DataError(
            f"No data at {path}.\n"
            f"{where}Give a .jsonl or .json file, a folder with train.jsonl (and valid.jsonl, "
            "test.jsonl), or `interview` for the shipped questions; tables may be .csv, .tsv or "
            ".parquet."
        )
    if path.is_file():
        return {"train": [path]}
    found = folders_of_splits(_names_in(path))
    own = {split: files_of_split(found.get("", []), split) for split in SPLIT_NAMES}
    if not own["train"]:
        raise _no_splits(path, [name for name in found if name])
    for chosen in own.values():
        if chosen and (total := _num_parts(chosen[0])) > len(chosen):
            raise DataError(
                f"{path} holds {len(chosen)} of {total} parts, such as {chosen[0]}.\n"
                "Download the others, too."
            )
    return {split: [path / name for name in chosen] for split, chosen in own.items() if chosen}


def _names_in(path: Path) -> list[str]:
    """The files of a folder, and of those in it that may hold a data set; not of all below."""
    below = (found for depth in ("*", "*/*", "*/*/*") for found in path.glob(depth))
    names = (file.relative_to(path).as_posix() for file in islice(below, _MAX_FILES))
    return [name for name in names if name.endswith(ENDINGS)]


def _no_splits(path: Path, folders: Sequence[str]) -> DataError:
    others = sorted(f.name for f in path.iterdir() if f.is_file() and f.name.endswith(ENDINGS))
    advice = f"It holds {brief(others[0])}: give that file." if len(others) == 1 else "Add one."
    if folders:
        named = ", ".join(str(path / folder) for folder in sorted(folders)[:_MAX_NAMED])
        which = "that folder" if len(folders) == 1 else "one of these folders"
        advice = f"There are such files in {named}: give {which}."
    return DataError(
        f"{path} holds no train.jsonl and no train.json, .csv, .tsv or .parquet.\n{advice}"
    )


def folders_of_splits(names: Iterable[str]) -> dict[str, list[str]]:
    """Folders that hold a data set's splits, and the names of their files.

    Args:
        names: of files, with their folders: `data/train.csv`, `easy/train/0000.parquet`.

    Returns:
        by folder, which ends in a slash if it is not the root.
    """
    by_folder: dict[str, list[str]] = {}
    for name in names:
        file = found[0] if (found := _BRANCH_PART.search(name)) else name.rpartition("/")[2]
        by_folder.setdefault(name.removesuffix(file), []).append(file)
    splits = {
        folder: [file for split in SPLIT_NAMES for file in files_of_split(files, split)]
        for folder, files in by_folder.items()
        if files_of_split(files, "train")
    }
    return {folder: [folder + file for file in files] for folder, files in splits.items()}


def files_of_split(names: Iterable[str], split: str) -> list[str]:
    """The file of a split among those of a folder, or its parts as the Hub names them.

    Parts are `train-00000-of-00002.parquet`, or `train/0000.parquet` and the next. Of several
    files with a split's name, the first ending counts: `train.jsonl` before `train.parquet`.

    Args:
        names: of the files in one folder.
        split: `train`, `valid` or `test`.
    """
    there = set(names)
    whole = [f"{name}{ending}" for name in SPLIT_NAMES[split] for ending in ENDINGS]
    if first := next((name for name in whole if name in there), None):
        return [first]
    for name in SPLIT_NAMES[split]:
        for ending in ENDINGS:
            part = re.compile(rf"{name}(-\d+-of-\d+(-[0-9a-f]+)?|/\d{{4}}){re.escape(ending)}")
            if parts := sorted(filter(part.fullmatch, there)):
                return parts
    return []


def _num_parts(name: str) -> int:
    found = re.search(r"-of-(\d+)", name)
    return int(found[1][:9]) if found else 1


def read_records(*paths: Path) -> list[Record]:
    """Read and check a file of rows, or one that lies in several parts.

    Raises:
        DataError: the file or some of its rows cannot be read. Every faulty row is
            named, with its line.
    """
    records, faults = scan_records(*paths)
    if faults:
        raise data_error(paths[0], faults)
    if not records:
        raise DataError(f"{paths[0]}: no rows.\nAdd rows, one JSON object per line.")
    return records


def scan_records(*paths: Path) -> tuple[list[Record], list[Fault]]:
    """Read a file of rows; return the valid ones, and the faults of the others or of the file."""
    records: list[Record] = []
    faults: list[Fault] = []
    for found in iterate_records(*paths):
        if isinstance(found, Record):
            records.append(found)
        else:
            faults.append(found)
    return records, faults


def iterate_records(*paths: Path) -> Iterator[Record | Fault]:
    """The rows of a file one after the other, each checked, or its fault."""
    num_faults = 0
    with Seen() as ids:
        for path in paths:
            for row in read_rows(path):
                source = f"{path.name} {row.place}".strip()
                if num_faults == MAX_FAULTS:
                    yield Fault(source, f"after {MAX_FAULTS} faults nothing more was read")
                    return
                record, fault = _check(row, source)
                if record and record.id and (first := ids.first(record.id, source)):
                    place = first.removeprefix(f"{path.name} ")
                    taken = f"id {record.id!r} is taken by {place}; expected each id once"
                    fault = Fault(source, taken, UNIQUE_ADVICE, TAKEN_ID)
                if fault:
                    num_faults += 1
                    yield fault
                if record:
                    yield record


def _check(row: Row, source: str) -> tuple[Record | None, Fault | None]:
    """A row as a record, or what is wrong with it."""
    if row.fault:
        return None, Fault(source, row.fault, row.advice)
    try:
        return read_row(row.value, source), None
    except UnknownKeysError as error:
        return None, Fault(source, str(error), error.advice)
    except ValueError as error:
        return None, Fault(source, str(error))


def readings(records: Iterable[Record]) -> list[str]:
    """What was understood of rows, the most usual first: as in `12 rows: question, answer`."""
    counts = Counter(record.reading for record in records)
    return [
        f"{number:,} row{'s' if number > 1 else ''}: {text}"
        for text, number in counts.most_common()
    ]


def own_row(record: Record, row_id: str) -> dict[str, Any]:
    """A row in this package's own form, as JSON has it."""
    said = [{"role": message.role, "content": message.content} for message in record.messages]
    roles = [message.role for message in record.messages]
    row: dict[str, Any] = {"id": row_id}
    if record.num_given:
        row |= {"prompt": said[: record.num_given], "completion": said[record.num_given :]}
    elif roles == ["user", "assistant"] and (extra := record.messages[0].input):
        asked = record.question[: -len(extra)].rstrip()
        row |= {"instruction": asked, "input": extra, "output": record.answer}
    elif roles == ["user", "assistant"]:
        row |= {"question": record.question, "answer": record.answer}
    elif roles:
        row |= {"messages": said}
    elif record.prompt:
        row |= {"prompt": record.prompt, "completion": record.completion}
    else:
        row |= {"text": record.completion}
    labels = {name: getattr(record, name) for name in LABELS if name != "id"}
    return row | {name: value for name, value in labels.items() if value}


def read_row(row: object, source: str) -> Record:
    """Check a row.

    Raises:
        ValueError: what is wrong with it.
    """
    if not isinstance(row, dict):
        raise ValueError(f"got {brief(row)}, expected a JSON object")
    is_judged = isinstance(row.get("label"), bool)  # or a bad answer would be learned
    if "prompt" in row and (is_judged or row.keys() & {"chosen", "rejected"}):
        raise ValueError("got a preference, expected one answer (or set train.method, as to dpo)")
    refuse_untrained(row)
    present = tuple(key for key, value in row.items() if value is not None)
    null = tuple(key for key, value in row.items() if value is None)
    reading = read_keys(present, null)
    keys = reading.keys
    labels: dict[str, Any] = {name: _label(row, keys[name]) for name in LABELS if name in keys}
    labels |= {"difficulty": labels.get("difficulty", "").casefold(), "reading": str(reading)}
    match reading.form:
        case "messages":
            messages = read_messages(_parsed(row[keys["messages"]]), keys["messages"])
            return Record(source, _with_system(row, reading, messages), **labels)
        case "question":
            _refuse_misspelt(row, reading)
            asked, answer = (as_text(row, keys[name]).strip() for name in ("question", "answer"))
            return Record(source, _with_system(row, reading, _dialogue(asked, answer)), **labels)
        case "instruction":
            asked, answer = (as_text(row, keys[name]).strip() for name in ("instruction", "output"))
            extra = as_text(row, keys["input"]).strip() if row.get(keys.get("input", "")) else ""
            both = "\n\n".join(filter(None, [asked, extra]))
            dialogue = _dialogue(both, answer, extra)
            return Record(source, _with_system(row, reading, dialogue), **labels)
        case "prompt":
            return _read_prompt(row, reading, source, labels)
    return Record(source, completion=as_text(row, keys["text"]), **labels)


def _read_prompt(
    row: dict[str, Any], reading: Reading, source: str, labels: dict[str, Any]
) -> Record:
    """A prompt and its completion: texts as they stand, or lists of messages."""
    prompt, completion = reading.keys["prompt"], reading.keys["completion"]
    if not isinstance(row[prompt], list) and not isinstance(row[completion], list):
        texts = as_text(row, prompt), as_text(row, completion)
        return Record(source, prompt=texts[0], completion=texts[1], **labels)
    given, learned = (read_messages(row[key], key) for key in (prompt, completion))
    messages = (*given, *learned)
    check_turns(messages, f"{prompt} and {completion}")
    if not learned or (given[-1:] and given[-1].role != "user"):
        raise ValueError(f"{prompt}: expected messages that end with the user's")
    return Record(source, messages, num_given=len(given), **labels)


def _with_system(
    row: dict[str, Any], reading: Reading, messages: tuple[Message, ...]
) -> tuple[Message, ...]:
    """Messages with the system message that a row has apart."""
    key = reading.keys.get("system", "")
    if row.get(key):
        if messages[:1] and messages[0].role == "system":
            raise ValueError(
                f"{key}: the messages begin with a system message, too; remove one of them"
            )
        messages = (Message("system", as_text(row, key).strip()), *messages)
    check_turns(messages, reading.keys.get("messages", "messages"))
    return messages


def _parsed(value: object) -> object:
    """Messages that stand in a table as the text of a JSON list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"messages: got text that is not JSON: {brief(value)}, expected a list like "
                '[{"role": "user", "content": "..."}, ...]'
            ) from error
    return value


def _refuse_misspelt(row: dict[str, Any], reading: Reading) -> None:
    given = {key for key, value in row.items() if value is not None}
    for key in sorted(given - set(reading.keys.values())):
        ratios = {label: SequenceMatcher(None, key.casefold(), label).ratio() for label in LABELS}
        nearest = max(LABELS, key=ratios.__getitem__)
        if ratios[nearest] >= _MISSPELT_RATIO:
            raise ValueError(f"got the key {brief(key)}, expected {nearest!r} (or another name)")


def _dialogue(question: str, answer: str, extra: str = "") -> tuple[Message, ...]:
    return Message("user", question, extra), Message("assistant", answer)


def _label(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = as_text(row, key)
    if key.casefold() != "follow_up" and not text.isprintable():
        raise ValueError(f"{key}: got {brief(text)}, expected no line breaks or control characters")
    return text
