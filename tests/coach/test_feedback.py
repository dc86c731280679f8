"""What is said of answers: kept, counted, turned into rows, forgotten."""

import pytest

from interviewmate_mlx.coach.feedback import (
    Feedback,
    leaking,
    pair_rows,
    refuse_leaks,
    sft_rows,
)
from interviewmate_mlx.config import shipped_data
from interviewmate_mlx.data.records import Message, Record, load_splits
from interviewmate_mlx.errors import ConfigError, DataError, StorageError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "feedback.sqlite"


@pytest.fixture
def feedback(path):
    with Feedback.open(path) as feedback:
        yield feedback


def user(*texts):
    """A conversation: user and assistant in turn."""
    roles = ["user", "assistant"] * len(texts)
    return [Message(role, text) for role, text in zip(roles, texts, strict=False)]


def keep(feedback, answer_id, messages, answer, voice="coach", category=""):
    feedback.keep(answer_id, messages, answer, voice, "hash", category)


def test_turns_of_one_conversation_belong_together(feedback):
    keep(feedback, "1", user("What?"), "That.")
    keep(feedback, "2", user("What?", "That.", "Why?"), "So.")
    keep(feedback, "3", user("What?"), "That.")  # somebody else begins in the same way
    keep(feedback, "4", user("What?", "That.", "Why?"), "So.", voice="base")
    keep(feedback, "5", user("What?", "That.", "Why?", "So.", "And?"), "No.")
    found = feedback.conversations()
    assert sorted(count for _, _, count, _ in found) == [1, 1, 3]
    assert {question for *_, question in found} == {"What?"}


def test_counts_by_adapter_and_category(feedback):
    for number in range(4):
        keep(feedback, f"{number}", user(f"Q{number}"), "A", category="statistics")
    keep(feedback, "x", user("Q"), "A", voice="base")
    for answer_id, thumbs in (("0", "up"), ("1", "up"), ("2", "down")):
        assert feedback.rate(answer_id, thumbs) == "coach"
    feedback.rate("3", better="B")
    base, coach = feedback.groups()
    assert (base.voice, base.answers, base.rated, base.good) == ("base", 1, 0, None)
    assert (coach.category, coach.answers, coach.rated, coach.better) == ("statistics", 4, 3, 1)
    assert coach.good == pytest.approx(2 / 3)
    ((_, counts),) = feedback.weeks().items()
    assert counts == (3, 2)


def test_a_rating_is_changed_and_taken_back(feedback):
    keep(feedback, "1", user("What?"), "That.")
    assert feedback.rate("unknown", "up") is None
    feedback.rate("1", "up")
    feedback.rate("1", better=" This. ")
    (rated,) = feedback.rated()
    assert (rated.thumbs, rated.better, rated.good, rated.bad) == (1, "This.", "This.", "")
    feedback.rate("1", "down")
    (rated,) = feedback.rated()
    assert (rated.good, rated.bad) == ("This.", "That.")
    feedback.rate("1", "", "")
    assert feedback.rated() == []


def test_rows_to_train_on(feedback):
    keep(feedback, "1", user("What is A?"), "Wrong.", category="statistics")
    feedback.rate("1", "down", "Right.")
    keep(feedback, "2", user("What is A?"), "Worse.")
    feedback.rate("2", "down")
    keep(feedback, "3", user("what is a"), "right")  # as the better one, but for its form
    feedback.rate("3", "up")
    keep(feedback, "4", user("What is B?"), "Bad, and nothing better is known.")
    feedback.rate("4", "down")
    keep(feedback, "5", user("What is A?", "Right.", "Why?"), "So.")
    feedback.rate("5", "up")
    keep(feedback, "6", user("Unrated?"), "Yes.")
    rated = feedback.rated()
    assert sft_rows(rated) == [
        {"question": "What is A?", "answer": "Right.", "category": "statistics"},
        {
            "messages": [
                {"role": "user", "content": "What is A?"},
                {"role": "assistant", "content": "Right."},
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "So."},
            ]
        },
    ]
    rows, num_left_out = pair_rows(rated)
    first = {"prompt": "What is A?", "chosen": "Right.", "rejected": "Wrong."}
    assert rows == [
        first | {"category": "statistics"},
        {"prompt": "What is A?", "chosen": "Right.", "rejected": "Worse."},
    ]
    assert num_left_out == 1
    assert pair_rows([*rated, *rated])[0] == rows


def test_what_is_held_out_is_not_learned():
    held_out = load_splits(shipped_data("interview"))["test"]
    record = held_out[0]
    rows = [
        {"question": "Why is the sky not green at noon in winter?", "answer": "It scatters."},
        {"question": record.question.upper(), "answer": "Something else altogether."},
        {"prompt": "Which is it?", "chosen": record.answer, "rejected": "No."},
        {"messages": [{"role": "user", "content": record.question},
                      {"role": "assistant", "content": "Mine."}]},
    ]  # fmt: skip
    found = leaking(rows, held_out)
    assert [(index, kind) for index, kind, _ in found] == [
        (1, "question"),
        (2, "answer"),
        (3, "question"),
    ]
    assert {each.id for *_, each in found} == {record.id}
    with pytest.raises(
        DataError, match=r"(?s)3 of 4 rows are in the valid or test rows.*test\.jsonl"
    ):
        refuse_leaks(rows, found)
    assert leaking(rows[:1], held_out) == []
    assert leaking([], held_out) == []
    assert leaking(rows, [Record("x", user("Other?", "Other."))]) == []


def test_forgotten_words_are_not_in_the_file(feedback, path):
    keep(feedback, "1", user("A secret question?"), "A secret answer.")
    keep(feedback, "2", user("Another?"), "Kept words.")
    ids = {question: conversation for conversation, *_, question in feedback.conversations()}
    assert feedback.forget(ids["A secret question?"][:8]) == 1
    on_disk = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert b"secret" not in on_disk
    assert b"Kept words" in on_disk
    with pytest.raises(ConfigError, match="Conversation 'zz': 0 begin so, expected one"):
        feedback.forget("zz")
    assert feedback.forget() == 1
    assert b"Kept words" not in b"".join(file.read_bytes() for file in path.parent.iterdir())


def test_missing_file_is_refused(path):
    with pytest.raises(StorageError, match="No file"), Feedback.open(path, must_exist=True):
        pass
    assert not path.exists()


def test_two_open_it_at_once(path):
    with Feedback.open(path) as one, Feedback.open(path) as other:
        keep(one, "1", user("A?"), "B")
        keep(other, "2", user("A?", "B", "C?"), "D")
        assert other.rate("1", "up") == "coach"
        assert len(one.conversations()) == 1
