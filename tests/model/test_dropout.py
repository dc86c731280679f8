"""Dropout: what is dropped is random, and a row's own."""

from math import sqrt

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from interviewmate_mlx.errors import ModelError
from interviewmate_mlx.model.dropout import Dropout, token_seeds, tokens_seeded

ROWS, LENGTH, CHANNELS = 4, 96, 320


def row_ids(count: int = ROWS) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 2**32, count, dtype=np.uint32)


def kept(p: float, number: int = 0, seed: int = 1, ids: np.ndarray | None = None) -> np.ndarray:
    """Which numbers are left, (B, L, C) bool."""
    ids = row_ids() if ids is None else ids
    with tokens_seeded(token_seeds(ids, LENGTH, seed)):
        left = Dropout(p, number).train()(mx.ones((len(ids), LENGTH, CHANNELS)))
    return np.array(left) != 0


def standardised(is_kept: np.ndarray, p: float) -> np.ndarray:
    """Of mean 0 and variance 1, if each is kept with probability 1 - p."""
    return (is_kept - (1 - p)) / sqrt(p * (1 - p))


def hash_in_python(x: int) -> int:
    """lowbias32, a number at a time."""
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_masks_are_those_of_a_naive_hash():
    p, number, seed, ids = 0.3, 5, 77, row_ids()
    found = kept(p, number, seed, ids)
    for row, position, channel in [(0, 0, 0), (1, 95, 319), (3, 17, 200), (2, 50, 1), (3, 95, 0)]:
        token = hash_in_python(
            (hash_in_python(int(ids[row]) ^ seed) + position * 0x85EBCA6B) % 2**32
        )
        place = hash_in_python((number * 0x9E3779B9 + channel * 0xC2B2AE35) % 2**32)
        x = (token | 1) * (place | 1) % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        assert found[row, position, channel] == (x < round((1 - p) * 2**32))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5])
def test_share_is_right_in_all_and_along_each_axis(p):
    """Sums over n numbers have the variance n; five, and of many sums six, deviations pass."""
    z = standardised(kept(p), p)
    assert abs(z.sum()) < 5 * sqrt(z.size)
    for axes in [(0, 1), (0, 2), (1, 2), 0, 1, 2]:
        sums = z.sum(axis=axes)
        count = z.size / sums.size
        assert np.abs(sums).max() < 6 * sqrt(count) + 6 / sqrt(p)  # a skewed tail where p is small
        assert np.mean(sums**2) / count == pytest.approx(1, abs=6 * sqrt(2 / sums.size))


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_layers_steps_rows_positions_and_channels_drop_others(p):
    first = standardised(kept(p), p)
    others = {f"layer {n}": kept(p, number=n) for n in (1, 2, 3, 24, 1000)}
    others |= {f"step seed {seed}": kept(p, seed=seed) for seed in (0, 2, 3, 2**31, 2**32 - 1)}
    near = row_ids()
    for bit in (0, 1, 31):
        others[f"row ids differ in bit {bit}"] = kept(p, ids=near ^ np.uint32(1 << bit))
    correlations = {name: (first * standardised(m, p)).sum() for name, m in others.items()}
    for axis, shift in [(0, 1), (1, 1), (1, 2), (1, 16), (2, 1), (2, 2), (2, 64)]:
        moved = np.roll(first, shift, axis=axis)
        correlations[f"moved by {shift} along axis {axis}"] = (first * moved).sum()
    for name, correlation in correlations.items():
        assert abs(correlation) < 5 * sqrt(first.size), name


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_no_two_channels_or_tokens_are_correlated(p):
    """Of two layers: of two million pairs of random numbers none is beyond seven deviations."""
    ids = np.random.default_rng(4).integers(0, 2**32, 16, dtype=np.uint32)
    masks = []
    with tokens_seeded(token_seeds(ids, 256, 7)):
        for number in (0, 1):
            left = Dropout(p, number).train()(mx.ones((16, 256, 1024)))
            masks.append(np.array(left != 0).reshape(-1, 1024))
    z = standardised(np.concatenate(masks, axis=1), p).astype(np.float32)
    for kind in (z, z.T):
        gram = kind.T @ kind / sqrt(len(kind))
        np.fill_diagonal(gram, 0)
        # Products of skewed numbers have longer tails than a normal distribution.
        assert np.abs(gram).max() < (7 if p == 0.5 else 12)


def test_no_pattern_of_rows_by_channels():
    """Each number is a hash of a sum of two; a poor one would show in the singular values.

    Those of random numbers lie between sqrt(C) - sqrt(n) and sqrt(C) + sqrt(n).
    """
    tokens = standardised(kept(0.5), 0.5).reshape(-1, CHANNELS)
    values = np.linalg.svd(tokens[:200], compute_uv=False)
    assert values.max() < 1.05 * (sqrt(CHANNELS) + sqrt(200))
    assert values.min() > 0.8 * (sqrt(CHANNELS) - sqrt(200))


def test_a_row_s_mask_is_its_own_whatever_is_beside_it():
    ids, p = row_ids(), 0.2
    together = kept(p, ids=ids)
    for row in range(ROWS):
        np.testing.assert_array_equal(kept(p, ids=ids[row : row + 1])[0], together[row])
    with tokens_seeded(token_seeds(ids, 16, 1)):
        shorter = Dropout(p).train()(mx.ones((ROWS, 16, CHANNELS)))
    np.testing.assert_array_equal(np.array(shorter) != 0, together[:, :16])


def test_probabilities_near_the_ends():
    x = mx.ones((64, 1024))
    assert np.array(Dropout(1e-12).train()(x) != 0).all()
    assert not np.array(Dropout(1 - 1e-12).train()(x) != 0).any()


def test_input_that_is_not_all_tokens_is_refused():
    said = pytest.raises(ModelError, match=r"takes \(4, 1, 8\), where the microbatch has 384")
    with tokens_seeded(token_seeds(row_ids(), LENGTH, 1)), said:
        Dropout(0.1).train()(mx.ones((ROWS, 1, 8)))


def test_tokens_laid_end_to_end_are_those_of_their_rows():
    p, seeds = 0.2, token_seeds(row_ids(), LENGTH, 1)
    with tokens_seeded(seeds):
        left = Dropout(p).train()(mx.ones((ROWS * LENGTH, CHANNELS)))
    np.testing.assert_array_equal(np.array(left).reshape(ROWS, LENGTH, -1) != 0, kept(p))


def test_without_seeds_each_call_draws():
    dropout, x = Dropout(0.5).train(), mx.ones((8, 64))
    mx.random.seed(0)
    first, second = np.array(dropout(x)), np.array(dropout(x))
    assert (first != second).any()
    mx.random.seed(0)
    np.testing.assert_array_equal(dropout(x), first)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_is_that_of_a_product_with_the_mask(dtype, compiled):
    p, scale = 0.3, 1.7
    rng = np.random.default_rng(0)
    x, weights = (
        mx.array(rng.normal(size=(ROWS, LENGTH, CHANNELS)), mx.float32).astype(kind)
        for kind in (dtype, mx.float32)
    )
    dropout = Dropout(p).train()

    def loss(x):
        with tokens_seeded(token_seeds(row_ids(), LENGTH, 1)):
            return (dropout(x, scale) * weights).sum()

    differentiate = mx.grad(loss)
    got = (mx.compile(differentiate) if compiled else differentiate)(x)
    assert got.dtype == dtype
    factor = np.float32(scale / (1 - p))
    expected = mx.array(np.where(kept(p), np.array(weights) * factor, 0)).astype(dtype)
    np.testing.assert_allclose(
        np.array(got.astype(mx.float32)), np.array(expected.astype(mx.float32)), rtol=2**-22
    )


def test_dtype_of_the_result_and_evaluation():
    x = mx.ones((2, 3, 8), mx.bfloat16)
    assert Dropout(0.5).train()(x).dtype == mx.float32
    narrow = Dropout(0.05).train()(x, 2.0, mx.bfloat16)
    assert narrow.dtype == mx.bfloat16
    # Scaled first and then rounded, not by a rounded number.
    assert set(narrow.flatten().tolist()) <= {0.0, mx.array(2 / 0.95).astype(mx.bfloat16).item()}
    for module in (Dropout(0.5).eval(), Dropout(0.0).train()):
        np.testing.assert_array_equal(module(x, 3.0), np.full((2, 3, 8), 3.0))
        assert module(x).dtype == mx.float32


def test_it_is_a_module_without_parameters():
    assert isinstance(Dropout(0.1), nn.Module)
    assert not Dropout(0.1).parameters()
