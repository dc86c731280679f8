"""Losses over preferences: DPO, IPO, ORPO, SimPO on pairs of answers, KTO on answers with a label.

Each is a function of the answers' log-probabilities alone, and a sum over rows. So microbatches
add up to the same update however a step is split, and padding never matters. What depends on
the whole step (KTO's divergence, ORPO's number of tokens) is known before its first microbatch.

The numbers are those of TRL 1.16, whose formulas these are; each function names the paper.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from interviewmate_mlx.data.batches import Microbatch, by_width, collate
from interviewmate_mlx.data.pairs import Judged, collate_judged, collate_pairs_step, with_rows
from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.files import atomic_file
from interviewmate_mlx.formats.safetensors_file import save_tensors
from interviewmate_mlx.training.loss import Loss, Sums, token_loss
from interviewmate_mlx.training.ranks import ALONE, Ranks
from interviewmate_mlx.training.step import Executor, total_of

PAIRED = ("dpo", "ipo", "orpo", "simpo")
UNPAIRED = ("kto",)
# These compare with what the model gave before training; the others need no such reference.
WITH_REFERENCE = ("dpo", "ipo", "kto")
_TENSOR = "log_probabilities"


@dataclass(frozen=True)
class Objective:
    """What a run makes smaller.

    Attributes:
        loss: of a microbatch's predicted tokens.
        collate: groups of rows as microbatches; and, for what depends on all of them, the rows of
            the whole step or validation set.
    """

    loss: Loss
    collate: Callable[[Sequence[Sequence[Any]], Sequence[Any]], list[Microbatch]]


def objective_of(
    method: str,
    beta: float,
    label_smoothing: float,
    length_normalized: bool,
    target_margin: float,
    divergence: Callable[[Sequence[Judged]], mx.array],
) -> Objective:
    """The objective of a method.

    Args:
        method: `sft`, or one of this file's.
        beta: how much a change of the log-probabilities counts.
        label_smoothing: share of pairs that are taken to be the wrong way round.
        length_normalized: whether DPO compares means over an answer's tokens, not sums.
        target_margin: SimPO's.
        divergence: KTO's, of the rows of a step: see `divergence_of`.
    """
    if method == "sft":
        return Objective(token_loss, lambda groups, _: [collate(group) for group in groups])
    if method == "kto":
        return Objective(
            partial(judged_loss, beta),
            lambda groups, rows: _collate_judged_step(groups, divergence(rows)),
        )
    of_pairs = {
        "dpo": partial(_dpo, beta, label_smoothing, length_normalized),
        "ipo": partial(_ipo, beta),
        "orpo": partial(_orpo, beta),
        "simpo": partial(_simpo, beta, label_smoothing, target_margin),
    }[method]
    is_mean = method in ("orpo", "simpo")
    return Objective(partial(pair_loss, of_pairs, beta, is_mean), collate_pairs_step)


@dataclass(frozen=True)
class Sides:
    """The better and the worse answers of some pairs.

    Attributes:
        logps: (2, B) float32, log-probability of each answer, better ones first, nats.
        references: (2, B), the same before training.
        lengths: (2, B), tokens of each answer.
        nll: (B,), what the better sides cost as rows to learn: nats, divided by the step's mean
            number of such tokens in a pair.
    """

    logps: mx.array
    references: mx.array
    lengths: mx.array
    nll: mx.array

    @property
    def gains(self) -> mx.array:
        return self.logps - self.references


OfPairs = Callable[[Sides], mx.array]


def pair_loss(
    of_pairs: OfPairs,
    beta: float,
    is_mean: bool,
    losses: mx.array,
    mask: mx.array,
    of_rows: dict[str, mx.array],
) -> Sums:
    """A loss over pairs.

    Args:
        of_pairs: (B,) float32, the loss of each pair.
        beta: scales rewards.
        is_mean: whether log-probabilities are means over an answer's tokens and are their own
            rewards; otherwise they are sums, and rewards are how far they rose.
        losses, mask, of_rows: of `collate_pairs`.
    """
    in_answer = mask & of_rows["in_answer"]
    logps = -row_sums(losses, in_answer, of_rows).reshape(2, -1)
    lengths = of_rows["lengths"].reshape(2, -1)
    learned = row_sums(losses, mask & of_rows["is_learned"], of_rows).reshape(2, -1)[0]
    references = of_rows["references"].reshape(2, -1)
    sides = Sides(logps, references, lengths, learned / of_rows["tokens_per_pair"])
    measured = logps / lengths if is_mean else logps
    rewards = beta * (measured if is_mean else sides.gains)
    measures = {
        "reward_chosen": rewards[0],
        "reward_rejected": rewards[1],
        "accuracy": (rewards[0] > rewards[1]).astype(mx.float32),
        "logp_chosen": measured[0],
        "logp_rejected": measured[1],
    }
    count = mx.array(logps.shape[1])
    return of_pairs(sides).sum(), count, {name: _summed(m) for name, m in measures.items()}


def _dpo(beta: float, label_smoothing: float, length_normalized: bool, sides: Sides) -> mx.array:
    """Equation 7 of https://arxiv.org/abs/2305.18290, with the smoothing of its authors' code.

    The mean form is TRL's `sigmoid_norm`.
    """
    gains = sides.gains / sides.lengths if length_normalized else sides.gains
    return _smoothed(beta * (gains[0] - gains[1]), label_smoothing)


def _ipo(beta: float, sides: Sides) -> mx.array:
    """Equation 17 of https://arxiv.org/abs/2310.12036, on means over an answer's tokens."""
    gains = sides.gains / sides.lengths
    return (gains[0] - gains[1] - 1 / (2 * beta)) ** 2


def _orpo(beta: float, sides: Sides) -> mx.array:
    """Equation 6 of https://arxiv.org/abs/2403.07691: the loss of the better side as a row to
    learn, which here is a mean over the step's tokens, and the odds ratio of both.
    """
    means = sides.logps / sides.lengths
    odds = means - _log_of_the_rest(means)
    return sides.nll - beta * nn.log_sigmoid(odds[0] - odds[1])


def _simpo(beta: float, label_smoothing: float, target_margin: float, sides: Sides) -> mx.array:
    """Equation 6 of https://arxiv.org/abs/2405.14734; gamma there is the target margin."""
    means = sides.logps / sides.lengths
    return _smoothed(beta * (means[0] - means[1]) - target_margin, label_smoothing)


def _smoothed(margin: mx.array, label_smoothing: float) -> mx.array:
    """-log of the probability that the better answer wins, if some labels are wrong."""
    loss = -(1 - label_smoothing) * nn.log_sigmoid(margin)
    return loss - label_smoothing * nn.log_sigmoid(-margin) if label_smoothing else loss


def _log_of_the_rest(logps: mx.array) -> mx.array:
    """log(1 - exp(x)) for x < 0, exact for small and for large x."""
    is_small = logps > -math.log(2)
    small, large = mx.where(is_small, logps, -1.0), mx.where(is_small, -1.0, logps)
    return mx.where(is_small, mx.log(-mx.expm1(small)), mx.log1p(-mx.exp(large)))


def judged_loss(
    beta: float, losses: mx.array, mask: mx.array, of_rows: dict[str, mx.array]
) -> Sums:
    """KTO's loss over answers that are good or not: equation 7 of https://arxiv.org/abs/2402.01306.

    Args:
        beta: scales rewards.
        losses, mask, of_rows: of `collate_judged`.
    """
    logps = -row_sums(losses, mask, of_rows)
    rewards = beta * (logps - of_rows["references"])
    is_good = of_rows["is_good"]
    above = rewards - beta * of_rows["divergence"]
    of_each = mx.sigmoid(mx.where(is_good, -above, above))  # 1 - sigmoid(x), but exact
    measures = {}
    for side, counted in (("chosen", is_good), ("rejected", ~is_good)):
        # One array for both: MLX cannot compile a graph that gives the same sum twice.
        count = mx.where(counted, 1.0, 0.0).sum()
        measures[f"reward_{side}"] = mx.where(counted, rewards, 0).sum(), count
        measures[f"logp_{side}"] = mx.where(counted, logps, 0).sum(), count
    measures["divergence"] = _summed(mx.zeros_like(logps) + of_rows["divergence"])
    return of_each.sum(), mx.array(logps.shape[0]), measures


def _summed(values: mx.array) -> tuple[mx.array, mx.array]:
    """The sum of the values, and how many there are, () float32 each."""
    return values.sum(), mx.array(float(values.size))


def row_sums(losses: mx.array, counted: mx.array, of_rows: dict[str, mx.array]) -> mx.array:
    """The sum of the tokens that count of each row of a microbatch, (B,).

    Not by scattering, whose order of addition on a GPU is not always the same.

    Args:
        losses: (N,) float32.
        counted: (N,) bool.
        of_rows: `row_of_token` (N,) int32, and `lengths` (B,).
    """
    rows = mx.arange(of_rows["lengths"].shape[0])[:, None]
    is_of_row = (of_rows["row_of_token"] == rows) & counted
    return mx.where(is_of_row, losses, 0).sum(axis=1)


def _collate_judged_step(
    groups: Sequence[Sequence[Judged]], divergence: mx.array
) -> list[Microbatch]:
    return [collate_judged(group, divergence) for group in groups]


def divergence_of(
    model: nn.Module, executor: Executor, token_budget: int, ranks: Ranks = ALONE
) -> Callable[[Sequence[Judged]], mx.array]:
    """KTO's estimate of how far a model has come from where it began, for the rows of a step.

    A mean over the rows: how far the log-probability of another row's answer to its prompt has
    risen; 0 if it has fallen. It is computed without dropout, and nothing is learned from it.

    Args:
        model: a `Network`.
        executor: where microbatches are computed.
        token_budget: padded tokens of a microbatch.
        ranks: that compute it together.
    """

    def risen(losses: mx.array, mask: mx.array, of_rows: dict[str, mx.array]) -> list[mx.array]:
        return [(-row_sums(losses, mask, of_rows) - of_rows["references"]).sum()]

    total = total_of(model, risen, executor)

    def divergence(rows: Sequence[Judged]) -> mx.array:
        share = ranks.share([row.other for row in rows])
        batches = [
            with_rows(collate(group), group) for group in executor.split(share.rows, token_budget)
        ]
        was_training = model.training
        model.eval()
        found = mx.maximum(share.sum(total(batches))[0] / len(rows), 0)
        model.train(was_training)
        mx.eval(found)
        return found

    return divergence


def log_probabilities(
    model: nn.Module,
    examples: Sequence[Example],
    executor: Executor,
    token_budget: int,
    ranks: Ranks = ALONE,
) -> np.ndarray:
    """What a model gives the tokens with a loss of each row, without dropout, (rows,) nats.

    Args:
        model: a `Network`.
        examples: the rows.
        executor: where microbatches are computed.
        token_budget: padded tokens of a microbatch.
        ranks: that compute them together.
    """

    def found(losses: mx.array, mask: mx.array, of_rows: dict[str, mx.array]) -> list[mx.array]:
        sums = -row_sums(losses, mask, of_rows)
        # At each row's own place among all, so that microbatches add up.
        return [mx.zeros(len(examples)).at[of_rows["places"]].add(sums)]

    model.eval()
    total = total_of(model, found, executor)
    copies = [replace(example) for example in examples]  # none of them twice
    place = {id(example): number for number, example in enumerate(copies)}
    share, batches = ranks.share(copies), []
    for rows in by_width(share.rows):
        for group in executor.split(rows, token_budget):
            batch = with_rows(collate(group), group)
            places = {"places": mx.array([place[id(example)] for example in group])}
            batches.append(replace(batch, of_rows=batch.of_rows | places))
    return np.array(share.sum(total(batches))[0])


def kept_log_probabilities(
    path: Path | None,
    fingerprint: dict[str, str],
    compute: Callable[[], np.ndarray],
    ranks: Ranks = ALONE,
) -> np.ndarray:
    """What a file holds; computed and written if it is damaged, of another run, or not there.

    Args:
        path: the file; None where another rank has it.
        fingerprint: of all that the numbers depend on.
        compute: the numbers, (rows,).
        ranks: that compute them together.

    Raises:
        StorageError: the file cannot be written.
    """
    kept = _read(path, fingerprint) if path else None
    kept_by_first = {} if kept is None else {_TENSOR: mx.array(kept)}
    if tensors := ranks.tensors_from_first(kept_by_first):
        return np.array(tensors[_TENSOR])
    found = compute()
    if path:
        metadata = {"of": json.dumps(fingerprint), "sha256": _hash(found)}
        with atomic_file(path) as temporary:
            save_tensors(temporary, {_TENSOR: mx.array(found)}, metadata)
    return found


def _read(path: Path, fingerprint: dict[str, str]) -> np.ndarray | None:
    if not path.is_file():
        return None
    try:
        read: Any = mx.load(str(path), return_metadata=True)
        tensors, metadata = read
        found = np.array(tensors[_TENSOR])
        is_ours = json.loads(metadata["of"]) == fingerprint and metadata["sha256"] == _hash(found)
    except (RuntimeError, ValueError, KeyError):
        return None
    return found if is_ours else None


def _hash(found: np.ndarray) -> str:
    return hashlib.sha256(found.tobytes()).hexdigest()
