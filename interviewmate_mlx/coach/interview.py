"""Mock interviews: questions of a data set, asked again when they are due.

When a question returns is decided by FSRS (https://github.com/open-spaced-repetition), from the
grades that the user gives their own answers.
"""

import hashlib
import json
import random
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from enum import StrEnum
from functools import cached_property
from pathlib import Path

from fsrs import Card, Rating, Scheduler
from platformdirs import user_data_path

from interviewmate_mlx.coach.points import Point, points_of, term_weights
from interviewmate_mlx.coach.store import open_store
from interviewmate_mlx.data.leakage import fold
from interviewmate_mlx.data.records import DIFFICULTIES, Record, load_splits
from interviewmate_mlx.errors import ConfigError, brief

_TABLES = """
CREATE TABLE IF NOT EXISTS cards (
    question_id TEXT PRIMARY KEY, card TEXT NOT NULL, due TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS reviews (
    at TEXT NOT NULL, question_id TEXT NOT NULL, category TEXT NOT NULL, difficulty TEXT NOT NULL,
    question TEXT NOT NULL, answer TEXT NOT NULL, follow_up TEXT NOT NULL,
    covered INTEGER NOT NULL, points INTEGER NOT NULL, grade TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS reviews_at ON reviews (at);
"""


class Grade(StrEnum):
    """How well a user knew an answer, in their own eyes."""

    AGAIN = "again"
    HARD = "hard"
    GOOD = "good"
    EASY = "easy"


@dataclass(frozen=True)
class Question:
    """A question to ask.

    Attributes:
        id: from its words, so that it is the same in every data set and file.
        text: as it is asked.
        reference: the written answer.
        category, difficulty, follow_up: the row's labels; may be empty.
    """

    id: str
    text: str
    reference: str
    category: str = ""
    difficulty: str = ""
    follow_up: str = ""


class Deck:
    """The questions of a data set, and what their terms weigh."""

    def __init__(self, records: Iterable[Record]) -> None:
        """
        Args:
            records: rows with a question; others are left out. Of equal questions, the first
                is taken.
        """
        questions = [_as_question(record) for record in records if record.messages]
        self.questions: dict[str, Question] = {}
        for question in questions:
            self.questions.setdefault(question.id, question)

    @cached_property
    def _weights(self) -> dict[str, float]:
        return term_weights(f"{q.text} {q.reference}" for q in self.questions.values())

    @classmethod
    def read(cls, path: Path) -> "Deck":
        """The questions of all splits of a folder, or of a file.

        Raises:
            DataError: as for `load_splits`.
            ConfigError: there are no questions in it.
        """
        deck = cls(record for rows in load_splits(path).values() for record in rows)
        if not deck.questions:
            raise ConfigError(
                f"{path} holds no questions, only verbatim texts.\n"
                "Give rows with question and answer, or with messages.",
                "data",
            )
        return deck

    def choose(self, category: str = "", difficulty: str = "") -> list[Question]:
        """The questions of a category and a difficulty, in the order of the rows.

        Args:
            category: "" for all.
            difficulty: "" for all.

        Raises:
            ConfigError: there is no such category or difficulty, or nothing has both.
        """
        everything = list(self.questions.values())
        for name, wanted, known in (
            ("category", category, sorted({q.category for q in everything} - {""})),
            ("difficulty", difficulty, list(DIFFICULTIES)),
        ):
            if wanted and wanted not in known:
                raise ConfigError(
                    f"{name}: got {brief(wanted)}, expected one of: {', '.join(known) or 'none'}."
                )
        chosen = [
            question
            for question in everything
            if category in ("", question.category) and difficulty in ("", question.difficulty)
        ]
        if not chosen:
            raise ConfigError(
                f"No question has the category {brief(category)} and the difficulty "
                f"{brief(difficulty)}.\nLeave one of them out."
            )
        return chosen

    def compare(self, question: Question, answer: str) -> list[Point]:
        """The points of the written answer, each with how much of it the user's answer has."""
        return points_of(question.reference, answer, self._weights)

    def category_of(self, text: str) -> str:
        """The category of a question by its words; "" if it is not one of these."""
        found = self.questions.get(_id_of(text))
        return found.category if found else ""


@dataclass(frozen=True)
class CategoryProgress:
    """What was practised in a category.

    Attributes:
        category: its name.
        asked: different questions.
        reviews: answers in all.
        known: the share of answers that were graded good or easy.
        covered: the share of points that the answers had.
        due: questions that are due now.
    """

    category: str
    asked: int
    reviews: int
    known: float
    covered: float
    due: int


class Practice:
    """What a user has practised, in an SQLite file. `Practice.open` opens it."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection
        self._scheduler = Scheduler()

    @classmethod
    @contextmanager
    def open(cls, path: Path | None = None) -> Iterator["Practice"]:
        """Open a file, by default the one in the user's data folder.

        Raises:
            StorageError: as for `open_store`.
        """
        with open_store(path or default_path(), _TABLES) as connection:
            yield cls(connection)

    def next_questions(
        self, questions: Sequence[Question], count: int, now: datetime | None = None
    ) -> list[Question]:
        """The next questions to ask: first what is due, the longest due first; then new ones.

        New questions come in an order that is another one each day. When all have been asked
        and none is due, those that are due next.

        Args:
            questions: to choose from.
            count: at most so many.
            now: the time; by default the clock's.
        """
        now = now or datetime.now(UTC)
        rows = self._db.execute("SELECT question_id, due FROM cards")
        due = {row["question_id"]: datetime.fromisoformat(row["due"]) for row in rows}
        shuffled = list(questions)
        random.Random(now.date().isoformat()).shuffle(shuffled)
        new = [question for question in shuffled if question.id not in due]
        old = sorted((q for q in questions if q.id in due), key=lambda q: due[q.id])
        waiting = [question for question in old if due[question.id] <= now]
        later = [question for question in old if due[question.id] > now]
        return [*waiting, *new, *later][:count]

    def grade(
        self,
        question: Question,
        answer: str,
        points: Sequence[Point],
        grade: Grade,
        follow_up: str = "",
        now: datetime | None = None,
    ) -> datetime:
        """Keep an answer with the grade that the user gives it.

        Args:
            question: that was asked.
            answer: of the user.
            points: from `Deck.compare`.
            grade: by the user.
            follow_up: the user's answer to the follow-up question.
            now: the time; by default the clock's.

        Returns:
            When the question is due again.
        """
        now = (now or datetime.now(UTC)).astimezone(UTC)
        with self._transaction():
            row = self._db.execute(
                "SELECT card FROM cards WHERE question_id = ?", (question.id,)
            ).fetchone()
            card = Card.from_json(row["card"]) if row else Card()
            card, _ = self._scheduler.review_card(card, Rating[grade.name.capitalize()], now)
            self._db.execute(
                "INSERT OR REPLACE INTO cards VALUES (?, ?, ?)",
                (question.id, card.to_json(), card.due.astimezone(UTC).isoformat()),
            )
            covered = sum(point.is_covered for point in points)
            labels = (question.id, question.category, question.difficulty, question.text)
            self._db.execute(
                "INSERT INTO reviews VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (now.isoformat(), *labels, answer, follow_up, covered, len(points), str(grade)),
            )
        return card.due

    def progress(self, now: datetime | None = None) -> list[CategoryProgress]:
        """What was practised, by category."""
        now = now or datetime.now(UTC)
        rows = self._db.execute(
            """
            SELECT category, COUNT(DISTINCT question_id) AS asked, COUNT(*) AS reviews,
                   AVG(grade IN ('good', 'easy')) AS known,
                   COALESCE(1.0 * SUM(covered) / NULLIF(SUM(points), 0), 0.0) AS covered,
                   (SELECT COUNT(*) FROM cards WHERE due <= ? AND question_id IN
                       (SELECT question_id FROM reviews AS r WHERE r.category = reviews.category)
                   ) AS due
            FROM reviews GROUP BY category ORDER BY category
            """,
            (now.astimezone(UTC).isoformat(),),
        )
        return [CategoryProgress(**row) for row in map(dict, rows)]

    def days(self) -> dict[date, int]:
        """How many answers were given on each day, by the clock's own time zone."""
        counts: dict[date, int] = {}
        for row in self._db.execute("SELECT at FROM reviews ORDER BY at"):
            day = datetime.fromisoformat(row["at"]).astimezone().date()
            counts[day] = counts.get(day, 0) + 1
        return counts

    def export(self) -> Iterator[str]:
        """Every answer as a line of JSON, the oldest first."""
        for row in self._db.execute("SELECT * FROM reviews ORDER BY at, rowid"):
            yield json.dumps(dict(row), ensure_ascii=False)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of the block is written, or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def default_path() -> Path:
    """Where practice is kept unless another file is named."""
    return user_data_path("interviewmate") / "interview.sqlite"


def _as_question(record: Record) -> Question:
    return Question(
        _id_of(record.question),
        record.question,
        record.answer,
        record.category,
        record.difficulty,
        record.follow_up,
    )


def _id_of(text: str) -> str:
    return hashlib.sha256(" ".join(fold(text)).encode()).hexdigest()[:16]
