"""The check finds every planted fault; the split is stable."""

import json
import random
import statistics
import time
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from checkpoints import write_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from transformers import AutoTokenizer

from interviewmate_mlx.config import shipped
from interviewmate_mlx.data import check, leakage
from interviewmate_mlx.data.check import check_data, inspect_data
from interviewmate_mlx.data.leakage import (
    ANSWER_THRESHOLD,
    QUESTION_THRESHOLD,
    Seen,
    fold,
    similar_pairs,
)
from interviewmate_mlx.data.splits import SPLITS, split_rows
from interviewmate_mlx.errors import DataError, StorageError

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


def paragraphs_shared_by_many(num_texts=700, num_paragraphs=60):
    """Six paragraphs per text; each paragraph, and so each of its grams, is in 70 texts."""
    rng = random.Random(0)
    words = [f"w{i}" for i in range(3000)]
    paragraphs = [" ".join(rng.sample(words, 30)) for _ in range(num_paragraphs)]
    decks = rng.sample(range(num_paragraphs), num_paragraphs)
    texts = []
    while len(texts) < num_texts:
        rng.shuffle(decks)
        texts += [
            ". ".join(paragraphs[i] for i in sorted(decks[j : j + 6]))
            for j in range(0, num_paragraphs, 6)
        ]
    return texts


def test_exact_duplicate_made_of_common_grams_is_found():
    texts = paragraphs_shared_by_many()
    texts.append(texts[350].upper() + "!")
    pairs = similar_pairs(texts, 0.9)
    assert [(p.first, p.second) for p in pairs if p.similarity == 1] == [(350, 700)]


def test_near_duplicates_made_of_common_grams_are_found():
    texts = paragraphs_shared_by_many()
    originals = range(100, 700, 40)
    texts += [f"{texts[i]} and then some words of its own" for i in originals]
    found = {(p.first, p.second) for p in similar_pairs(texts, 0.8) if p.similarity >= 0.8}
    assert found == {(i, 700 + n) for n, i in enumerate(originals)}


def test_many_copies_pair_with_their_first_alone_in_bounded_memory():
    rows = [f"row {i} says this one thing {i * 7} and no other {i}" for i in range(10_000)]
    tracemalloc.start()
    pairs = similar_pairs(rows * 5, 0.9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len([pair for pair in pairs if pair.similarity == 1]) == 40_000
    assert all(
        pair.first < 10_000 and pair.second % 10_000 == pair.first for pair in pairs[:40_000]
    )
    assert peak < 200e6


def test_compatibility_forms_are_folded():
    (pair,) = similar_pairs(["\ufb01ne \uff21 question", "FINE a Question?"], 0.3)
    assert pair.similarity == 1


def test_texts_without_words_are_similar_to_none():
    assert similar_pairs(["", "", "?!", "!!"], 0.3) == []


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
    with pytest.raises(DataError, match=rf"{split}.jsonl .*planted.* that of train.jsonl line 1 "):
        check_data(write(tmp_path / "data", **splits))


def test_rows_written_independently_are_far_below_the_thresholds():
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
    assert "its question is the same as that of" in message
    assert "its answer is the same as that of" in message
    assert "4 faults" in message


def test_broken_rows_of_all_files_are_named(tmp_path):
    folder = write(tmp_path / "data", train=ROWS[:2])
    (folder / "test.jsonl").write_bytes(b'{"question": "Q", "anwser": "A"}\n{\n"\xff"\n')
    with pytest.raises(DataError, match=r"(?s)3 faults.*'anwser'.*line 2.*line 3: not UTF-8"):
        check_data(folder)


def test_faults_of_rows_and_of_content_come_at_once(tmp_path):
    rows = [ROWS[0], ROWS[1] | {"difficulty": "hard"}, ROWS[2] | {"id": ROWS[0]["id"]}]
    folder = write(tmp_path / "data", train=rows, valid=[ROWS[0] | {"id": "copy"}])
    with (folder / "valid.jsonl").open("a") as file:
        file.write("{\n")
    (folder / "test.jsonl").write_bytes("text".encode("utf-16"))
    with pytest.raises(DataError) as error:
        check_data(folder)
    message = str(error.value)
    for fault in (
        "train.jsonl line 3: id 'behavioural-01' is taken by line 1",
        "valid.jsonl line 2: not JSON",
        "test.jsonl: encoding: got UTF-16",
        "train.jsonl line 2: difficulty: got 'hard'",
        "its question is the same as that of",
        "its answer is the same as that of",
    ):
        assert fault in message
    assert "6 faults" in message


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_token_lengths_are_those_of_the_template(tmp_path, tokenizer):
    pairs = [("Why?", "Because."), ("How long is this one?", "Longer."), ("Who?", "Me " * 50)]
    rows = [{"question": question, "answer": answer} for question, answer in pairs]
    lengths = sorted(
        len(tokenizer.encode(f"Question: {q}\nAnswer:"))
        + len(tokenizer.encode(f" {a.strip()}"))
        + 1
        for q, a in pairs
    )
    folder = write(tmp_path / "data", train=rows)
    assert check_data(folder).token_lengths is None
    assert check_data(folder, tokenizer, lengths[2]).token_lengths == tuple(lengths)
    with pytest.raises(DataError, match=f"1 fault:\n.*line 3: {lengths[2]} tokens, expected at"):
        check_data(folder, tokenizer, lengths[2] - 1)


@pytest.mark.parametrize("label", ["id", "category", "difficulty"])
def test_label_that_some_rows_lack_is_a_fault(tmp_path, label):
    bare = {key: value for key, value in ROWS[1].items() if key != label}
    with pytest.raises(DataError, match=f"1 fault:\n.*train.jsonl line 2: no {label}, expected"):
        check_data(write(tmp_path / "data", train=[ROWS[0], bare]))
    check_data(write(tmp_path / "data", train=[bare]))


@pytest.mark.parametrize("split", ["valid", "test"])
def test_category_that_train_does_not_know_is_a_fault(tmp_path, split):
    rows = {"train": ROWS[:2], split: [ROWS[2] | {"category": "planted"}]}
    with pytest.raises(DataError, match=rf"1 fault:\n.*{split}: category 'planted' \(1 rows\)"):
        check_data(write(tmp_path / "data", **rows))


def test_split_without_rows_is_a_fault(tmp_path):
    with pytest.raises(DataError, match=r"1 fault:\n.*valid\.jsonl: no rows"):
        check_data(write(tmp_path / "data", train=ROWS[:2], valid=[]))


def test_verbatim_texts_can_be_checked_too(tmp_path):
    folder = write(tmp_path / "data", train=[{"text": row["answer"]} for row in ROWS[:5]])
    assert check_data(folder).rows == {"train": 5}


def test_new_rows_do_not_move_old_ones(tmp_path):
    out = tmp_path / "out"
    source = write(tmp_path / "rows", train=ROWS[:100]) / "train.jsonl"
    split_rows([source], out)
    before = splits_by_id(out)
    write(tmp_path / "rows", train=ROWS)
    report = split_rows([source], out)
    assert report.rows == {"train": 147, "valid": 31, "test": 33}
    assert report.added == {"train": 77, "valid": 16, "test": 18}
    assert (report.updated, report.unchanged) == (0, 100)
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
    write(tmp_path / "rows", train=[*changed[:20], *ROWS[20:30]])
    report = split_rows([source], out)
    assert (sum(report.added.values()), report.updated, report.unchanged) == (0, 20, 10)
    write(tmp_path / "rows", train=changed)
    assert split_rows([source], out).updated == 10
    assert splits_by_id(out) == before
    assert "New. New." in (out / "valid.jsonl").read_text()


def test_split_follows_its_seed_and_shares(tmp_path):
    source = write(tmp_path / "rows", train=ROWS[:100]) / "train.jsonl"
    split_rows([source], tmp_path / "one", seed=1)
    split_rows([source], tmp_path / "two", seed=2)
    assert splits_by_id(tmp_path / "one") != splits_by_id(tmp_path / "two")
    report = split_rows([source], tmp_path / "three", shares=(0.5, 0.25, 0.25))
    assert report.rows == {"train": 50, "valid": 25, "test": 25}


@pytest.mark.parametrize("num_rows", [3, 4, 5, 6, 7])
def test_few_rows_reach_every_split_and_stay(tmp_path, num_rows):
    source = write(tmp_path / "rows", train=ROWS[:num_rows]) / "train.jsonl"
    counts = split_rows([source], tmp_path / "out").rows
    assert min(counts.values()) >= 1
    assert sum(counts.values()) == num_rows
    before = splits_by_id(tmp_path / "out")
    assert split_rows([source], tmp_path / "out").rows == counts
    assert split_rows([], tmp_path / "out").rows == counts
    assert splits_by_id(tmp_path / "out") == before


def test_split_without_rows_has_no_file(tmp_path):
    out = write(tmp_path / "out", test=[])
    source = write(tmp_path / "rows", train=ROWS[:5]) / "train.jsonl"
    for _ in range(2):
        assert split_rows([source], out, shares=(0.7, 0.3, 0)).rows == {
            "train": 3,
            "valid": 2,
            "test": 0,
        }
        assert sorted(path.name for path in out.iterdir()) == ["train.jsonl", "valid.jsonl"]


@pytest.mark.parametrize("shares", [(float("nan"), 0.5, 0.5), (1.2, -0.1, -0.1), (0.5, 0.5, 0.5)])
def test_invalid_shares_are_refused(tmp_path, shares):
    with pytest.raises(DataError, match="three from 0 to 1 that sum to 1"):
        split_rows([], tmp_path / "out", shares=shares)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"question": "Q", "answer": "A"}] * 2,
            "2: the same question and answer as .*line 1",
        ),
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


def many_rows(count: int) -> list[dict[str, str]]:
    """Rows whose words are drawn at random, so that no two are alike."""
    draw = np.random.default_rng(0)
    letters = draw.integers(97, 123, (5000, 7), np.uint8)
    words = np.array([row.tobytes().decode() for row in letters])
    labels = {"category": "c", "difficulty": "beginner"}
    return [
        {"id": str(n), "question": " ".join(row[:10]), "answer": " ".join(row[10:])} | labels
        for n, row in enumerate(words[draw.integers(0, len(words), (count, 90))])
    ]


def test_rows_in_parts_give_the_findings_of_the_whole(tmp_path, monkeypatch):
    """Of near-duplicates those that are equal, and those of valid and test, in every part."""
    rows = many_rows(40)
    rows[33] = rows[2] | {"id": "33"}  # equal texts, in two parts
    del rows[17]["id"], rows[17]["category"]
    rows[18]["difficulty"] = "odd"
    valid = many_rows(44)[40:]
    valid[0]["answer"] = rows[25]["answer"] + " and more"  # leaks from the third part
    valid[1]["category"] = "unknown"
    valid[2]["id"] = "30"  # of the fourth
    for name, part in (("train", rows), ("valid", valid)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    whole = inspect_data(tmp_path)
    monkeypatch.setattr(check, "MAX_COMPARED_ROWS", 10)
    parts = inspect_data(tmp_path)
    kinds = [
        [(fault.place, fault.kind or fault.message) for fault in f.faults] for f in (whole, parts)
    ]
    assert sorted(kinds[0]) == sorted(kinds[1])
    assert len(kinds[0]) == 8
    assert "in parts of so many they were compared" in parts.warnings[-1].message


def test_report_of_rows_in_parts_is_that_of_the_whole(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in many_rows(25)))
    whole = check_data(path)
    monkeypatch.setattr(check, "MAX_COMPARED_ROWS", 10)
    parts = check_data(path)
    assert replace(parts, closest=[], warnings=[]) == replace(whole, closest=[], warnings=[])


def test_texts_and_ids_of_large_splits_are_compared_through_the_disk(tmp_path, monkeypatch):
    """Also where valid is in parts: only its first stays in memory."""
    rows, valid = many_rows(30), many_rows(60)[30:]
    valid[25]["question"] = rows[3]["question"].upper()
    valid[26]["id"] = rows[4]["id"]
    valid[27]["category"] = "unknown"
    rows[29]["answer"] = rows[1]["answer"]
    folder = write(tmp_path / "data", train=rows, valid=valid)
    whole = inspect_data(folder)
    monkeypatch.setattr(check, "MAX_COMPARED_ROWS", 10)
    parts = inspect_data(folder)
    assert len(parts.faults) == len(whole.faults) == 4
    messages = [f"{fault.place}: {fault.message}" for fault in parts.faults]
    for expected in (
        "train.jsonl line 4 (3): its question is the same as that of valid.jsonl line 26 (55)",
        "train.jsonl line 5: id '4' is taken by valid.jsonl line 27",
        "train.jsonl line 30 (29): its answer is the same as that of train.jsonl line 2 (1)",
        "valid: category 'unknown' (1 rows) is not in train",
    ):
        assert any(message.startswith(expected) for message in messages), messages
    del valid[25:28], rows[29]
    folder = write(tmp_path / "data", train=rows, valid=valid)
    assert list(check_data(folder).rows.items()) == [("train", 29), ("valid", 27)]


def test_faults_and_values_without_end_are_kept_to_a_number(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "MAX_FAULTS", 5)
    monkeypatch.setattr(check, "_MAX_VALUES", 3)
    rows = many_rows(20)
    for n, row in enumerate(rows):
        row |= {"category": f"c{n}", "follow_up": f"Ask n{n}@firm.com."}
    found = inspect_data(write(tmp_path / "data", train=rows))
    assert found.report.categories == {name: {"train": 1} for name in ("c0", "c1", "c2")} | {
        "(others)": {"train": 17}
    }
    assert [fault.place for fault in found.warnings[:5]] == [f"train.jsonl line {n + 1} ({n})"
                                                             for n in range(5)]  # fmt: skip
    assert found.warnings[5].message == "after 5 of its kind no more was looked for"
    assert len(found.warnings) == 6
    for row in rows:
        row["difficulty"] = "odd"
    assert len(inspect_data(write(tmp_path / "data", train=rows)).faults) == 6


@given(st.lists(st.integers(0, 9), min_size=1))
def test_lengths_are_those_of_a_list(values):
    expected = min(values), statistics.median(values), max(values)
    assert check._lengths(Counter(values)) == expected
    assert check._mean(Counter(values)) == pytest.approx(statistics.mean(values))


def test_seen_tells_where_a_text_was_first_whatever_it_holds():
    texts = ["", "a", "A", "\0", "a\0", "漢", "a' OR 1=1", "x" * 100_000] * 2
    with Seen() as seen:
        places = [seen.first(text, f"line {n}") for n, text in enumerate(texts)]
    assert places == [""] * 8 + [f"line {n}" for n in range(8)]


def test_full_disk_of_what_was_seen_is_a_message():
    with Seen() as seen:
        seen._file.execute("PRAGMA max_page_count = 3")
        with pytest.raises(StorageError, match=r"cannot be written: .* full.*\n.*TMPDIR"):
            [seen.first(str(n), "x" * 100) for n in range(1000)]


def test_many_grams_of_many_texts_are_compared_in_bounded_memory(monkeypatch):
    """Families of as many texts as a rare gram may have: each row is found through the first."""
    texts = [
        f"{family} is the {family * 7} family of these {family * 11} long texts and its number {n}"
        for family in range(20)
        for n in range(50)
    ]
    whole = similar_pairs(texts, 0.5)
    monkeypatch.setattr(leakage, "_MAX_GRAM_PAIRS", 1000)
    fewer = similar_pairs(texts, 0.5)
    assert len(whole) == 20 * 50 * 49 // 2
    assert len(fewer) < len(whole) / 2
    found = [{p.second for p in pairs if p.similarity >= 0.5} for pairs in (whole, fewer)]
    assert found[0] == found[1] == {n for n in range(1000) if n % 50}


@pytest.mark.slow
def test_100_000_rows_of_parquet_are_checked_in_a_minute(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(many_rows(100_000)), path, row_group_size=10_000)
    start = time.monotonic()
    assert check_data(path).rows == {"train": 100_000}
    assert time.monotonic() - start < 60
