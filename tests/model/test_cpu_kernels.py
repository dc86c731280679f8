"""The functions for a CPU against float64, and their derivatives against autodiff's."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from checkpoints import our_model, tiny_falcon

from interviewmate_mlx.model import cpu_kernels
from interviewmate_mlx.model.cpu_kernels import (
    attention,
    cross_entropy,
    gelu,
    layer_norm,
    use_cpu_kernels,
)
from interviewmate_mlx.model.falcon import alibi_mask, alibi_slopes


def evenly(low: float, high: float, count: int = 200_001) -> np.ndarray:
    return np.linspace(low, high, count).astype(np.float32)


def test_exp_errs_as_if_its_argument_had_been_rounded():
    x = np.concatenate([evenly(-87, 0), -np.logspace(-30, 0, 1001).astype(np.float32)])
    got = np.array(mx.compile(cpu_kernels.exp)(mx.array(x))).astype(np.float64)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(got / exact - 1) / (1 + np.abs(x))) < 2e-7


@pytest.mark.parametrize("x", [-88.5, -100.0, -1e4, -1e30, -3.4e38])
def test_exp_is_zero_where_no_normal_number_is_left(x):
    assert mx.compile(cpu_kernels.exp)(mx.array([x, 0.0])).tolist() == [0.0, 1.0]


def test_gelu_and_its_derivative_are_the_exact_one_s():
    x = evenly(-8, 8)
    double = torch.tensor(x.astype(np.float64), requires_grad=True)
    exact = torch.nn.functional.gelu(double)
    exact.sum().backward()
    got, slope = mx.compile(lambda x: (gelu(x), mx.grad(lambda x: gelu(x).sum())(x)))(mx.array(x))
    np.testing.assert_allclose(np.array(got), exact.detach().numpy(), atol=1e-6, rtol=0)
    np.testing.assert_allclose(np.array(slope), double.grad.numpy(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("x", [-1e30, -1e4, -20.0, -0.0, 1e-30, 20.0, 1e4, 1e30])
def test_gelu_far_out_is_the_straight_line(x):
    assert gelu(mx.array(x)).item() == pytest.approx(max(x, 0.0), abs=1e-7 * max(1, abs(x)))


@pytest.mark.parametrize("shape", [(3, 5, 32), (64, 2048), (2, 1, 4096)])
@pytest.mark.parametrize("mean", [0, 5])
def test_layer_norm_and_its_derivatives_are_the_exact_one_s(shape, mean):
    rng = np.random.default_rng(0)
    x, cotangent = mean + rng.normal(size=shape), rng.normal(size=shape)
    x[..., 3] *= 50  # as some channels of a trained model are
    arrays = [x, rng.normal(size=shape[-1]), rng.normal(size=shape[-1])]
    arrays = [a.astype(np.float32) for a in arrays]
    doubles = [torch.tensor(a.astype(np.float64), requires_grad=True) for a in arrays]
    exact = torch.nn.functional.layer_norm(doubles[0], shape[-1:], *doubles[1:], eps=1e-5)
    exact.backward(torch.tensor(cotangent.astype(np.float32).astype(np.float64)))

    def ours(*arrays):
        return layer_norm(*arrays, eps=1e-5)

    inputs, cotangents = list(map(mx.array, arrays)), [mx.array(cotangent.astype(np.float32))]
    (out,), slopes = mx.compile(lambda *a: mx.vjp(ours, list(a[:3]), [a[3]]))(*inputs, *cotangents)
    expected = [exact.detach().numpy(), *(double.grad.numpy() for double in doubles)]
    # A sum of C numbers, in whatever order, errs by about sqrt(C) roundings; the root of the
    # variance halves that. Sixteen more for all else.
    allowed = (math.sqrt(shape[-1]) / 2 + 16) * 2**-24
    # The last two are sums over rows, whose terms may cancel: rounded is what has the terms' size.
    rows = tuple(range(len(shape) - 1))
    normal = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    terms = [cotangent * normal, cotangent]
    sizes = [np.abs(other).max() for other in expected[:2]]
    sizes += [np.sqrt(np.square(of_sum).sum(rows)).max() for of_sum in terms]
    for one, other, size in zip([out, *slopes], expected, sizes, strict=True):
        np.testing.assert_allclose(np.array(one), other, atol=allowed * size, rtol=0)


@pytest.mark.parametrize("x", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(x):
    """Training finds it by that."""
    assert not math.isfinite(gelu(mx.array(x)).item())
    assert not mx.isfinite(layer_norm(mx.array([0.0, x, 1.0]), mx.ones(3), mx.zeros(3), 1e-5)).any()
    logits = mx.array([[0.0, x, 1.0]])
    assert not math.isfinite(cross_entropy(logits, mx.array([0])).item())


@pytest.mark.parametrize(
    ("shape", "num_cached"),
    [
        ((1, 2, 7, 8), 0),
        ((3, 4, 40, 16), 5),
        ((1, 1, 1, 4), 0),
        ((2, 2, 129, 8), 0),  # two blocks of queries
        ((2, 2, 301, 8), 40),
        ((1, 1, 700, 4), 0),
    ],
)
@pytest.mark.parametrize("size", [0.1, 10.0])
def test_attention_and_its_derivatives_equal_mlx_s(shape, num_cached, size):
    mx.random.seed(0)
    B, H, L, D = shape
    queries, weights = (size * mx.random.normal(shape) for _ in range(2))
    keys, values = (size * mx.random.normal((B, H, num_cached + L, D)) for _ in range(2))
    positions = mx.arange(num_cached + L)[None]
    scale = D**-0.5
    mask = alibi_mask(alibi_slopes(H), positions[:, num_cached:], positions, scale, mx.float32)

    def ours(q, k, v):
        return (weights * attention(q, k, v, scale=scale, mask=mask)).sum()

    def theirs(q, k, v):
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        return (weights * out).sum()

    got = mx.compile(mx.value_and_grad(ours, argnums=(0, 1, 2)))(queries, keys, values)
    expected = mx.value_and_grad(theirs, argnums=(0, 1, 2))(queries, keys, values)
    assert got[0].item() == pytest.approx(expected[0].item(), rel=1e-4, abs=1e-4)
    for one, other in zip(got[1], expected[1], strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=2e-5 * size**3, rtol=1e-4)


def test_a_query_takes_exactly_nothing_from_a_key_it_may_not_see():
    mx.random.seed(0)
    queries, keys, values = (mx.random.normal((1, 2, 9, 4)) for _ in range(3))
    positions = mx.arange(9)[None]
    mask = alibi_mask(alibi_slopes(2), positions, positions, 0.5, mx.float32)
    later = mx.where((mx.arange(9) >= 5)[None, None, :, None], 1e6, values)
    one = attention(queries, keys, values, scale=0.5, mask=mask)[:, :, :5]
    other = attention(queries, keys, later, scale=0.5, mask=mask)[:, :, :5]
    np.testing.assert_array_equal(np.array(one), np.array(other))


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_cross_entropy_and_its_derivative_equal_mlx_s(size):
    mx.random.seed(0)
    logits, weights = size * mx.random.normal((11, 301)), mx.random.normal((11,))
    targets = mx.random.randint(0, 301, (11,))

    def total(function):
        return mx.value_and_grad(lambda x: (weights * function(x, targets)).sum())

    got = mx.compile(total(cross_entropy))(logits)
    expected = total(nn.losses.cross_entropy)(logits)
    assert got[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    # MLX's own probabilities are off by as much: logits of 100 are rounded to 8e-6.
    np.testing.assert_allclose(np.array(got[1]), np.array(expected[1]), atol=1e-6 * (1 + size))


def test_model_with_cpu_kernels_gives_the_reference_s_logits(monkeypatch):
    for name in ("layer_norm", "scaled_dot_product_attention"):
        monkeypatch.setattr(mx.fast, name, None)  # all of it is ours
    reference = tiny_falcon(heads=6, head_dim=8, layers=2)
    model = our_model(reference)
    use_cpu_kernels(model)
    tokens = np.random.default_rng(0).integers(0, 384, (2, 70))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    got = np.array(mx.compile(model)(mx.array(tokens.astype(np.int32))))
    np.testing.assert_allclose(got, expected, atol=1e-4)
