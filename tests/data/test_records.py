"""Rows of every format, and every fault with its line."""

import json

import pytest

from interviewmate_mlx.data.records import Message, load_splits, read_records, scan_records
from interviewmate_mlx.errors import DataError

USER = {"role": "user", "content": "Q"}
Q_AND_I = Message("user", "Q\n\nI", "I")
QA = (Message("user", "Q"), Message("assistant", "A"))


def write(path, rows):
    path.write_bytes(
        b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows)
    )
    return path


@pytest.mark.parametrize(
    ("row", "messages", "prompt", "completion"),
    [
        ({"question": " Q ", "answer": "A\n"}, QA, "", ""),
        ({"messages": [USER, {"role": "assistant", "content": "A"}]}, QA, "", ""),
        ({"prompt": "Q ", "completion": " A"}, (), "Q ", " A"),
        ({"instruction": "Q", "output": "A"}, QA, "", ""),
        ({"instruction": "Q", "input": "", "output": "A", "text": "QA"}, QA, "", ""),
        ({"instruction": "Q", "input": "I", "output": "A"}, (Q_AND_I, QA[1]), "", ""),
        ({"text": "T"}, (), "", "T"),
    ],
)  # fmt: skip
def test_every_format_is_read(tmp_path, row, messages, prompt, completion):
    (record,) = read_records(write(tmp_path / "rows.jsonl", [row]))
    assert (record.messages, record.prompt, record.completion) == (messages, prompt, completion)
    assert record.source == "rows.jsonl line 1"


def test_labels_are_read(tmp_path):
    row = {
        "id": 7,
        "question": "Q",
        "answer": "A",
        "category": "c",
        "difficulty": "beginner",
        "x": 1,
    }
    (record,) = read_records(write(tmp_path / "rows.jsonl", [row]))
    assert (record.id, record.category, record.difficulty) == ("7", "c", "beginner")


def test_json_list_bom_crlf_blank_lines_and_unicode_separators_are_read(tmp_path):
    row = {"question": "Q\u2028Q", "answer": "A"}
    (tmp_path / "a.json").write_text(json.dumps([row, row]), encoding="utf-8")
    assert len(read_records(tmp_path / "a.json")) == 2
    line = json.dumps(row, ensure_ascii=False).encode()
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\r\n")
    records = read_records(tmp_path / "b.jsonl")
    assert [record.source for record in records] == ["b.jsonl line 1", "b.jsonl line 3"]
    assert records[0].messages[0].content == "Q\u2028Q"


FAULTS = [
    (b"{", "not JSON"),
    (b"\xff\xfe", "not UTF-8 at byte 0"),
    (b'"text"', "got 'text', expected a JSON object"),
    (b"[" * 100_000, "nested too deeply|not JSON"),
    ({}, r"got the keys \(none\), expected 'question' and 'answer'"),
    ({"questoin": "Q", "answer": "A"}, "got the keys 'questoin', 'answer'"),
    ({"question": "Q", "answer": "  "}, "answer: got an empty string"),
    ({"question": 3, "answer": "A"}, "question: got 3, expected a string"),
    ({"question": "Q", "answer": None}, "answer: got nothing, expected a string"),
    (b'{"question": "Q", "answer": "\\ud800"}', "answer: got half a surrogate pair"),
    ({"messages": []}, r"roles \(none\), expected user and assistant"),
    ({"messages": "hi"}, "messages: expected a list"),
    ({"messages": [{"role": "user", "content": "Q"}]}, "got the roles user, expected"),
    ({"messages": [{"role": "tool", "content": "Q"}]}, "got the role 'tool'"),
    ({"messages": [{"role": "user"}]}, "content: got nothing"),
    ({"question": "Q", "answer": "A", "id": []}, "id: got"),
    ({"question": "Q", "answer": "A", "ID": 1, "id": 2}, "'ID' and 'id', which mean the same"),
    ({"question": "Q", "answer": "A", "catgory": "x"}, "'catgory', expected 'category'"),
    ({"question": "Q", "answer": "A", "dificulty": "x"}, "'dificulty', expected 'difficulty'"),
    ({"question": "Q", "answer": "A", "followup": "x"}, "'followup', expected 'follow_up'"),
]


@pytest.mark.parametrize(("row", "message"), FAULTS)
def test_fault_is_named_with_its_line(tmp_path, row, message):
    good = {"question": "Q", "answer": "A"}
    with pytest.raises(DataError, match=f"line 2: .*({message})"):
        read_records(write(tmp_path / "rows.jsonl", [good, row, good]))


def test_all_faults_come_at_once(tmp_path):
    rows = [row for row, _ in FAULTS]
    with pytest.raises(DataError) as error:
        read_records(write(tmp_path / "rows.jsonl", rows))
    assert f"{len(FAULTS)} faults" in str(error.value)
    assert all(f"line {number}: " in str(error.value) for number in range(1, len(FAULTS) + 1))


def test_scan_gives_the_readable_rows_and_the_faults(tmp_path):
    good = {"question": "Q", "answer": "A"}
    records, faults = scan_records(write(tmp_path / "rows.jsonl", [good, b"{", good]))
    assert [record.source for record in records] == ["rows.jsonl line 1", "rows.jsonl line 3"]
    assert [fault.place for fault in faults] == ["rows.jsonl line 2"]


def test_keys_that_do_not_look_like_a_label_are_ignored(tmp_path):
    row = {"question": "Q", "answer": "A", "source": "s", "level": 1, "tags": [], "split": "x"}
    assert len(read_records(write(tmp_path / "rows.jsonl", [row]))) == 1


@pytest.mark.parametrize(
    ("encoding", "found"),
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16"),
        ("utf-16-be", "UTF-16"),
        ("latin-1", "3 of 4 lines"),
    ],
)
def test_other_encoding_is_one_fault_of_the_file(tmp_path, encoding, found):
    lines = ['{"question": "\u00e9t\u00e9", "answer": "A"}'] * 3
    text = "\n".join([*lines, '{"question": "Q", "answer": "A"}'])
    (tmp_path / "rows.jsonl").write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=f"encoding: got {found}") as error:
        read_records(tmp_path / "rows.jsonl")
    assert "line 1" not in str(error.value)


def test_duplicate_id_is_refused_with_its_first_line(tmp_path):
    row = {"id": "x", "question": "Q", "answer": "A"}
    with pytest.raises(DataError, match="line 3: id 'x' is taken by line 1"):
        read_records(write(tmp_path / "rows.jsonl", [row, row | {"id": "y"}, row]))


def test_folder_is_read_by_split_and_its_faults_by_file(tmp_path):
    row = {"question": "Q", "answer": "A"}
    write(tmp_path / "train.jsonl", [row] * 3)
    write(tmp_path / "validation.jsonl", [row])
    assert {k: len(v) for k, v in load_splits(tmp_path).items()} == {"train": 3, "valid": 1}
    write(tmp_path / "train.jsonl", [{}])
    write(tmp_path / "test.jsonl", [row, b"{"])
    with pytest.raises(DataError, match=r"(?s)train.jsonl.*line 1.*test.jsonl.*line 2"):
        load_splits(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "No data at"),
        ("rows.xlsx", b"a,b", "got a .xlsx file"),
        ("rows.csv", b"a,b", "no rows"),
        ("empty.jsonl", b"", "no rows"),
        ("object.json", b"{}", "got a JSON object with the keys \\(none\\), expected a list"),
        ("broken.json", b"[", "not JSON"),
    ],
)
def test_file_without_rows_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_splits(tmp_path / name)


def test_folder_without_training_rows_is_refused(tmp_path):
    write(tmp_path / "test.jsonl", [{"question": "Q", "answer": "A"}])
    with pytest.raises(DataError, match=r"holds no train\.jsonl"):
        load_splits(tmp_path)
