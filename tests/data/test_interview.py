"""The shipped questions: what their README says of them is true."""

import json
import re
from collections import Counter

import pytest

from interviewmate_mlx.config import shipped
from interviewmate_mlx.data.check import check_data
from interviewmate_mlx.data.records import load_splits
from interviewmate_mlx.data.splits import SPLITS, split_rows

FOLDER = shipped("data/interview")
ROWS = {
    split: [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]
    for split in SPLITS
}
ALL = [row for rows in ROWS.values() for row in rows]
# Labels that were mended after the rows had been dealt; the rows kept their place.
DEALT_AS = {
    "language-models-03": "intermediate",
    "responsible-ai-24": "intermediate",
    "statistics-19": "advanced",
}


def test_set_passes_its_own_check_with_the_counts_of_its_readme():
    report = check_data(FOLDER)
    assert report.rows == {"train": 211, "valid": 45, "test": 46}
    assert len(report.categories) == 12
    assert max(pair.similarity for pair in report.closest) < 0.15
    table = {
        cells[0]: cells[1]
        for line in (FOLDER.parent / "README.md").read_text().splitlines()
        if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 4
    }
    for category, counts in report.categories.items():
        assert table[category] == " / ".join(str(counts[split]) for split in SPLITS)
        assert 25 <= sum(counts.values()) <= 26


def test_difficulties_are_a_quarter_a_half_a_quarter():
    counts = Counter(row["difficulty"] for row in ALL)
    assert set(counts) == {"beginner", "intermediate", "advanced"}
    assert 0.22 < counts["beginner"] / 302 < 0.28
    assert 0.48 < counts["intermediate"] / 302 < 0.55
    assert 0.22 < counts["advanced"] / 302 < 0.28


def test_mended_labels_are_not_those_that_the_rows_were_dealt_with():
    labels = {row["id"]: row["difficulty"] for row in ALL}
    assert {row_id: labels[row_id] for row_id in DEALT_AS} == {
        "language-models-03": "advanced",
        "responsible-ai-24": "advanced",
        "statistics-19": "intermediate",
    }


def test_every_stratum_is_in_every_split_near_its_share():
    strata = Counter((row["category"], row["difficulty"]) for row in map(as_dealt, ALL))
    trained = Counter((row["category"], row["difficulty"]) for row in map(as_dealt, ROWS["train"]))
    for stratum, count in strata.items():
        assert abs(trained[stratum] - 0.7 * count) <= 1.3


@pytest.mark.parametrize("row", ALL, ids=lambda row: row["id"])
def test_row_is_of_the_form_that_the_readme_gives(row):
    assert list(row) == ["id", "category", "difficulty", "question", "answer", "follow_up"]
    assert re.fullmatch(re.escape(row["category"]) + r"-\d\d", row["id"])
    assert 60 <= len(row["answer"].split()) <= 220
    assert row["follow_up"].endswith("?")
    for key in ("question", "answer", "follow_up"):
        assert row[key].isascii()
        assert row[key] == row[key].strip()
        assert not re.search(r"^#|^[-*] |important to note|great question|up to date", row[key])


def test_no_follow_up_is_another_row_s_question():
    questions = {row["question"].casefold() for row in ALL}
    follow_ups = [row["follow_up"].casefold() for row in ALL]
    assert len(set(follow_ups)) == len(follow_ups)
    assert not questions & set(follow_ups)


def test_splitting_again_changes_nothing(tmp_path):
    for split in SPLITS:
        (tmp_path / f"{split}.jsonl").write_bytes((FOLDER / f"{split}.jsonl").read_bytes())
    split_rows([], tmp_path)
    split_rows([FOLDER / f"{split}.jsonl" for split in SPLITS], tmp_path)
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (
            FOLDER / f"{split}.jsonl"
        ).read_bytes()


def test_split_is_what_the_command_makes_of_all_rows(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(as_dealt(row)) + "\n" for row in reversed(ALL)))
    report = split_rows([rows], tmp_path / "out")
    assert report.rows == report.added == {"train": 211, "valid": 45, "test": 46}
    split_rows([FOLDER], tmp_path / "out")  # now with the mended labels
    for split in SPLITS:
        made = (tmp_path / "out" / f"{split}.jsonl").read_bytes()
        assert made == (FOLDER / f"{split}.jsonl").read_bytes()


def test_records_carry_their_labels():
    record = load_splits(FOLDER)["test"][0]
    row = ROWS["test"][0]
    assert (record.id, record.category, record.follow_up) == (
        row["id"],
        row["category"],
        row["follow_up"],
    )


def as_dealt(row: dict[str, str]) -> dict[str, str]:
    return row | {"difficulty": DEALT_AS.get(row["id"], row["difficulty"])}
