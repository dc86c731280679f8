"""What users say of answers, in an SQLite file, and the rows to train on that come of it."""

import hashlib
import json
import sqlite3
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from interviewmate_mlx.coach.store import open_store
from interviewmate_mlx.data.leakage import (
    ANSWER_THRESHOLD,
    QUESTION_THRESHOLD,
    fold,
    similar_pairs,
)
from interviewmate_mlx.data.records import Message, Record
from interviewmate_mlx.errors import ConfigError, DataError, brief, list_faults

THUMBS = {"up": 1, "down": -1}
_TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    id TEXT PRIMARY KEY, conversation TEXT NOT NULL, at TEXT NOT NULL,
    messages TEXT NOT NULL, answer TEXT NOT NULL, before TEXT NOT NULL, after TEXT NOT NULL,
    voice TEXT NOT NULL, adapter_hash TEXT NOT NULL, category TEXT NOT NULL,
    thumbs INTEGER, better TEXT NOT NULL DEFAULT '', rated_at TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX IF NOT EXISTS answers_after ON answers (after);
CREATE INDEX IF NOT EXISTS answers_conversation ON answers (conversation);
"""


@dataclass(frozen=True)
class Rated:
    """An answer that was kept, and what was said of it.

    Attributes:
        conversation: which it belongs to.
        messages: the prompt: perhaps a system message, then user and assistant in turn.
        answer: to the last message.
        thumbs: 1, -1, or None.
        better: an answer that would have been better; may be empty.
        category: of the question, if it is one of a data set.
    """

    conversation: str
    messages: tuple[Message, ...]
    answer: str
    thumbs: int | None
    better: str
    category: str

    @property
    def good(self) -> str:
        """What to learn from it: the better answer, or the answer if it was liked; or ""."""
        return self.better or (self.answer if self.thumbs == 1 else "")

    @property
    def bad(self) -> str:
        """The answer, if it was disliked or there is a better one; or ""."""
        is_bad = self.thumbs == -1 or (self.better and self.thumbs != 1)
        return self.answer if is_bad else ""


@dataclass(frozen=True)
class Group:
    """Counts of an adapter's answers in a category.

    Attributes:
        voice, category: whose.
        answers: kept.
        rated: with a thumb.
        good: of the rated, the share with a thumb up; None if none is rated.
        better: with a better answer.
    """

    voice: str
    category: str
    answers: int
    rated: int
    good: float | None
    better: int


class Feedback:
    """Answers and what was said of them. `Feedback.open` opens a file."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    @classmethod
    @contextmanager
    def open(cls, path: Path, must_exist: bool = False) -> Iterator["Feedback"]:
        """Open a file.

        Raises:
            StorageError: as for `open_store`.
        """
        with open_store(path, _TABLES, must_exist) as connection:
            yield cls(connection)

    def keep(
        self,
        answer_id: str,
        messages: Sequence[Message],
        answer: str,
        voice: str,
        adapter_hash: str,
        category: str = "",
    ) -> None:
        """Keep an answer. It belongs to the conversation that its messages go on with.

        Args:
            answer_id: to rate it by.
            messages: the prompt.
            answer: to it.
            voice: who gave it.
            adapter_hash: of the adapter's weights.
            category: of the question.
        """
        before = _digest(messages[:-1])
        after = _digest([*messages, Message("assistant", answer)])
        row = self._db.execute(
            "SELECT conversation FROM answers WHERE after = ? AND voice = ? "
            "ORDER BY at DESC, rowid DESC LIMIT 1",
            (before, voice),
        ).fetchone()
        conversation = row["conversation"] if row and len(messages) > 1 else uuid.uuid4().hex
        said = json.dumps([[m.role, m.content] for m in messages], ensure_ascii=False)
        self._db.execute(
            "INSERT INTO answers (id, conversation, at, messages, answer, before, after, voice, "
            "adapter_hash, category) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(answer_id, conversation, datetime.now(UTC).isoformat(), said, answer),
                *(before, after, voice, adapter_hash, category),
            ),
        )

    def rate(
        self, answer_id: str, thumbs: str | None = None, better: str | None = None
    ) -> str | None:
        """Say of an answer whether it is good, and what would be better. None leaves what is there.

        Args:
            answer_id: of a kept answer.
            thumbs: `up`, `down`, or "" to take it back.
            better: a better answer, or "" to take it back.

        Returns:
            Who gave the answer; None if no such answer is kept.
        """
        sets: dict[str, Any] = {"rated_at": datetime.now(UTC).isoformat()}
        sets |= {} if thumbs is None else {"thumbs": THUMBS.get(thumbs)}
        sets |= {} if better is None else {"better": better.strip()}
        columns = ", ".join(f"{name} = ?" for name in sets)
        row = self._db.execute(
            f"UPDATE answers SET {columns} WHERE id = ? RETURNING voice",
            (*sets.values(), answer_id),
        ).fetchone()
        return str(row["voice"]) if row else None

    def groups(self) -> list[Group]:
        """Counts by adapter and category."""
        rows = self._db.execute(
            "SELECT voice, category, COUNT(*) AS answers, COUNT(thumbs) AS rated, "
            "AVG(thumbs > 0) AS good, SUM(better != '') AS better "
            "FROM answers GROUP BY voice, category ORDER BY voice, category"
        )
        return [Group(**row) for row in map(dict, rows)]

    def weeks(self) -> dict[date, tuple[int, int]]:
        """By the Monday of each week: how many answers were rated, and how many of them good."""
        found: dict[date, tuple[int, int]] = {}
        for row in self._db.execute(
            "SELECT rated_at, thumbs FROM answers WHERE thumbs IS NOT NULL ORDER BY rated_at"
        ):
            day = datetime.fromisoformat(row["rated_at"]).astimezone().date()
            monday = day - timedelta(days=day.weekday())
            rated, good = found.get(monday, (0, 0))
            found[monday] = (rated + 1, good + (row["thumbs"] > 0))
        return found

    def conversations(self) -> list[tuple[str, str, int, str]]:
        """Id, time, number of answers and first question of each, the newest first."""
        rows = self._db.execute(
            "SELECT conversation, MIN(at) AS at, COUNT(*) AS answers, messages FROM answers "
            "GROUP BY conversation ORDER BY at DESC"
        )
        found = []
        for row in rows:
            asked = next(text for role, text in json.loads(row["messages"]) if role == "user")
            found.append((row["conversation"], row["at"], row["answers"], asked))
        return found

    def rated(self) -> list[Rated]:
        """The answers that something was said of, the oldest first."""
        rows = self._db.execute(
            "SELECT * FROM answers WHERE thumbs IS NOT NULL OR better != '' ORDER BY at, rowid"
        )
        return [
            Rated(
                row["conversation"],
                tuple(Message(role, text) for role, text in json.loads(row["messages"])),
                row["answer"],
                row["thumbs"],
                row["better"],
                row["category"],
            )
            for row in rows
        ]

    def forget(self, conversation: str = "") -> int:
        """Delete a conversation, or all; nothing of it stays in the file.

        Args:
            conversation: the start of its id; "" for all.

        Returns:
            How many answers were deleted.

        Raises:
            ConfigError: no conversation begins so, or several do.
        """
        if conversation:
            ids = {found[0] for found in self.conversations()}
            matching = [found for found in ids if found.startswith(conversation)]
            if len(matching) != 1:
                raise ConfigError(
                    f"Conversation {brief(conversation)}: {len(matching)} begin so, expected one.\n"
                    "`imate-mlx feedback show --conversations` lists them."
                )
            done = self._db.execute("DELETE FROM answers WHERE conversation = ?", matching)
        else:
            done = self._db.execute("DELETE FROM answers")
        self._db.execute("VACUUM")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return done.rowcount


def sft_rows(rated: Sequence[Rated]) -> list[dict[str, Any]]:
    """Rows to train on: each question or conversation with its good answers, none twice."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for each in rated:
        if each.good:
            key = (*_folded(each.messages), " ".join(fold(each.good)))
            label = {"category": each.category} if each.category else {}
            rows.setdefault(key, _sft_row(each) | label)
    return list(rows.values())


def pair_rows(rated: Sequence[Rated]) -> tuple[list[dict[str, str]], int]:
    """Preferences: each bad answer beside a good one to the same question, none twice.

    A bad answer goes with its own better one, or else with the first good one.

    Returns:
        The rows, and how many bad answers were left out: those of later turns or with a
        system text, whose prompt is more than a question, and those without a good one.
    """
    good: dict[str, str] = {}
    for each in rated:
        if each.good:
            good.setdefault(_question_key(each), each.good)
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    num_left_out = 0
    for each in rated:
        if not each.bad:
            continue
        key = _question_key(each)
        chosen = each.better or good.get(key, "")
        same = " ".join(fold(chosen)) == " ".join(fold(each.bad))
        if len(each.messages) > 1 or not chosen or same:
            num_left_out += 1
            continue
        folded = (key, " ".join(fold(chosen)), " ".join(fold(each.bad)))
        label = {"category": each.category} if each.category else {}
        question = each.messages[-1].content
        rows.setdefault(
            folded, {"prompt": question, "chosen": chosen, "rejected": each.bad} | label
        )
    return list(rows.values()), num_left_out


def leaking(
    rows: Sequence[dict[str, Any]], held_out: Sequence[Record]
) -> list[tuple[int, str, Record]]:
    """Rows that are near-duplicates of rows that are held out.

    Args:
        rows: from `sft_rows` or `pair_rows`.
        held_out: rows of the valid and test splits.

    Returns:
        For each such row its index, what is alike, and the row that is held out.
    """
    found: dict[int, tuple[int, str, Record]] = {}
    kinds: list[tuple[str, float, Callable[[dict[str, Any]], str], Callable[[Record], str]]] = [
        ("question", QUESTION_THRESHOLD, _asked, lambda record: record.question),
        ("answer", ANSWER_THRESHOLD, _learned, lambda record: record.answer),
    ]
    for kind, threshold, of_row, of_record in kinds:
        # Of equal texts, `similar_pairs` compares only the first with others.
        same: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            same.setdefault(" ".join(fold(of_row(row))), []).append(index)
        groups = list(same.values())
        texts = [*map(of_record, held_out), *(of_row(rows[group[0]]) for group in groups)]
        for pair in similar_pairs(texts, threshold):
            is_across = pair.first < len(held_out) <= pair.second
            if is_across and pair.similarity >= threshold:
                for index in groups[pair.second - len(held_out)]:
                    found.setdefault(index, (index, kind, held_out[pair.first]))
    return [found[index] for index in sorted(found)]


def refuse_leaks(rows: Sequence[dict[str, Any]], leaks: Sequence[tuple[int, str, Record]]) -> None:
    """Refuse rows that would teach what is held out.

    Raises:
        DataError: there are some; they are named.
    """
    if leaks:
        faults = [
            f"{brief(_asked(rows[index]))}: its {kind} is that of {record.source}"
            for index, kind, record in leaks
        ]
        raise DataError(
            f"{len(leaks)} of {len(rows)} rows are in the valid or test rows, which nothing may "
            f"be trained on:\n{list_faults(faults)}\nLeave them out, or name other data.",
            "leave_out",
            "data",
        )


def _sft_row(each: Rated) -> dict[str, Any]:
    if len(each.messages) == 1:
        return {"question": each.messages[0].content, "answer": each.good}
    messages = [*each.messages, Message("assistant", each.good)]
    return {"messages": [{"role": m.role, "content": m.content} for m in messages]}


def _asked(row: dict[str, Any]) -> str:
    if "messages" in row:
        return str(next(m["content"] for m in reversed(row["messages"]) if m["role"] == "user"))
    return str(row.get("question") or row["prompt"])


def _learned(row: dict[str, Any]) -> str:
    if "messages" in row:
        return str(row["messages"][-1]["content"])
    return str(row.get("answer") or row["chosen"])


def _question_key(each: Rated) -> str:
    return "\n".join(_folded(each.messages))


def _folded(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple(f"{message.role} {' '.join(fold(message.content))}" for message in messages)


def _digest(messages: Sequence[Message]) -> str:
    said = json.dumps([[m.role, m.content.strip()] for m in messages])
    return hashlib.sha256(said.encode()).hexdigest()
