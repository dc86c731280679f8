"""Mock interviews: what is asked when, what is kept, and what survives."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from datetime import UTC, datetime, timedelta

import pytest
from conftest import write_rows
from fsrs import Card, Rating, Scheduler

from interviewmate_mlx.coach.interview import Deck, Grade, Practice, default_path
from interviewmate_mlx.config import shipped_data
from interviewmate_mlx.errors import ConfigError, StorageError

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)


@pytest.fixture
def deck(tmp_path):
    rows = [
        {
            "question": f"What is number {n}?",
            "answer": f"It is the value {n}. It follows {n - 1}.",
            "category": "even" if n % 2 == 0 else "odd",
            "difficulty": "beginner" if n < 4 else "advanced",
            "follow_up": f"And {n + 1}?",
        }
        for n in range(6)
    ]
    return Deck.read(write_rows(tmp_path / "rows.jsonl", [*rows, rows[0], {"text": "verbatim"}]))


@pytest.fixture
def practice(tmp_path):
    with Practice.open(tmp_path / "practice.sqlite") as practice:
        yield practice


def numbers(questions):
    return [int(question.text.split()[-1].strip("?")) for question in questions]


def test_deck_has_each_question_once_and_no_verbatim_rows(deck):
    assert numbers(deck.questions.values()) == list(range(6))
    assert numbers(deck.choose("even")) == [0, 2, 4]
    assert numbers(deck.choose("odd", "advanced")) == [5]
    assert deck.category_of("  what IS number 3 ") == "odd"
    assert deck.category_of("Something else?") == ""


def test_question_has_the_same_id_in_every_data_set():
    small = Deck.read(shipped_data("interview"))
    large = Deck.read(shipped_data("interview-1000"))
    assert len(small.questions) == 302
    assert small.questions.keys() <= large.questions.keys()


@pytest.mark.parametrize(
    ("category", "difficulty", "message"),
    [
        ("evn", "", "category: got 'evn', expected one of: even, odd"),
        ("", "hard", "difficulty: got 'hard', expected one of: beginner, intermediate, advanced"),
        ("even", "intermediate", "No question has the category 'even' and the difficulty"),
    ],
)
def test_what_nothing_has_is_refused(deck, category, difficulty, message):
    with pytest.raises(ConfigError, match=message):
        deck.choose(category, difficulty)


def test_only_verbatim_rows_are_refused(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "verbatim"}])
    with pytest.raises(ConfigError, match="holds no questions, only verbatim texts"):
        Deck.read(path)


def test_due_questions_come_first_then_new_ones_then_what_is_due_later(deck, practice):
    questions = list(deck.questions.values())
    answered = {0: Grade.EASY, 1: Grade.AGAIN, 2: Grade.GOOD}
    for minute, (number, grade) in enumerate(answered.items()):
        question = questions[number]
        practice.grade(question, "x", [], grade, now=NOW + timedelta(minutes=minute))
    soon = numbers(practice.next_questions(questions, 10, NOW + timedelta(minutes=30)))
    assert soon[:2] == [1, 2]  # again is due a minute later, good ten
    assert set(soon[2:5]) == {3, 4, 5}
    assert soon[5:] == [0]  # easy: in days
    assert numbers(practice.next_questions(questions, 1, NOW + timedelta(days=60))) == [1]


def test_order_of_new_questions_is_another_one_each_day(practice):
    questions = list(Deck.read(shipped_data("interview")).questions.values())
    today, again, tomorrow = (
        [q.id for q in practice.next_questions(questions, 10, NOW + timedelta(hours=hours))]
        for hours in (0, 1, 24)
    )
    assert today == again != tomorrow


def test_return_of_a_question_is_fsrs_own(deck, practice):
    question = deck.choose()[0]
    grades = [Grade.GOOD, Grade.GOOD, Grade.AGAIN, Grade.HARD]
    scheduler, card, now = Scheduler(enable_fuzzing=False), Card(), NOW
    practice._scheduler = scheduler
    for grade in grades:
        due = practice.grade(question, "an answer", [], grade, now=now)
        card, _ = scheduler.review_card(card, Rating[grade.name.capitalize()], now)
        assert due == card.due
        now = due + timedelta(hours=1)
    assert due > NOW + timedelta(days=1)


def test_progress_export_and_days(deck, practice):
    first, second, *_ = deck.choose()
    points = deck.compare(first, "It is the value 0")
    assert [point.is_covered for point in points] == [True, False]
    practice.grade(first, "It is the value 0", points, Grade.GOOD, "Then 1", now=NOW)
    practice.grade(first, "no", deck.compare(first, "no"), Grade.AGAIN, now=NOW)
    later = NOW + timedelta(days=1)
    practice.grade(second, "yes", [], Grade.EASY, now=later)
    even, odd = practice.progress(later)
    assert (even.category, even.asked, even.reviews, even.due) == ("even", 1, 2, 1)
    assert (even.known, even.covered) == (0.5, 0.25)
    assert (odd.asked, odd.known, odd.covered, odd.due) == (1, 1.0, 0.0, 0)
    assert list(practice.days().values()) == [2, 1]
    rows = [json.loads(line) for line in practice.export()]
    assert [row["grade"] for row in rows] == ["good", "again", "easy"]
    assert rows[0]["answer"] == "It is the value 0"
    assert rows[0]["follow_up"] == "Then 1"
    assert (rows[0]["covered"], rows[0]["points"]) == (1, 2)


def test_default_file_is_in_the_users_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path().is_relative_to(tmp_path)


def test_new_file_can_be_read_by_its_owner_only(tmp_path):
    with Practice.open(tmp_path / "new" / "practice.sqlite"):
        pass
    assert (tmp_path / "new" / "practice.sqlite").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", ["noise", "middle"])
def test_damaged_file_is_set_aside_with_a_word(deck, tmp_path, damage):
    path = tmp_path / "practice.sqlite"
    with Practice.open(path) as practice:
        for question in deck.choose():
            practice.grade(question, "x" * 5000, [], Grade.GOOD)
    data = bytearray(path.read_bytes())
    size = len(data)
    data[:] = os.urandom(size) if damage == "noise" else data
    data[4096:12288] = b"\xff" * 8192
    path.write_bytes(data)
    opened = Practice.open(path)
    with pytest.warns(UserWarning, match=r"is damaged\. It was renamed to .*damaged-"):
        practice = opened.__enter__()
    assert practice.progress() == []
    practice.grade(deck.choose()[0], "x", [], Grade.GOOD)
    opened.__exit__(None, None, None)
    (aside,) = tmp_path.glob("practice.sqlite.damaged-*")
    assert aside.stat().st_size == size


def test_folder_in_place_of_the_file_is_refused(tmp_path):
    with pytest.raises(StorageError, match="Cannot use"), Practice.open(tmp_path):
        pass


def test_file_of_something_else_is_refused_and_unchanged(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("My own notes, a hundred times. " * 100)
    with (
        pytest.raises(StorageError, match="is not an SQLite file"),
        Practice.open(notes),
    ):
        pass
    assert notes.read_text().startswith("My own notes")
    other = tmp_path / "cookies.sqlite"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE cookies (name TEXT)")
    connection.commit()
    connection.close()
    before = other.read_bytes()
    with pytest.raises(StorageError, match="another program's SQLite file"), Practice.open(other):
        pass
    assert other.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cookies.sqlite", "notes.txt"]


def test_answers_survive_kill_and_two_processes(tmp_path, deck):
    """Two processes write until they are killed; all that they said was written is there."""
    path = tmp_path / "practice.sqlite"
    rows = write_rows(tmp_path / "one.jsonl", [{"question": "What?", "answer": "That it is."}])
    script = f"""
        import sys
        from pathlib import Path
        from interviewmate_mlx.coach.interview import Deck, Grade, Practice
        question = Deck.read(Path({str(rows)!r})).choose()[0]
        with Practice.open(Path({str(path)!r})) as practice:
            for number in range(100000):
                practice.grade(question, f"{{sys.argv[1]}} {{number}}", [], Grade.GOOD)
                print(number, flush=True)
        """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    running = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "ab"
    ]
    said = {}
    for name, process in zip("ab", running, strict=True):
        for _ in range(5):
            said[name] = int(process.stdout.readline())
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with Practice.open(path) as practice:
        answers = {json.loads(line)["answer"] for line in practice.export()}
    for name, last in said.items():
        assert {f"{name} {number}" for number in range(last + 1)} <= answers
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    connection.close()
