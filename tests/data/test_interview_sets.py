"""The sets beside the 302 questions: their counts, and that none knows another's held-out rows."""

import json
import re
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from interviewmate_mlx.config import shipped
from interviewmate_mlx.data.check import check_data
from interviewmate_mlx.data.leakage import ANSWER_THRESHOLD, QUESTION_THRESHOLD, similar_pairs
from interviewmate_mlx.data.splits import SPLITS, split_rows

DATA = shipped("data/interview").parent
SCRIPTS = Path(__file__).parents[2] / "scripts" / "data"
FAULTS = (
    "buzzwords",
    "evasive",
    "misses-the-question",
    "no-trade-off",
    "too-long",
    "wrong-claim",
)


def read_set(name: str, splits: tuple[str, ...] = SPLITS) -> dict[str, list[dict[str, Any]]]:
    return {
        split: [
            json.loads(line) for line in (DATA / name / f"{split}.jsonl").read_text().splitlines()
        ]
        for split in splits
    }


OLD = read_set("interview")
ROWS = read_set("interview-1000")
DIALOGUES = read_set("interview-dialogues")
PAIRS = read_set("interview-preferences", ("train", "valid"))


def flat(splits: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [row for rows in splits.values() for row in rows]


def held_out(splits: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return splits["valid"] + splits["test"]


# All of them


@pytest.mark.parametrize(
    ("name", "counts", "column"),
    [
        ("interview-1000", {"train": 750, "valid": 160, "test": 162}, 2),
        ("interview-dialogues", {"train": 105, "valid": 22, "test": 23}, 3),
    ],
)
def test_set_passes_its_own_check_with_the_counts_of_the_readme(name, counts, column):
    report = check_data(DATA / name)
    assert report.rows == counts
    table = {
        cells[0]: cells[column]
        for line in (DATA / "README.md").read_text().splitlines()
        if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 4
    }
    for category, found in report.categories.items():
        assert table[category] == " / ".join(str(found[split]) for split in SPLITS)


@pytest.mark.parametrize("name", ["interview-1000", "interview-dialogues"])
def test_splitting_again_changes_nothing(name, tmp_path):
    before = {s: (DATA / name / f"{s}.jsonl").read_bytes() for s in SPLITS}
    for split, text in before.items():
        (tmp_path / f"{split}.jsonl").write_bytes(text)
    split_rows([DATA / name], tmp_path)
    assert {s: (tmp_path / f"{s}.jsonl").read_bytes() for s in SPLITS} == before


def test_no_training_text_is_near_a_held_out_row_of_the_questions():
    """Across the sets: within one, its own check looks."""
    asked = [row["question"] for row in held_out(ROWS)]
    answered = [row["answer"] for row in held_out(ROWS)]
    turns = [m["content"] for row in DIALOGUES["train"] for m in row["messages"]]
    written = turns + [pair[key] for pair in flat(PAIRS) for key in ("chosen", "rejected")]
    for texts, others, threshold in (
        (asked, turns + [pair["prompt"] for pair in flat(PAIRS)], QUESTION_THRESHOLD),
        (answered, written, ANSWER_THRESHOLD),
    ):
        near = [
            (pair.similarity, texts[pair.first])
            for pair in similar_pairs(texts + others, threshold)
            if pair.first < len(texts) <= pair.second and pair.similarity >= threshold
        ]
        assert near == []


# interview-1000


def test_old_rows_are_where_they_were_and_as_they_are_there():
    for split in SPLITS:
        now = {row["id"]: row for row in ROWS[split]}
        assert [now.get(row["id"]) for row in OLD[split]] == OLD[split]


def test_no_held_out_row_of_the_old_set_is_trained_on():
    held = {row[key] for row in held_out(OLD) for key in ("id", "question", "answer")}
    trained = {row[key] for row in ROWS["train"] for key in ("id", "question", "answer")}
    asked = {pair[key] for pair in flat(PAIRS) for key in ("question_id", "prompt", "chosen")}
    said = {m["content"] for row in DIALOGUES["train"] for m in row["messages"]}
    assert not held & (trained | asked | said)


def test_new_rows_are_dealt_by_the_command(tmp_path):
    for split in SPLITS:
        (tmp_path / f"{split}.jsonl").write_bytes(
            (DATA / "interview" / f"{split}.jsonl").read_bytes()
        )
    rows = tmp_path / "new.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in reversed(flat(ROWS))))
    report = split_rows([rows], tmp_path)
    assert sum(report.added.values()) == 770
    for split in SPLITS:
        made = (tmp_path / f"{split}.jsonl").read_bytes()
        assert made == (DATA / "interview-1000" / f"{split}.jsonl").read_bytes()


def test_difficulties_are_about_a_quarter_a_half_a_quarter():
    counts = Counter(row["difficulty"] for row in flat(ROWS))
    assert 0.22 < counts["beginner"] / 1072 < 0.28
    assert 0.48 < counts["intermediate"] / 1072 < 0.55
    assert 0.22 < counts["advanced"] / 1072 < 0.28


def test_rows_are_of_the_form_that_the_readme_gives():
    old = {row["id"] for row in flat(OLD)}
    for row in flat(ROWS):
        assert list(row) == ["id", "category", "difficulty", "question", "answer", "follow_up"]
        assert re.fullmatch(re.escape(row["category"]) + r"-\d{2,3}", row["id"])
        assert row["id"] in old or 21 <= len(row["answer"].split()) <= 266
        for key in ("question", "answer", "follow_up"):
            assert row[key].isascii(), row["id"]
            assert row[key] == row[key].strip(), row["id"]
            assert row[key].count("```") % 2 == 0, row["id"]
        assert not re.search(r"important to note|great question", row["answer"], re.I), row["id"]


def test_no_question_or_follow_up_comes_twice():
    questions = [row["question"].casefold() for row in flat(ROWS)]
    follow_ups = [row["follow_up"].casefold() for row in flat(ROWS)]
    assert len(set(questions)) == len(set(follow_ups)) == len(ROWS["train"]) + 160 + 162
    assert not set(questions) & set(follow_ups)


def test_new_rows_are_less_alike_than_the_old():
    measure_rows = runpy.run_path(str(SCRIPTS / "measure.py"))["measure_rows"]
    old = measure_rows(flat(OLD))
    new = measure_rows([r for r in flat(ROWS) if r["id"] not in {o["id"] for o in flat(OLD)}])
    assert (old["digits per 100 words"], new["digits per 100 words"]) == ("16.7", "2.8")
    for name in ("answers with more than 3 numbers", "follow-ups that begin with How"):
        assert int(new[name].split()[0]) < 0.25 * int(old[name].split()[0])
    assert 40 <= int(new["answers with contractions"].split()[0]) <= 60


# interview-dialogues


def test_dialogues_alternate_from_the_candidate_to_the_coach():
    for row in flat(DIALOGUES):
        assert list(row) == ["id", "category", "difficulty", "messages"]
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2), row["id"]
        assert 3 <= len(roles) // 2 <= 6, row["id"]
        assert sum(len(m["content"].split()) for m in row["messages"]) <= 600, row["id"]
        for message in row["messages"]:
            assert list(message) == ["role", "content"]
            assert message["content"].isascii(), row["id"]
            assert message["content"] == message["content"].strip(), row["id"]


# interview-preferences


def test_preferences_ask_only_what_the_questions_train_on():
    questions = {row["id"]: row for row in OLD["train"]}
    assert (len(PAIRS["train"]), len(PAIRS["valid"])) == (255, 45)
    for pair in flat(PAIRS):
        assert pair["prompt"] == questions[pair["question_id"]]["question"]
        assert pair["category"] == questions[pair["question_id"]]["category"]


def test_preferences_are_of_the_form_that_the_readme_gives():
    pairs = flat(PAIRS)
    assert [pair["id"] for pair in sorted(pairs, key=lambda pair: pair["id"])] == [
        f"pref-{number:03d}" for number in range(1, 301)
    ]
    for pair in pairs:
        assert list(pair) == [
            "id",
            "category",
            "question_id",
            "prompt",
            "chosen",
            "rejected",
            "fault",
            "reason",
        ]
        assert pair["chosen"] != pair["rejected"]
        assert all(pair[key].isascii() and pair[key].strip() == pair[key] for key in pair)
    texts = [pair[key] for pair in pairs for key in ("chosen", "rejected")]
    assert len(set(texts)) == 600


def test_held_out_pairs_are_spread_and_share_no_question_with_the_others():
    held = {pair["question_id"] for pair in PAIRS["valid"]}
    assert not held & {pair["question_id"] for pair in PAIRS["train"]}
    assert Counter(pair["fault"] for pair in flat(PAIRS)) == dict.fromkeys(FAULTS, 50)
    faults = Counter(pair["fault"] for pair in PAIRS["valid"])
    categories = Counter(pair["category"] for pair in PAIRS["valid"])
    assert set(faults.values()) == {7, 8}
    assert len(categories) == 12
    assert set(categories.values()) == {3, 4}


@pytest.mark.parametrize("length", [lambda text: len(text.split()), len], ids=["words", "chars"])
def test_length_alone_hardly_tells_the_chosen_from_the_rejected(length):
    """The best rule "longer than this", fitted on all 600 texts, against half by chance."""
    texts = [
        (length(pair[key]), key == "chosen")
        for pair in flat(PAIRS)
        for key in ("chosen", "rejected")
    ]
    shares = [
        sum((n >= threshold) == chosen for n, chosen in texts) / len(texts)
        for threshold in {n for n, _ in texts}
    ]
    best = max(max(shares), 1 - min(shares))
    assert best <= (0.55 if length is not len else 0.56)


def test_length_alone_tells_no_pair():
    longer = [len(p["chosen"].split()) > len(p["rejected"].split()) for p in flat(PAIRS)]
    assert 0.45 <= sum(longer) / len(longer) <= 0.55


# The scripts beside them


def test_every_check_belongs_to_a_row():
    names = runpy.run_path(str(SCRIPTS / "check_rows.py"))
    checks = names["find_checks"]()
    assert len(checks) == 560
    assert checks.keys() <= {row["id"] for row in flat(ROWS)}


@pytest.mark.slow
def test_every_check_passes(capsys):
    assert runpy.run_path(str(SCRIPTS / "check_rows.py"))["main"]([]) == 0
    assert "560 checks of 1072 rows, 0 failed" in capsys.readouterr().out


def test_shipped_dialogues_train_and_chat(imate, tiny_base):
    """Several turns: learned in each, and remembered from one to the next."""
    rows = ["--data", "interview-dialogues", "--set", "data.max_length=128"]
    short = ["--max-steps", "1", "--set", "train.warmup_ratio=0", "--set", "validate.every=9"]
    imate("train", "--model", tiny_base, *rows, *short, "--out", "adapter")
    said = imate("chat", "--adapter", "adapter", "--max-tokens", "3", stdin="Hello\nAnd then?\n")
    assert len(said.stdout.splitlines()) == 2
