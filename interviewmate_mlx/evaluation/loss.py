"""How well a model foresees written answers: row by row, and how sure a difference is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from interviewmate_mlx.data.batches import Microbatch, collate, split_step
from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.model.zoo import Network
from interviewmate_mlx.training.loss import CHUNK_ELEMENTS

# Padded tokens that go through the network at once.
_TOKENS_AT_ONCE = 2048
_RESAMPLES = 10_000
_CONFIDENCE = 0.95
_MAX_DRAWS = 1 << 22  # that are in memory at once


class RowLoss(NamedTuple):
    """What a model makes of one row's answer."""

    nats: float  # summed over its tokens
    tokens: int  # that carry loss
    correct: int  # of them, those that the model thinks likeliest


@dataclass(frozen=True)
class LossScore:
    """Over several rows, each token counting the same.

    Attributes:
        loss: mean over the answers' tokens, nats.
        perplexity: e to the loss.
        accuracy: the share of tokens that the model thinks likeliest.
        rows: how many there are.
        tokens: of their answers.
    """

    loss: float
    perplexity: float
    accuracy: float
    rows: int
    tokens: int


@dataclass(frozen=True)
class Difference:
    """How a model's loss differs from the base's on the same rows.

    Attributes:
        loss: the difference; below 0 the model is better.
        low, high: of its 95 % confidence interval, by a paired bootstrap over rows.
        rows_better: rows on which the model's loss is lower.
        rows: how many there are.
    """

    loss: float
    low: float
    high: float
    rows_better: int
    rows: int

    @property
    def is_significant(self) -> bool:
        """Whether the interval does not hold 0."""
        return not self.low <= 0 <= self.high


def row_losses(
    model: Network,
    examples: Sequence[Example],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[RowLoss]:
    """Each row's loss, in the order of the rows.

    Args:
        model: in eval mode.
        examples: each with a loss on at least one token.
        progress: called with rows done and rows in all.
    """
    found: dict[int, RowLoss] = {}
    compute = mx.compile(partial(_token_losses, model), inputs=[model.state])
    for group in split_step(examples, _TOKENS_AT_ONCE):
        microbatch = collate(group)
        nats, is_correct = map(np.array, compute(*microbatch.arrays()[:3]))
        for row, example in enumerate(group):
            mine = _of_row(microbatch, row)
            found[id(example)] = RowLoss(
                float(nats[mine].sum(dtype=np.float64)),
                int(mine.sum()),
                int(is_correct[mine].sum()),
            )
        progress(len(found), len(examples))
    return [found[id(example)] for example in examples]


def _of_row(microbatch: Microbatch, row: int) -> np.ndarray:
    """Which of a microbatch's predicted tokens are a row's, (N,) bool."""
    rows = np.array(microbatch.positions) // microbatch.inputs.shape[1]
    return (rows == row) & np.array(microbatch.mask)


def _token_losses(
    model: Network, inputs: mx.array, positions: mx.array, targets: mx.array
) -> tuple[mx.array, mx.array]:
    """The loss of each predicted token and whether the model thinks it likeliest, (N,) each."""
    hidden = model.states(inputs)[-1]
    predicting = hidden.reshape(-1, hidden.shape[-1])[positions]
    nats: list[mx.array] = []
    is_correct: list[mx.array] = []
    chunk = CHUNK_ELEMENTS // model.args.vocab_size
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        # The next chunk waits for this one, so that their logits never exist together.
        (states,) = mx.depends([predicting[part]], nats[-1:] or [positions])
        logits = model.head(states)
        nats.append(model.cross_entropy(logits, targets[part]))
        is_correct.append(logits.argmax(axis=-1) == targets[part])
    return mx.concatenate(nats), mx.concatenate(is_correct)


def score(losses: Sequence[RowLoss]) -> LossScore:
    """The loss over rows."""
    tokens = sum(row.tokens for row in losses)
    loss = math.fsum(row.nats for row in losses) / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    accuracy = sum(row.correct for row in losses) / tokens
    return LossScore(loss, perplexity, accuracy, len(losses), tokens)


def difference(base: Sequence[RowLoss], other: Sequence[RowLoss], seed: int = 0) -> Difference:
    """How another model's loss differs from the base's, row by row.

    Args:
        base: the base's losses.
        other: the other model's, on the same rows in the same order.
        seed: of the bootstrap's draws.
    """
    tokens = np.array([row.tokens for row in base])
    nats = np.array([b.nats - a.nats for a, b in zip(base, other, strict=True)])
    rng, means = np.random.default_rng(seed), []
    at_once = max(1, _MAX_DRAWS // len(tokens))
    for start in range(0, _RESAMPLES, at_once):
        size = (min(at_once, _RESAMPLES - start), len(tokens))
        rows = rng.integers(0, len(tokens), size)
        means.append(nats[rows].sum(axis=1) / tokens[rows].sum(axis=1))
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Difference(
        float(nats.sum() / tokens.sum()), float(low), float(high), int((nats < 0).sum()), len(base)
    )
