"""Losses row by row against transformers, and the interval of a difference."""

import math

import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import our_model, tiny_falcon

from interviewmate_mlx.data.prompts import Example
from interviewmate_mlx.data.records import Record
from interviewmate_mlx.evaluation import loss as loss_module
from interviewmate_mlx.evaluation.loss import RowLoss, difference, row_losses, score


def random_rows(count: int) -> list[Example]:
    """Rows of unequal length, whose answers begin anywhere."""
    rng = np.random.default_rng(5)
    rows = []
    for length in rng.integers(4, 70, count):
        tokens = rng.integers(0, 384, length).astype(np.int32)
        start = rng.integers(1, length)
        rows.append(Example(Record("row"), tokens, np.arange(length) >= start))
    return rows


@pytest.mark.parametrize("chunk", [None, 5])
def test_losses_are_transformers_row_by_row(monkeypatch, chunk):
    if chunk:  # logits a few tokens at a time
        monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk * 384)
    reference, rows = tiny_falcon(), random_rows(40)
    seen = []
    found = row_losses(our_model(reference), rows, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (40, 40)
    for row, got in zip(rows, found, strict=True):
        ids = torch.tensor(row.tokens[None].astype(np.int64))
        with torch.no_grad():
            logits = reference(ids).logits[0, :-1]
        wanted = torch.tensor(row.loss_mask[1:])
        targets = ids[0, 1:][wanted]
        expected = torch.nn.functional.cross_entropy(logits[wanted], targets, reduction="sum")
        assert got.nats == pytest.approx(expected.item(), rel=1e-5)
        assert got.tokens == int(row.loss_mask.sum())
        assert got.correct == int((logits[wanted].argmax(-1) == targets).sum())


def test_score_weighs_tokens_and_not_rows():
    found = score([RowLoss(1.0, 1, 1), RowLoss(6.0, 3, 0)])
    assert (found.loss, found.accuracy, found.rows, found.tokens) == (7 / 4, 1 / 4, 2, 4)
    assert found.perplexity == pytest.approx(math.exp(7 / 4))
    assert score([RowLoss(1e6, 1, 0)]).perplexity == math.inf


def rows_of(nats: np.ndarray, tokens: np.ndarray) -> list[RowLoss]:
    return [RowLoss(float(n), int(t), 0) for n, t in zip(nats, tokens, strict=True)]


def test_interval_is_that_of_the_normal_law_for_many_rows():
    rng = np.random.default_rng(0)
    count = 400
    base, tokens = rng.normal(10, 3, count), np.full(count, 4)
    delta = rng.normal(-0.4, 1.0, count)
    found = difference(rows_of(base, tokens), rows_of(base + delta, tokens))
    assert found.loss == pytest.approx(delta.mean() / 4)
    half = 1.96 * delta.std() / math.sqrt(count) / 4
    # 10,000 resamples know a quantile to about 2 % of the interval.
    assert found.low == pytest.approx(delta.mean() / 4 - half, abs=0.1 * half)
    assert found.high == pytest.approx(delta.mean() / 4 + half, abs=0.1 * half)
    assert found.is_significant
    assert (found.rows_better, found.rows) == (int((delta < 0).sum()), count)


def test_difference_by_chance_is_not_significant_and_draws_repeat():
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 200, 46)
    base = rng.normal(3, 0.5, 46) * tokens
    other = base + rng.normal(0, 1, 46) * tokens * 0.01
    one, again = (difference(rows_of(base, tokens), rows_of(other, tokens)) for _ in range(2))
    assert one == again
    assert one.low < one.loss < one.high
    assert not difference(rows_of(base, tokens), rows_of(base, tokens)).is_significant


def test_pairs_make_it_sure_where_rows_differ_much():
    """Rows differ by nats, models by a hundredth on each: pairing shows it."""
    rng = np.random.default_rng(2)
    tokens = np.full(30, 50)
    base = rng.normal(4, 1, 30) * tokens
    found = difference(rows_of(base, tokens), rows_of(base - 0.01 * tokens, tokens))
    assert found.loss == pytest.approx(-0.01)
    assert found.is_significant
    assert found.high - found.low < 1e-9


def test_many_rows_are_drawn_in_parts(monkeypatch):
    tokens = np.full(300, 2)
    base = np.linspace(1, 9, 300)
    pair = rows_of(base, tokens), rows_of(base * 0.9, tokens)
    whole = difference(*pair)
    monkeypatch.setattr(loss_module, "_MAX_DRAWS", 1000)
    assert difference(*pair).low == pytest.approx(whole.low)


def test_model_s_own_cross_entropy_is_used():
    """A model with a CPU's or a GPU's kernels has another function for it."""
    model, asked = our_model(tiny_falcon()), []
    original = model.cross_entropy

    def noted(logits: mx.array, targets: mx.array) -> mx.array:
        asked.append(logits.shape)
        return original(logits, targets)

    model.cross_entropy = noted
    row_losses(model, random_rows(2))
    assert asked
