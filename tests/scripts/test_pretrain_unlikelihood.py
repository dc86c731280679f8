"""The term against repetition, against loops that a reader believes, and torch's gradient."""

from argparse import Namespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from pretrain_folder import falcon_config
from pretrain_unlikelihood import repeat_unlikelihood, use_unlikelihood

from interviewmate_mlx.model.falcon import Model, ModelArgs, cross_entropy

WIDTH, VOCAB = 9, 6
SIZES = Namespace(vocab=VOCAB, hidden=8, layers=1, heads=2)
# Pairs come back: with the same follower (no penalty), with another one, and more than once.
ROWS = [[1, 2, 3, 1, 2, 4, 1, 2, 1], [5, 5, 5, 0, 5, 1, 5, 0, 5]]


def naive(logits: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
    """(B, L, V) -> (B, L), place by place."""
    out = []
    for row, row_logits in zip(rows, logits, strict=True):
        for i, target in enumerate(row):
            p = torch.softmax(row_logits[i], -1)
            followers = [row[j] for j in range(1, i) if i and row[j - 1] == row[i - 1]]
            terms = [-torch.log(1 - p[f]) for f in followers if f != target]
            out.append(sum(terms, torch.zeros((), dtype=logits.dtype)))
    return torch.stack(out).reshape(len(rows), -1)


def random_logits() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 2, (len(ROWS), WIDTH, VOCAB)).astype(np.float32)


def ours(logits: mx.array) -> mx.array:
    flat, targets = logits.reshape(-1, VOCAB), mx.array(ROWS).reshape(-1)
    return repeat_unlikelihood(flat, targets, cross_entropy(flat, targets), WIDTH)


def test_term_and_its_gradient_equal_the_naive_ones():
    """In float64 there; -log(1 - p) of float32 loses some 1e-6 where p is near 1."""
    logits = random_logits()
    reference = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected = naive(reference, ROWS)
    assert (expected > 0).sum() == 5
    got = np.array(ours(mx.array(logits))).reshape(len(ROWS), WIDTH)
    np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-4)
    expected.sum().backward()
    gradient = mx.grad(lambda x: ours(x).sum())(mx.array(logits))
    np.testing.assert_allclose(np.array(gradient), reference.grad.numpy(), atol=1e-4)


def test_certain_repetition_costs_much_and_not_infinitely():
    logits = np.zeros((len(ROWS), WIDTH, VOCAB), np.float32)
    logits[0, 5, 3] = 100.0  # "1 2 3 1 2" goes on with 4, but 3 was certain
    terms = np.array(ours(mx.array(logits))).reshape(len(ROWS), WIDTH)
    assert terms[0, 5] == pytest.approx(-np.log(1e-4), rel=1e-5)


def test_model_has_the_term_in_training_and_not_in_eval():
    model = Model(ModelArgs.from_dict(falcon_config(SIZES)))
    flat, targets = mx.array(random_logits()).reshape(-1, VOCAB), mx.array(ROWS).reshape(-1)
    plain = np.array(model.cross_entropy(flat, targets))
    use_unlikelihood(model, 0.5, WIDTH)
    model.train()
    expected = plain + 0.5 * np.array(ours(mx.array(random_logits())))
    np.testing.assert_allclose(np.array(model.cross_entropy(flat, targets)), expected, atol=1e-5)
    model.eval()
    np.testing.assert_array_equal(np.array(model.cross_entropy(flat, targets)), plain)
