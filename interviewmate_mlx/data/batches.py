"""Groups rows into steps, and steps into microbatches of a few fixed widths.

A *step* is one optimizer update over an effective batch of rows. A *microbatch*
is what goes through the network at once: part of a step, or all of it. How a
step is split changes speed and memory, but not the update.
"""

from interviewmate_mlx import backend as backend  # its BLAS must be loaded before MLX

# isort: split
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar
from zlib import crc32

import mlx.core as mx
import numpy as np
from numpy.random import default_rng  # loaded here: a Ctrl-C is lost while it loads

from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.data.records import Record

# Rows are padded to a multiple of this: few widths, so few compiled variants, and
# still little padding.
WIDTH_STEP = 16
# Rows of similar length are grouped within pools of this many steps. A pool is large
# enough to find such rows, and small enough that the order of an epoch stays random.
POOL_STEPS = 16
# The number of predicted tokens is rounded up to a multiple of a microbatch's tokens
# divided by this: few compiled variants here, too.
PREDICTED_PARTS = 8


class Row(Protocol):
    """What is learned from: an example, a pair of answers, an answer with a label."""

    def __len__(self) -> int:
        """Tokens of its longest side."""

    @property
    def sides(self) -> tuple[Example, ...]:
        """What goes through the model together."""

    @property
    def record(self) -> Record:
        """The row as it was read."""

    def content(self) -> bytes:
        """What tells it from others."""


AnyRow = TypeVar("AnyRow", bound=Row)


@dataclass(frozen=True)
class Microbatch:
    """Rows of one width, padded on the right, and the tokens to predict.

    Attributes:
        inputs: (B, L) int32 token ids.
        positions: (N,) int32, indices of the hidden states that predict a token, in
            the B * L flattened ones. N is rounded up; the surplus is 0.
        targets: (N,) int32, the tokens to predict.
        mask: (N,) bool, false on the surplus.
        of_rows: what else a method's loss asks for, by name.
        row_ids: (B,) uint32, on the host: what tells the rows apart.
        seed: of the step's dropout.
    """

    inputs: mx.array
    positions: mx.array
    targets: mx.array
    mask: mx.array
    row_ids: np.ndarray
    of_rows: dict[str, mx.array] = field(default_factory=dict)
    seed: int = 0

    def arrays(self) -> tuple[mx.array, mx.array, mx.array, mx.array, dict[str, mx.array]]:
        """The inputs of the compiled step."""
        return self.inputs, self.positions, self.targets, self.mask, self.of_rows


def steps_per_epoch(num_rows: int, effective_batch: int) -> int:
    """Steps in an epoch. One may be smaller than the others; no row is dropped."""
    return math.ceil(num_rows / effective_batch)


def epoch_steps(
    lengths: Sequence[int], effective_batch: int, seed: int, epoch: int
) -> list[list[int]]:
    """The rows of each step of an epoch. Every row is used once.

    The order depends only on `seed` and `epoch`.

    Args:
        lengths: tokens in each row.
        effective_batch: rows per step; rows that are left over make one smaller step.
        seed: the run's.
        epoch: from 0; each has its own order.

    Returns:
        One list of row numbers per step.
    """
    rng = default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    steps: list[list[int]] = []
    pool_rows = POOL_STEPS * effective_batch
    for start in range(0, len(order), pool_rows):
        pool = sorted(order[start : start + pool_rows].tolist(), key=lambda row: lengths[row])
        # The smaller step gets the pool's shortest rows, so it is the cheapest one.
        first = len(pool) % effective_batch
        cuts = [0, *range(first or effective_batch, len(pool) + 1, effective_batch)]
        steps += [pool[a:b] for a, b in itertools.pairwise(cuts)]
    return [steps[i] for i in rng.permutation(len(steps))]


def padded_width(num_inputs: int) -> int:
    """The width that a row of `num_inputs` tokens is padded to."""
    return WIDTH_STEP * math.ceil(num_inputs / WIDTH_STEP)


def padded_tokens(row: Row) -> int:
    """Padded tokens that a row puts through the model, at its own width."""
    return padded_width(len(row) - 1) * len(row.sides)


def split_step(examples: Sequence[AnyRow], token_budget: int) -> list[list[AnyRow]]:
    """Split a step into as few microbatches as the budget of padded tokens allows.

    Rows of similar length share a microbatch. A single row may exceed the budget.
    """
    return fill(sorted(examples, key=len, reverse=True), token_budget)


def fill(examples: Sequence[AnyRow], token_budget: int) -> list[list[AnyRow]]:
    """Group rows. A group has as many as the budget allows, and at least one.

    Args:
        examples: rows, the longest first.
        token_budget: padded tokens per group.
    """
    groups: list[list[AnyRow]] = []
    for example in examples:
        size = padded_tokens(groups[-1][0]) if groups else 0
        if groups and size * (len(groups[-1]) + 1) <= token_budget:
            groups[-1].append(example)
        else:
            groups.append([example])
    return groups


def collate(examples: Sequence[Example], width: int | None = None) -> Microbatch:
    """Pad rows to one width.

    Args:
        examples: the rows. The last token of a row is only a target, never an input.
        width: of the padded inputs; by default the smallest one possible.
    """
    width = width or padded_width(max(len(example) for example in examples) - 1)
    inputs = np.zeros((len(examples), width), dtype=np.int32)
    positions, targets = [], []
    for row, example in enumerate(examples):
        inputs[row, : len(example) - 1] = example.tokens[:-1]
        predicted = np.flatnonzero(example.loss_mask)
        positions.append(row * width + predicted - 1)
        targets.append(example.tokens[predicted])
    num_predicted = sum(map(len, targets))
    part = math.ceil(inputs.size / PREDICTED_PARTS)
    surplus = -num_predicted % part
    return Microbatch(
        inputs=mx.array(inputs),
        positions=mx.array(np.pad(np.concatenate(positions), (0, surplus)).astype(np.int32)),
        targets=mx.array(np.pad(np.concatenate(targets), (0, surplus)).astype(np.int32)),
        mask=mx.array(np.arange(num_predicted + surplus) < num_predicted),
        row_ids=np.array([crc32(example.content()) for example in examples], np.uint32),
    )


def by_width(examples: Sequence[AnyRow]) -> list[list[AnyRow]]:
    """Group rows by their padded width, the narrowest first. Validation uses these groups."""

    def width(example: AnyRow) -> int:
        return padded_width(len(example) - 1)

    return [list(rows) for _, rows in itertools.groupby(sorted(examples, key=len), key=width)]
