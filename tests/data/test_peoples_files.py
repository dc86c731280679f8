"""Files as people have them: each is read by all commands, or refused in words that help."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

PAIRS = [("What is a loss?", "How far off."), ("What is a gradient?", "The way to fall fastest.")]
ROWS = [{"question": asked, "answer": answer} for asked, answer in PAIRS]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(header: str, separator: str = ",", end: str = "\r\n") -> str:
    rows = [header, *(separator.join(pair) for pair in PAIRS)]
    return "".join(row + end for row in rows)


def sharegpt(*roles: str) -> dict[str, Any]:
    turns = enumerate(roles)
    return {"conversations": [{"from": r, "value": f"{r} {n}{len(roles)}"} for n, r in turns]}


CHAT = [
    {
        "messages": [
            {"role": "system", "content": "You are a coach."},
            {"role": "user", "content": [{"type": "text", "text": asked}]},
            {"role": "assistant", "content": answer, "weight": 1},
        ]
    }
    for asked, answer in PAIRS
]
PLAIN_CHAT = [
    {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ],
        "source": None,
    }
    for asked, answer in PAIRS
]
READ: dict[str, tuple[bytes, str]] = {
    "excel.csv": (
        b"\xef\xbb\xbf" + b"Question;Answer;Category;Difficulty;;\r\n"
        b'"What is a loss?";"How far off.";ml;Beginner;;\r\n'
        b'"What is a gradient?";"The way to fall fastest.";ml;ADVANCED;;\r\n;;;;;\r\n',
        "question from 'Question', answer from 'Answer'",
    ),
    "separator.csv": (
        b"sep=;\r\n" + table("Question;Answer", ";").encode(),
        "question from 'Question', answer from 'Answer'",
    ),
    "pandas.csv": (
        b",question,answer\n0,What is a loss?,How far off.\n"
        b"1,What is a gradient?,The way to fall fastest.\n",
        "question, answer",
    ),
    "packed.tsv.gz": (
        gzip.compress(table("question\tanswer", "\t", "\n").encode()),
        "question, answer",
    ),
    "sharegpt.json": (
        json.dumps([sharegpt("system", "human", "gpt"),
                    sharegpt("human", "gpt", "human", "gpt")]).encode(),
        "messages from 'conversations'",
    ),
    "alpaca.json": (
        json.dumps([{"instruction": "Add.", "input": "1, 2", "output": "3"},
                    {"instruction": "Name a sort.", "input": "", "output": "Heap."}]).encode(),
        "instruction, input, output",
    ),
    "dolly.jsonl": (
        lines([{"instruction": asked, "context": "", "response": answer, "category": "open"}
               for asked, answer in PAIRS]),
        "instruction, input from 'context', output from 'response'",
    ),
    "openai.jsonl": (lines(CHAT), "messages"),
    "wrapped.json": (json.dumps({"version": "1", "train": ROWS}).encode(), "question, answer"),
    "structs.parquet": (b"", "messages"),
}  # fmt: skip
REFUSED: dict[str, tuple[bytes, str]] = {
    "windows.csv": (
        ("Question;Answer\r\n" + "Über was?;Für jeden: é\r\n" * 3).encode("cp1252"),
        "got 3 of 4 lines that are not UTF-8, expected UTF-8.\n"
        "Save windows.csv as UTF-8; Excel calls it CSV UTF-8.",
    ),
    "unicode_text.csv": (
        table("Question\tAnswer", "\t").encode("utf-16"),
        "got UTF-16 or UTF-32, expected UTF-8.\nSave unicode_text.csv as UTF-8; Excel calls",
    ),
    "mac.csv": (
        table("Question,Answer", ",", "\r").encode(),
        "its lines end in carriage returns alone, as those of old Macs",
    ),
    "title.csv": (
        b"My questions;\r\n" + table("Question;Answer", ";").encode(),
        "got 2 cells, expected 1 cell, as in row 1: 'My questions': 3 rows (rows 2, 3, 4)",
    ),
    "no_header.csv": (
        table("What is it?,A test.").encode(),
        "got the keys 'What is it?', 'A test.', expected 'question' and 'answer' (or messages, "
        "prompt and completion, instruction and output, text): 2 rows (rows 2, 3)\n"
        "Rename the keys of these rows; those of a table are the names of its columns, in row 1.",
    ),
    "german.csv": (table("Frage,Antwort").encode(), "got the keys 'Frage', 'Antwort', expected"),
    "backslash.csv": (
        b'question,answer\n"What is \\"hot\\" data?","Much used."\n',
        'row 2: a quote within a quoted cell, expected two of them: ""',
    ),
    "holes.csv": (
        b"question,answer\nWhat is it?,\n,A test.\n",
        "holes.csv row 2: answer: got nothing, expected a string\n"
        "  holes.csv row 3: question: got nothing, expected a string",
    ),
    "grades.csv": (
        b"question,answer,difficulty\nWhat is it?,A test.,Easy\n",
        "got 'easy', expected beginner, intermediate, advanced\n"
        "Write one of these words, or name the key otherwise: it is not needed.",
    ),
    "python.csv": (
        b"messages\n\"[{'role': 'user', 'content': 'Hi'}]\"\n",
        "got text that is not JSON: \"[{'role': 'user', 'content': 'Hi'}]\", expected a list "
        'like [{"role": "user", "content": "..."}, ...]',
    ),
    "tools.json": (
        json.dumps([sharegpt("human", "function_call", "observation", "gpt")]).encode(),
        "got the role 'function_call', expected system, user, assistant: tool calls are not",
    ),
    "greeting.json": (
        json.dumps([sharegpt("gpt", "human", "gpt")]).encode(),
        "expected user and assistant in turn, the user first and the assistant last",
    ),
    "thanks.json": (
        json.dumps([sharegpt("human", "gpt", "human")]).encode(),
        "got the roles user, assistant, user, expected user and assistant in turn",
    ),
    "picture.jsonl": (
        lines([{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}]),
        "got a part of the kind 'image_url', expected text",
    ),
    "columns.json": (
        json.dumps({"question": ["Q"], "answer": ["A"]}).encode(),
        "got a JSON object with the keys 'question', 'answer', expected a list of rows.\n"
        "Give a list of rows, [{...}, {...}], or JSON Lines: one JSON object a line. pandas",
    ),
    "splits.json": (
        json.dumps({"train": ROWS, "validation": ROWS}).encode(),
        "got several lists of rows, 'train', 'validation', expected one.\nWrite each into a file",
    ),
    "notes.md": (b"# Question\n", "got a .md file, expected .jsonl or .json, .csv, .tsv or .par"),
}


def write(name: str, content: bytes) -> str:
    """A file in another folder than the one where the commands run."""
    path = Path("elsewhere", name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    if name == "structs.parquet":
        parquet.write_table(pa.Table.from_pylist(PLAIN_CHAT), path)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "reading"), [(n, *each) for n, each in READ.items()], ids=READ
)
def test_file_of_a_person_is_read_by_every_command(imate, tiny_base, name, content, reading):
    path = write(name, content)
    checked = json.loads(imate("data", "check", path, "--json").stdout)
    assert (checked["rows"], checked["faults"]) == ({"train": 2}, [])
    assert checked["readings"] == {"train": [f"2 rows: {reading}"]}
    seen = imate("data", "preview", path, "--row", 2, "--model", tiny_base)
    assert f"train: 2 rows: {reading}\n" in seen.stderr
    shown = json.loads(imate("data", "show", path, "--model", tiny_base, "--json").stdout)
    assert shown["train"]["rows"] == 2
    imate("data", "convert", path, "--out", "own.jsonl")
    again = imate("data", "preview", "own.jsonl", "--row", 2, "--model", tiny_base)
    assert again.stdout == seen.stdout  # the same tokens, with the same loss
    said = imate("data", "split", path, "--out", "split", "--shares", 1, 0, 0).stdout
    assert said.startswith("split/train.jsonl: 2 rows, 2 of them new")
    assert json.loads(imate("data", "check", "split", "--json").stdout)["rows"] == {"train": 2}


@pytest.mark.parametrize(
    ("name", "content", "says"), [(n, *each) for n, each in REFUSED.items()], ids=REFUSED
)
def test_file_of_a_person_that_cannot_be_read_says_why(imate, name, content, says):
    path = write(name, content)
    refusal = imate("data", "check", path, code=1).stderr
    assert refusal.startswith(f"DataError: {path}: ")
    assert says in refusal
    if name != "grades.csv":  # an unknown word is not wrong to train on
        for command in ("preview", "show"):
            assert says in imate("data", command, path, code=1).stderr
        assert says in imate("data", "convert", path, "--out", "own.jsonl", code=1).stderr
        assert says in imate("data", "split", path, "--out", "split", code=1).stderr
    assert not Path("own.jsonl").exists()
    assert not Path("split").exists()
