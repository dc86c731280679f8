"""Preferences as the model sees them, and their microbatches."""

from interviewmate_mlx import backend as backend  # its BLAS must be loaded before MLX

# isort: split
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from interviewmate_mlx.data.batches import Microbatch, collate
from interviewmate_mlx.data.preferences import JudgedRecord, PairRecord
from interviewmate_mlx.data.prompts import Example, encode_record
from interviewmate_mlx.data.records import Record
from interviewmate_mlx.data.templates import Template, Tokenizer
from interviewmate_mlx.errors import DataError


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, as the model sees them.

    Attributes:
        chosen: the better one. Its loss mask is true on the answer.
        rejected: the worse one, likewise.
        learned: (L,) bool, the tokens of `chosen` that are learned as such, where a method
            does that; by default those of the answer.
    """

    chosen: Example
    rejected: Example
    learned: np.ndarray

    def __len__(self) -> int:
        """Tokens of the longer side: both are padded to it."""
        return max(len(self.chosen), len(self.rejected))

    @property
    def sides(self) -> tuple[Example, ...]:
        return self.chosen, self.rejected

    @property
    def compared(self) -> tuple[Example, Example]:
        """The answers whose log-probabilities before training matter."""
        return self.chosen, self.rejected

    @property
    def record(self) -> Record:
        return self.chosen.record

    def content(self) -> bytes:
        return self.chosen.content() + self.rejected.content() + self.learned.tobytes()

    def with_references(self, references: Sequence[float]) -> "Pair":
        """The same, with the log-probabilities of its sides before training."""
        chosen, rejected = references
        return replace(
            self,
            chosen=replace(self.chosen, reference=chosen),
            rejected=replace(self.rejected, reference=rejected),
        )


@dataclass(frozen=True)
class Judged:
    """An answer that is good or not, as the model sees it.

    Attributes:
        example: the row. Its loss mask is true on the answer.
        is_good: whether the answer is.
        other: the same prompt with the answer of another row.
    """

    example: Example
    is_good: bool
    other: Example

    def __len__(self) -> int:
        return len(self.example)

    @property
    def sides(self) -> tuple[Example, ...]:
        return (self.example,)

    @property
    def compared(self) -> tuple[Example, Example]:
        """The answers whose log-probabilities before training matter."""
        return self.example, self.other

    @property
    def record(self) -> Record:
        return self.example.record

    def content(self) -> bytes:
        return self.example.content() + self.other.content() + bytes([self.is_good])

    def with_references(self, references: Sequence[float]) -> "Judged":
        """The same, with the log-probabilities of both answers before training."""
        example, other = references
        return replace(
            self,
            example=replace(self.example, reference=example),
            other=replace(self.other, reference=other),
        )


def encode_preferences(
    tokenizer: Tokenizer,
    rows: Sequence[Any],
    max_length: int,
    train_on: str,
    template: Template | None,
    group_rows: int,
) -> tuple[list[Any], int]:
    """Encode rows of either kind; see `encode_pairs` and `encode_judged`."""
    if rows and isinstance(rows[0], JudgedRecord):
        return encode_judged(tokenizer, rows, max_length, group_rows, template)
    return encode_pairs(tokenizer, rows, max_length, train_on, template)


def encode_pairs(
    tokenizer: Tokenizer,
    rows: Sequence[PairRecord],
    max_length: int,
    train_on: str,
    template: Template | None = None,
) -> tuple[list[Pair], int]:
    """Encode pairs.

    Args:
        tokenizer: a Hugging Face tokenizer.
        rows: checked ones.
        max_length: the most tokens of a side to keep.
        train_on: what a method that also learns the better answer learns of it: `answer`, or
            `all` for the prompt as well.
        template: by default the one that the tokenizer brings.

    Returns:
        The pairs; and how many rows are left out, because what was kept of an answer is nothing
        or is the same on both sides.
    """
    found = []
    for row in rows:
        sides = [
            _encode(tokenizer, record, max_length, template)
            for record in (row.chosen, row.rejected)
        ]
        chosen, rejected = sides
        is_alike = np.array_equal(chosen.tokens, rejected.tokens)
        if is_alike or not all(side.loss_mask.any() for side in sides):
            continue
        learned = chosen.loss_mask
        if train_on == "all":
            learned = np.arange(len(chosen)) > 0
        found.append(Pair(chosen, rejected, learned))
    return found, len(rows) - len(found)


def encode_judged(
    tokenizer: Tokenizer,
    rows: Sequence[JudgedRecord],
    max_length: int,
    group_rows: int,
    template: Template | None = None,
) -> tuple[list[Judged], int]:
    """Encode answers with labels, each with its prompt under another row's answer.

    The other answers are those of a group of rows that follow each other in the file: each row
    has the one before it, the first one the last. A row that is left over joins the last group.

    Args:
        tokenizer: a Hugging Face tokenizer.
        rows: checked ones.
        max_length: the most tokens of a row to keep.
        group_rows: rows in a group, at least 2.
        template: by default the one that the tokenizer brings.

    Returns:
        The rows; and how many are left out, because nothing of an answer was kept.
    """
    kept, examples = [], []
    for row in rows:
        example = _encode(tokenizer, row.record, max_length, template)
        if example.loss_mask.any():
            kept.append(row)
            examples.append(example)
    found = []
    for row, example, place in zip(kept, examples, rotated(len(kept), group_rows), strict=True):
        prompt, answer = row.record.messages[:-1], kept[place].record.messages[-1]
        other = replace(row.record, messages=(*prompt, answer))
        found.append(Judged(example, row.is_good, _encode(tokenizer, other, max_length, template)))
    return found, len(rows) - len(found)


def rotated(count: int, group_rows: int) -> list[int]:
    """For each of `count` rows, which row's answer it takes: see `encode_judged`."""
    starts = list(range(0, count, group_rows))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    places: list[int] = []
    for start, end in zip(starts, [*starts[1:], count], strict=True):
        places += [end - 1, *range(start, end - 1)]
    return places


def _encode(
    tokenizer: Tokenizer, record: Record, max_length: int, template: Template | None
) -> Example:
    """A conversation in tokens, with its last answer in the loss mask."""
    try:
        return encode_record(tokenizer, record, max_length, "last", template)[-1]
    except DataError as error:
        raise DataError(f"{record.source}: {error}") from error


def collate_pairs_step(
    groups: Sequence[Sequence[Pair]], of_step: Sequence[Pair]
) -> list[Microbatch]:
    """Pairs of a step, in groups: all of `of_step`, or one rank's."""
    learned = [int(pair.learned.sum()) for pair in of_step]
    return [collate_pairs(group, sum(learned) / len(learned)) for group in groups]


def collate_pairs(
    pairs: Sequence[Pair], tokens_per_pair: float, width: int | None = None
) -> Microbatch:
    """Both sides of pairs in one microbatch, the better ones first, padded to one width.

    Args:
        pairs: the pairs.
        tokens_per_pair: to learn as such, a mean over the step.
        width: see `collate`.
    """
    # Where tokens before the answer are learned, they are predicted, too.
    better = [replace(pair.chosen, loss_mask=pair.learned) for pair in pairs]
    sides = [*better, *(pair.rejected for pair in pairs)]
    batch = with_rows(collate(sides, width), sides)
    asked = [pair.chosen.loss_mask[pair.learned] for pair in pairs]
    num_better = sum(map(len, asked))
    in_answer = np.ones(batch.mask.shape, dtype=bool)
    in_answer[:num_better] = np.concatenate(asked)
    answers = [side for pair in zip(*(pair.sides for pair in pairs), strict=True) for side in pair]
    return replace(
        batch,
        of_rows=batch.of_rows
        | {
            "in_answer": mx.array(in_answer),
            "is_learned": mx.array(np.arange(len(in_answer)) < num_better),
            "lengths": mx.array([float(side.loss_mask.sum()) for side in answers]),
            "tokens_per_pair": mx.array(tokens_per_pair),
        },
    )


def with_rows(batch: Microbatch, sides: Sequence[Example]) -> Microbatch:
    """A microbatch that knows of each predicted token which side it is of."""
    lengths = [int(side.loss_mask.sum()) for side in sides]
    rows = np.zeros(batch.mask.shape, dtype=np.int32)  # the surplus: of no matter, it is masked
    rows[: sum(lengths)] = np.repeat(np.arange(len(sides)), lengths)
    return replace(
        batch,
        of_rows={
            "row_of_token": mx.array(rows),
            "lengths": mx.array([float(length) for length in lengths]),
            "references": mx.array([side.reference for side in sides]),
        },
    )


def collate_judged(
    rows: Sequence[Judged], divergence: mx.array, width: int | None = None
) -> Microbatch:
    """Answers with their labels. The divergence is () float32, nats, of the whole step."""
    sides = [row.example for row in rows]
    batch = with_rows(collate(sides, width), sides)
    labels = {"is_good": mx.array([row.is_good for row in rows]), "divergence": divergence}
    return replace(batch, of_rows=batch.of_rows | labels)
