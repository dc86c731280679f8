"""Rows as people have them: other files, other keys, other ways to give a conversation."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from checkpoints import write_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from transformers import AutoTokenizer

from interviewmate_mlx.data.check import inspect_data
from interviewmate_mlx.data.prompts import encode_records
from interviewmate_mlx.data.records import (
    Message,
    load_splits,
    own_row,
    read_records,
    readings,
    scan_records,
)
from interviewmate_mlx.data.splits import split_rows
from interviewmate_mlx.data.templates import choose_template
from interviewmate_mlx.errors import DataError

ROWS = [
    {"id": "a", "category": "x", "question": "What is a loss?", "answer": "How far off.\nYes."},
    {"id": "b", "category": "x", "question": 'A "quoted", one; é 漢', "answer": "=1+1"},
    {"id": "c", "category": "y", "question": "Third\t?", "answer": "| bars |\n\nand lines"},
]
QA = (Message("user", "Q"), Message("assistant", "A"))
USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",", end: str = "\r\n") -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file, **options)
    return file.getvalue()


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FILES = {
    "rows.jsonl": as_lines(ROWS),
    "rows.json": json.dumps(ROWS).encode(),
    "wrapped.json": json.dumps({"version": 1, "train": ROWS}).encode(),
    "data.json": json.dumps({"data": ROWS}).encode(),
    "rows.csv": as_csv(ROWS),
    "excel.csv": b"\xef\xbb\xbf" + as_csv(ROWS, ";"),
    "unix.csv": as_csv(ROWS, ",", "\n"),
    "rows.tsv": as_csv(ROWS, "\t"),
    "rows.parquet": as_parquet(ROWS),
    "groups.parquet": as_parquet(ROWS, row_group_size=2, compression="zstd"),
    "named_wrongly.jsonl": as_parquet(ROWS),
    "lines.csv": as_lines(ROWS),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_in_every_file_are_the_same_tokens(tokenizer, tmp_path, name, packed):
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(FILES[name]) if packed else FILES[name])
    records = read_records(path)
    naive = [
        (row["id"], row["category"], row["question"].strip(), row["answer"].strip()) for row in ROWS
    ]
    assert [(r.id, r.category, r.question, r.answer) for r in records] == naive
    reference = tmp_path / "reference.jsonl"
    reference.write_bytes(as_lines(ROWS))
    got, expected = (
        encode_records(tokenizer, rows, 512, "answer")[0]
        for rows in (records, read_records(reference))
    )
    for one, other in zip(got, expected, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.loss_mask.tolist() == other.loss_mask.tolist()


PLACES = {
    "rows.jsonl": ["rows.jsonl line 1", "rows.jsonl line 2", "rows.jsonl line 3"],
    "rows.json": ["rows.json row 1", "rows.json row 2", "rows.json row 3"],
    # The names of the columns are a sheet's row 1; a cell of two lines is one row.
    "rows.csv": ["rows.csv row 2", "rows.csv row 3", "rows.csv row 4"],
    "groups.parquet": [
        "groups.parquet group 0 row 1",
        "groups.parquet group 0 row 2",
        "groups.parquet group 1 row 1",
    ],
}


@pytest.mark.parametrize(("name", "places"), PLACES.items())
def test_places_are_those_that_a_person_finds(tmp_path, name, places):
    (tmp_path / name).write_bytes(FILES[name])
    assert [record.source for record in read_records(tmp_path / name)] == places


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.jsonl"])
def test_split_of_every_file_is_the_same(tmp_path, name):
    """Rows keep their columns, and go where the same rows of JSON Lines go."""
    rows = [
        {"ID": f"{n:02}", "Category": "ab"[n % 2], "Question": f"Q{n}?", "Response": f"A {n}."}
        for n in range(20)
    ]
    files = {"csv": as_csv(rows), "parquet": as_parquet(rows), "jsonl": as_lines(rows)}
    (tmp_path / name).write_bytes(files[name.partition(".")[2]])
    split_rows([tmp_path / name], tmp_path / "out")
    own = [{"id": row["ID"], "category": row["Category"], "question": row["Question"],
            "answer": row["Response"]} for row in rows]  # fmt: skip
    (tmp_path / "own.jsonl").write_bytes(as_lines(own))
    split_rows([tmp_path / "own.jsonl"], tmp_path / "expected")
    got, expected = (
        {s: [(r.id, r.category, r.question, r.answer) for r in found] for s, found in both.items()}
        for both in (load_splits(tmp_path / "out"), load_splits(tmp_path / "expected"))
    )
    assert got == expected
    assert sum(map(len, got.values())) == 20


def test_near_duplicates_are_found_across_kinds_of_files(tmp_path):
    text = "a loss says how far the answers of a model are from what was wanted of it"
    train = [{"question": f"What is it, {n}?", "answer": f"{n} {text}" * (n == 1) or f"B{n}"}
             for n in range(3)]  # fmt: skip
    (tmp_path / "train.parquet").write_bytes(as_parquet(train))
    (tmp_path / "valid.csv").write_bytes(as_csv([{"question": "Why so?", "answer": text}]))
    (fault,) = [f for f in inspect_data(tmp_path).faults if "answer" in f.message]
    assert fault.place == "valid.csv row 2"
    assert "like that of train.parquet group 0 row 2" in fault.message


# keys


def record_of(tmp_path: Path, row: dict[str, Any]) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(as_lines([row]))
    (record,) = read_records(path)
    return record


READINGS = [
    ({"Question": "Q", "ANSWER": "A"}, "question from 'Question', answer from 'ANSWER'"),
    ({"query": "Q", "response": "A"}, "question from 'query', answer from 'response'"),
    ({"input": "Q", "output": "A"}, "question from 'input', answer from 'output'"),
    ({"instruction": "Q", "response": "A"}, "instruction, output from 'response'"),
    ({"instruction": "Q", "answer": "A"}, "instruction, output from 'answer'"),
    ({" question ": "Q", "answer": "A", "query": None}, "question from ' question ', answer"),
    ({"messages": [USER, ASSISTANT]}, "messages"),
    ({"Messages": [USER, ASSISTANT], "text": "QA"}, "messages from 'Messages'"),
    ({"messages": json.dumps([USER, ASSISTANT])}, "messages"),
    (
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        "messages from 'conversations'",
    ),
    (
        {"messages": [{"role": "human", "content": "Q"}, {"role": "model", "content": " A"}]},
        "messages",
    ),
    (
        {"messages": [USER | {"content": [{"type": "text", "text": "Q"}], "tool_calls": None},
                      ASSISTANT | {"tool_calls": [], "name": "x"}], "tools": []},
        "messages",
    ),
    ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt, completion"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reading"), READINGS)
def test_row_is_understood_and_says_how(tmp_path, row, reading):
    record = record_of(tmp_path, row)
    assert (record.messages, record.reading) == (QA, reading)


@pytest.mark.parametrize("base", ["plain", "alpaca", "chatml"])
def test_the_same_row_in_every_form_is_the_same_tokens(tokenizer, tmp_path, base):
    rows = [row for row, _ in READINGS] + [{"instruction": "Q", "input": "", "output": "A"}]
    template = choose_template(base, tokenizer)
    examples = [
        example
        for row in rows
        for example in encode_records(
            tokenizer, [record_of(tmp_path, row)], 99, "answer", template
        )[0]
    ]
    assert len(examples) == len(rows)
    assert len({(e.tokens.tobytes(), e.loss_mask.tobytes()) for e in examples}) == 1
    assert tokenizer.decode(examples[0].tokens[examples[0].loss_mask]).strip() == "A<|endoftext|>"


def test_input_and_context_belong_to_an_instruction(tmp_path):
    for name in ("input", "context", "Context"):
        row = {"instruction": "Q", name: "I", "response": "A"}
        assert record_of(tmp_path, row).messages[0] == Message("user", "Q\n\nI", "I")


def test_system_message_beside_the_row_comes_first(tmp_path):
    for row in (
        {"system_prompt": "S", "question": "Q", "response": "A"},
        {"system": "S", "conversations": [{"from": "user", "value": "Q"}, ASSISTANT]},
        {"messages": [{"role": "system", "content": "S"}, USER, ASSISTANT]},
        {"messages": [{"role": "developer", "content": "S"}, USER, ASSISTANT]},
    ):
        assert record_of(tmp_path, row).messages == (Message("system", "S"), *QA)


def test_messages_of_a_prompt_are_given_and_those_of_its_completion_learned(tokenizer, tmp_path):
    early = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1."}]
    record = record_of(tmp_path, {"prompt": [*early, USER], "completion": [ASSISTANT]})
    assert (len(record.messages), record.num_given) == (4, 3)
    (example,), _ = encode_records(tokenizer, [record], 99, "answer")
    assert tokenizer.decode(example.tokens[example.loss_mask]) == " A<|endoftext|>"
    assert "1." in tokenizer.decode(example.tokens)


REFUSED = [
    ({"question": "Q", "answer": "A", "response": "B"}, "answer can be 'answer' or 'response'"),
    ({"question": "Q", "Query": "R", "answer": "A"}, "question can be 'question' or 'Query'"),
    ({"question": "Q", "instruction": "R", "output": "A"}, "can be 'question' or 'instruction'"),
    ({"question": "Q", "Question": "R", "answer": "A"}, "'question' and 'Question', which mean"),
    ({"question": "Q", "context": "C", "answer": "A"}, "'context' can belong to the question or"),
    ({"prompt": "Q", "response": "A"}, "'prompt' and 'response' can be read in two ways"),
    ({"messages": [USER, ASSISTANT], "conversations": [USER, ASSISTANT]}, "'messages' or 'conv"),
    ({"system": "S", "messages": [{"role": "system", "content": "T"}, USER, ASSISTANT]}, "too;"),
    ({"instruction": "Q", "input": "I", "context": "C", "output": "A"}, "'input' or 'context'"),
    ({"messages": [USER, ASSISTANT | {"tool_calls": [{"id": 1}]}]}, "got tool_calls, and tool"),
    ({"messages": [USER, {"role": "tool", "content": "x"}]}, "got the role 'tool', expected"),
    ({"messages": [USER, ASSISTANT], "tools": [{"name": "x"}]}, "tools: tool calls, images and"),
    ({"messages": [USER, ASSISTANT], "images": ["a.png"]}, "images: tool calls, images and sound"),
    (
        {"messages": [USER | {"content": [{"type": "image_url", "image_url": "x"}]}, ASSISTANT]},
        "got a part of the kind 'image_url', expected text",
    ),
    ({"messages": [USER | {"content": [3]}, ASSISTANT]}, "got a part of the kind 3, expected text"),
    ({"prompt": "P", "completion": "C", "label": False}, "got a preference, expected one answer"),
    ({"prompt": "P", "chosen": "C", "rejected": "D"}, "got a preference, expected one answer"),
    ({"messages": "[1"}, "got text that is not JSON: '[1'"),
    ({"prompt": [USER], "completion": "A"}, "completion: expected a list of objects"),
    ({"prompt": [USER, ASSISTANT], "completion": [USER, ASSISTANT]}, "that end with the user's"),
]


@pytest.mark.parametrize(("row", "reason"), REFUSED)
def test_row_of_two_readings_or_of_more_than_text_is_refused(tmp_path, row, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(as_lines([row]))
    records, (fault,) = scan_records(path)
    assert records == []
    assert reason in fault.message


def test_what_was_understood_is_counted(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(as_csv([{"Question": f"Q{n}", "Response": "A", "Notes": "x"} for n in (1, 2)]))
    assert readings(read_records(path)) == [
        "2 rows: question from 'Question', answer from 'Response'"
    ]


def test_own_form_of_a_row_is_read_as_the_same_row(tmp_path):
    rows = [row for row, _ in READINGS] + ROWS + [
        {"text": " T "},
        {"prompt": "P ", "completion": " C"},
        {"instruction": "Q", "input": "I", "output": "A", "difficulty": "beginner"},
        {"system": "S", "question": "Q", "answer": "A", "follow_up": "And?\nMore?"},
        {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
    ]  # fmt: skip
    for row in rows:
        record = record_of(tmp_path, row)
        again = record_of(tmp_path, own_row(record, "new"))
        fields = ("messages", "prompt", "completion", "category", "difficulty", "follow_up")
        assert again.id == "new"
        for name in (*fields, "num_given"):
            assert getattr(again, name) == getattr(record, name), name


# tables


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)
FILLED = CELLS.filter(str.strip)


@given(
    st.lists(st.tuples(FILLED, FILLED), min_size=1, max_size=5),
    st.sampled_from([",", ";", "\t", "|"]),
)
def test_any_text_in_a_cell_is_read_as_pythons_csv_wrote_it(tmp_path_factory, pairs, delimiter):
    path = tmp_path_factory.mktemp("tables") / "rows.csv"
    rows = [{"question": asked, "answer": answer} for asked, answer in pairs]
    path.write_bytes(as_csv(rows, delimiter))
    got = [(record.question, record.answer) for record in read_records(path)]
    assert got == [(asked.strip(), answer.strip()) for asked, answer in pairs]


def test_faulty_rows_of_a_table_are_named_as_a_sheet_counts_them(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b'question,answer,id\n"Q\n1",A,1\nQ2\n,,\nQ3,A,2,\nQ4,A,3,x\nQ5,\xff,4\n"Q6"x,A,5\nQ7,,6\n'
    )
    records, faults = scan_records(path)
    assert [(r.source, r.id) for r in records] == [("rows.csv row 2", "1"), ("rows.csv row 5", "2")]
    assert [(fault.place, fault.message) for fault in faults] == [
        ("rows.csv row 3", "got 1 cell, expected 3 cells, as in row 1: 'question, answer, id'"),
        ("rows.csv row 6", "got 4 cells, expected 3 cells, as in row 1: 'question, answer, id'"),
        ("rows.csv row 7", "not UTF-8 at byte 3 of the line"),
        ("rows.csv row 8", 'a quote within a quoted cell, expected two of them: ""'),
        ("rows.csv row 9", "answer: got nothing, expected a string"),
    ]  # fmt: skip


def test_header_with_two_separators_is_refused_with_both(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"question,answer;id\nQ,A;1\n")
    _, (fault,) = scan_records(tmp_path / "rows.csv")
    assert "can be read in two ways: as columns between ',' or ';'" in fault.message
    (tmp_path / "rows.csv").write_bytes(b'question;"answer"\n"Q, or not";A\n')
    assert read_records(tmp_path / "rows.csv")[0].question == "Q, or not"


def test_parts_of_a_split_are_read_in_order_and_must_all_be_there(tmp_path):
    for number, row in enumerate(ROWS[:2]):
        part = tmp_path / f"train-0000{number}-of-00002.parquet"
        part.write_bytes(as_parquet([row]))
    splits = load_splits(tmp_path)
    assert [record.id for record in splits["train"]] == ["a", "b"]
    part.unlink()
    with pytest.raises(DataError, match="holds 1 of 2 parts, such as train-00000-of-00002"):
        load_splits(tmp_path)


def test_folder_of_folders_says_which_one_to_give(tmp_path):
    for name in ("hard/train-00000-of-00001.parquet", "easy/train/0000.parquet", "deep/a/b/c.csv"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(as_parquet(ROWS))
    with pytest.raises(DataError) as caught:
        load_splits(tmp_path)
    advice = str(caught.value).splitlines()[1]
    assert advice == (
        f"There are such files in {tmp_path}/easy, {tmp_path}/hard: give one of these folders."
    )
    assert [record.id for record in load_splits(tmp_path / "easy")["train"]] == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"0000\.parquet': give that file"):
        load_splits(tmp_path / "easy" / "train")


def test_types_of_parquet_are_read_as_they_are_written(tmp_path):
    table = pa.table(
        {
            "question": pa.array(["Q", "R"]).dictionary_encode(),
            "answer": pa.array([b"A", b"B"]),  # old writers: bytes for text
            "id": pa.array([1, 2], pa.int64()),
            "difficulty": pa.array([None, None], pa.string()),
            "when": pa.array([0, 1], pa.timestamp("s")),
            "rate": pa.array([0.5, float("nan")]),
        }
    )
    parquet.write_table(table, tmp_path / "rows.parquet")
    records = read_records(tmp_path / "rows.parquet")
    assert [(r.question, r.answer, r.id) for r in records] == [("Q", "A", "1"), ("R", "B", "2")]


def test_messages_and_pictures_of_a_hub_data_set(tmp_path):
    rows = [{"messages": [USER, ASSISTANT], "prompt_id": "1", "image": None}]
    (tmp_path / "a.parquet").write_bytes(as_parquet(rows))
    assert read_records(tmp_path / "a.parquet")[0].messages == QA
    picture = [rows[0] | {"image": {"bytes": b"\x89PNG", "path": "a.png"}}]
    (tmp_path / "b.parquet").write_bytes(as_parquet(picture))
    _, (fault,) = scan_records(tmp_path / "b.parquet")
    assert "image: tool calls, images and sound are not trained on here" in fault.message
