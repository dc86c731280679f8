"""The check finds each planted fault; the split is stable."""

import json
import random

import pytest

from interviewmate_mlx.config import shipped
from interviewmate_mlx.data.check import check_data
from interviewmate_mlx.data.leakage import (
    ANSWER_THRESHOLD,
    QUESTION_THRESHOLD,
    fold,
    similar_pairs,
)
from interviewmate_mlx.data.splits import SPLITS, split_rows
from interviewmate_mlx.errors import DataError

TRAIN = shipped("data/interview") / "train.jsonl"
ROWS = [json.loads(line) for line in TRAIN.read_text().splitlines()]


def write(folder, **splits):
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def naive_similarity(one: str, other: str) -> float:
    grams = []
    for text in (one, other):
        words = fold(text)
        grams.append({tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))})
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def test_similarities_equal_the_naive_ones():
    rng = random.Random(0)
    sentences = [" ".join(rng.choices("abcdefgh", k=6)) for _ in range(12)]
    texts = [" ".join(rng.sample(sentences, 3)) for _ in range(40)]
    expected = {
        (i, j): naive_similarity(texts[i], texts[j]) for i in range(40) for j in range(i + 1, 40)
    }
    found = {(p.first, p.second): p.similarity for p in similar_pairs(texts, 0.05)}
    likely = {pair: value for pair, value in expected.items() if value >= 0.05}
    assert len(likely) > 50
    for pair, value in likely.items():
        assert found[pair] == pytest.approx(value)
    assert all(expected[pair] == pytest.approx(value) for pair, value in found.items())


def test_family_of_many_copies_is_found_through_its_first():
    texts = [f"{i} is how this very long template of an answer always begins" for i in range(200)]
    alike = {pair.second for pair in similar_pairs(texts, 0.5) if pair.similarity > 0.5}
    assert alike == set(range(1, 200))


def reworded(row, **changes):
    return row | {"id": "planted"} | changes


def change_word(text: str, position: int) -> str:
    words = text.split()
    words[position] = "something"
    return " ".join(words)


QUESTION, ANSWER = ROWS[0]["question"], ROWS[0]["answer"]
PLANTED = {
    "same question": {"question": QUESTION, "answer": "Another answer. " * 12},
    "case and punctuation": {"question": QUESTION.upper() + "!!", "answer": "No. " * 60},
    "question with one word changed": {"question": change_word(QUESTION, -1), "answer": "X " * 60},
    "same answer": {"question": "What else could be asked here?", "answer": ANSWER},
    "answer with four words changed": {
        "question": "What else could be asked here?",
        "answer": change_word(change_word(change_word(change_word(ANSWER, 9), 35), 60), 80),
    },
    "half of an answer": {
        "question": "What else could be asked here?",
        "answer": " ".join(ANSWER.split()[: len(ANSWER.split()) // 2]),
    },
}


@pytest.mark.parametrize("changes", PLANTED.values(), ids=PLANTED)
@pytest.mark.parametrize("split", ["train", "valid"])
def test_planted_near_duplicate_is_found(tmp_path, changes, split):
    planted = [reworded(ROWS[0], **changes)]
    others = ROWS[1:20]
    splits = {"train": ROWS[:1] + others, "valid": ROWS[20:24]}
    splits[split] = splits[split] + planted
    with pytest.raises(DataError, match=rf"train.jsonl line 1 .*{split}.jsonl line .*planted"):
        check_data(write(tmp_path / "data", **splits))


def test_rows_written_apart_are_far_below_the_thresholds():
    for key, threshold in (("question", QUESTION_THRESHOLD), ("answer", ANSWER_THRESHOLD)):
        pairs = similar_pairs([row[key] for row in ROWS], threshold)
        assert pairs[0].similarity < threshold / 2


def test_all_faults_come_at_once(tmp_path):
    rows = [dict(row) for row in ROWS[:6]]
    rows[1]["difficulty"] = "hard"
    rows[2]["id"] = rows[5]["id"]
    folder = write(tmp_path / "data", train=rows[:5], test=[rows[5], reworded(rows[0])])
    with pytest.raises(DataError) as error:
        check_data(folder)
    message = str(error.value)
    assert "train.jsonl line 2: difficulty: got 'hard'" in message
    assert "is taken by train.jsonl line 3" in message
    assert "questions are the same" in message
    assert "answers are the same" in message
    assert "4 faults" in message


def test_broken_rows_of_all_files_are_named(tmp_path):
    folder = write(tmp_path / "data", train=ROWS[:2])
    (folder / "test.jsonl").write_bytes(b'{"question": "Q", "anwser": "A"}\n{\n"\xff"\n')
    with pytest.raises(DataError, match=r"(?s)3 faulty rows.*'anwser'.*line 2.*line 3: not UTF-8"):
        check_data(folder)


def test_verbatim_texts_can_be_checked_too(tmp_path):
    folder = write(tmp_path / "data", train=[{"text": row["answer"]} for row in ROWS[:5]])
    assert check_data(folder).rows == {"train": 5}


def test_new_rows_move_no_old_one(tmp_path):
    out = tmp_path / "out"
    source = write(tmp_path / "rows", train=ROWS[:100]) / "train.jsonl"
    split_rows([source], out)
    before = splits_by_id(out)
    write(tmp_path / "rows", train=ROWS)
    assert split_rows([source], out) == {"train": 147, "valid": 31, "test": 33}
    after = splits_by_id(out)
    assert {row_id: after[row_id] for row_id in before} == before
    assert len(after) == len(ROWS)


def splits_by_id(folder):
    return {
        json.loads(line)["id"]: split
        for split in SPLITS
        for line in (folder / f"{split}.jsonl").read_text().splitlines()
    }


def test_changed_row_is_replaced_where_it_is(tmp_path):
    out = tmp_path / "out"
    source = write(tmp_path / "rows", train=ROWS[:30]) / "train.jsonl"
    split_rows([source], out)
    before = splits_by_id(out)
    changed = [row | {"answer": "New. " * 60} for row in ROWS[:30]]
    write(tmp_path / "rows", train=changed)
    split_rows([source], out)
    assert splits_by_id(out) == before
    assert "New. New." in (out / "valid.jsonl").read_text()


def test_split_follows_its_seed_and_shares(tmp_path):
    source = write(tmp_path / "rows", train=ROWS[:100]) / "train.jsonl"
    split_rows([source], tmp_path / "one", seed=1)
    split_rows([source], tmp_path / "two", seed=2)
    assert splits_by_id(tmp_path / "one") != splits_by_id(tmp_path / "two")
    counts = split_rows([source], tmp_path / "three", shares=(0.5, 0.25, 0.25))
    assert counts == {"train": 50, "valid": 25, "test": 25}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "Q", "answer": "A"}], "line 1: no id"),
        ([{"id": "a", "question": "Q"}], "line 1: got the keys"),
        ([{"id": "a", "question": "Q", "answer": "A"}] * 2, "'a' is taken by line 1"),
    ],
)
def test_rows_that_cannot_be_split_are_refused_and_nothing_is_written(tmp_path, rows, message):
    source = write(tmp_path / "rows", train=rows) / "train.jsonl"
    with pytest.raises(DataError, match=message):
        split_rows([source], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="Nothing to split"):
        split_rows([], tmp_path / "out")
    with pytest.raises(DataError, match="sum to 1"):
        split_rows([], tmp_path / "out", shares=(0.7, 0.2, 0.2))
